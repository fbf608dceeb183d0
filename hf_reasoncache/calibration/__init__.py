"""Calibration: measure what the layers of a model need, once. The result is a profile."""
