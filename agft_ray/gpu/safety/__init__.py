"""Leases and guards: whatever happens, clocks go back. Standard library only."""
