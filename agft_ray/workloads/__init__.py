"""Requests to serve: recorded traces and generated workloads."""
