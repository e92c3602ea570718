"""Parameters that are not trained: they have no gradient, no moments, and keep their bits."""

from typing import Any

from flax import nnx

from moejax.config import ConfigError, OptimizerConfig, is_named, read_names


def split_frozen(config: OptimizerConfig, params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters that are trained, and those that are not.

    Args:
      config: the optimizer's leaves.
      params: of the model.

    Raises:
      ConfigError: a name that no parameter has, or nothing is left to train.
    """
    names = read_names("optimizer.frozen", config.frozen)
    if not names:
        return params, nnx.State({})
    _check_names(names, params)

    def is_frozen(path: tuple[Any, ...], _: object) -> bool:
        text = "/".join(map(str, path))
        return any(is_named(text, name) for name in names)

    frozen, trained = nnx.split_state(params, is_frozen, ...)
    if not nnx.to_flat_state(trained):
        raise ConfigError(
            f"optimizer.frozen={config.frozen} leaves nothing to train; name less, or evaluate the "
            "model (moejax eval)"
        )
    return trained, frozen


def trained_params(config: OptimizerConfig, params: nnx.State) -> nnx.State:
    """Returns the parameters that are trained."""
    trained, _ = split_frozen(config, params)
    return trained


def join_params(trained: nnx.State, frozen: nnx.State) -> nnx.State:
    """Returns all parameters of a model, undoing `split_frozen`."""
    return nnx.merge_state(trained, frozen) if frozen else trained


def _check_names(names: tuple[str, ...], params: nnx.State) -> None:
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    for name in names:
        if not any(is_named(path, name) for path in paths):
            raise ConfigError(
                f"optimizer.frozen: no parameter of the model is {name}; leave it out, or name one "
                f"of {', '.join(sorted(paths))}"
            )
