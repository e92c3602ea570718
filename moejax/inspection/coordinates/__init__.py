"""Coordinate checks: do activations and their updates keep their size as a model grows?

If they do, a learning rate that is good for a small model is good for a large one. Models of
several widths, numbers of experts and experts per token take a few steps; sizes are compared in
their logarithms. Source: Yang et al. 2022 (Tensor Programs V), appendix on coordinate checks.
"""
