"""Policies and step governors to compare with."""
