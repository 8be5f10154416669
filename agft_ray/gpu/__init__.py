"""GPUs: what the loop reads and locks, under leases, and guards that unlock whatever happens."""
