"""Sweeps: many configurations of one recipe, the arms, planned before the first runs and recorded in one directory.

A recipe in `configs/` may say what to vary, in a function beside `get_config`:

    from moejax.sweeps import choice, log_uniform, product, seeds

    def sweep():
        return product(choice("moe.num_experts", 4, 8, 16), log_uniform("moe.balance_weight", 1e-4, 1e-1, 5), seeds(3))

or as a plain generator of points: `yield {"moe.num_experts": 4, "train.seed": 1}`.
"""

from moejax.sweeps.space import Axis as Axis
from moejax.sweeps.space import Choice as Choice
from moejax.sweeps.space import Point as Point
from moejax.sweeps.space import Range as Range
from moejax.sweeps.space import Space as Space
from moejax.sweeps.space import SpaceError as SpaceError
from moejax.sweeps.space import chain as chain
from moejax.sweeps.space import choice as choice
from moejax.sweeps.space import log_uniform as log_uniform
from moejax.sweeps.space import parse_axis as parse_axis
from moejax.sweeps.space import product as product
from moejax.sweeps.space import seeds as seeds
from moejax.sweeps.space import uniform as uniform
from moejax.sweeps.space import varied_keys as varied_keys
from moejax.sweeps.space import where as where
from moejax.sweeps.space import zip_ as zip_
