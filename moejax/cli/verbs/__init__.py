"""The verbs of `moejax`, one file each; parts of large ones are named after them."""
