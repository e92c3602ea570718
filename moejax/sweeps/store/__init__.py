"""A sweep on disk: its definition and its records."""
