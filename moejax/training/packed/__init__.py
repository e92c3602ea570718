"""Several arms of a sweep trained as one program."""
