"""The policy `phases`: a clock for prefill, one for decode and one for an empty engine, by models
of step time and power that are learned from windows."""
