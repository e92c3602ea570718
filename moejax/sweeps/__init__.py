"""Sweeps: many configurations of one recipe.

The arms are planned before the first one runs, and recorded in one directory. A recipe in
`configs/` may say what to vary, in a function next to `get_config`:

    from moejax.sweeps import choice, log_uniform, product, seeds

    def sweep():
        weights = log_uniform("moe.balance_weight", 1e-4, 1e-1, 5)
        return product(choice("moe.num_experts", 4, 8, 16), weights, seeds(3))

or as a plain generator of points: `yield {"moe.num_experts": 4, "train.seed": 1}`.
"""

from moejax.sweeps.axes import choice as choice
from moejax.sweeps.axes import log_uniform as log_uniform
from moejax.sweeps.axes import parse_axis as parse_axis
from moejax.sweeps.axes import seeds as seeds
from moejax.sweeps.axes import uniform as uniform
from moejax.sweeps.combinations import chain as chain
from moejax.sweeps.combinations import product as product
from moejax.sweeps.combinations import where as where
from moejax.sweeps.combinations import zip_ as zip_
from moejax.sweeps.space import Axis as Axis
from moejax.sweeps.space import Choice as Choice
from moejax.sweeps.space import Point as Point
from moejax.sweeps.space import Range as Range
from moejax.sweeps.space import Space as Space
from moejax.sweeps.space import SpaceError as SpaceError
from moejax.sweeps.space import varied_keys as varied_keys
