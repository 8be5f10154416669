"""What the tuner and the simulator cost."""
