"""The fused kernels in interpret mode against float64, in value and gradient, and what compiles without a device."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumamba_jax import scan_pallas
from lumamba_jax.scan import selective_scan_oracle
from lumamba_jax.scan_pallas import pallas_scan, pallas_scan_bidirectional

BACKENDS = ("tpu", "gpu")
STEPWISE = ("u", "delta", "B", "C", "z")
OPTIONAL = ("h0", "D", "z", "delta_bias")


@pytest.fixture
def small_tiles(monkeypatch):
    """Registers of 16 lanes instead of 128: several tiles in a short sequence, and interpretation in seconds."""
    monkeypatch.setattr(scan_pallas, "LANES", 16)


def _inputs(length, batch=2, width=6, states=4, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    x = {"u": draw(batch, length, width), "delta": draw(batch, length, width) - 1, "A": -np.exp(draw(states, width))}
    x |= {"B": draw(batch, length, states), "C": draw(batch, length, states), "h0": draw(batch, states, width)}
    x |= {"D": draw(width), "z": draw(batch, length, width), "delta_bias": draw(width)}
    return {k: jnp.asarray(v, dtype if k in STEPWISE else np.float32) for k, v in x.items()}


def _as64(x):
    return {k: np.asarray(v, np.float64) for k, v in x.items()}


def _reference(u, delta, A, B, C, h0=None, D=None, z=None, delta_bias=None, *, softplus=True, reverse=False):
    """The scan in the dtype of its arguments, by `jax.lax.scan`: differentiable, so that float64 gradients exist."""
    d = delta if delta_bias is None else delta + delta_bias[None, None]
    d = jnp.logaddexp(d, 0) if softplus else d
    h0 = jnp.zeros((u.shape[0], *A.shape), d.dtype) if h0 is None else h0

    def step(h, inputs):
        u_t, d_t, B_t, C_t = inputs
        h = jnp.exp(d_t[:, None] * A[None]) * h + (d_t * u_t)[:, None] * B_t[:, :, None]
        return h, jnp.einsum("bnd,bn->bd", h, C_t)

    h_last, y = jax.lax.scan(step, h0, tuple(jnp.swapaxes(x, 0, 1) for x in (u, d, B, C)), reverse=reverse)
    y = jnp.swapaxes(y, 0, 1) if D is None else jnp.swapaxes(y, 0, 1) + D[None, None] * u
    return (y if z is None else y * jax.nn.silu(z)), h_last


def _close(value, expected, relative):
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(np.asarray(value, np.float64), expected, atol=relative * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("reverse", "length", "width", "states"), [(False, 8, 20, 16), (True, 37, 6, 3)])
def test_equals_the_oracle(small_tiles, backend, reverse, length, width, states):
    x = _inputs(length, width=width, states=states)
    y, h_last = pallas_scan(**x, delta_softplus=True, reverse=reverse, backend=backend)

    wide = _as64(x)
    order = slice(None, None, -1 if reverse else 1)
    steps = np.logaddexp(wide["delta"] + wide["delta_bias"], 0)
    inputs = (wide["u"][:, order], steps[:, order], wide["A"].T, wide["B"][:, order], wide["C"][:, order])
    expected, expected_state = selective_scan_oracle(*inputs, h0=wide["h0"].swapaxes(1, 2))
    gate = wide["z"] / (1 + np.exp(-wide["z"]))
    _close(y, (expected[:, order] + wide["D"] * wide["u"]) * gate, 2e-6)
    _close(h_last, expected_state.swapaxes(1, 2), 2e-6)


def test_equals_the_oracle_with_registers_of_true_size():
    x = {k: v for k, v in _inputs(133, batch=1, width=130, states=16).items() if k not in OPTIONAL}
    x["delta"] = jnp.exp(x["delta"])
    y, h_last = pallas_scan(**x, backend="tpu")
    wide = _as64(x)
    expected, expected_state = selective_scan_oracle(wide["u"], wide["delta"], wide["A"].T, wide["B"], wide["C"])
    _close(y, expected, 2e-6)
    _close(h_last, expected_state.swapaxes(1, 2), 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_input_equal_float64_in_both_directions(x64, small_tiles, backend):
    ways = [_inputs(37, seed=1), _inputs(37, seed=2)]  # three tiles, the last one ragged
    both = {k: jnp.stack([way[k] for way in ways]) for k in ways[0]}
    rng = np.random.default_rng(3)
    w_y, w_h = (rng.normal(size=both[k].shape).astype(np.float32) for k in ("u", "h0"))

    def loss(scan, w_y, w_h, x):
        y, h_last = scan(**x)
        return (y * w_y).sum() + (h_last * w_h).sum(), (y, h_last)  # through y and through h_last

    scan = partial(pallas_scan_bidirectional, delta_softplus=True, backend=backend)
    grads, (y, h_last) = jax.jit(jax.grad(partial(loss, scan, w_y, w_h), has_aux=True))(both)
    for k, reverse in enumerate((False, True)):
        single = partial(_reference, reverse=reverse)
        expected, (expected_y, expected_h) = jax.grad(partial(loss, single, w_y[k], w_h[k]), has_aux=True)(
            _as64(ways[k])
        )
        _close(y[k], expected_y, 2e-6)
        _close(h_last[k], expected_h, 2e-6)
        for name, grad in grads.items():
            assert grad.dtype == both[name].dtype
            _close(grad[k], expected[name], 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_step_from_nothing_without_gate_skip_bias_and_softplus(x64, small_tiles, backend):
    x = {k: v for k, v in _inputs(1).items() if k not in OPTIONAL}

    def loss(scan, x):
        y, h_last = scan(**x, reverse=True)
        return (y**2).sum() + (h_last**2).sum()

    value, grads = jax.jit(jax.value_and_grad(partial(loss, partial(pallas_scan, backend=backend))))(x)
    expected, expected_grads = jax.value_and_grad(partial(loss, partial(_reference, softplus=False)))(_as64(x))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, grad in grads.items():
        _close(grad, expected_grads[name], 4e-6)


def test_bfloat16_inputs_keep_a_float32_state(x64, small_tiles):
    x = _inputs(20, dtype=jnp.bfloat16)  # register tiles of 16 rows
    w_h = np.random.default_rng(3).normal(size=x["h0"].shape).astype(np.float32)

    def loss(scan, x):
        y, h_last = scan(**x)
        return (y.astype(w_h.dtype) ** 2).sum() + (h_last * w_h).sum(), (y, h_last)

    scan = partial(pallas_scan, delta_softplus=True)
    grads, (y, h_last) = jax.jit(jax.grad(partial(loss, scan), has_aux=True))(x)
    expected_grads, (expected, expected_h) = jax.grad(partial(loss, _reference), has_aux=True)(_as64(x))
    assert (y.dtype, h_last.dtype) == (jnp.bfloat16, jnp.float32)
    _close(h_last, expected_h, 2e-6)  # nothing was rounded on the way
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)  # but y, once
    for name, grad in grads.items():
        assert grad.dtype == x[name].dtype
        _close(grad, expected_grads[name], 2**-7)  # the rounded y is its own gradient


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_very_negative_step_size_is_padding(small_tiles, backend):
    x = _inputs(19)
    short = {k: v[:, :12] if k in STEPWISE else v for k, v in x.items()}
    padded = x | {"delta": x["delta"].at[:, 12:].set(-1e9)}
    _, h_last = pallas_scan(**padded, delta_softplus=True, backend=backend)
    _close(h_last, _reference(**short)[1], 2e-6)


def test_mistakes_are_named():
    x = _inputs(5)
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        pallas_scan(**x, backend="cuda")
    with pytest.raises(ValueError, match=r"B has shape \(2, 5, 3\), u asks for \(2, 5, 4\)"):
        pallas_scan(**x | {"B": x["B"][:, :, :3]})
    with pytest.raises(ValueError, match="L = 0"):
        pallas_scan(**{k: v[:, :0] if k in STEPWISE else v for k, v in x.items()})
    with pytest.raises(ValueError, match="more than the TPU kernel holds"):
        pallas_scan(**_inputs(2, states=300), backend="tpu")
    with pytest.raises(ValueError, match="3 directions"):
        pallas_scan_bidirectional(*(jnp.stack([x[k]] * 3) for k in ("u", "delta", "A", "B", "C", "h0")))


def test_the_gpu_kernels_lower_to_triton():
    """No compiler for a GPU is needed for this; it finds operations that Triton does not know."""
    x = _inputs(37, width=100, dtype=jnp.bfloat16)
    scan = partial(pallas_scan, delta_softplus=True, reverse=True, backend="gpu", interpret=False)

    def both_passes(x):
        out, pull = jax.vjp(lambda x: scan(**x), x)
        return pull(out)

    text = jax.jit(both_passes).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2


@pytest.mark.slow
def test_the_tpu_kernels_compile_for_a_chip_that_is_not_there():
    pytest.importorskip("libtpu")
    script = Path(__file__).parents[2] / "benchmarks" / "scan_tpu_cost.py"
    command = [sys.executable, script, "--chips", "v5e", "--shapes", "2x40", "--dtypes", "float32", "bfloat16"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("| v5e |") == 4  # forward and training, two dtypes
