"""GPU profiles fitted to measurements."""
