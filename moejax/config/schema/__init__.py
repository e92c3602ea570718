"""How a leaf is declared, found by its key, described, and refused where nothing reads it."""
