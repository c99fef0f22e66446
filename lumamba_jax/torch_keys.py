"""Published tensor names, their places in our parameter tree, and how an array is laid out on either side.

`key_map` is a bijection for each architecture: reading and writing share it, and whatever it does not cover is an error
of the conversion. Names are those of the released PyTorch code (model specification, all sections).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from lumamba_jax.architectures import ModelConfig
from lumamba_jax.femba import FembaConfig
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig

UNREAD_SCALAR = "cross_attn.temparature"
"""Spelt so in the published files; no computation reads it. Kept beside the parameters, so that nothing is lost."""


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
    "grid_conv": Layout(lambda x: x[:, 0].transpose(1, 2, 0), lambda x: x.transpose(2, 0, 1)[:, None]),  # (E, 1, h, w)
    "plane_conv": Layout(lambda x: x[0, 0], lambda x: x[None, None]),  # (1, 1, h, w) <-> (h, w)
}


class KeyMapping(NamedTuple):
    """One published tensor, its path in the parameter tree, and its entry of `LAYOUTS`."""

    torch_name: str
    path: str
    layout: str


def key_map(config: ModelConfig) -> tuple[KeyMapping, ...]:
    """Every published tensor of the architecture, in the order of the model, but for `unread(config)`."""
    if isinstance(config, FembaConfig):
        return (*_grid_keys(), *_mamba_block_keys(config), *_head_keys(config))
    blocks = _rotary_block_keys(config) if isinstance(config, LunaConfig) else _mamba_block_keys(config)
    return (*_tokenizer_keys(), *_unifier_keys(), *blocks, *_head_keys(config))


def unread(config: ModelConfig) -> tuple[str, ...]:
    """Names of published scalars that no computation reads."""
    return () if isinstance(config, FembaConfig) else (UNREAD_SCALAR,)


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


def _grid_keys() -> list[KeyMapping]:
    return [
        KeyMapping("patch_embed.proj.weight", "patch_embed/kernel", "grid_conv"),
        KeyMapping("patch_embed.proj.bias", "patch_embed/bias", "same"),
        KeyMapping("pos_embed", "pos_embed", "table"),
    ]


def _mamba_block_keys(config: LuMambaConfig | FembaConfig) -> list[KeyMapping]:
    rows = []
    for i in range(config.num_blocks):
        rows += _norm(f"norm_layers.{i}", f"blocks/{i}/norm")
        for way in ("fwd",) if config.bidirectional == "none" else ("fwd", "rev"):
            rows += mamba_keys(f"mamba_blocks.{i}.mamba_{way}", f"blocks/{i}/mamba/{way}")
    return rows


def _rotary_block_keys(config: LunaConfig) -> list[KeyMapping]:
    rows = []
    for i in range(config.num_blocks):
        torch_name, path = f"blocks.{i}", f"blocks/{i}"
        rows += _norm(f"{torch_name}.norm1", f"{path}/norm1")
        rows.append(KeyMapping(f"{torch_name}.attn.rotary_emb.freqs", f"{path}/attn/rotary_frequencies", "same"))
        rows += _dense(f"{torch_name}.attn.qkv_proj", f"{path}/attn/qkv")
        rows += _dense(f"{torch_name}.attn.proj", f"{path}/attn/proj")
        rows += _norm(f"{torch_name}.norm2", f"{path}/norm2")
        rows += _mlp(f"{torch_name}.mlp", f"{path}/mlp", hidden_norm=True)
    return rows + _norm("norm", "norm")


def _head_keys(config: ModelConfig) -> list[KeyMapping]:
    if config.head == "reconstruction" and isinstance(config, FembaConfig):
        return [
            KeyMapping("decoder.dec_conv.weight", "head/plane_kernel", "plane_conv"),
            KeyMapping("decoder.conv_transpose.weight", "head/kernel", "grid_conv"),
            KeyMapping("decoder.conv_transpose.bias", "head/bias", "same"),
        ]
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
