"""moejax: Mixture-of-Experts transformers in JAX and Flax, for research."""

__version__ = "0.1.0"
