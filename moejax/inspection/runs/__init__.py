"""Run directories, opened and compared."""
