"""The device mesh and where arrays live on it: axes `("data", "fsdp")`, rules by path, modules untouched.

The batch is split over both axes; large 2-D kernels are split on their input axis over `fsdp`, everything else is
replicated. Declared once here and applied at the `jit` boundary, so that one device and many run the same program.
"""

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
    """The mesh over all hosts, or over `devices`. Raises ValueError when they are too few or do not divide."""
    available = list(jax.devices() if devices is None else devices)
    count = len(available) if config.devices is None else config.devices
    if count > len(available) or count % config.fsdp:
        raise ValueError(f"mesh: {count} devices with fsdp {config.fsdp} asked for, {len(available)} available")
    shape = (count // config.fsdp, config.fsdp)
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=available[:count])


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


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch -> global arrays split over the mesh.

    Args:
        batch: arrays whose first axis is the batch (docs/architecture.md, "The batch").
        mesh: from `make_mesh`.

    Raises: ValueError when the rows do not divide by this host's devices.
    """
    sharding = batch_sharding(mesh)
    local_devices = len(mesh.local_devices)
    rows = {key: value.shape[0] for key, value in batch.items()}
    if any(count % local_devices for count in rows.values()) or len(set(rows.values())) > 1:
        raise ValueError(f"batch size {sorted(set(rows.values()))} must be a multiple of {local_devices} local devices")
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
