"""Released models to run directories and back, piece by piece, and proof that they are the same."""
