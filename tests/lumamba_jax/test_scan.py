"""Every scan implementation against the float64 recurrence and its adjoint, with carries and in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumamba_jax import scan
from lumamba_jax.scan import ScanInputs, bidirectional_scan, selective_scan, selective_scan_oracle, softplus

IMPLEMENTATIONS = ("associative", "sequential", "chunked")
IN_BOTH_DIRECTIONS = [("chunked", False), ("chunked", True), ("sequential", False), ("associative", True)]


def _inputs(length, batch=2, width=6, states=4, dtype=np.float32, seed=0, largest_step=0.5):
    rng = np.random.default_rng(seed)
    return {
        "u": rng.normal(size=(batch, length, width)).astype(dtype),
        "delta": rng.uniform(1e-3, largest_step, (batch, length, width)).astype(dtype),
        "A": -np.exp(rng.normal(size=(width, states))).astype(dtype),
        "B": rng.normal(size=(batch, length, states)).astype(dtype),
        "C": rng.normal(size=(batch, length, states)).astype(dtype),
    }


def _weights(x, seed=3):
    """Weights of outputs and last state in a scalar loss, and a state to begin with."""
    rng = np.random.default_rng(seed)
    state = (x["u"].shape[0], *x["A"].shape)
    return rng.normal(size=x["u"].shape), rng.normal(size=state), rng.normal(size=state)


def _oracle_gradient(x, h0, w_y, w_h):
    """Adjoint of `selective_scan_oracle` for the loss `sum(w_y y) + sum(w_h h_last)`: NumPy float64, step by step."""
    u, delta, A, B, C = (np.asarray(x[name], np.float64) for name in ("u", "delta", "A", "B", "C"))
    states = [np.asarray(h0, np.float64)]
    for t in range(u.shape[1]):
        drive = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        states.append(np.exp(delta[:, t, :, None] * A) * states[-1] + drive)
    grads, g = {name: np.zeros(np.shape(x[name])) for name in x}, np.asarray(w_h, np.float64)
    for t in reversed(range(u.shape[1])):
        g = g + w_y[:, t, :, None] * C[:, t, None, :]
        decayed = np.exp(delta[:, t, :, None] * A) * g
        along_b = (g * B[:, t, None, :]).sum(-1)
        grads["u"][:, t] = delta[:, t] * along_b
        grads["delta"][:, t] = u[:, t] * along_b + (decayed * states[t] * A).sum(-1)
        grads["A"] += (decayed * states[t] * delta[:, t, :, None]).sum(0)
        grads["B"][:, t] = (g * (delta[:, t] * u[:, t])[:, :, None]).sum(1)
        grads["C"][:, t] = (states[t + 1] * w_y[:, t, :, None]).sum(1)
        g = decayed
    return grads, g


def _reversed(x):
    return {name: value if name == "A" else value[:, ::-1] for name, value in x.items()}


def _run(x, h0, w_y, w_h, implementation, *, reverse):
    """y, h_last, and the gradient of the weighted sum of both in x and h0."""

    def loss(x, h0):
        y, h_last = selective_scan(**x, h0=h0, implementation=implementation, reverse=reverse)
        return (y * w_y).sum() + (h_last * w_h).sum(), (y, h_last)

    arrays = {name: jnp.asarray(value) for name, value in x.items()}
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, dh0), (y, h_last) = gradient(arrays, jnp.asarray(h0, x["u"].dtype))
    return y, h_last, grads, dh0


def _assert_equals_the_oracle(x, implementation, *, reverse, tolerance):
    w_y, w_h, h0 = _weights(x)
    w_y, w_h, h0 = (w.astype(x["u"].dtype) for w in (w_y, w_h, h0))
    y, h_last, grads, dh0 = _run(x, h0, w_y, w_h, implementation, reverse=reverse)
    in_order = _reversed(x) if reverse else x
    expected_y, expected_h = selective_scan_oracle(**in_order, h0=h0)
    expected, expected_dh0 = _oracle_gradient(in_order, h0, w_y[:, ::-1] if reverse else w_y, w_h)
    if reverse:
        expected, expected_y = _reversed(expected), expected_y[:, ::-1]
    pairs = {"y": (y, expected_y), "h_last": (h_last, expected_h), "h0": (dh0, expected_dh0)}
    pairs |= {name: (grads[name], expected[name]) for name in x}
    for name, (ours, theirs) in pairs.items():
        np.testing.assert_allclose(ours, theirs, atol=tolerance * (np.abs(theirs).max() + 1e-3), err_msg=name)


@pytest.mark.parametrize(("implementation", "reverse"), IN_BOTH_DIRECTIONS)
def test_value_and_gradient_equal_the_oracle_in_float64(x64, implementation, reverse):
    _assert_equals_the_oracle(_inputs(33, dtype=np.float64), implementation, reverse=reverse, tolerance=1e-12)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(
    length=st.one_of(st.integers(1, 70), st.integers(1, 3000), st.just(3000)),
    batch=st.integers(1, 3),
    width=st.sampled_from([1, 3, 7, 16]),
    states=st.sampled_from([1, 5, 16, 17]),
    reverse=st.booleans(),
    implementation=st.sampled_from(("chunked", "chunked", "sequential", "associative")),
)
def test_value_and_gradient_equal_the_oracle_at_any_shape(length, batch, width, states, reverse, implementation):
    x = _inputs(length, batch, width, states, seed=length)
    _assert_equals_the_oracle(x, implementation, reverse=reverse, tolerance=1e-5)


@pytest.mark.parametrize(("implementation", "reverse"), [*IN_BOTH_DIRECTIONS, ("auto", True)])
def test_without_a_gradient_the_value_is_the_same(implementation, reverse):
    x = _inputs(37)
    h0 = np.random.default_rng(1).normal(size=(2, 6, 4)).astype(np.float32)
    expected, expected_state = selective_scan_oracle(**(_reversed(x) if reverse else x), h0=h0)
    run = jax.jit(lambda x, h0: selective_scan(**x, h0=h0, implementation=implementation, reverse=reverse))
    y, h_last = run(x, h0)
    expected = expected[:, ::-1] if reverse else expected
    np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_allclose(h_last, expected_state, atol=2e-6 * np.abs(expected_state).max())


@pytest.mark.parametrize(("implementation", "reverse"), IN_BOTH_DIRECTIONS)
def test_pieces_with_a_carried_state_equal_the_whole(implementation, reverse):
    x = _inputs(47)
    run = jax.jit(lambda x, h: selective_scan(**x, h0=h, implementation=implementation, reverse=reverse))
    h = jnp.zeros((2, 6, 4))
    whole, last = run(x, h)
    pieces = {}
    cuts = [(0, 7), (7, 8), (8, 47)]
    for start, stop in reversed(cuts) if reverse else cuts:
        pieces[start], h = run({k: v if k == "A" else v[:, start:stop] for k, v in x.items()}, h)
    joined = np.concatenate([pieces[start] for start, _ in cuts], axis=1)
    np.testing.assert_allclose(joined, whole, atol=2e-6)
    np.testing.assert_allclose(h, last, atol=2e-6)


@pytest.mark.parametrize(("implementation", "reverse"), IN_BOTH_DIRECTIONS)
def test_padding_leaves_no_trace_in_state_outputs_or_gradients(implementation, reverse):
    x = {k: jnp.asarray(v) for k, v in _inputs(20).items()}
    short = {k: v if k == "A" else v[:, :13] for k, v in x.items()}
    valid = jnp.asarray(np.arange(20) < 13)[None].repeat(2, 0)

    def loss(x, valid):
        y, last = selective_scan(**x, valid=valid, implementation=implementation, reverse=reverse)
        return (y[:, :13] ** 2).sum() + (last**2).sum(), (y[:, :13], last)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    grads, outputs = gradient(short, None)
    padded_grads, padded_outputs = gradient(x, valid)
    for ours, alone in zip(padded_outputs, outputs, strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-6)
    for name, alone in grads.items():
        ours = padded_grads[name]
        if name != "A":
            assert not np.any(ours[:, 13:]), f"{name} has a gradient in the padding"
            ours = ours[:, :13]
        np.testing.assert_allclose(ours, alone, atol=1e-5 * np.abs(alone).max(), err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_inputs_keep_a_float32_state(implementation):
    x = {k: jnp.asarray(v, jnp.bfloat16) for k, v in _inputs(100).items()}
    expected, _ = selective_scan_oracle(**{k: np.asarray(v, np.float64) for k, v in x.items()})
    y, h_last = jax.jit(lambda x: selective_scan(**x, implementation=implementation))(x)
    assert (y.dtype, h_last.dtype) == (jnp.bfloat16, jnp.float32)
    # Only the final rounding to bfloat16 (2^-9 relative) may separate the two.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=2e-4)


def test_bfloat16_gradients_round_only_once():
    x = {k: jnp.asarray(v, jnp.bfloat16) for k, v in _inputs(40).items()}
    exact = {k: np.asarray(v, np.float64) for k, v in x.items()}
    gradient = jax.jit(jax.grad(lambda x: selective_scan(**x, implementation="chunked")[1].sum()))(x)
    expected, _ = _oracle_gradient(exact, np.zeros((2, 6, 4)), np.zeros((2, 40, 6)), np.ones((2, 6, 4)))
    for name, theirs in expected.items():
        assert gradient[name].dtype == jnp.bfloat16
        ours = np.asarray(gradient[name], np.float64)
        np.testing.assert_allclose(ours, theirs, rtol=2**-8, atol=1e-5 * np.abs(theirs).max() + 1e-30, err_msg=name)


@pytest.mark.parametrize("implementation", ["associative", "chunked"])
def test_steps_up_to_ten_with_decays_that_vanish(implementation):
    x = _inputs(40, width=3, states=16, largest_step=10.0)
    x["A"] = -np.broadcast_to(np.arange(1, 17, dtype=np.float32), (3, 16)).copy()
    _assert_equals_the_oracle(x, implementation, reverse=False, tolerance=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_wide_steps_with_the_polynomial_decay_equal_the_oracle(reverse):
    x = _inputs(18, batch=1, width=scan._LARGE_STEP // 16 + 1, states=16, largest_step=10.0)
    _assert_equals_the_oracle(x, "chunked", reverse=reverse, tolerance=1e-5)


def test_polynomial_decay_is_exact_to_rounding_and_never_leaves_the_range():
    delta = jnp.linspace(0, 10, 4001, dtype=jnp.float32)[None]
    A = -jnp.asarray([[0.0], [1e-3], [1.0], [8.0]]) * jnp.ones((4, 4001))
    ours = np.asarray(scan._decay(delta, A, large=True), np.float64)[0]
    argument = np.asarray(delta, np.float64) * np.asarray(A, np.float64)
    # Half a unit in the last place of the argument, as for any exp, and 2e-7 of the polynomial.
    np.testing.assert_array_less(np.abs(ours / np.exp(argument) - 1), 2e-7 + 1.2e-7 * np.abs(argument))
    extremes = scan._decay(jnp.asarray([[1e4, np.inf, np.nan, -1e4]]), -jnp.ones((1, 4)), large=True)[0, 0]
    assert np.all((extremes[:2] >= 0) & (extremes[:2] < 1e-37))
    assert np.isnan(extremes[2])
    assert extremes[3] > 1e38


def test_softplus_and_its_derivative_against_float64():
    x = np.concatenate([np.linspace(-100, 100, 20001), [0, -1e-3, 1e-3, -1e-30, 1e-30, -87, 88, 1e30]])
    x = x.astype(np.float32).astype(np.float64)
    normal = x > -87  # below, the result itself is subnormal
    exact = np.logaddexp(0, x)
    ours = np.asarray(softplus(jnp.asarray(x, jnp.float32)), np.float64)
    assert np.max(np.abs(ours / exact - 1)[normal]) < 4e-7
    assert np.all(ours[~normal] < 2e-38)
    slope = np.asarray(jax.vmap(jax.grad(softplus))(jnp.asarray(x, jnp.float32)), np.float64)
    with np.errstate(over="ignore"):
        exact_slope = 1 / (1 + np.exp(-x))
    assert np.max(np.abs(slope / exact_slope - 1)[normal]) < 4e-7
    assert softplus(jnp.float32(np.inf)) == np.inf
    assert softplus(jnp.float32(-np.inf)) == 0
    assert np.isnan(softplus(jnp.float32(np.nan)))


def test_softplus_is_exact_in_float64(x64):
    x = jnp.linspace(-40, 40, 1001)
    np.testing.assert_allclose(softplus(x), np.logaddexp(0, x), rtol=1e-14)


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_both_directions_in_one_call(implementation):
    pair = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed + 10)
        more = {"D": rng.normal(size=6), "z": rng.normal(size=(2, 9, 6)), "delta_bias": rng.normal(size=6)}
        more = {name: value.astype(np.float32) for name, value in more.items()}
        pair.append(ScanInputs(**{k: jnp.asarray(v) for k, v in (_inputs(9, seed=seed) | more).items()}))
    valid = jnp.asarray(np.arange(9) < 7)[None].repeat(2, 0)
    ours = bidirectional_scan(*pair, delta_softplus=True, valid=valid, implementation=implementation)
    for x, y, reverse in zip(pair, ours, (False, True), strict=True):
        delta = np.logaddexp(0, np.asarray(x.delta, np.float64) + np.asarray(x.delta_bias)) * valid[:, :, None]
        in_order = {"u": x.u, "delta": delta, "A": x.A, "B": x.B, "C": x.C}
        expected, _ = selective_scan_oracle(**(_reversed(in_order) if reverse else in_order))
        expected = expected[:, ::-1] if reverse else expected
        z = np.asarray(x.z, np.float64)
        expected = (expected + np.asarray(x.u) * np.asarray(x.D)) * z / (1 + np.exp(-z))
        np.testing.assert_allclose(y[:, :7], expected[:, :7], atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("reverse", [False, True])
def test_associative_scans_in_chunks_equal_the_oracle(monkeypatch, reverse):
    """What `auto` runs on a GPU, reached here by name."""
    monkeypatch.setattr(scan, "_ASSOCIATIVE_LENGTH", 8)
    monkeypatch.setitem(scan._RUN, "chunked", scan._around(scan._associative_in_chunks))
    _assert_equals_the_oracle(_inputs(21), "chunked", reverse=reverse, tolerance=1e-5)


def test_kernel_by_name_equals_chunked():
    x = {k: jnp.asarray(v) for k, v in _inputs(11, batch=1, width=5, states=3).items()}
    valid = jnp.asarray(np.arange(11) < 9)[None]
    outputs = {}
    for implementation in ("pallas", "chunked"):

        def loss(x, implementation=implementation):
            more = {"D": jnp.ones(5), "delta_bias": jnp.full(5, 0.3), "valid": valid}
            y, h = selective_scan(**x, **more, implementation=implementation, reverse=True)
            return (y[:, :9] ** 2).sum() + h.sum(), (y[:, :9], h)

        outputs[implementation] = jax.tree.leaves(jax.jit(jax.grad(loss, has_aux=True))(x))
    for kernel, ours in zip(outputs["pallas"], outputs["chunked"], strict=True):
        np.testing.assert_allclose(kernel, ours, atol=1e-5 * np.abs(ours).max())


def _shapes(length, batch=1, width=768, states=16):
    x = _inputs(1, 1, width, states)
    arrays = {k: (width, states) if k == "A" else (batch, length, v.shape[-1]) for k, v in x.items()}
    return {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in arrays.items()}


def test_memory_of_value_and_gradient_is_bounded():
    """Compiled, not run; one state of this size is 48 KB, so a stored state per step would be seen at once."""
    length, kilobyte = 2048, 1024

    def value(x):
        return selective_scan(**x)[0]

    for function, bound in ((value, 10), (jax.grad(lambda x: (value(x) ** 2).sum()), 32)):
        memory = jax.jit(function).lower(_shapes(length)).compile().memory_analysis()
        assert memory.temp_size_in_bytes / length / kilobyte < bound


def test_auto_is_resolved_for_the_platform_that_the_program_is_lowered_for():
    def gradient(x):
        return jax.grad(lambda x: selective_scan(**x)[0].sum())(x)

    def both(x):
        return bidirectional_scan(ScanInputs(**x), ScanInputs(**x))

    for function, kernels in ((lambda x: selective_scan(**x)[0], 1), (gradient, 2), (both, 1)):
        lowered = {p: jax.jit(function).trace(_shapes(32)).lower(lowering_platforms=(p,)) for p in ("cpu", "tpu")}
        assert lowered["tpu"].as_text().count("tpu_custom_call") == kernels
        assert "while" not in lowered["tpu"].as_text()
        assert "tpu_custom_call" not in lowered["cpu"].as_text()


def test_mistakes_are_named():
    x = _inputs(5)
    with pytest.raises(ValueError, match="'fast' is unknown"):
        selective_scan(**x, implementation="fast")
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan(**{**x, "B": x["B"][:, :3]})
    with pytest.raises(ValueError, match="L = 0"):
        selective_scan(**{k: v if k == "A" else v[:, :0] for k, v in x.items()})
