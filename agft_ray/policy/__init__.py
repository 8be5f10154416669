"""Policies: one a file, each a pure choice over windows."""
