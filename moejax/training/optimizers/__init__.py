"""What makes updates of gradients: each optimizer is a file, or a line of `rules.RULES`."""
