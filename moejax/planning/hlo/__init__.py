"""Compiled programs, read as text: instructions, arithmetic, collectives."""
