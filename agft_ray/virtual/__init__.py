"""Replicas in virtual time: the loop, policies and engine that run under Ray."""
