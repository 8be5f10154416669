"""The policy `phases`: the cheapest clocks for prefill, decode and an empty engine within bounds.

It knows them by models of step time and power, which it learns from windows."""
