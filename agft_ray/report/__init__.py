"""A report of simulated runs: one HTML page."""
