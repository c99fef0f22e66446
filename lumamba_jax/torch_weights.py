"""PyTorch LuMamba weights to our parameter tree and back (model specification section 6).

One table, `key_map`, pairs every published tensor name with a path of the parameter tree and a named layout. It is a
bijection for each architecture, so reading and writing share it, and whatever it does not cover is an error: a
conversion lists every unused, missing, misshapen and non-finite tensor at once and returns nothing.

Sizes are inferred from names and shapes; what they cannot show (the number of attention heads, how the two directions
of a block are joined) is assumed and said, and can be overridden.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes  # the safetensors reader needs bfloat16 registered with NumPy
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from lumamba_jax.checkpoint import named_leaves
from lumamba_jax.lumamba import ComputeDtype, Head, LuMamba, LuMambaConfig
from lumamba_jax.mamba import Bidirectional

UNREAD_SCALAR = "cross_attn.temparature"
"""Spelt so in the published files; no computation reads it. Kept beside the parameters, so that nothing is lost."""
LIGHTNING_PREFIX = "model."
MAX_LISTED = 40

Tensors = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Evidence = tuple[str, int, Callable[[int], int]]


class Layout(NamedTuple):
    """How an array is laid out in a published file, and how to go back."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


LAYOUTS: Mapping[str, Layout] = {
    "same": Layout(lambda x: x, lambda x: x),
    "linear": Layout(lambda x: x.T, lambda x: x.T),  # (out, in) <-> (in, out)
    "patch_conv": Layout(lambda x: x[:, :, 0].transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0)[:, :, None]),
    "depthwise_conv": Layout(lambda x: x[:, 0].T, lambda x: x.T[:, None]),  # (D, 1, K) <-> (K, D)
    "vector": Layout(lambda x: x[0, 0], lambda x: x[None, None]),  # (1, 1, E) <-> (E,)
    "table": Layout(lambda x: x[0], lambda x: x[None]),  # (1, Q, E) <-> (Q, E)
}


class KeyMapping(NamedTuple):
    """One published tensor, its path in the parameter tree, and its entry of `LAYOUTS`."""

    torch_name: str
    path: str
    layout: str


@dataclass(frozen=True)
class ConvertedWeights:
    """A model read from published weights.

    Attributes:
        config: the architecture.
        graphdef: the static half of `LuMamba(config)`.
        params: its parameter tree, with NumPy leaves.
        mapped: what was read, from where to where.
        assumed: sentences about what the weights cannot show.
        kept: tensors no computation reads, as plain numbers.
        dtypes: how many tensors were stored in which dtype.
        dropped: names of tensors left out on request (the head of the source, see `replace_head`).
        fresh: paths of parameters that are newly initialised.
    """

    config: LuMambaConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    mapped: tuple[KeyMapping, ...]
    assumed: tuple[str, ...]
    kept: Mapping[str, float]
    dtypes: Mapping[str, int]
    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def model(self) -> LuMamba:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, self.params)


def load_torch_weights(
    paths: str | Path | Iterable[str | Path],
    *,
    num_heads: int | None = None,
    bidirectional: Bidirectional | None = None,
    output_channels: int | None = None,
    compute_dtype: ComputeDtype = "float32",
) -> ConvertedWeights:
    """Read a published-style safetensors file, or several that together hold one model.

    Args:
        paths: files with bare or `model.`-prefixed names; F32, F16 or BF16.
        num_heads: attention heads; None = 2, as in the published models.
        bidirectional: how the two directions are joined; None = "add" when there are two.
        output_channels: Mamba classifier with outputs per channel: the number of channels.
        compute_dtype: of the returned configuration; parameters are float32 (float64 for "float64").

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: not a safetensors file, not a LuMamba, or tensors that do not fit, all of them listed.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    source = ", ".join(Path(path).name for path in paths)
    return convert_tensors(
        read_tensors(paths),
        source=source,
        num_heads=num_heads,
        bidirectional=bidirectional,
        output_channels=output_channels,
        compute_dtype=compute_dtype,
    )


def read_tensors(paths: Iterable[str | Path]) -> dict[str, np.ndarray]:
    """The union of the tensors of safetensors files, without the prefix `model.`, in their stored dtypes.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file that is not safetensors, or a name that occurs twice.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the path of a .safetensors file")
        try:
            with safe_open(path, framework="np") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, TypeError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({error}); a pickled .pt or .ckpt file must be saved with "
                "safetensors.torch.save_file first"
            ) from error
        for name, tensor in found.items():
            bare = name.removeprefix(LIGHTNING_PREFIX)
            if bare in tensors:
                raise ValueError(f"{path}: tensor {bare} occurs twice; the files must hold each tensor once")
            tensors[bare] = tensor
    return tensors


def convert_tensors(
    tensors: Tensors,
    *,
    source: str = "the weights",
    num_heads: int | None = None,
    bidirectional: Bidirectional | None = None,
    output_channels: int | None = None,
    compute_dtype: ComputeDtype = "float32",
) -> ConvertedWeights:
    """Convert tensors under their published names; see `load_torch_weights`."""
    config, assumed = infer_config(
        {name: tensor.shape for name, tensor in tensors.items()},
        source=source,
        num_heads=num_heads,
        bidirectional=bidirectional,
        output_channels=output_channels,
    )
    config = config.replace(compute_dtype=compute_dtype)
    graphdef, expected = nnx.split(nnx.eval_shape(lambda: LuMamba(config, rngs=nnx.Rngs(0))))
    leaves = named_leaves(expected)
    mapping = key_map(config)
    problems = _problems(tensors, mapping, leaves)
    if problems:
        listed = problems[:MAX_LISTED] + [f"... and {len(problems) - MAX_LISTED} more"] * (len(problems) > MAX_LISTED)
        raise ValueError(
            f"{source} is not the LuMamba its shapes describe; nothing was converted. {len(problems)} problem(s):\n"
            + "\n".join(f"  {line}" for line in listed)
        )
    arrays = {
        row.path: np.ascontiguousarray(LAYOUTS[row.layout].from_torch(tensors[row.torch_name])) for row in mapping
    }
    params = jax.tree.unflatten(
        jax.tree.structure(expected), [arrays[path].astype(leaf.dtype) for path, leaf in leaves.items()]
    )
    kept = {UNREAD_SCALAR: float(tensors[UNREAD_SCALAR])} if UNREAD_SCALAR in tensors else {}
    dtypes = Counter(str(tensor.dtype) for tensor in tensors.values())
    return ConvertedWeights(config, graphdef, params, mapping, tuple(assumed), kept, dict(dtypes))


def to_torch_tensors(
    config: LuMambaConfig, params: nnx.State, kept: Mapping[str, float] | None = None
) -> dict[str, np.ndarray]:
    """The inverse of `convert_tensors`: published names and layouts, in the dtypes of `params`.

    `kept` are the scalars of `ConvertedWeights.kept`.
    """
    leaves = named_leaves(params)
    tensors = {
        row.torch_name: np.ascontiguousarray(LAYOUTS[row.layout].to_torch(np.asarray(leaves[row.path])))
        for row in key_map(config)
    }
    return tensors | {name: np.asarray(value, np.float32) for name, value in (kept or {}).items()}


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
    graphdef, expected = nnx.split(nnx.eval_shape(lambda: LuMamba(config, rngs=nnx.Rngs(seed))))

    @jax.jit  # only the head is computed: what is not returned is never drawn
    def initialise() -> dict[str, jax.Array]:
        leaves = named_leaves(nnx.split(LuMamba(config, rngs=nnx.Rngs(seed)))[1])
        return {path: leaf for path, leaf in leaves.items() if path.startswith("head/")}

    new = {path: np.asarray(leaf) for path, leaf in initialise().items()}
    values = named_leaves(source.params) | new
    params = jax.tree.unflatten(jax.tree.structure(expected), [values[path] for path in named_leaves(expected)])
    return ConvertedWeights(
        config,
        graphdef,
        params,
        tuple(row for row in source.mapped if not row.path.startswith("head/")),
        source.assumed,
        source.kept,
        source.dtypes,
        dropped=tuple(row.torch_name for row in source.mapped if row.path.startswith("head/")),
        fresh=tuple(new),
    )


# --- architecture from names and shapes ------------------------------------------------------------------------------


def infer_config(
    shapes: Shapes,
    *,
    source: str = "the weights",
    num_heads: int | None = None,
    bidirectional: Bidirectional | None = None,
    output_channels: int | None = None,
) -> tuple[LuMambaConfig, list[str]]:
    """Sizes of the model that tensors of these names and shapes belong to, and sentences about what was assumed.

    Several tensors show each size; the most frequent answer wins, so that a single damaged tensor is reported as
    misshapen and does not change the architecture.

    Raises:
        ValueError: not a LuMamba, or an override that contradicts the tensors.
    """
    _require_lumamba(shapes, source)
    assumed = []
    sizes = {what: _vote(shapes, source, what, places) for what, places in _SHOWN_BY.items()}
    width, embed_dim = sizes["model width"], sizes["embed_dim"]
    if num_heads is None:
        num_heads = 2
        assumed.append("num_heads is 2, as in the published models: no tensor shows it (override: num_heads)")
    two_way = any(".mamba_rev." in name for name in shapes)
    if bidirectional is None:
        bidirectional = "add" if two_way else "none"
        if two_way:
            assumed.append(
                'the two directions are added: no tensor tells "add" from "ew_multiply" (override: bidirectional)'
            )
    elif two_way == (bidirectional == "none"):
        raise ValueError(
            f"{source}: bidirectional={bidirectional!r} contradicts the tensors, which hold {1 + two_way} direction(s)"
        )
    head, num_outputs = _infer_head(shapes, output_channels, source, assumed)
    try:
        config = LuMambaConfig(
            patch_size=sizes["patch_size"],
            num_queries=width // embed_dim,
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_blocks=len({match[1] for name in shapes if (match := re.match(r"mamba_blocks\.(\d+)\.", name))}),
            expand=sizes["inner width"] // width,
            d_state=sizes["d_state"],
            d_conv=sizes["d_conv"],
            mlp_ratio=sizes["hidden width"] / embed_dim,
            bidirectional=bidirectional,
            head=head,
            num_outputs=num_outputs,
            output_channels=output_channels,
            vocab_size=shapes.get("channel_emb.embeddings.weight", (LuMambaConfig.vocab_size,))[0],
        )
    except ValueError as error:
        raise ValueError(f"{source}: the sizes that its tensors show do not make a model ({error})") from error
    return config, assumed


def _require_lumamba(shapes: Shapes, source: str) -> None:
    blocks = any(name.startswith("mamba_blocks.") for name in shapes)
    unifier = any(name.startswith("cross_attn.") for name in shapes)
    if blocks and unifier:
        return
    if any(re.match(r"blocks\.\d+\.attn\.", name) for name in shapes):
        found = "it has blocks.*.attn: a LUNA"
    elif blocks:
        found = "it has no cross_attn.*: a FEMBA"
    else:
        groups = sorted({name.split(".")[0] for name in shapes})
        found = f"its {len(shapes)} tensor(s) are {', '.join(groups[:5]) or 'none'}"
    raise ValueError(f"{source} holds no LuMamba (mamba_blocks.* and cross_attn.*): {found}")


_FREQUENCY, _BLOCK = "freq_embed.frequency_to_embed.fc1", "mamba_blocks.0.mamba_"
_SHOWN_BY: Mapping[str, tuple[Evidence, ...]] = {
    # size: the tensors that show it, by axis, and how to read it from there
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
    "model width": (
        ("norm_layers.0.weight", 0, int),
        ("norm_layers.0.bias", 0, int),
        (f"{_BLOCK}fwd.in_proj.weight", 1, int),
    ),
    "inner width": (
        (f"{_BLOCK}fwd.A_log", 0, int),
        (f"{_BLOCK}fwd.D", 0, int),
        (f"{_BLOCK}fwd.conv1d.bias", 0, int),
    ),
    "d_state": tuple((f"{_BLOCK}{way}.A_log", 1, int) for way in ("fwd", "rev")),
    "d_conv": tuple((f"{_BLOCK}{way}.conv1d.weight", 2, int) for way in ("fwd", "rev")),
}


def _vote(shapes: Shapes, source: str, what: str, places: tuple[Evidence, ...]) -> int:
    votes = [read(shapes[name][axis]) for name, axis, read in places if axis < len(shapes.get(name, ()))]
    if not votes:
        names = ", ".join(name for name, _, _ in places)
        raise ValueError(f"{source}: {what} cannot be read; missing or misshapen: {names}")
    return Counter(votes).most_common(1)[0][0]


def _infer_head(
    shapes: Shapes, output_channels: int | None, source: str, assumed: list[str]
) -> tuple[Head, int | None]:
    if any(name.startswith(("decoder_head.", "channel_emb.")) for name in shapes):
        return "reconstruction", None
    kinds: dict[str, tuple[Head, str]] = {
        "classifier.decoder_": ("attention", "classifier.decoder_ffn.fc2"),
        "classifier.mamba_1.": ("mamba", "classifier.fc3"),
        "classifier.fc1.": ("linear", "classifier.fc1"),
    }
    for prefix, (head, last) in kinds.items():
        if any(name.startswith(prefix) for name in shapes):
            rows = tuple((f"{last}.{name}", 0, int) for name in ("bias", "weight"))
            outputs = _vote(shapes, source, "the number of outputs", rows)
            if head == "mamba" and output_channels is None:
                assumed.append(
                    f"the {outputs} outputs of the Mamba head are classes of the window, not of channels "
                    "(override: output_channels)"
                )
            if output_channels is None:
                return head, outputs
            if outputs % output_channels:
                raise ValueError(f"{source}: {outputs} outputs cannot be split over output_channels={output_channels}")
            return head, None if outputs == output_channels else outputs // output_channels
    assumed.append("there is no head: the model encodes only")
    return "none", None


# --- the table -------------------------------------------------------------------------------------------------------


def key_map(config: LuMambaConfig) -> tuple[KeyMapping, ...]:
    """Every published tensor of the architecture, in the order of the model; `UNREAD_SCALAR` has no counterpart."""
    return (*_tokenizer_keys(), *_unifier_keys(), *_block_keys(config), *_head_keys(config))


def _dense(torch_name: str, path: str, *, bias: bool = True) -> list[KeyMapping]:
    rows = [KeyMapping(f"{torch_name}.weight", f"{path}/kernel", "linear")]
    return rows + [KeyMapping(f"{torch_name}.bias", f"{path}/bias", "same")] * bias


def _norm(torch_name: str, path: str) -> list[KeyMapping]:
    return [
        KeyMapping(f"{torch_name}.weight", f"{path}/scale", "same"),
        KeyMapping(f"{torch_name}.bias", f"{path}/bias", "same"),
    ]


def _attention(torch_name: str, path: str) -> list[KeyMapping]:
    return [
        KeyMapping(f"{torch_name}.in_proj_weight", f"{path}/in_proj/kernel", "linear"),
        KeyMapping(f"{torch_name}.in_proj_bias", f"{path}/in_proj/bias", "same"),
        *_dense(f"{torch_name}.out_proj", f"{path}/out_proj"),
    ]


def _mlp(torch_name: str, path: str, *, hidden_norm: bool = False) -> list[KeyMapping]:
    norm = _norm(f"{torch_name}.norm", f"{path}/norm") if hidden_norm else []
    return _dense(f"{torch_name}.fc1", f"{path}/fc1") + norm + _dense(f"{torch_name}.fc2", f"{path}/fc2")


def _transformer_layer(torch_name: str, path: str, *, cross: bool) -> list[KeyMapping]:
    # PyTorch numbers the norms in the order of use: the feed-forward one is norm2 without cross-attention, else norm3.
    rows = _norm(f"{torch_name}.norm1", f"{path}/norm1") + _attention(f"{torch_name}.self_attn", f"{path}/self_attn")
    if cross:
        rows += _norm(f"{torch_name}.norm2", f"{path}/cross_norm")
        rows += _attention(f"{torch_name}.multihead_attn", f"{path}/cross_attn")
    rows += _norm(f"{torch_name}.norm{3 if cross else 2}", f"{path}/ffn_norm")
    return rows + [row for i in (1, 2) for row in _dense(f"{torch_name}.linear{i}", f"{path}/linear{i}")]


def mamba_keys(torch_name: str, path: str) -> list[KeyMapping]:
    """The tensors of one direction of a Mamba block; both names end before the dot or slash."""
    return [
        *_dense(f"{torch_name}.in_proj", f"{path}/in_proj", bias=False),
        KeyMapping(f"{torch_name}.conv1d.weight", f"{path}/conv_kernel", "depthwise_conv"),
        KeyMapping(f"{torch_name}.conv1d.bias", f"{path}/conv_bias", "same"),
        *_dense(f"{torch_name}.x_proj", f"{path}/x_proj", bias=False),
        *_dense(f"{torch_name}.dt_proj", f"{path}/dt_proj", bias=False),
        KeyMapping(f"{torch_name}.dt_proj.bias", f"{path}/dt_bias", "same"),
        KeyMapping(f"{torch_name}.A_log", f"{path}/A_log", "same"),
        KeyMapping(f"{torch_name}.D", f"{path}/D", "same"),
        *_dense(f"{torch_name}.out_proj", f"{path}/out_proj", bias=False),
    ]


def _tokenizer_keys() -> list[KeyMapping]:
    rows = [KeyMapping("mask_token", "tokenizer/mask_token", "vector")]
    for i in range(3):  # the published stack counts convolution, norm and GELU
        conv, path = f"patch_embed.proj_in.{3 * i}", f"tokenizer/time_path/convs/{i}"
        rows += [
            KeyMapping(f"{conv}.weight", f"{path}/kernel", "patch_conv"),
            KeyMapping(f"{conv}.bias", f"{path}/bias", "same"),
            *_norm(f"patch_embed.proj_in.{3 * i + 1}", f"tokenizer/time_path/norms/{i}"),
        ]
    rows += _mlp("freq_embed.frequency_to_embed", "tokenizer/frequency_path")
    return rows + _mlp("channel_location_embedder.0", "tokenizer/position_mlp", hidden_norm=True)


def _unifier_keys() -> list[KeyMapping]:
    rows = [KeyMapping("cross_attn.query_embed", "unifier/queries", "table")]
    for name in ("queries_norm", "keys_norm", "values_norm"):
        rows += _norm(f"cross_attn.{name}", f"unifier/{name}")
    rows += _attention("cross_attn.cross_attention", "unifier/attention")
    rows += _mlp("cross_attn.ffn", "unifier/ffn", hidden_norm=True)
    for i in range(3):
        rows += _transformer_layer(f"cross_attn.query_self_attn.layers.{i}", f"unifier/refinement/{i}", cross=False)
    return rows


def _block_keys(config: LuMambaConfig) -> list[KeyMapping]:
    rows = []
    for i in range(config.num_blocks):
        rows += _norm(f"norm_layers.{i}", f"blocks/{i}/norm")
        for way in ("fwd",) if config.bidirectional == "none" else ("fwd", "rev"):
            rows += mamba_keys(f"mamba_blocks.{i}.mamba_{way}", f"blocks/{i}/mamba/{way}")
    return rows


def _head_keys(config: LuMambaConfig) -> list[KeyMapping]:
    if config.head == "reconstruction":
        return [
            KeyMapping("channel_emb.embeddings.weight", "head/channel_embedding", "same"),
            *_transformer_layer("decoder_head.decoder_pred.layers.0", "head/layer", cross=True),
            *_norm("decoder_head.norm", "head/norm"),
            *_mlp("decoder_head.decoder_linear", "head/mlp"),
        ]
    if config.head == "attention":
        return [
            KeyMapping("classifier.learned_agg", "head/query", "vector"),
            *_attention("classifier.decoder_attn", "head/attention"),
            *_mlp("classifier.decoder_ffn", "head/mlp"),
        ]
    if config.head == "mamba":
        return [
            *_dense("classifier.fc1", "head/fc1"),
            *mamba_keys("classifier.mamba_1", "head/mamba"),
            *_dense("classifier.fc3", "head/fc3"),
        ]
    return _dense("classifier.fc1", "head/fc1") if config.head == "linear" else []


def _problems(tensors: Tensors, mapping: Iterable[KeyMapping], leaves: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    expected = {row.torch_name: _published_shape(row.layout, leaves[row.path].shape) for row in mapping}
    known = expected | {UNREAD_SCALAR: ()}
    problems = [f"missing     {name} {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unused      {name} {tensor.shape}" for name, tensor in tensors.items() if name not in known]
    for name, tensor in tensors.items():
        if name in known and tensor.shape != known[name]:
            problems.append(f"misshapen   {name} {tensor.shape}, expected {known[name]}")
        if not _is_floating(tensor):
            if name in known:
                problems.append(f"not float   {name} is stored as {tensor.dtype}")
        elif bad := int(np.sum(~np.isfinite(tensor.astype(np.float32)))):
            problems.append(f"non-finite  {name}: {bad} of {tensor.size} values are NaN or infinite")
    return problems


def _published_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return LAYOUTS[layout].to_torch(np.broadcast_to(np.float32(0), shape)).shape


def _is_floating(tensor: np.ndarray) -> bool:
    return np.issubdtype(tensor.dtype, np.floating) or tensor.dtype == ml_dtypes.bfloat16
