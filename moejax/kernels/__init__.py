"""Products that XLA does not compute well by itself; each is one function with one file per implementation."""
