"""Models of other codebases: their configurations and weights, read and written."""
