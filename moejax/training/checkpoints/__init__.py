"""Checkpoints: complete or absent, restored strictly, verified."""
