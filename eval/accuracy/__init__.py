"""Accuracy over visual tokens on the embedded benchmark, for every method."""
