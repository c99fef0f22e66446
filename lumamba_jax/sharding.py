"""The device mesh and where arrays live on it: axes `("data", "fsdp")`, rules by path, modules untouched.

The batch is split over both axes; large 2-D kernels are split on their input axis over `fsdp`, everything else is
replicated. Declared once here and applied at the `jit` boundary, so that one device and many run the same program.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")
# Kernels below this size cost less to replicate than to gather.
_MIN_SPLIT_SIZE = 2**16


@dataclass(frozen=True)
class MeshConfig:
    """`fsdp` devices share each copy of the parameters; `devices` limits how many are used (all by default)."""

    fsdp: int = 1
    devices: int | None = None

    def __post_init__(self):
        if self.fsdp < 1 or (self.devices is not None and (self.devices < 1 or self.devices % self.fsdp)):
            raise ValueError(f"mesh: devices {self.devices} must be a positive multiple of fsdp {self.fsdp}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all hosts, or over `devices`: rows of the batch on process 0, then on process 1, and so on.

    `jax.make_mesh` would follow the links of a TPU slice instead, and let processes take turns along the mesh, while
    each process brings neighbouring rows (`to_global`). What is summed over all devices does not depend on their order;
    the devices of a process, which lie side by side, share the copies that `fsdp` divides.

    Raises: ValueError when devices are too few, do not divide, or are not equally many of every process.
    """
    given = jax.devices() if devices is None else devices
    available = sorted(given, key=lambda device: (device.process_index, device.id))
    count = len(available) if config.devices is None else config.devices
    if count > len(available) or count % config.fsdp:
        raise ValueError(f"mesh: {count} devices with fsdp {config.fsdp} asked for, {len(available)} available")
    processes = {device.process_index for device in available}
    used = Counter(device.process_index for device in available[:count])
    if len(used) < len(processes) or len(set(used.values())) > 1:
        least, most = min(used[process] for process in processes), max(used.values())
        raise ValueError(
            f"mesh: {count} devices would be {least} of one process and {most} of another: choose mesh.devices so that "
            f"each of the {len(processes)} processes has the same number (all {len(available)}), or fewer processes"
        )
    grid = np.array(available[:count]).reshape(count // config.fsdp, config.fsdp)
    return Mesh(grid, BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for parameters or a whole train state; optimizer moments follow their parameter."""

    def rule(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").rsplit("/", 1)[-1]
        splits = (
            name == "kernel"
            and leaf.ndim == 2
            and leaf.size >= _MIN_SPLIT_SIZE
            and leaf.shape[0] % mesh.shape["fsdp"] == 0
        )
        return NamedSharding(mesh, PartitionSpec("fsdp") if splits else PartitionSpec())

    return jax.tree_util.tree_map_with_path(rule, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, split over every device."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, shardings: Any) -> Any:
    """Values that every process has as a whole (NumPy) -> global arrays with the shardings of the same tree.

    A compiled function takes NumPy arguments only where nothing is split over several processes.
    """

    def place_leaf(value: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

    return jax.tree.map(place_leaf, tree, shardings)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch -> global arrays split over the mesh, host 0's rows first.

    Args:
        batch: arrays whose first axis is the batch (docs/architecture.md, "The batch").
        mesh: from `make_mesh`.

    Raises: ValueError when the rows do not divide by this host's devices, or the mesh is not ordered by process.
    """
    sharding = batch_sharding(mesh)
    local_devices = _devices_per_process(mesh)
    rows = {key: value.shape[0] for key, value in batch.items()}
    if any(count % local_devices for count in rows.values()) or len(set(rows.values())) > 1:
        raise ValueError(f"batch size {sorted(set(rows.values()))} must be a multiple of {local_devices} local devices")
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


@functools.lru_cache(maxsize=8)
def _devices_per_process(mesh: Mesh) -> int:
    """How many devices each process has in the mesh. Raises ValueError when rows would not lie as `to_global` says."""
    owners = [device.process_index for device in mesh.devices.flat]
    counts = Counter(owners)
    if owners != sorted(owners) or len(set(counts.values())) > 1 or len(counts) != jax.process_count():
        raise ValueError(
            "mesh: its devices must be ordered by process and be equally many of each, or rows of the batch would "
            "change places: take it from sharding.make_mesh"
        )
    return counts[owners[0]]
