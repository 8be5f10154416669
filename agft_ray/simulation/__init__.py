"""A simulated GPU and LLM engine, calibrated on published measurements."""
