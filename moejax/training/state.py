"""The state of a run: created sharded, in one jit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moejax.config import Config, Transfer
from moejax.models import Decoder
from moejax.sharding import replicated, tree_shardings
from moejax.training.optimizers.frozen import trained_params
from moejax.training.optimizers.make import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Also the shape of trees that describe it: shardings, abstract arrays.

    Attributes:
      step: steps done, skipped ones included, int32; also the position in the data.
      params: trained arrays, float32.
      router_state: what routers carry besides parameters, outside the optimizer.
      opt_state: moments, sharded like the parameters.
      skipped: steps that were not applied because a value was not finite, int32.
      skipped_in_row: those since the last applied one, int32.
      average: the moving average of the parameters; None without `train.average_decay`.
    """

    step: Any
    params: nnx.State
    router_state: nnx.State
    opt_state: optax.OptState
    skipped: Any
    skipped_in_row: Any
    average: Any = None


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What stays fixed during a run: model structure, optimizer, and where each array is."""

    config: Config
    mesh: Mesh
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformationExtraArgs
    shardings: TrainState
    abstract: TrainState

    def init(self, seed: int) -> TrainState:
        """Initialises a state, sharded; its values do not depend on the mesh."""
        with jax.set_mesh(self.mesh):
            # Made here, where another mesh that the caller has set does not count.
            key = jax.random.key(seed)
            return jax.jit(self._init, out_shardings=self.shardings)(key)

    def begin(self, params: nnx.State, router_state: nnx.State) -> TrainState:
        """Returns a state at step 0 with given weights, whose buffers it takes over."""

        def fresh(params, router_state):
            return _fresh(params, router_state, self.config, self.optimizer)

        with jax.set_mesh(self.mesh):
            begin = jax.jit(fresh, out_shardings=self.shardings, donate_argnums=(0, 1))
            return begin(params, router_state)

    def _init(self, key: jax.Array) -> TrainState:
        model = Decoder(self.config, rngs=nnx.Rngs(params=key))
        _, params, router_state = split_model(model)
        return _fresh(params, router_state, self.config, self.optimizer)


def make_train_setup(config: Config, mesh: Mesh) -> TrainSetup:
    """Prepares everything about a run that is known before any array exists."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    graphdef, params, router_state = split_model(model)
    trained = trained_params(config.optimizer, params)
    optimizer = make_optimizer(config.optimizer, trained, Transfer.from_config(config))

    def fresh(params, router_state):
        return _fresh(params, router_state, config, optimizer)

    abstract = jax.eval_shape(fresh, params, router_state)
    shardings = _shardings(abstract, mesh)
    return TrainSetup(config, mesh, graphdef, optimizer, shardings, abstract)


def _shardings(abstract: TrainState, mesh: Mesh) -> TrainState:
    """Returns where each array of a state is: moments where their parameters are."""
    everywhere = replicated(mesh)
    param_shardings = tree_shardings(logical_axes(abstract.params), mesh)
    return TrainState(
        step=everywhere,
        params=param_shardings,
        router_state=tree_shardings(logical_axes(abstract.router_state), mesh),
        opt_state=_shardings_of_moments(abstract.opt_state, mesh),
        skipped=everywhere,
        skipped_in_row=everywhere,
        average=param_shardings if abstract.average is not None else None,
    )


def _shardings_of_moments(opt_state: optax.OptState, mesh: Mesh) -> Any:
    """Returns where the moments are: by their own axes, which are those of their parameters.

    What has no axes, such as a count, is on every device.
    """

    def sharding(node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            return replicated(mesh)
        if isinstance(node.get_raw_value(), optax.MaskedNode):
            return node
        return node.replace(tree_shardings(node.axes, mesh))

    return jax.tree.map(sharding, opt_state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def split_model(model: Decoder) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns structure, parameters, and what else a model carries: the state of its routers."""
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
    return graphdef, params, rest[0]


def logical_axes(state: nnx.State) -> nnx.State:
    """Returns the same tree with each array's tuple of logical axes in its place."""

    def axes_of(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(variable.axes)

    return jax.tree.map(axes_of, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def _fresh(
    params: nnx.State,
    router_state: nnx.State,
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
) -> TrainState:
    """Returns a state at step 0."""
    zero = jnp.int32(0)
    return TrainState(
        step=zero,
        params=params,
        router_state=router_state,
        opt_state=optimizer.init(trained_params(config.optimizer, params)),
        skipped=zero,
        skipped_in_row=zero,
        # An array of its own: the buffers of both are given away in a step.
        average=jax.tree.map(jnp.copy, params) if config.train.average_decay else None,
    )
