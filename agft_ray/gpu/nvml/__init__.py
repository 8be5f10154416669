"""Real GPUs through NVML, NVIDIA's management library."""
