"""What `moejax ladder` does apart from its flags."""
