"""Attention against its definition, and queries that all rows share against the same queries in every row."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumamba_jax.attention import MultiHeadAttention, attend
from lumamba_jax.layers import Dtypes, LayerNorm

WIDTH, HEADS, KEYS, QUERIES = 16, 2, 5, 3
DTYPES = Dtypes(jnp.dtype("float64"), jnp.dtype("float64"))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def attention(dropout=0.0):
    module = MultiHeadAttention(WIDTH, HEADS, dropout=dropout, dtypes=DTYPES, rngs=nnx.Rngs(0))
    for i, bias in enumerate((module.in_proj.bias, module.out_proj.bias)):
        bias[...] = jnp.asarray(normal(*bias.shape, seed=10 + i))
    return module


def norm(seed):
    module = LayerNorm(WIDTH, dtypes=DTYPES, rngs=nnx.Rngs(0))
    module.scale[...], module.bias[...] = (
        jnp.asarray(normal(WIDTH, seed=seed)),
        jnp.asarray(normal(WIDTH, seed=seed + 50)),
    )
    return module


@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_the_softmax_weighted_sum_of_every_head(x64, masked):
    q, k, v = normal(2, QUERIES, HEADS, 4), normal(2, KEYS, HEADS, 4, seed=1), normal(2, KEYS, HEADS, 4, seed=2)
    mask = np.array([[True, True, False, True, True], [True, False, False, False, True]]) if masked else None
    attended, scores = attend(*map(jnp.asarray, (q, k, v)), key_mask=None if mask is None else jnp.asarray(mask))
    expected, weights = np.zeros((2, QUERIES, HEADS, 4)), np.zeros((2, QUERIES, KEYS))
    for b in range(2):
        keep = np.ones(KEYS, bool) if mask is None else mask[b]
        for head in range(HEADS):
            for row in range(QUERIES):
                e = np.where(keep, np.exp(k[b, :, head] @ q[b, row, head] / math.sqrt(4)), 0)
                expected[b, row, head] = e / e.sum() @ v[b, :, head]
                weights[b, row] += e / e.sum() / HEADS
    np.testing.assert_allclose(attended, expected.reshape(2, QUERIES, -1), atol=1e-12)
    np.testing.assert_allclose(scores, weights, atol=1e-12)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_shared_queries_pool_what_the_same_queries_attend_to_in_every_row(x64, normed, masked):
    module, query, memory = attention(), jnp.asarray(normal(QUERIES, WIDTH)), jnp.asarray(normal(4, KEYS, WIDTH))
    mask = jnp.asarray(np.arange(KEYS) < np.arange(2, 6)[:, None]) if masked else None
    norms = {"key_norm": norm(3), "value_norm": norm(4)} if normed else {}
    attended, scores = module.pool(query, memory, key_mask=mask, **norms)
    keys, values = (norms[name](memory) if normed else memory for name in ("key_norm", "value_norm"))
    kernels, biases = np.split(np.asarray(module.in_proj.kernel), 3, 1), np.split(np.asarray(module.in_proj.bias), 3)
    q, k, v = (
        jnp.asarray(np.asarray(x) @ kernel + bias).reshape(*x.shape[:-1], HEADS, -1)
        for x, kernel, bias in zip((query, keys, values), kernels, biases, strict=True)
    )
    expected, weights = attend(jnp.broadcast_to(q[None], (4, *q.shape)), k, v, key_mask=mask)
    np.testing.assert_allclose(attended, module.out_proj(expected), atol=1e-12)
    np.testing.assert_allclose(scores, weights, atol=1e-12)


def test_dropout_of_shared_queries_scales_the_constant_terms_too(x64):
    """Every value the same: what is left of it is the sum of the kept weights, which is 0 where all are dropped."""
    module, memory = attention(dropout=0.5), jnp.zeros((200, 2, WIDTH))
    attended, _ = module.pool(jnp.zeros((1, WIDTH)), memory, rngs=nnx.Rngs(dropout=1))
    value = module.in_proj.bias[...][2 * WIDTH :]
    kernel, bias = np.asarray(module.out_proj.kernel[...]), np.asarray(module.out_proj.bias[...])
    kept = np.linalg.lstsq(kernel.T, (np.asarray(attended)[:, 0] - bias).T, rcond=None)[0].T / np.asarray(value)
    per_head = kept.reshape(200, HEADS, -1)
    np.testing.assert_allclose(per_head, np.repeat(per_head[..., :1], WIDTH // HEADS, -1), atol=1e-9)
    # Two keys of weight 1/2, each kept with probability 1/2 and then doubled: the sum is 0, 1 or 2.
    assert {round(float(x), 6) + 0.0 for x in per_head[..., 0].ravel()} == {0.0, 1.0, 2.0}
