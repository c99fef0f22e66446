"""Losses, objectives, optimizer steps and schedules of the PyTorch program, and that the comparison can fail."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lumamba_jax import tasks
from lumamba_jax.heads import ModelOutput
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.masking import STREAMS, stream_key
from lumamba_jax.parity import ParityCase, check_case, read_manifest
from lumamba_jax.parity_cases import compare, compare_group

COMMITTED = Path(__file__).parent / "golden"
CASES = {case.name: case for case in read_manifest(COMMITTED)}
VALUES = (
    "reconstruction_loss",
    "query_specialization",
    "sigreg",
    "lejepa_given_embeddings",
    "normalize",
    "lr_schedules",
)


@dataclasses.dataclass(frozen=True)
class Altered(ParityCase):
    """A case whose stored numbers are those of `altered`."""

    altered: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def data(self):
        return self.altered


def _altered(case, data):
    return Altered(**{field.name: getattr(case, field.name) for field in dataclasses.fields(case)}, altered=data)


def _golden_case(folder, name):
    return next(case for case in read_manifest(folder) if case.name == name)


def _checks(case, *, x64):
    checks = check_case(case, x64=x64)
    failed = [
        f"{c.stage}: error {c.max_error:.2e}, tolerance {c.tolerance:.2e} {c.problem}" for c in checks if not c.passed
    ]
    assert checks
    assert not failed, "\n".join([case.name, *failed])
    return {check.stage: check for check in checks}


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", VALUES)
def test_losses_normalisers_and_schedules(golden_dir, name, x64):
    case = _golden_case(golden_dir, name)
    checks = _checks(case, x64=x64)
    if name == "lr_schedules":
        assert {f"layer-wise factors, {v}" for v in ("luna_large (238 tensors)", "femba_finetune (56 tensors)")} <= set(
            checks
        )
    elif any(key.startswith("grad/") for key in case.data()):
        gradients = next(check for stage, check in checks.items() if stage.startswith("gradients"))
        assert bool(gradients.skipped) != x64


def test_the_mixed_objective_with_every_gradient(golden_dir):
    case = _golden_case(golden_dir, "pretrain_objectives")
    data = {name: x for name, x in case.data().items() if not name.startswith(("f64/rec", "f64/lej"))}
    checks = _checks(_altered(case, data), x64=True)
    terms = ("total_loss", "masked_loss", "query_specialization_loss", "lejepa_loss", "LeJEPA_train_SIGReg_loss")
    assert {"normalized_input", *(f"mixed/{term}" for term in terms)} <= set(checks)
    assert "mixed: gradients (122 tensors)" in checks


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
def test_all_objectives(golden_dir, x64):
    checks = _checks(_golden_case(golden_dir, "pretrain_objectives"), x64=x64)
    assert {stage.split("/")[0] for stage in checks if "/" in stage} == {"reconstruction", "mixed", "lejepa_only"}


@pytest.mark.parametrize("name", [pytest.param("train5_cls_adamw", marks=pytest.mark.slow), "train5_cls_llrd_cosine"])
def test_five_finetuning_steps(golden_dir, name):
    checks = _checks(_golden_case(golden_dir, name), x64=True)
    assert list(checks) == ["losses", "gradient norms", "learning rates", "parameters after 5 steps (126 tensors)"]


def test_a_float32_run_says_that_steps_and_gradients_are_compared_in_float64():
    (steps,) = check_case(CASES["train5_pretrain_adamw"])
    assert (steps.stage, steps.skipped) == ("5 optimizer steps", "compared in float64 only")
    assert check_case(CASES["mamba_d16_L13"])[-1].skipped


@pytest.mark.slow
def test_five_steps_notice_a_parameter_and_a_rate_that_differ():
    case = CASES["train5_pretrain_adamw"]
    data = case.data()
    data["after/norm_layers.0.bias"] = data["after/norm_layers.0.bias"] + 1e-7
    data["f64/lrs"] = data["f64/lrs"] * (1 + 1e-11)
    failed = {c.stage: c for c in check_case(_altered(case, data), x64=True) if not c.passed}
    assert set(failed) == {"learning rates", "parameters after 5 steps (122 tensors)"}
    assert failed["parameters after 5 steps (122 tensors)"].where == "norm_layers.0.bias"


def test_gradients_notice_a_tensor_that_differs_and_one_that_is_missing():
    case = CASES["mamba_d24_n8_k3_L9"]
    data = case.data()
    data["grad/D"] = data["grad/D"] + 1e-7
    failed = [c for c in check_case(_altered(case, data), x64=True) if not c.passed]
    assert [(c.stage, c.where) for c in failed] == [("gradients (10 tensors)", "grad/D")]
    data = case.data() | {"grad/unheard_of": np.zeros(2)}
    failed = [c for c in check_case(_altered(case, data), x64=True) if not c.passed]
    assert [(c.where, c.problem) for c in failed] == [("grad/unheard_of", "our model has no such stage")]


def test_a_case_that_lacks_something_is_one_sentence():
    case = CASES["train5_pretrain_adamw"]
    silent = dataclasses.replace(case, config={name: x for name, x in case.config.items() if name != "optimizer"})
    with pytest.raises(ValueError, match="lack 'optimizer'"):
        check_case(silent, x64=True)


def test_the_worst_of_a_group_is_named_and_nan_is_worse_than_any_number():
    stored = {"a": np.zeros(2), "b": np.ones(3)}
    worst = compare_group("case", "things", {"a": np.full(2, 0.5), "b": np.full(3, 1.25)}, stored, 1.0)
    assert (worst.stage, worst.where, worst.max_error, worst.relative_error) == ("things (2 tensors)", "a", 0.5, 0.5)
    assert worst.passed
    broken = compare_group("case", "things", {"a": np.full(2, 0.5), "b": np.full(3, np.nan)}, stored, 1.0)
    assert broken.where == "b"
    assert not broken.passed
    assert not compare_group("case", "things", {}, {}, 1.0).passed
    assert compare("case", "x", np.zeros((2, 1)), np.zeros(2), 1.0).problem == "shape (2, 1), stored (2,)"


def test_stored_draws_take_the_place_of_ours():
    class Silent:
        """Reconstructs nothing, so that the error is the normalised signal, and remembers how it was called."""

        def __call__(self, signal, locations, **arguments):
            self.arguments = arguments
            return ModelOutput(signal, None, reconstruction=jnp.zeros_like(signal))

    rows, channels, samples = 2, 3, 80
    rng = np.random.default_rng(0)
    batch = {
        "signal": jnp.asarray(rng.normal(size=(rows, channels, samples)), jnp.float32),
        "channel_mask": jnp.ones((rows, channels), bool),
        "patch_mask": jnp.ones((rows, 2), bool),
        "window_mask": jnp.ones(rows, bool),
    }
    keys = {name: stream_key(0, name, 0) for name in STREAMS}
    hidden = np.zeros((rows, channels, samples), bool)
    hidden[:, 0, :40] = True
    noise = jnp.ones((rows, channels, 3))
    model = Silent()
    task = tasks.Pretrain(tasks.TaskConfig(objective="reconstruction"), LuMambaConfig())
    _, terms = task.loss(model, batch, keys, draws=tasks.Draws(jnp.asarray(hidden), noise))
    error = np.abs(np.asarray(tasks.normalize(batch, "channel_zscore")))
    penalty = np.where(error < 1, error**2 / 2, error - 0.5)
    np.testing.assert_allclose(terms["masked"], penalty[hidden].mean(), rtol=1e-5)
    np.testing.assert_allclose(terms["unmasked"], penalty[~hidden].mean(), rtol=1e-5)
    assert model.arguments["position_noise"] is noise
