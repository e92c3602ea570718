"""What a run directory holds: what is written to it as a run trains, and the checks when it is read."""
