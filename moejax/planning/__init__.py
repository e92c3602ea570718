"""What a program would need on machines one does not have."""
