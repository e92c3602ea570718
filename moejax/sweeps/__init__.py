"""Sweeps: search spaces, runners and records."""
