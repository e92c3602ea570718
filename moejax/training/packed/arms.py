"""Several runs as one program: `vmap` over the arms of a sweep that differ only in `Knobs` and seeds.

Arms are spread over the devices, each with as many as one run of theirs asks for (`mesh`), and
stacked where devices are fewer. Nothing travels between arms. What an arm computes is what it
computes alone, to the order of addition.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.config import Config, ConfigError, Knobs, to_dict
from moejax.data import Batch
from moejax.sharding import BATCH_AXES, MESH_AXES, make_mesh
from moejax.training.eval_step import eval_step_of
from moejax.training.state import TrainState, make_train_setup
from moejax.training.step import StepOutput, compiler_options, train_step_of

ARMS = "arms"
"""The mesh axis of the arms."""


def program_of(config: Config) -> Config:
    """What the arms of a pack have in common: equal for configurations that one program can train.

    They may differ in knobs, in `train.seed`, and in the section `alarms`, which changes nothing
    that is computed. A knob that is 0 may be left out of a program, so that 0 and other values are
    kept apart. Capacity is a limit on buffers as large as the largest of a pack needs; where
    experts choose their tokens it is a shape.
    """
    names = [field.name for field in dataclasses.fields(Knobs) if hasattr(config.moe, field.name)]
    if config.moe.dispatch != "capacity":
        names.remove("capacity_factor")
    is_on: dict[str, Any] = {name: float(getattr(config.moe, name) != 0) for name in names}
    return dataclasses.replace(
        config,
        moe=dataclasses.replace(config.moe, **is_on),
        train=dataclasses.replace(config.train, seed=0),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0),
        alarms=type(config.alarms)(),
    )


class Pack:
    """The compiled functions of a pack of arms.

    Args:
      configs: of the arms, with equal `program_of`.
      devices: all by default.

    Attributes:
      mesh: the devices by arm, and within an arm by the axes of its own mesh.
      trainables: the fixed part of each arm, on the devices of the first.
      knobs: of all arms, stacked on a leading axis of lanes.
      lanes_of_device: arms that a device trains one beside another.

    Raises:
      ConfigError: no arms, arms that no single program can train, or a mesh that does not fit
        the devices.
    """

    def __init__(self, configs: Sequence[Config], devices: Sequence[jax.Device] | None = None):
        _check_arms(configs)
        largest = max(config.moe.capacity_factor for config in configs)
        template = dataclasses.replace(
            configs[0], moe=dataclasses.replace(configs[0].moe, capacity_factor=largest)
        )
        devices = list(jax.devices() if devices is None else devices)
        each = devices_of_arm(template)
        groups = max(1, min(len(devices) // each, len(configs)))
        meshes = [make_mesh(template, devices[i * each : (i + 1) * each]) for i in range(groups)]
        axes = (ARMS, *MESH_AXES)
        self.mesh = Mesh(
            np.stack([m.devices for m in meshes]), axes, axis_types=(AxisType.Auto,) * len(axes)
        )
        self._alone = make_train_setup(template, meshes[0])
        self.trainables = [dataclasses.replace(self._alone, config=config) for config in configs]
        self.lanes_of_device = -(-len(configs) // groups)
        self._num_lanes = self.lanes_of_device * groups
        self._shardings = jax.tree.map(
            lambda s: NamedSharding(self.mesh, _by_arm(s.spec)), self._alone.shardings
        )
        self.knobs = self._put(
            self._stack([Knobs.from_config(config) for config in configs]), PartitionSpec(ARMS)
        )

    def compile_step(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """`(state, batch, knobs) -> (state, StepOutput)`, all with lanes in front; the old state is overwritten."""
        step = jax.jit(
            self._for_each_arm(train_step_of(self._alone), 3),
            donate_argnums=0,
            out_shardings=(self._shardings, NamedSharding(self.mesh, PartitionSpec(ARMS))),
            compiler_options=compiler_options(self.mesh),
        )
        return step.lower(state, batch, self.knobs).compile()

    def make_eval_step(self, num_domains: int):
        """`(params, router_state, batch, ...) -> EvalOutput` with lanes in front; all arms see one batch."""
        return jax.jit(self._for_each_arm(eval_step_of(self._alone, num_domains), 2))

    def _for_each_arm(self, function, num_own: int):
        """Over the arms of each device; arguments from `num_own` on are the same for all."""

        def of_device(*arguments):
            in_axes = [0 if i < num_own else None for i in range(len(arguments))]
            return jax.vmap(function, in_axes)(*arguments)

        def of_all(*arguments):
            own, all_alike = PartitionSpec(ARMS), PartitionSpec()
            specs = tuple(own if i < num_own else all_alike for i in range(len(arguments)))
            # No collective is in it: what varies over arms needs no check.
            mapped = jax.shard_map(
                of_device,
                mesh=self.mesh,
                in_specs=specs,
                out_specs=own,
                axis_names={ARMS},
                check_vma=False,
            )
            return mapped(*arguments)

        return of_all

    def put_batches(self, batches: Sequence[Batch]) -> Batch:
        """The batch of each arm, NumPy arrays `[B, L]`, on the devices of its arm."""
        return self._put(self._stack(batches), PartitionSpec(ARMS, BATCH_AXES))

    def put_batch(self, batch: Any) -> Any:
        """One batch for all arms."""
        return self._put(batch, PartitionSpec(BATCH_AXES))

    def join(self, states: Iterable[TrainState]) -> TrainState:
        """The states of the arms, stacked on their devices; each may be made when the one before is on the host."""
        return jax.device_put(
            self._stack([jax.device_get(state) for state in states]), self._shardings
        )

    def split(self, state: TrainState, arms: Iterable[int]) -> Iterator[TrainState]:
        """The states of these arms, as they would be alone, one after another on the devices of the first."""
        host = jax.device_get(state)
        for arm in arms:
            yield jax.device_put(
                jax.tree.map(lambda x, arm=arm: x[arm], host), self._alone.shardings
            )

    def outputs(self, output: StepOutput) -> list[StepOutput]:
        """The output of each arm, on the host; waits for the step."""
        host = jax.device_get(output)
        return [
            jax.tree.map(lambda x, arm=arm: x[arm], host) for arm in range(len(self.trainables))
        ]

    def _stack(self, trees: Sequence[Any]) -> Any:
        """As many lanes as the devices need: the last arm fills up those that are over."""
        trees = [*trees, *[trees[-1]] * (self._num_lanes - len(trees))]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *trees)

    def _put(self, tree: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(tree, NamedSharding(self.mesh, spec))


def devices_of_arm(config: Config) -> int:
    """Devices that one arm of a pack takes: as many as its mesh says, where -1, "all that remain", is 1."""
    return math.prod(max(1, size) for size in dataclasses.asdict(config.mesh).values())


def depends_on_devices(config: Config) -> bool:
    """Whether it computes something else on another number of devices; in a pack it would have fewer than alone."""
    moe = config.moe
    scopes = (moe.balance_scope, moe.capacity_group if moe.dispatch == "capacity" else "")
    return (
        config.num_moe_layers > 0
        and "device" in scopes
        and -1 in dataclasses.asdict(config.mesh).values()
    )


def is_split_twice(config: Config) -> bool:
    """Whether an arm's mesh splits matrices, and batch or experts besides.

    Over several such arms the partitioner of XLA ends the process, by a check of its own
    (jaxlib 0.10.2).
    """
    sizes = dataclasses.asdict(config.mesh)
    return sizes["tensor"] > 1 and any(sizes[axis] > 1 for axis in BATCH_AXES)


def trains_alone(config: Config) -> bool:
    """Whether no pack of several arms can train it."""
    return depends_on_devices(config) or is_split_twice(config)


def _check_arms(configs: Sequence[Config]) -> None:
    """Raises `ConfigError` unless one program can train them all."""
    if not configs:
        raise ConfigError("a pack of 0 arms trains nothing; give 1 configuration or more")
    programs = [to_dict(program_of(config)) for config in configs]
    for arm, program in enumerate(programs):
        for section, leaves in program.items():
            for name, value in leaves.items():
                if value != programs[0][section][name]:
                    own = [to_dict(config)[section][name] for config in (configs[0], configs[arm])]
                    raise ConfigError(
                        f"{section}.{name} is {own[0]} in arm 0 and {own[1]} in arm {arm}; arms of a pack may differ "
                        "in knobs that are not 0, train.seed and alarms: train the others apart"
                    )
    if len(configs) > 1 and depends_on_devices(configs[0]):
        raise ConfigError(
            f"moe.balance_scope={configs[0].moe.balance_scope}, moe.capacity_group={configs[0].moe.capacity_group}: "
            "what a device computes depends on how many there are, which a mesh axis of -1 leaves open; give the axes "
            "of mesh as numbers, or train the arms apart"
        )
    if len(configs) > 1 and is_split_twice(configs[0]):
        raise ConfigError(
            f"mesh.tensor={configs[0].mesh.tensor} beside another axis that splits the batch or the experts: XLA "
            "cannot compile a pack of such arms; use one of both, or train the arms apart"
        )


def _by_arm(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(ARMS, *spec)
