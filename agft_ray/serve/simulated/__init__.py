"""The simulated deployment: an OpenAI-compatible server on a simulated engine and GPU."""
