"""Checkpoints on disk: exported models (`save_pretrained`) and resumable train states (`TrainCheckpoints`), Orbax v1.

An exported model is a directory with the parameters under their paths in the module tree and `metadata.json`: the
architecture, the sizes, where the numbers come from and which versions wrote them. The converter, the trainer, the
evaluation and `inference.load` share it. A train state additionally carries the optimizer and the step; the step is
the data position too, because batch `k` is a function of (data, seed, `k`).
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from lumamba_jax.architectures import ARCHITECTURES, ModelConfig, abstract_model, config_from

FORMAT_VERSION = 1
METADATA_FILE = "metadata.json"
WEIGHTS_DIRECTORY = "weights"
BEST_DIRECTORY = "best"
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
)


def named_leaves(tree: Any) -> dict[str, Any]:
    """`{"blocks/0/norm/scale": leaf, ...}` of a parameter state or any other tree, in the order of the tree."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in paths}


def abstract_params(config: ModelConfig) -> nnx.State:
    """The parameter tree of `config` as `jax.ShapeDtypeStruct`s: nothing is computed or allocated."""
    return abstract_model(config)[1]


def save_pretrained(
    directory: str | Path, model_config: ModelConfig, params: nnx.State, provenance: Mapping[str, Any]
) -> Path:
    """Write a model as `directory`, replacing an earlier export there; complete or not at all.

    Args:
        directory: the target; its parents are created.
        model_config: sizes, head and numerics of the model.
        params: `nnx.split(model)[1]` (or the same tree with NumPy leaves).
        provenance: what JSON can hold about the origin of the numbers: source file, training run, class names, rate.

    Returns: `directory`.
    Raises: ValueError when `params` is not the tree of `model_config`; OSError when the disk refuses.
    """
    directory = Path(directory).absolute()
    weights = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    _require_same_leaves(named_leaves(abstract_params(model_config)), weights, directory)
    text = json.dumps(describe(model_config, provenance), indent=2, allow_nan=False)
    with _replacing(directory) as temporary:
        ocp.save(str(temporary / WEIGHTS_DIRECTORY), weights)
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

    Returns: (config, params, metadata); `params` has NumPy leaves in the tree of the model, so that
        `nnx.merge(nnx.split(nnx.eval_shape(...))[0], params)` is the model; `metadata` is the whole JSON file.
    Raises: FileNotFoundError when there is no export; ValueError when it is damaged, of another format or
        architecture, or when its tensors are not those of its configuration (all of them listed).
    """
    directory = _export_in(directory)
    metadata = read_metadata(directory)
    config = _config_from(metadata, directory)
    try:
        weights = ocp.load(str(directory / WEIGHTS_DIRECTORY))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{directory}: the weights cannot be read ({first_line}); export the model again") from error
    expected = abstract_params(config)
    names = named_leaves(expected)
    _require_same_leaves(names, weights, directory)
    params = jax.tree.unflatten(jax.tree.structure(expected), [np.asarray(weights[name]) for name in names])
    return config, params, metadata


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """The JSON beside the weights. Raises FileNotFoundError or ValueError like `load_pretrained`."""
    path = _export_in(directory) / METADATA_FILE
    try:
        metadata = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); export the model again") from error
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format {metadata.get('format_version')!r}, this version reads {FORMAT_VERSION}")
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


class TrainCheckpoints:
    """The train states of one run: `directory/<step>/`, written completely or not at all, the last `keep` retained."""

    def __init__(self, directory: str | Path, *, keep: int = 1):
        self._checkpointer = ocp.training.Checkpointer(
            str(Path(directory).absolute()),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, None before the first save."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, progress: Mapping[str, Any]) -> None:
        """Write the array tree `state`, and `progress` (JSON: best value so far, ...), as `step`; blocks until done."""
        self._checkpointer.save(step, named_leaves(state), custom_metadata=dict(progress), force=True, overwrite=True)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Read a state into the tree, dtypes and shardings of `abstract_state` (the newest one by default).

        Returns: (state, progress).
        Raises: FileNotFoundError when nothing was saved; ValueError when the saved tree is another one.
        """
        step = self.latest_step if step is None else step
        if step is None:
            raise FileNotFoundError(f"{self._checkpointer.directory} holds no checkpoint to resume from")
        expected = named_leaves(abstract_state)
        source = Path(str(self._checkpointer.directory)) / str(step)
        stored = ocp.metadata(str(source)).metadata
        _require_same_leaves(expected, stored.get("state", stored), source)
        leaves = self._checkpointer.load(step, expected)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in expected])
        progress: Any = self._checkpointer.metadata(step).custom_metadata or {}
        return state, dict(progress)

    def close(self) -> None:
        """Wait for the disk and release the directory."""
        self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}


def _export_in(directory: str | Path) -> Path:
    directory = Path(directory).absolute()
    for candidate in (directory, directory / BEST_DIRECTORY):
        if (candidate / METADATA_FILE).is_file():
            return candidate
    raise FileNotFoundError(f"{directory} is not an exported model or a training run: it has no {METADATA_FILE}")


def _config_from(metadata: dict[str, Any], source: Path) -> ModelConfig:
    try:
        return config_from(metadata["architecture"], metadata.get("config") or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _require_same_leaves(expected: Mapping[str, Any], found: Mapping[str, Any], source: Path) -> None:
    problems = [f"missing {name} {tuple(expected[name].shape)}" for name in expected if name not in found]
    problems += [f"unused {name} {tuple(found[name].shape)}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    if problems:
        raise ValueError(f"{source}: the parameters are those of another architecture: {'; '.join(problems)}")


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `directory` when the block ends, and vanishes when it fails."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    temporary = directory.with_name(f".{directory.name}.writing-{mark}")
    temporary.mkdir()
    try:
        yield temporary
        if directory.exists():
            previous = directory.with_name(f".{directory.name}.previous-{mark}")
            directory.replace(previous)
            temporary.replace(directory)
            shutil.rmtree(previous)
        else:
            temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
