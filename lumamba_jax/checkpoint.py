"""Exported models on disk (`save_pretrained`, `load_pretrained`), Orbax v1; train states are `train_checkpoints`.

An exported model is a directory with the parameters under their paths in the module tree and `metadata.json`: the
architecture, the sizes, where the numbers come from, which versions wrote them, and the checksums of its files and
leaves (`manifest.py`), which `load_pretrained` verifies. The converter, the trainer, the evaluation and
`inference.load` share it.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from lumamba_jax.agreement import from_all_processes, on_first
from lumamba_jax.architectures import ARCHITECTURES, ModelConfig, abstract_model, config_from
from lumamba_jax.manifest import (
    file_damage,
    file_records,
    leaf_damage,
    leaf_records,
    leaves_of,
    named_leaves,
    require_same_leaves,
    require_space,
    seal,
    unseal,
)
from lumamba_jax.train_checkpoints import TrainCheckpoints

__all__ = [
    "BEST_DIRECTORY",
    "METADATA_FILE",
    "TrainCheckpoints",
    "abstract_params",
    "describe",
    "is_export",
    "load_pretrained",
    "named_leaves",
    "package_versions",
    "read_metadata",
    "require_same_encoder",
    "save_pretrained",
]

FORMAT_VERSION = 2
# Exports of format 1 carry no checksums: they load unverified.
_WITHOUT_CHECKSUMS = 1
METADATA_FILE = "metadata.json"
WEIGHTS_DIRECTORY = "weights"
BEST_DIRECTORY = "best"
# What an export that was killed left behind is removed by a later one to the same place, after this long.
_ABANDONED_S = 3600
# Fields that may differ between a checkpoint and the model its encoder is loaded into: the head and how to compute.
_NOT_ENCODER = (
    "head",
    "num_outputs",
    "output_channels",
    "vocab_size",
    "dropout",
    "drop_path",
    "head_dropout",
    "compute_dtype",
    "scan_implementation",
    "remat",
)


def abstract_params(config: ModelConfig) -> nnx.State:
    """The parameter tree of `config` as `jax.ShapeDtypeStruct`s: nothing is computed or allocated."""
    return abstract_model(config)[1]


def save_pretrained(
    directory: str | Path, model_config: ModelConfig, params: nnx.State, provenance: Mapping[str, Any]
) -> Path:
    """Write a model as `directory`, replacing an earlier export there; complete or not at all.

    With several processes all of them must call this (Orbax compares their paths); process 0 writes.

    Args:
        directory: the target; its parents are created.
        model_config: sizes, head and numerics of the model.
        params: `nnx.split(model)[1]` (or the same tree with NumPy leaves), sharded as it may be.
        provenance: what JSON can hold about the origin of the numbers: source file, training run, class names, rate.

    Returns: `directory`.
    Raises: ValueError when `params` is not the tree of `model_config`; OSError when the disk refuses.
    """
    directory = Path(directory).absolute()
    leaves = named_leaves(params)
    require_same_leaves(named_leaves(abstract_params(model_config)), leaves, directory)
    weights = {name: _on_host(leaf) for name, leaf in leaves.items()}
    metadata = {**describe(model_config, provenance), "leaves": leaf_records(weights)}
    seal(metadata)  # a provenance that JSON cannot hold is refused before anything is written
    with _replacing(directory) as temporary:
        with on_first() as first:
            if first:
                require_space(temporary, sum(values.nbytes for values in weights.values()))
        try:
            ocp.save(str(temporary / WEIGHTS_DIRECTORY), weights)
        except ValueError as error:  # the tree is right: this is the disk
            raise OSError(f"{directory} could not be written: {' '.join(str(error).split())}") from error
        with on_first() as first:
            if first:
                text = seal({**metadata, "files": file_records(temporary)})
                (temporary / METADATA_FILE).write_text(text)
    return directory


def describe(model_config: ModelConfig, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a model: architecture, sizes, provenance, versions, number of parameters."""
    return {
        "format_version": FORMAT_VERSION,
        "architecture": model_config.architecture,
        "config": dataclasses.asdict(model_config),
        "provenance": dict(provenance),
        "versions": package_versions(),
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model_config))),
    }


def is_export(directory: str | Path) -> bool:
    """Whether `load_pretrained` would find a model there: an export, or a training run with its best model."""
    try:
        _export_in(directory)
    except FileNotFoundError:
        return False
    return True


def load_pretrained(directory: str | Path) -> tuple[ModelConfig, nnx.State, dict[str, Any]]:
    """Read what `save_pretrained` wrote; the directory of a training run stands for its best model.

    The files are verified before they are read, the leaves after it (exports of earlier versions have no checksums).

    Returns: (config, params, metadata); `params` has NumPy leaves in the tree of the model, so that
        `nnx.merge(nnx.split(nnx.eval_shape(...))[0], params)` is the model; `metadata` is the whole JSON file.
    Raises: FileNotFoundError when there is no export; ValueError when it is damaged, of another format or
        architecture, or when its tensors are not those of its configuration (all of them listed).
    """
    directory = _export_in(directory)
    metadata = read_metadata(directory)
    config = _config_from(metadata, directory)
    _require_intact(directory, file_damage(directory, metadata.get("files", {})))
    try:
        with _alone():
            weights = ocp.load(str(directory / WEIGHTS_DIRECTORY))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{directory}: the weights cannot be read ({first_line}); export the model again") from error
    expected = abstract_params(config)
    names = named_leaves(expected)
    require_same_leaves(names, weights, directory)
    if metadata["format_version"] != _WITHOUT_CHECKSUMS:
        _require_intact(directory, leaf_damage(leaves_of(metadata), weights))
    params = jax.tree.unflatten(jax.tree.structure(expected), [np.asarray(weights[name]) for name in names])
    return config, params, metadata


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """The JSON beside the weights. Raises FileNotFoundError or ValueError like `load_pretrained`."""
    path = _export_in(directory) / METADATA_FILE
    try:
        metadata = json.loads(path.read_text())
        if not isinstance(metadata, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); export the model again") from error
    if metadata.get("format_version") not in (FORMAT_VERSION, _WITHOUT_CHECKSUMS):
        raise ValueError(f"{path}: format {metadata.get('format_version')!r}, this version reads {FORMAT_VERSION}")
    if metadata["format_version"] != _WITHOUT_CHECKSUMS:
        try:
            metadata = unseal(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} {error}; take another copy, or export the model again") from error
    if metadata.get("architecture") not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architecture {metadata.get('architecture')!r} is not one of {known}")
    return metadata


def require_same_encoder(found: ModelConfig, expected: ModelConfig, source: str | Path) -> None:
    """Raise one ValueError that lists every size in which the encoder at `source` differs from `expected`."""
    if found.architecture != expected.architecture:
        raise ValueError(f"{source} holds a {found.architecture}, but a {expected.architecture} is asked for")
    fields = [field.name for field in dataclasses.fields(found) if field.name not in _NOT_ENCODER]
    differing = [
        f"{name} {getattr(found, name)!r} (expected {getattr(expected, name)!r})"
        for name in fields
        if getattr(found, name) != getattr(expected, name)
    ]
    if differing:
        raise ValueError(f"{source} holds another architecture: {', '.join(differing)}")


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers and the order of the data."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a model is used without the input pipeline
            found[name] = importlib.metadata.version(name)
    return found


def _export_in(directory: str | Path) -> Path:
    directory = Path(directory).absolute()
    for candidate in (directory, directory / BEST_DIRECTORY):
        # A process that is killed while it replaces an export leaves the earlier one under its other name.
        previous = () if candidate.exists() else sorted(candidate.parent.glob(f".{candidate.name}.previous-*"))
        for path in (candidate, *previous):
            if (path / METADATA_FILE).is_file():
                return path
    raise FileNotFoundError(f"{directory} is not an exported model or a training run: it has no {METADATA_FILE}")


def _on_host(leaf: Any) -> np.ndarray:
    """The whole array, of which one process of several may hold only a part."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _alone() -> contextlib.AbstractContextManager[Any]:
    """Orbax without waiting for other processes: each may read an export for itself."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"alone_{own}"
    )
    return ocp.Context(multiprocessing_options=options)


def _require_intact(directory: Path, damage: str | None) -> None:
    if damage is not None:
        raise ValueError(f"{directory} is damaged: {damage}; take another copy, or export the model again")


def _config_from(metadata: dict[str, Any], source: Path) -> ModelConfig:
    try:
        return config_from(metadata["architecture"], metadata.get("config") or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `directory` when the block ends, and vanishes when it fails."""
    mark = from_all_processes(uuid.uuid4().hex[:8])[0]
    temporary = directory.with_name(f".{directory.name}.writing-{mark}")
    previous = directory.with_name(f".{directory.name}.previous-{mark}")
    with on_first() as first:
        if first:
            directory.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(directory)
            temporary.mkdir()
    try:
        yield temporary
        with on_first() as first:
            if first and directory.exists():
                directory.replace(previous)
                temporary.replace(directory)
                shutil.rmtree(previous, ignore_errors=True)
            elif first:
                temporary.replace(directory)
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    """What killed exports to `directory` left beside it; the last good one is kept while there is no other."""
    leftovers = list(directory.parent.glob(f".{directory.name}.writing-*"))
    if directory.exists():
        leftovers += directory.parent.glob(f".{directory.name}.previous-*")
    for path in leftovers:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
