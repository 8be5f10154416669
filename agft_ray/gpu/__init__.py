"""GPUs: what the loop reads and locks, and the guard that unlocks whatever happens."""
