"""The verbs of `moejax`, one file each."""
