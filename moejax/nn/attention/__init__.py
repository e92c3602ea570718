"""Attention, one file a kind."""
