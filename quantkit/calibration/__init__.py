"""Calibration: which text, and what every linear of a model sees of it, one decoder layer in memory at a time."""
