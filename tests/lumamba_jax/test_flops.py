"""FLOPs and elementwise work by formula, against what the compiler counts."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lumamba_jax.architectures import SIZES, abstract_model
from lumamba_jax.femba import FembaConfig
from lumamba_jax.flops import (
    OPERATIONS,
    TRANSCENDENTAL,
    applications,
    folded_flops,
    forward_flops,
    program_flops,
    transcendentals,
)
from lumamba_jax.layers import gelu
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.luna import LunaConfig
from lumamba_jax.scan import selective_scan, softplus

WINDOW = (22, 1280)


def analysis(run, *shapes):
    return jax.jit(run).lower(*shapes).compile().cost_analysis()


@pytest.mark.parametrize(
    "config",
    [
        LuMambaConfig(num_blocks=1),
        LuMambaConfig(num_blocks=1, head="attention", num_outputs=2),
        LuMambaConfig(num_blocks=1, head="mamba", num_outputs=2),
        LunaConfig(num_blocks=2),
        LunaConfig(num_blocks=1, embed_dim=96, num_queries=6, head="attention", num_outputs=4),
        FembaConfig(num_blocks=1),
    ],
    ids=lambda config: f"{config.architecture}-{config.head}",
)
def test_formula_of_the_program_agrees_with_the_compiler(config):
    graphdef, params = abstract_model(config)

    def run(params, signal, locations, channel_ids):
        out = nnx.merge(graphdef, params)(signal, locations, channel_ids=channel_ids)
        return out.logits if config.classifies else out.reconstruction

    shapes = [jax.ShapeDtypeStruct((1, 22, *tail), "float32") for tail in ((1280,), (3,))]
    counted = analysis(run, params, *shapes, jax.ShapeDtypeStruct((1, 22), jnp.int32))["flops"]
    # Whether the program folds constant queries is the model's choice; it must be one of the two.
    ratios = [program_flops(config, *WINDOW, folded=folded) / counted for folded in (False, True)]
    assert min(abs(ratio - 1) for ratio in ratios) < 0.05, ratios


@pytest.mark.parametrize(("name", "function"), [("gelu", gelu), ("silu", jax.nn.silu), ("softplus", softplus)])
def test_operations_of_one_element(name, function):
    counted = analysis(function, jax.ShapeDtypeStruct((64, 1000), jnp.float32))
    assert counted["flops"] == pytest.approx(OPERATIONS[name] * 64000, rel=0.1)
    assert counted["transcendentals"] == pytest.approx(64000)


def test_a_step_of_the_scan():
    """One step, so that the loop's body is counted as often as it runs."""
    width, states = 768, 16
    rows, state = (jax.ShapeDtypeStruct((1, 1, size), jnp.float32) for size in (width, states))
    matrix = jax.ShapeDtypeStruct((width, states), jnp.float32)
    counted = analysis(lambda *x: selective_scan(*x, implementation="chunked")[0], rows, rows, matrix, state, state)
    assert counted["flops"] == pytest.approx(6 * width * states, rel=0.03)
    assert counted["transcendentals"] == width * states


def test_work_of_a_window_of_the_published_model():
    """The figures that the roofline of the speed benchmark is made of (docs/performance.md)."""
    config = SIZES["LuMamba tiny"].replace(head="attention", num_outputs=2)
    counts = transcendentals(config, *WINDOW)
    assert counts["exp"] == 768 * 16 * 32 * 4  # decays: inner x states x patches x scans
    assert counts["softplus"] == 768 * 32 * 4
    assert set(counts) <= set(TRANSCENDENTAL) <= set(OPERATIONS)
    nominal, folded = (sum(count(config, *WINDOW).values()) for count in (forward_flops, folded_flops))
    assert 0.9 * nominal < folded < nominal


def test_applications_name_known_functions_in_every_stage():
    for config in SIZES.values():
        counts = applications(config, *WINDOW)
        assert set().union(*counts.values()) <= set(OPERATIONS)
        assert list(counts) == list(forward_flops(config, *WINDOW))


def test_flops_grow_as_the_architectures_promise():
    def temporal(config, patches):
        return forward_flops(config, 22, 40 * patches)["temporal encoder"]

    lumamba, luna = SIZES["LuMamba tiny"], SIZES["LUNA base"]
    assert temporal(lumamba, 4000) == 10 * temporal(lumamba, 400)  # linear
    assert temporal(luna, 4000) > 15 * temporal(luna, 400)  # quadratic in the long run
    with pytest.raises(ValueError, match="fixed grid"):
        forward_flops(SIZES["FEMBA tiny"], 20, 1280)
