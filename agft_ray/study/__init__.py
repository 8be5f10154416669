"""Policies x seeds on simulated traffic: scenarios, runs, and what is known in hindsight."""
