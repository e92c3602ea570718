"""What surrounds the experts: normalisation, positions, attention."""
