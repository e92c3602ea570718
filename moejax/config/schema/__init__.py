"""How a leaf of the configuration is declared, found by its key, described, and refused where nothing reads it."""
