"""The compiled evaluation as one file: StableHLO, weights and metadata, reloaded without building the model.

`save_evaluation` traces embedding or prediction once, for one montage size and window length and any number of windows
(`jax.export`, symbolic batch), and stores it with the weights. `load_evaluation` needs JAX and this module only: no
Flax module is built, no Python of the model runs, and the program stays the same when the code changes later.
"""

import functools
import io
import json
import os
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lumamba_jax.compilation import enable_compilation_cache

FORMAT_VERSION = 1
PROGRAM, WEIGHTS, METADATA = "program.stablehlo", "weights.safetensors", "metadata.json"


@dataclass(frozen=True)
class SavedEvaluation:
    """A program with its weights, from `load_evaluation`.

    Attributes:
        metadata: what it computes ("output"), shape of a window, platforms, and the model's metadata.
    """

    metadata: Mapping[str, Any]
    _program: export.Exported
    _weights: Sequence[Array]

    def __call__(self, signal_uv: Float[np.ndarray, "N C T"], locations: Float[np.ndarray, "N C 3"]) -> np.ndarray:
        """Run windows in microvolts, with electrode positions in metres: `(N, M)` embeddings or `(N, K)` probabilities.

        Raises: ValueError for other shapes than it was made for, or values that are not finite.
        """
        signal = np.asarray(signal_uv, np.float32)
        shape = (self.metadata["num_channels"], self.metadata["num_samples"])
        if signal.ndim != 3 or signal.shape[1:] != shape or signal.shape[0] == 0:
            raise ValueError(
                f"this program takes windows of {shape[0]} channels x {shape[1]} samples, not {signal.shape}"
            )
        places = np.broadcast_to(np.asarray(locations, np.float32), (*signal.shape[:2], 3))
        if not (np.isfinite(signal).all() and np.isfinite(places).all()):
            raise ValueError(
                "the signal or the locations hold NaN or infinite values: remove or interpolate them first"
            )
        return np.asarray(self._call(self._weights, signal, places))

    @functools.cached_property
    def _call(self) -> Any:
        return jax.jit(self._program.call)


def save_evaluation(
    model: Any,
    path: str | Path,
    *,
    num_channels: int,
    num_samples: int,
    output: Literal["embedding", "prediction"] = "embedding",
    platforms: Sequence[str] | None = None,
) -> Path:
    """Write the evaluation of a loaded model; complete or not at all.

    Args:
        model: from `inference.load`.
        path: the file to write.
        num_channels: C of every window; no padding.
        num_samples: T of every window.
        output: mean latents, or class probabilities (values, for a regression).
        platforms: what the program may run on ("cpu", "cuda", "tpu"); None = the platform at hand.

    Raises: ValueError when the window does not fit the model, or a model without a classifier is asked to predict.
    """
    from lumamba_jax import inference  # builds the model; whoever only reloads a program does not need it

    model.config.check_window(num_channels, num_samples)
    run = inference.evaluation(model, output)
    leaves, tree = jax.tree.flatten(model.params)
    (batch,) = export.symbolic_shape("b")

    def program(weights: Sequence[Array], signal: Array, locations: Array) -> Array:
        return run(jax.tree.unflatten(tree, weights), {"signal": signal, "locations": locations})

    shapes = (
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
        jax.ShapeDtypeStruct((batch, num_channels, num_samples), jnp.float32),
        jax.ShapeDtypeStruct((batch, num_channels, 3), jnp.float32),
    )
    exported = export.export(jax.jit(program), platforms=platforms)(*shapes)
    metadata = {
        "format_version": FORMAT_VERSION,
        "output": output,
        "num_channels": num_channels,
        "num_samples": num_samples,
        "platforms": list(exported.platforms),
        "model": model.metadata,
    }
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(PROGRAM, bytes(exported.serialize()))
        archive.writestr(WEIGHTS, save({f"{i:05d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}))
        archive.writestr(METADATA, json.dumps(metadata, indent=2))
    return _write(Path(path), content.getvalue())


def load_evaluation(path: str | Path) -> SavedEvaluation:
    """Read what `save_evaluation` wrote.

    Raises: FileNotFoundError when there is no file; ValueError when it is damaged, of another format, or made for other
        platforms than the one at hand.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    enable_compilation_cache()
    try:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in (PROGRAM, WEIGHTS, METADATA)}
        metadata = json.loads(parts[METADATA])
        program = export.deserialize(bytearray(parts[PROGRAM]))
        weights = load(parts[WEIGHTS])
    except (zipfile.BadZipFile, KeyError, ValueError, SafetensorError, EOFError) as error:
        raise ValueError(f"{path} is no saved evaluation, or damaged ({error}); save it again") from error
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format {metadata.get('format_version')!r}, this version reads {FORMAT_VERSION}")
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in program.platforms:
        raise ValueError(
            f"{path} was made for {', '.join(program.platforms)}, not for {platform}: save it again for that"
        )
    return SavedEvaluation(metadata, program, [jnp.asarray(weights[name]) for name in sorted(weights)])


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
