"""Products that XLA does not compute well by itself.

Each is one function, with one file per implementation.
"""
