"""PyTorch weights of the family to our parameter tree and back (model specification section 6).

Reading: `torch_files` gives tensors, `torch_architecture` says whose they are, `torch_keys` pairs every published name
with a place of the parameter tree. Whatever that pairing does not cover is an error: a conversion lists every unused,
missing, misshapen and non-finite tensor at once and returns nothing. Writing is the inverse, bit for bit.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from lumamba_jax.architectures import ARCHITECTURES, Model, ModelConfig, abstract_model
from lumamba_jax.checkpoint import named_leaves
from lumamba_jax.heads import ComputeDtype, Head
from lumamba_jax.torch_architecture import NO_OVERRIDES, Overrides, infer_config
from lumamba_jax.torch_files import read_tensors
from lumamba_jax.torch_keys import LAYOUTS, KeyMapping, key_map, unread

UNREAD_VALUE = 1.0
"""What the published code initialises its unread scalar with."""
MAX_LISTED = 40
STORED_DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in (
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
        ("float32", np.float32),
        ("float64", np.float64),
    )
}

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ConvertedWeights:
    """A model read from published weights.

    Attributes:
        config: architecture and sizes.
        graphdef: the static half of the model.
        params: its parameter tree, with NumPy leaves.
        mapped: what was read, from where to where.
        assumed: sentences about what the weights cannot show.
        kept: tensors no computation reads, as plain numbers.
        stored: dtype in the file of every tensor, by its published name.
        dropped: names of tensors left out on request (the head of the source, see `replace_head`).
        fresh: paths of parameters that are newly initialised.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    mapped: tuple[KeyMapping, ...]
    assumed: tuple[str, ...]
    kept: Mapping[str, float]
    stored: Mapping[str, str]
    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def model(self) -> Model:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, self.params)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors were stored in which dtype."""
        return dict(Counter(self.stored.values()))

    def report(self) -> dict[str, object]:
        """Everything about the conversion that JSON can hold; `provenance` of the checkpoint, read by the way back."""
        return {
            "mapped": {row.torch_name: row.path for row in self.mapped},
            "assumed": list(self.assumed),
            "kept": dict(self.kept),
            "stored_dtypes": dict(self.stored),
            "dropped": list(self.dropped),
            "fresh": list(self.fresh),
        }


def load_torch_weights(
    paths: str | Path | Iterable[str | Path],
    *,
    overrides: Overrides = NO_OVERRIDES,
    compute_dtype: ComputeDtype = "float32",
) -> ConvertedWeights:
    """Read a published-style weight file, or several that together hold one model.

    Args:
        paths: what `torch_files.read_tensors` reads: safetensors, an index of shards, `.pt`, `.ckpt`; names bare or
            prefixed `model.`; F32, F16 or BF16.
        overrides: what the weights cannot show.
        compute_dtype: of the returned configuration; parameters are float32 (float64 for "float64").

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: not a weight file, none of the family, or tensors that do not fit, all of them listed.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    source = ", ".join(Path(path).name for path in paths)
    return convert_tensors(read_tensors(paths), source=source, overrides=overrides, compute_dtype=compute_dtype)


def convert_tensors(
    tensors: Tensors,
    *,
    source: str = "the weights",
    overrides: Overrides = NO_OVERRIDES,
    compute_dtype: ComputeDtype = "float32",
) -> ConvertedWeights:
    """Convert tensors under their published names; see `load_torch_weights`."""
    config, assumed = infer_config(
        {name: tensor.shape for name, tensor in tensors.items()}, source=source, overrides=overrides
    )
    config = config.replace(compute_dtype=compute_dtype)
    mapping = key_map(config)
    missing = [row.torch_name for row in mapping if row.torch_name not in tensors]
    if len(missing) > len(tensors):  # names of another model: no need to build this one to compare shapes
        raise _refusal(source, config, [f"missing     {name}" for name in missing])
    graphdef, expected = abstract_model(config)
    leaves = named_leaves(expected)
    problems = _problems(tensors, mapping, leaves, config)
    if problems:
        raise _refusal(source, config, problems)
    arrays = {
        row.path: np.ascontiguousarray(LAYOUTS[row.layout].from_torch(tensors[row.torch_name])) for row in mapping
    }
    params = jax.tree.unflatten(
        jax.tree.structure(expected), [arrays[path].astype(leaf.dtype) for path, leaf in leaves.items()]
    )
    return ConvertedWeights(
        config,
        graphdef,
        params,
        mapping,
        tuple(assumed),
        kept={name: float(tensors[name]) for name in unread(config) if name in tensors},
        stored={name: str(tensor.dtype) for name, tensor in tensors.items()},
    )


def to_torch_tensors(
    config: ModelConfig,
    params: nnx.State,
    *,
    kept: Mapping[str, float] | None = None,
    stored: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """The inverse of `convert_tensors`: published names, shapes and layouts, complete for a strict `load_state_dict`.

    Args:
        config: of the model.
        params: its parameters.
        kept: `ConvertedWeights.kept`; scalars that nothing reads get their initial value otherwise.
        stored: `ConvertedWeights.stored`. A tensor whose values all fit in the dtype it came in is written in it again,
            so that an unchanged tensor is equal byte by byte; any other is written in the dtype of `params`.
    """
    leaves = named_leaves(params)
    tensors = {
        row.torch_name: np.ascontiguousarray(LAYOUTS[row.layout].to_torch(np.asarray(leaves[row.path])))
        for row in key_map(config)
    }
    for name in unread(config):
        tensors[name] = np.asarray((kept or {}).get(name, UNREAD_VALUE), np.float32)
    return {name: _as_stored(tensor, (stored or {}).get(name)) for name, tensor in tensors.items()}


def _as_stored(tensor: np.ndarray, stored: str | None) -> np.ndarray:
    if stored not in STORED_DTYPES or STORED_DTYPES[stored] == tensor.dtype:
        return tensor
    with np.errstate(over="ignore"):
        narrowed = tensor.astype(STORED_DTYPES[stored])
    return narrowed if np.array_equal(narrowed.astype(tensor.dtype), tensor) else tensor


def replace_head(
    source: ConvertedWeights,
    head: Head,
    *,
    num_outputs: int | None = None,
    output_channels: int | None = None,
    seed: int = 0,
) -> ConvertedWeights:
    """The encoder of `source` under a new head: the old head is dropped, the new one freshly initialised from `seed`.

    The result says both in `dropped` and `fresh`.
    """
    config = source.config.replace(head=head, num_outputs=num_outputs, output_channels=output_channels)
    graphdef, expected = abstract_model(config)
    module = ARCHITECTURES[config.architecture].module

    @jax.jit  # only the head is computed: what is not returned is never drawn
    def initialise() -> dict[str, jax.Array]:
        model = module(config, rngs=nnx.Rngs(seed))  # pyright: ignore[reportArgumentType]
        return {path: leaf for path, leaf in named_leaves(nnx.split(model)[1]).items() if path.startswith("head/")}

    new = {path: np.asarray(leaf) for path, leaf in initialise().items()}
    values = named_leaves(source.params) | new
    params = jax.tree.unflatten(jax.tree.structure(expected), [values[path] for path in named_leaves(expected)])
    dropped = tuple(row.torch_name for row in source.mapped if row.path.startswith("head/"))
    return ConvertedWeights(
        config,
        graphdef,
        params,
        tuple(row for row in source.mapped if not row.path.startswith("head/")),
        source.assumed,
        source.kept,
        {name: dtype for name, dtype in source.stored.items() if name not in dropped},
        dropped=dropped,
        fresh=tuple(new),
    )


# --- what does not fit ------------------------------------------------------------------------------------------------


def _refusal(source: str, config: ModelConfig, problems: list[str]) -> ValueError:
    listed = problems[:MAX_LISTED] + [f"... and {len(problems) - MAX_LISTED} more"] * (len(problems) > MAX_LISTED)
    return ValueError(
        f"{source} is not the {config.architecture} its shapes describe; nothing was converted. "
        f"{len(problems)} problem(s):\n" + "\n".join(f"  {line}" for line in listed)
    )


def _problems(
    tensors: Tensors, mapping: Iterable[KeyMapping], leaves: Mapping[str, jax.ShapeDtypeStruct], config: ModelConfig
) -> list[str]:
    expected = {row.torch_name: _published_shape(row.layout, leaves[row.path].shape) for row in mapping}
    known = expected | dict.fromkeys(unread(config), ())
    problems = [f"missing     {name} {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unused      {name} {tensor.shape}" for name, tensor in tensors.items() if name not in known]
    for name, tensor in tensors.items():
        if name in known and tensor.shape != known[name]:
            problems.append(f"misshapen   {name} {tensor.shape}, expected {known[name]}")
        if str(tensor.dtype) not in STORED_DTYPES:
            if name in known:
                problems.append(f"not float   {name} is stored as {tensor.dtype}")
        elif bad := _count_non_finite(tensor):
            problems.append(f"non-finite  {name}: {bad} of {tensor.size} values are NaN or infinite")
    return problems


def _count_non_finite(tensor: np.ndarray) -> int:
    return int(tensor.size - np.count_nonzero(np.isfinite(tensor)))


def _published_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return LAYOUTS[layout].to_torch(np.broadcast_to(np.float32(0), shape)).shape
