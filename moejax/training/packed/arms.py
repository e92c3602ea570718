"""Several runs as one program: `vmap` over arms of a sweep that differ only in `Knobs` and seeds.

Arms are spread over the devices, each with as many as its `mesh` asks for, and stacked where there
are fewer devices. There is no communication between arms. What an arm computes is what it computes
alone, up to the order of addition.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.config import Config, ConfigError, Knobs, to_dict
from moejax.data import Batch
from moejax.sharding import BATCH_AXES, MESH_AXES, make_mesh
from moejax.training.eval_step import EvalOutput, eval_step_of
from moejax.training.program import WITH_NORMS, Program
from moejax.training.state import TrainState, make_train_setup
from moejax.training.step import compiler_options, train_step_of

ARMS = "arms"
"""The mesh axis of the arms."""


def program_of(config: Config) -> Config:
    """Returns what the arms of a pack have in common.

    It is equal for configurations that one program can train. They may differ in knobs, in
    `train.seed`, and in the section `alarms`, which changes nothing that is computed. A knob that
    is 0 may be left out of a program, so that 0 and other values are kept apart. Capacity is a
    limit on buffers that are as large as the largest of a pack needs; where experts choose their
    tokens it is a shape.
    """
    names = Knobs.names_of_moe()
    if config.moe.dispatch != "capacity":
        names.remove("capacity_factor")
    is_on: dict[str, Any] = {name: float(getattr(config.moe, name) != 0) for name in names}
    return dataclasses.replace(
        config,
        moe=dataclasses.replace(config.moe, **is_on),
        train=dataclasses.replace(config.train, seed=0, logit_z_weight=0.0),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.0),
        alarms=type(config.alarms)(),
    )


class Pack(Program):
    """The program of a pack of arms.

    States, batches of a step and outputs have a leading axis of slots, one or more for each arm.

    Args:
      configs: of the arms, with equal `program_of`.
      devices: all by default.

    Attributes:
      mesh: the devices by arm, and within an arm by the axes of its own mesh.
      setups: the fixed part of each arm, on the devices of the first.
      knobs: of all arms, stacked on a leading axis of slots.
      runs_of_device: how many arms a device trains side by side.

    Raises:
      ConfigError: no arms, arms that no single program can train, or a mesh that does not fit
        the devices.
    """

    def __init__(self, configs: Sequence[Config], devices: Sequence[jax.Device] | None = None):
        _check_arms(configs)
        template = _with_largest_capacity(configs)
        meshes = _mesh_of_groups(template, devices, len(configs))
        super().__init__(make_train_setup(template, meshes[0]))
        self.mesh = _stack_meshes(meshes)
        self.setups = [dataclasses.replace(self._alone, config=config) for config in configs]
        num_groups = len(meshes)
        self.runs_of_device = math.ceil(len(configs) / num_groups)
        self._num_slots = self.runs_of_device * num_groups
        self._shardings = jax.tree.map(self._by_arm, self._alone.shardings)
        knobs_by_arm = [Knobs.from_config(config) for config in configs]
        self.knobs = self._put(self._stack(knobs_by_arm), PartitionSpec(ARMS))

    def _by_arm(self, sharding: NamedSharding) -> NamedSharding:
        """Returns the sharding of a stack of arrays that alone have this one."""
        return NamedSharding(self.mesh, PartitionSpec(ARMS, *sharding.spec))

    def compile_step(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """Compiles `(state, batch, knobs, has_norms) -> (state, StepOutput)`.

        All but the last have a leading axis of slots. The old state is overwritten.
        """
        output_sharding = NamedSharding(self.mesh, PartitionSpec(ARMS))
        step = jax.jit(
            self._for_each_arm(train_step_of(self._alone), 3),
            donate_argnums=0,
            out_shardings=(self._shardings, output_sharding),
            compiler_options=compiler_options(self.mesh),
        )
        return step.lower(state, batch, self.knobs, WITH_NORMS).compile()

    def make_eval_step(self, num_domains: int) -> Callable[..., EvalOutput]:
        """Makes `(params, router_state, batch, ...) -> EvalOutput`.

        The first two and the output have a leading axis of slots; all arms see one batch.
        """
        return jax.jit(self._for_each_arm(eval_step_of(self._alone, num_domains), 2))

    def _for_each_arm(self, function, num_own: int):
        """Maps a function over arms; arguments from `num_own` on are the same for all arms."""

        def for_arms_of_device(*arguments):
            num_shared = len(arguments) - num_own
            in_axes = [0] * num_own + [None] * num_shared
            return jax.vmap(function, in_axes)(*arguments)

        def for_all_arms(*arguments):
            num_shared = len(arguments) - num_own
            by_arm = PartitionSpec(ARMS)
            mapped = jax.shard_map(
                for_arms_of_device,
                mesh=self.mesh,
                in_specs=(by_arm,) * num_own + (PartitionSpec(),) * num_shared,
                out_specs=by_arm,
                axis_names={ARMS},
                # It has no collective over arms: what varies over them needs no check.
                check_vma=False,
            )
            return mapped(*arguments)

        return for_all_arms

    def put_batches(self, batches: Sequence[Batch]) -> Batch:
        """Puts the batch of each arm, NumPy arrays `[B, L]`, on the devices of its arm."""
        return self._put(self._stack(batches), PartitionSpec(ARMS, BATCH_AXES))

    def put_batch(self, batch: Any) -> Any:
        """Puts one batch for all arms on the devices."""
        return self._put(batch, PartitionSpec(BATCH_AXES))

    def join(self, states: Iterable[TrainState]) -> TrainState:
        """Stacks the states of the arms on their devices.

        Each may be made when the one before it is on the host.
        """
        host = [jax.device_get(state) for state in states]
        return jax.device_put(self._stack(host), self._shardings)

    def split(self, state: TrainState, runs: Iterable[int]) -> Iterator[TrainState]:
        """Yields the states of these arms as they would be alone.

        They come one after another, on the devices of the first arm.
        """
        host = jax.device_get(state)
        for arm in runs:
            yield jax.device_put(_slice_arm(host, arm), self._alone.shardings)

    def outputs(self, output: Any) -> list[Any]:
        """Returns what each arm has of an output, on the host; waits for it."""
        host = jax.device_get(output)
        return [_slice_arm(host, arm) for arm in range(len(self.setups))]

    def _stack(self, trees: Sequence[Any]) -> Any:
        """Stacks as many trees as there are slots: the last arm fills those that are left."""
        num_left = self._num_slots - len(trees)
        filled = [*trees, *[trees[-1]] * num_left]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *filled)

    def _put(self, tree: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(tree, NamedSharding(self.mesh, spec))


def _slice_arm(tree: Any, arm: int) -> Any:
    """Returns one arm of a tree of stacked arrays."""
    return jax.tree.map(lambda array: array[arm], tree)


def _with_largest_capacity(configs: Sequence[Config]) -> Config:
    """Returns the first configuration with the largest capacity factor of all."""
    largest = max(config.moe.capacity_factor for config in configs)
    moe = dataclasses.replace(configs[0].moe, capacity_factor=largest)
    return dataclasses.replace(configs[0], moe=moe)


def _mesh_of_groups(
    config: Config, devices: Sequence[jax.Device] | None, num_arms: int
) -> list[Mesh]:
    """Returns a mesh for each group of devices on which arms train side by side."""
    devices = list(jax.devices() if devices is None else devices)
    group_size = devices_of_arm(config)
    num_groups = max(1, min(len(devices) // group_size, num_arms))
    meshes = []
    for group in range(num_groups):
        own_devices = devices[group * group_size : (group + 1) * group_size]
        meshes.append(make_mesh(config, own_devices))
    return meshes


def _stack_meshes(meshes: Sequence[Mesh]) -> Mesh:
    """Returns a mesh with a leading axis of arms."""
    axes = (ARMS, *MESH_AXES)
    devices = np.stack([mesh.devices for mesh in meshes])
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


def devices_of_arm(config: Config) -> int:
    """Returns how many devices one arm of a pack takes: as many as its mesh says.

    A size of -1, which means all devices that remain, counts as 1.
    """
    return math.prod(max(1, size) for size in dataclasses.asdict(config.mesh).values())


def depends_on_devices(config: Config) -> bool:
    """Whether a configuration computes something else on another number of devices.

    In a pack it would have fewer devices than alone.
    """
    moe = config.moe
    by_device = moe.balance_scope == "device"
    if moe.dispatch == "capacity" and moe.capacity_group == "device":
        by_device = True
    is_open = -1 in dataclasses.asdict(config.mesh).values()
    return config.num_moe_layers > 0 and by_device and is_open


def is_split_twice(config: Config) -> bool:
    """Whether an arm's mesh splits matrices, and also the batch or the experts.

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
    _check_one_program(configs)
    if len(configs) == 1:
        return
    first = configs[0]
    if depends_on_devices(first):
        raise ConfigError(
            f"moe.balance_scope={first.moe.balance_scope}, "
            f"moe.capacity_group={first.moe.capacity_group}: what a device computes depends on how "
            "many there are, which a mesh axis of -1 leaves open; give the axes of mesh as "
            "numbers, or train the arms apart"
        )
    if is_split_twice(first):
        raise ConfigError(
            f"mesh.tensor={first.mesh.tensor} together with another axis that splits the batch or "
            "the experts: XLA cannot compile a pack of such arms; use only one of both, or train "
            "the arms apart"
        )


def _check_one_program(configs: Sequence[Config]) -> None:
    """Raises `ConfigError` naming the first leaf in which the programs of arms differ."""
    programs = [to_dict(program_of(config)) for config in configs]
    for arm, program in enumerate(programs):
        for section, leaves in program.items():
            for name, value in leaves.items():
                if value == programs[0][section][name]:
                    continue
                first_value = to_dict(configs[0])[section][name]
                own_value = to_dict(configs[arm])[section][name]
                raise ConfigError(
                    f"{section}.{name} is {first_value} in arm 0 and {own_value} in arm {arm}; "
                    "arms of a pack may differ in knobs that are not 0, train.seed and alarms: "
                    "train the others apart"
                )
