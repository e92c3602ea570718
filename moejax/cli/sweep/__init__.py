"""What `moejax sweep` does apart from its flags."""
