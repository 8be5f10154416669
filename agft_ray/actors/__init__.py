"""Thin Ray actors round the plain-Python parts."""
