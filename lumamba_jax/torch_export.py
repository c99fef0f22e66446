"""The way back: one of our checkpoints as a safetensors file that the published PyTorch code loads, and its papers.

Beside the weights lie `config.json` (the arguments of the PyTorch constructor) and `provenance.json` (where the numbers
come from, with the hash of the source and the licence; which tensors were unchanged; the report of the conversion that
made the checkpoint).
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lumamba_jax.architectures import ModelConfig
from lumamba_jax.checkpoint import load_pretrained, package_versions
from lumamba_jax.femba import FembaConfig
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.torch_weights import to_torch_tensors

CONFIG_FILE, PROVENANCE_FILE = "config.json", "provenance.json"
SHARING_NOTE = (
    "The published weights of the family are CC BY-ND 4.0: weights adapted from them must not be shared, and unchanged "
    "ones only with their authors' names."
)


def torch_arguments(config: ModelConfig) -> dict[str, Any]:
    """The arguments with which the published PyTorch code builds this model."""
    classes = 0 if config.head in ("reconstruction", "none") else config.num_outputs or config.output_channels
    arguments: dict[str, Any] = {"num_classes": classes, "embed_dim": config.embed_dim}
    per_window = "bc" if config.num_outputs == 2 else "mcc"
    per_channel = "mmc" if config.num_outputs else "mc"
    kind = per_window if config.output_channels is None else per_channel
    if isinstance(config, FembaConfig):
        arguments |= {
            "seq_length": config.num_samples,
            "num_channels": config.num_channels,
            "patch_size": [config.channel_patch_size, config.patch_size],
            "stride": [config.channel_stride, config.patch_stride],
            "num_blocks": config.num_blocks,
            "exp": config.expand,
            "kernel_dec": list(config.decoder_kernel),
        }
        return arguments | ({"classification_type": kind} if classes else {})
    arguments |= {
        "patch_size": config.patch_size,
        "num_queries": config.num_queries,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
    }
    if not isinstance(config, LuMambaConfig):
        return arguments | {"depth": config.num_blocks, "drop_path": config.drop_path}
    arguments |= {"num_blocks": config.num_blocks, "exp": config.expand, "drop_path": 0.0}
    if config.bidirectional == "none":
        arguments["bidirectional"] = False
    else:
        arguments["bidirectional_strategy"] = config.bidirectional
    if classes:
        arguments["classifier_option"] = "luna" if config.head == "attention" else config.head
    if config.head == "mamba":
        arguments["classification_type"] = kind
        if config.output_channels is not None:
            arguments["classification_num_channels"] = config.output_channels
    return arguments


def export(checkpoint: str | Path, out: str | Path, *, prefix: str = "") -> dict[str, np.ndarray]:
    """Write a checkpoint of ours as `out` (safetensors), with `config.json` and `provenance.json` beside it.

    Args:
        checkpoint: exported model or training run.
        out: the file to write; its folder is created, and must not hold the papers of another file.
        prefix: put before every name, e.g. "model." for code that loads Lightning checkpoints.

    Returns: the tensors, by the names written.
    Raises: FileNotFoundError or ValueError as `load_pretrained`; ValueError when the folder belongs to other weights;
        OSError when the disk refuses. Nothing half-written stays behind.
    """
    config, params, metadata = load_pretrained(checkpoint)
    origin = metadata["provenance"]
    tensors = to_torch_tensors(config, params, kept=origin.get("kept"), stored=origin.get("stored_dtypes"))
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _require_own_folder(out)
    weights = save(tensors, metadata={"format": "pt"})
    provenance = {
        "weights": out.name,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "architecture": config.architecture,
        "checkpoint": Path(checkpoint).name,
        "licence_note": SHARING_NOTE,
        "origin": origin,
        "versions": package_versions(),
    }
    papers = {"architecture": config.architecture, **torch_arguments(config)}
    _write_together(
        {
            out: weights,
            out.parent / CONFIG_FILE: _json(papers),
            out.parent / PROVENANCE_FILE: _json(provenance),
        }
    )
    return tensors


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def _require_own_folder(out: Path) -> None:
    papers = [name for name in (CONFIG_FILE, PROVENANCE_FILE) if (out.parent / name).exists()]
    if not papers:
        return
    try:
        named = json.loads((out.parent / PROVENANCE_FILE).read_text())["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    if named != out.name:
        raise ValueError(f"{out.parent} holds {' and '.join(papers)} of other weights: export into a folder of its own")


def _write_together(files: Mapping[Path, bytes]) -> None:
    """All files under temporary names first, then renamed: a full disk leaves what was there before."""
    mark = uuid.uuid4().hex[:8]
    temporary = {path: path.with_name(f".{path.name}.writing-{mark}") for path in files}
    try:
        for path, content in files.items():
            with temporary[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            temporary[path].replace(path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
