"""Replay of a workload against an OpenAI-compatible server, and what it measured."""
