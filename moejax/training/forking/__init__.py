"""Runs that begin with the weights of others.

`source` opens the checkpoint, `fit` says which of its arrays becomes which, and `fork` makes the
first state of the run.
"""
