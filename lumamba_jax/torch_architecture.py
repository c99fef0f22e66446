"""Which architecture, and of which sizes, tensors of given names and shapes belong to.

Several tensors show each size; the most frequent answer wins, so that a single damaged tensor is reported as misshapen
and does not change the architecture. What weights cannot show is assumed, said, and can be overridden.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from lumamba_jax.architectures import ModelConfig
from lumamba_jax.femba import FembaConfig
from lumamba_jax.heads import Head
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig
from lumamba_jax.mamba import Bidirectional

MAX_BLOCKS = 1000  # above it, names are those of no model, and building one to compare would take minutes

Shapes = Mapping[str, tuple[int, ...]]
Config = TypeVar("Config", LuMambaConfig, LunaConfig, FembaConfig)
Evidence = tuple[str, int, Callable[[int], int]]


@dataclass(frozen=True)
class Overrides:
    """What weights cannot show; None = the assumption that is printed.

    Attributes:
        num_heads: attention heads of LuMamba (2 as published). LUNA's are visible in its rotary frequencies.
        bidirectional: how the two directions of LuMamba and FEMBA are joined ("add").
        output_channels: Mamba classifier with outputs per channel: the number of channels.
        num_channels, num_samples: FEMBA's window (as many as its grid of patches covers).
        channel_stride, patch_stride: FEMBA's distance between patches (as large as a patch).
    """

    num_heads: int | None = None
    bidirectional: Bidirectional | None = None
    output_channels: int | None = None
    num_channels: int | None = None
    num_samples: int | None = None
    channel_stride: int | None = None
    patch_stride: int | None = None


NO_OVERRIDES = Overrides()


def infer_config(
    shapes: Shapes, *, source: str = "the weights", overrides: Overrides = NO_OVERRIDES
) -> tuple[ModelConfig, list[str]]:
    """Architecture and sizes of a model with tensors of these names and shapes, and sentences about what was assumed.

    Raises:
        ValueError: none of the family, or an override that contradicts the tensors.
    """
    architecture = recognise(shapes, source)
    if architecture == "FEMBA":
        unused = {"num_heads": overrides.num_heads}
    else:
        unused = {name: getattr(overrides, name) for name in _FEMBA_ONLY}
        if architecture == "LUNA":
            unused["bidirectional"] = overrides.bidirectional
    for name, value in unused.items():
        if value is not None:
            raise ValueError(f"{source} is a {architecture}, to which the override {name}={value!r} does not apply")
    infer = {"LuMamba": _infer_lumamba, "LUNA": _infer_luna, "FEMBA": _infer_femba}[architecture]
    assumed: list[str] = []
    try:
        return infer(_Evidence(shapes, source), overrides, assumed), assumed
    except _NoModelError as error:
        raise ValueError(f"{source}: the sizes that its tensors show do not make a model ({error})") from error


def recognise(shapes: Shapes, source: str = "the weights") -> str:
    """ "LuMamba", "LUNA" or "FEMBA", by tensor names. Raises ValueError for anything else."""
    unifier = any(name.startswith("cross_attn.") for name in shapes)
    mamba = any(name.startswith("mamba_blocks.") for name in shapes)
    rotary = any(re.match(r"blocks\.\d+\.attn\.", name) for name in shapes)
    grid = any(name.startswith("patch_embed.proj.") for name in shapes)
    if unifier and mamba and not rotary:
        return "LuMamba"
    if unifier and rotary and not mamba:
        return "LUNA"
    if mamba and grid and not unifier:
        return "FEMBA"
    groups = sorted({name.split(".")[0][:40] for name in shapes})
    listed = ", ".join(groups[:5]) + (", ..." if len(groups) > 5 else "") or "none"
    raise ValueError(
        f"{source} holds none of the family: LuMamba has cross_attn.* and mamba_blocks.*, LUNA cross_attn.* and "
        f"blocks.*.attn.*, FEMBA patch_embed.proj.* and mamba_blocks.*; its {len(shapes)} tensor(s) are {listed}"
    )


class _NoModelError(Exception):
    """Sizes that contradict each other."""


_FEMBA_ONLY = ("num_channels", "num_samples", "channel_stride", "patch_stride")
_FREQUENCY = "freq_embed.frequency_to_embed.fc1"
_MAMBA = "mamba_blocks.0.mamba_"
# size: the tensors that show it, by axis, and how to read it from there
_TOKENS: Mapping[str, tuple[Evidence, ...]] = {
    "embed_dim": (
        ("cross_attn.query_embed", 2, int),
        ("mask_token", 2, int),
        *((f"cross_attn.{name}_norm.bias", 0, int) for name in ("queries", "keys", "values")),
    ),
    "patch_size": (  # 2 (P/2 + 1) magnitudes and phases, four times as many hidden; first kernel P/2 - 1
        (f"{_FREQUENCY}.weight", 1, lambda features: features - 2),
        (f"{_FREQUENCY}.bias", 0, lambda hidden: hidden // 4 - 2),
        ("patch_embed.proj_in.0.weight", 3, lambda kernel: 2 * (kernel + 1)),
    ),
    "hidden width": (
        ("cross_attn.ffn.fc1.bias", 0, int),
        ("cross_attn.ffn.fc1.weight", 0, int),
        ("cross_attn.ffn.norm.bias", 0, int),
    ),
}
_MAMBA_SIZES: Mapping[str, tuple[Evidence, ...]] = {
    "model width": (
        ("norm_layers.0.weight", 0, int),
        ("norm_layers.0.bias", 0, int),
        (f"{_MAMBA}fwd.in_proj.weight", 1, int),
    ),
    "inner width": (
        (f"{_MAMBA}fwd.A_log", 0, int),
        (f"{_MAMBA}fwd.D", 0, int),
        (f"{_MAMBA}fwd.conv1d.bias", 0, int),
    ),
    "d_state": tuple((f"{_MAMBA}{way}.A_log", 1, int) for way in ("fwd", "rev")),
    "d_conv": tuple((f"{_MAMBA}{way}.conv1d.weight", 2, int) for way in ("fwd", "rev")),
}
_ROTARY_SIZES: Mapping[str, tuple[Evidence, ...]] = {
    "model width": (("norm.weight", 0, int), ("norm.bias", 0, int), ("blocks.0.norm1.weight", 0, int)),
    "half head width": tuple((f"blocks.{i}.attn.rotary_emb.freqs", 0, int) for i in range(3)),
}
_GRID_SIZES: Mapping[str, tuple[Evidence, ...]] = {
    "embed_dim": (
        ("patch_embed.proj.bias", 0, int),
        ("patch_embed.proj.weight", 0, int),
        ("decoder.conv_transpose.weight", 0, int),
    ),
    "channel_patch_size": (("patch_embed.proj.weight", 2, int), ("decoder.conv_transpose.weight", 2, int)),
    "patch_size": (("patch_embed.proj.weight", 3, int), ("decoder.conv_transpose.weight", 3, int)),
    "number of patches": (("pos_embed", 1, int),),
}


@dataclass(frozen=True)
class _Evidence:
    """Names and shapes, asked for sizes."""

    shapes: Shapes
    source: str

    def size(self, what: str, places: tuple[Evidence, ...]) -> int:
        votes = [read(self.shapes[name][axis]) for name, axis, read in places if axis < len(self.shapes.get(name, ()))]
        if not votes:
            names = ", ".join(name for name, _, _ in places)
            raise ValueError(f"{self.source}: {what} cannot be read; missing or misshapen: {names}")
        size = Counter(votes).most_common(1)[0][0]
        if size < 1:
            raise _NoModelError(f"{what} {size}")
        return size

    def sizes(self, table: Mapping[str, tuple[Evidence, ...]]) -> dict[str, int]:
        return {what: self.size(what, places) for what, places in table.items()}

    def num_blocks(self, pattern: str) -> int:
        count = len({match[1] for name in self.shapes if (match := re.match(pattern, name))})
        if count > MAX_BLOCKS:
            raise _NoModelError(f"{count} blocks")
        return count

    def first_axis(self, name: str, default: int) -> int:
        shape = self.shapes.get(name, ())
        return shape[0] if shape else default


def _infer_lumamba(evidence: _Evidence, overrides: Overrides, assumed: list[str]) -> LuMambaConfig:
    sizes = evidence.sizes(_TOKENS | _MAMBA_SIZES)
    num_heads = overrides.num_heads
    if num_heads is None:
        num_heads = 2
        assumed.append("num_heads is 2, as in the published models: no tensor shows it (override: num_heads)")
    head, num_outputs = _infer_head(evidence, overrides, assumed)
    return _make(
        LuMambaConfig,
        num_heads=num_heads,
        expand=sizes["inner width"] // sizes["model width"],
        d_state=sizes["d_state"],
        d_conv=sizes["d_conv"],
        bidirectional=_infer_directions(evidence, overrides, assumed),
        num_blocks=evidence.num_blocks(r"mamba_blocks\.(\d+)\."),
        head=head,
        num_outputs=num_outputs,
        output_channels=overrides.output_channels,
        **_token_sizes(evidence, sizes),
    )


def _infer_luna(evidence: _Evidence, overrides: Overrides, assumed: list[str]) -> LunaConfig:
    sizes = evidence.sizes(_TOKENS | _ROTARY_SIZES)
    num_heads = sizes["embed_dim"] // (2 * sizes["half head width"])
    if overrides.num_heads not in (None, num_heads):
        raise ValueError(
            f"{evidence.source}: num_heads={overrides.num_heads} contradicts the rotary frequencies ({num_heads})"
        )
    head, num_outputs = _infer_head(evidence, overrides, assumed)
    return _make(
        LunaConfig,
        num_heads=num_heads,
        num_blocks=evidence.num_blocks(r"blocks\.(\d+)\."),
        head=head,
        num_outputs=num_outputs,
        output_channels=overrides.output_channels,
        **_token_sizes(evidence, sizes),
    )


def _token_sizes(evidence: _Evidence, sizes: Mapping[str, int]) -> dict[str, int | float]:
    return {
        "patch_size": sizes["patch_size"],
        "num_queries": sizes["model width"] // sizes["embed_dim"],
        "embed_dim": sizes["embed_dim"],
        "mlp_ratio": sizes["hidden width"] / sizes["embed_dim"],
        "vocab_size": evidence.first_axis("channel_emb.embeddings.weight", LuMambaConfig.vocab_size),
    }


def _infer_femba(evidence: _Evidence, overrides: Overrides, assumed: list[str]) -> FembaConfig:
    sizes = evidence.sizes(_GRID_SIZES | _MAMBA_SIZES)
    patch = (sizes["channel_patch_size"], sizes["patch_size"])
    strides = (overrides.channel_stride or patch[0], overrides.patch_stride or patch[1])
    grid = (sizes["model width"] // sizes["embed_dim"], sizes["number of patches"])
    covered = [(n - 1) * stride + size for n, stride, size in zip(grid, strides, patch, strict=True)]
    window = (overrides.num_channels or covered[0], overrides.num_samples or covered[1])
    if overrides.channel_stride is None or overrides.patch_stride is None:
        assumed.append(
            f"patches of {patch[0]} x {patch[1]} do not overlap: no tensor shows their distance "
            "(override: channel_stride, patch_stride)"
        )
    if overrides.num_channels is None or overrides.num_samples is None:
        assumed.append(
            f"windows are {window[0]} channels x {window[1]} samples, what its {grid[0]} x {grid[1]} patches cover "
            "(override: num_channels, num_samples)"
        )
    head, num_outputs = _infer_head(evidence, overrides, assumed)
    kernel = evidence.shapes.get("decoder.dec_conv.weight", ())
    config = _make(
        FembaConfig,
        num_channels=window[0],
        num_samples=window[1],
        channel_patch_size=patch[0],
        patch_size=patch[1],
        channel_stride=strides[0],
        patch_stride=strides[1],
        embed_dim=sizes["embed_dim"],
        num_blocks=evidence.num_blocks(r"mamba_blocks\.(\d+)\."),
        expand=sizes["inner width"] // sizes["model width"],
        d_state=sizes["d_state"],
        d_conv=sizes["d_conv"],
        bidirectional=_infer_directions(evidence, overrides, assumed),
        decoder_kernel=kernel[2:] if len(kernel) == 4 else FembaConfig.decoder_kernel,
        head=head,
        num_outputs=num_outputs,
        output_channels=overrides.output_channels,
    )
    if config.grid != grid:
        raise ValueError(
            f"{evidence.source}: a window of {window[0]} x {window[1]} with strides {strides[0]} x {strides[1]} has "
            f"{config.grid[0]} x {config.grid[1]} patches, its tensors show {grid[0]} x {grid[1]}: check the overrides"
        )
    return config


def _make(config: type[Config], **sizes: object) -> Config:
    try:
        return config(**sizes)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise _NoModelError(str(error)) from error


def _infer_directions(evidence: _Evidence, overrides: Overrides, assumed: list[str]) -> Bidirectional:
    two_way = any(".mamba_rev." in name for name in evidence.shapes)
    given = overrides.bidirectional
    if given is None:
        if two_way:
            assumed.append(
                'the two directions are added: no tensor tells "add" from "ew_multiply" (override: bidirectional)'
            )
        return "add" if two_way else "none"
    if two_way == (given == "none"):
        raise ValueError(
            f"{evidence.source}: bidirectional={given!r} contradicts the tensors, which hold {1 + two_way} direction(s)"
        )
    return given


def _infer_head(evidence: _Evidence, overrides: Overrides, assumed: list[str]) -> tuple[Head, int | None]:
    if any(name.startswith(("decoder_head.", "channel_emb.", "decoder.")) for name in evidence.shapes):
        return "reconstruction", None
    kinds: dict[str, tuple[Head, str]] = {
        "classifier.decoder_": ("attention", "classifier.decoder_ffn.fc2"),
        "classifier.mamba_1.": ("mamba", "classifier.fc3"),
        "classifier.fc1.": ("linear", "classifier.fc1"),
    }
    output_channels = overrides.output_channels
    for prefix, (head, last) in kinds.items():
        if any(name.startswith(prefix) for name in evidence.shapes):
            outputs = evidence.size("the number of outputs", tuple((f"{last}.{n}", 0, int) for n in ("bias", "weight")))
            if head == "mamba" and output_channels is None:
                assumed.append(
                    f"the {outputs} outputs of the Mamba head are classes of the window, not of channels "
                    "(override: output_channels)"
                )
            if output_channels is None:
                return head, outputs
            if output_channels < 1 or outputs % output_channels:
                raise ValueError(
                    f"{evidence.source}: {outputs} outputs cannot be split over output_channels={output_channels}"
                )
            return head, None if outputs == output_channels else outputs // output_channels
    assumed.append("there is no head: the model encodes only")
    return "none", None
