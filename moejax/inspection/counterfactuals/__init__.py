"""What a checkpoint would lose under other routing."""
