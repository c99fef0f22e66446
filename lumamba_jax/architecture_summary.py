"""What a model is, in one page: family, sizes, parameters and FLOPs per stage, expected input, head, and its origin."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lumamba_jax.architectures import SIZES, ModelConfig, abstract_model
from lumamba_jax.checkpoint import is_export, load_pretrained, named_leaves
from lumamba_jax.femba import FembaConfig
from lumamba_jax.flops import forward_flops
from lumamba_jax.torch_architecture import NO_OVERRIDES, Overrides
from lumamba_jax.torch_files import files_at
from lumamba_jax.torch_keys import unread
from lumamba_jax.torch_weights import load_torch_weights
from lumamba_jax.weight_sources import resolve

EXAMPLE_WINDOW = (22, 1280)  # the window of pre-training: 5 s of 22 channels at 256 Hz
STAGES = ("tokens", "channel unification", "temporal encoder", "head")
_STAGE_OF = {
    "tokenizer": "tokens",
    "patch_embed": "tokens",
    "pos_embed": "tokens",
    "unifier": "channel unification",
    "blocks": "temporal encoder",
    "norm": "temporal encoder",
    "head": "head",
}
_NUMERICS = ("architecture", "head", "num_outputs", "output_channels", "compute_dtype", "scan_implementation", "remat")
_TRAINING = ("dropout", "head_dropout", "drop_path")


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by stage (`STAGES`), as the published files count them: with the scalar that nothing reads.

    From shapes alone; nothing is allocated.
    """
    counts = dict.fromkeys(STAGES, 0)
    for path, leaf in named_leaves(abstract_model(config)[1]).items():
        counts[_STAGE_OF[path.split("/")[0]]] += leaf.size
    counts["channel unification"] += len(unread(config))
    return counts


def published_size(config: ModelConfig) -> str | None:
    """The name of the published size with this encoder ("LUNA base"), or None."""
    ignored = (*_NUMERICS[1:], *_TRAINING, "vocab_size", "decoder_kernel")
    for name, size in SIZES.items():
        if size.architecture == config.architecture and all(
            getattr(size, field) == getattr(config, field) for field in _field_names(size) if field not in ignored
        ):
            return name
    return None


def summarize(
    source: str | Path, *, overrides: Overrides = NO_OVERRIDES, window: tuple[int, int] = EXAMPLE_WINDOW
) -> str:
    """The page for an exported model, a training run, a weight file of any kind, `hf://...` or a known name.

    Args:
        source: as for `inference.load`.
        overrides: what published weights cannot show.
        window: channels and samples that FLOPs are counted for (FEMBA: its own window).

    Raises: as `inference.load`; a file that a load would refuse is refused here with the same sentence.
    """
    found = resolve(source)
    if is_export(found.path):
        config, params, metadata = load_pretrained(found.path)
        dtypes = Counter(str(leaf.dtype) for leaf in named_leaves(params).values())
        provenance: Mapping[str, Any] = metadata["provenance"]
    else:
        converted = load_torch_weights(files_at(found.path), overrides=overrides)
        config, dtypes = converted.config, Counter(converted.dtypes)
        provenance = {**found.provenance, **converted.report()}
    return "\n".join(
        [
            f"{source}",
            *_describe_architecture(config, dtypes),
            "",
            *_stage_table(config, window),
            "",
            *_describe_input(config, provenance),
            "",
            *_describe_origin(provenance, str(source)),
        ]
    )


def _field_names(config: ModelConfig) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _describe_architecture(config: ModelConfig, dtypes: Mapping[str, int]) -> list[str]:
    fields = {name: getattr(config, name) for name in _field_names(config) if name not in (*_NUMERICS, *_TRAINING)}
    size = published_size(config)
    return [
        f"architecture   {config.architecture}"
        + (f", the published size {size}" if size else ", of no published size"),
        "sizes          " + ", ".join(f"{name} {value}" for name, value in fields.items()),
        "head           " + _describe_head(config),
        "stored as      " + ", ".join(f"{count} tensors {dtype}" for dtype, count in sorted(dtypes.items())),
    ]


def _describe_head(config: ModelConfig) -> str:
    if config.head == "reconstruction":
        return "reconstruction (pre-training): every channel's samples"
    if config.head == "none":
        return "none: embeddings only"
    shape = [str(n) for n in (config.output_channels, config.num_outputs) if n is not None]
    what = "channels x outputs" if len(shape) == 2 else "channels" if config.output_channels else "classes or targets"
    return f"{config.head} classifier, {' x '.join(shape)} {what}"


def _stage_table(config: ModelConfig, window: tuple[int, int]) -> list[str]:
    if isinstance(config, FembaConfig):
        window = (config.num_channels, config.num_samples)
    counts, flops = count_parameters(config), forward_flops(config, *window)
    rows = [(stage, counts[stage], flops[stage]) for stage in STAGES]
    rows.append(("total", sum(counts.values()), sum(flops.values())))
    title = f"MFLOPs, {window[0]} x {window[1]}"
    table = [f"{'stage':<20} {'parameters':>13} {title:>20}"]
    table += [f"{stage:<20} {count:>13,} {operations / 1e6:>20,.1f}" for stage, count, operations in rows]
    return table


def _describe_input(config: ModelConfig, provenance: Mapping[str, Any]) -> list[str]:
    how = provenance.get("task", {}).get("normalization", config.normalization)
    rate = provenance.get("sfreq")
    if isinstance(config, FembaConfig):
        shape = f"exactly {config.num_channels} channels, in the order of training, x {config.num_samples} samples"
    else:
        shape = f"any channels with positions (metres) x a multiple of {config.patch_size} samples"
    lines = [
        f"input          microvolts, {shape}",
        f"sampling rate  {f'{rate:g} Hz' if rate else '256 Hz in the published pre-training; the weights do not say'}",
        f"normalisation  {how}, applied by embed and predict",
    ]
    if provenance.get("class_names"):
        lines.append(f"classes        {', '.join(provenance['class_names'])}")
    return lines


def _describe_origin(provenance: Mapping[str, Any], source: str) -> list[str]:
    lines = []
    if "mapped" in provenance:
        lines.append(f"a load maps    {len(provenance['mapped'])} tensors")
        for title, key in (("keeps", "kept"), ("drops", "dropped"), ("starts fresh", "fresh")):
            names: Sequence[str] = list(provenance.get(key, ()))
            note = ", which no computation reads" if key == "kept" else ""
            lines.append(f"  {title:<13}" + (", ".join(names) + note if names else "nothing"))
        lines += [f"  assumes      {sentence}" for sentence in provenance.get("assumed", ())]
    named = {"run": "trained in", "source": "from", "sha256": "SHA-256", "revision": "revision"}
    for key, title in named.items():
        if provenance.get(key) and str(provenance[key]) != source:
            lines.append(f"{title:<14} {provenance[key]}")
    for key in ("licence", "licence_note"):
        if provenance.get(key):
            lines.append(f"{key.replace('_', ' '):<14} {provenance[key]}")
    return lines
