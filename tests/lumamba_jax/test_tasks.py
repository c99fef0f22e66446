"""Tasks: the totals are the sums they claim, padding counts for nothing, evaluation is free of noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.metrics import roc_auc_score

from lumamba_jax import tasks
from lumamba_jax.heads import ModelOutput
from lumamba_jax.lumamba import LuMamba, LuMambaConfig
from lumamba_jax.masking import STREAMS, stream_key
from lumamba_jax.tasks import Classify, Regress, TaskConfig, make_task

MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=1, d_state=4)
PRETRAIN = TaskConfig(sigreg_slices=8, local_views=2, local_patches=1, global_views=1, global_patches=2)
ROWS, CHANNELS, PATCHES = 4, 3, 4


def keys(step: int = 0) -> dict[str, jax.Array]:
    return {name: stream_key(0, name, step) for name in STREAMS}


def padded_batch(junk: int) -> dict[str, jax.Array]:
    """Row 0 lacks a channel, row 1 two patches, row 3 is filler; everything padded is drawn from seed `junk`."""
    rng = np.random.default_rng(0)
    samples = PATCHES * MICRO.patch_size
    channel_mask, patch_mask = np.ones((ROWS, CHANNELS), bool), np.ones((ROWS, PATCHES), bool)
    channel_mask[0, -1], patch_mask[1, -2:] = False, False
    window_mask = np.array([True, True, True, False])
    real = (
        channel_mask[:, :, None] & np.repeat(patch_mask, MICRO.patch_size, axis=1)[:, None] & window_mask[:, None, None]
    )
    noise = np.random.default_rng(junk)

    def mixed(scale: float, shape: tuple[int, ...], where: np.ndarray) -> np.ndarray:
        return np.where(where, scale * rng.standard_normal(shape), 100 * noise.standard_normal(shape)).astype(
            np.float32
        )

    known = channel_mask & window_mask[:, None]
    batch = {
        "signal": mixed(20, (ROWS, CHANNELS, samples), real),
        "locations": mixed(0.1, (ROWS, CHANNELS, 3), known[..., None]),
        "channel_ids": np.where(known, rng.integers(0, 90, known.shape), noise.integers(0, 90, known.shape)).astype(
            np.int32
        ),
        "channel_mask": channel_mask,
        "patch_mask": patch_mask,
        "window_mask": window_mask,
    }
    return {key: jnp.asarray(value) for key, value in batch.items()}


@pytest.fixture(scope="module")
def pretraining():
    """(evaluate, outputs of one batch): the compiled mixed objective in evaluation."""
    graphdef, params = nnx.split(LuMamba(MICRO, rngs=nnx.Rngs(0)))
    task = make_task(PRETRAIN, MICRO)
    evaluate = jax.jit(lambda batch, keys: task.evaluate(nnx.merge(graphdef, params), batch, keys))
    return evaluate, evaluate(padded_batch(1), keys())


def test_the_mixed_total_is_the_published_sum(pretraining):
    values = {name: float(value[0]) for name, value in pretraining[1].items() if value.ndim == 1}
    lejepa = 0.998 * values["similarity"] + 0.002 * values["sigreg"]
    expected = values["masked"] + 0.05 * values["unmasked"] + values["query"] + 0.05 * lejepa
    assert values["loss"] == pytest.approx(expected, rel=1e-6)
    assert values["sigreg"] == values["sigreg_global"]  # sigreg_count None is the global batch


def test_what_is_padded_does_not_count(pretraining):
    evaluate, outputs = pretraining
    for name, value in evaluate(padded_batch(2), keys()).items():
        real = slice(ROWS - 1)  # the last row is filler: what it embeds to is dropped by the trainer
        np.testing.assert_allclose(value[real], outputs[name][real], rtol=1e-5, err_msg=name)


def test_evaluation_has_masks_but_no_dropout_and_no_noise(pretraining):
    evaluate, outputs = pretraining
    other = keys(5)
    for stream in ("dropout", "noise"):
        found = evaluate(padded_batch(1), keys() | {stream: other[stream]})
        np.testing.assert_array_equal(found["loss"], outputs["loss"])
    changed = {"mask": "masked", "views": "similarity", "slices": "sigreg"}
    for stream, metric in changed.items():
        assert evaluate(padded_batch(1), keys() | {stream: other[stream]})[metric][0] != outputs[metric][0]


def test_dropout_of_a_step_is_a_function_of_the_step():
    draws = [jax.random.uniform(tasks.dropout_stream(keys(step)["dropout"]).dropout(), (5,)) for step in (3, 3, 4)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


class FixedModel:
    """Stands in for a model: returns the given logits and remembers the arguments it was called with."""

    def __init__(self, logits: np.ndarray):
        self.logits = jnp.asarray(logits)

    def __call__(self, signal, locations, **arguments):
        self.arguments = arguments
        return ModelOutput(signal, signal, logits=self.logits)


def labelled(labels: np.ndarray) -> dict[str, jax.Array]:
    return padded_batch(1) | {"label": jnp.asarray(labels)}


def test_classification_weighs_classes_and_leaves_filler_out():
    logits = np.random.default_rng(3).standard_normal((ROWS, 3)).astype(np.float32)
    labels, weights = np.array([0, 2, 1, 0], np.int32), np.array([1.0, 2.0, 4.0], np.float32)
    loss, metrics = Classify(TaskConfig(kind="classify"), weights).loss(FixedModel(logits), labelled(labels), keys())
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = weights[labels[:3]]
    expected = -(own * log_p[np.arange(3), labels[:3]]).sum() / own.sum()
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(logits[:3].argmax(1) == labels[:3]))


def test_float_labels_of_a_classification_are_independent_decisions():
    logits = np.random.default_rng(4).standard_normal((ROWS, 2)).astype(np.float32)
    labels = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)
    task = Classify(TaskConfig(kind="classify"))
    loss, _ = task.loss(FixedModel(logits), labelled(labels), keys())
    p = 1 / (1 + np.exp(-logits))
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))[:3].mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    scores = task.summarize({"logits": logits}, labels)
    assert scores["accuracy"] == pytest.approx(np.mean((logits > 0) == (labels > 0.5)))


def test_two_classes_per_channel_are_scored_as_a_decision_of_each_channel():
    """As eval.py scores them: means over channels, ranked by the difference of the two logits, not all pooled."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 2, (40, 3))
    logits = rng.normal(size=(40, 3, 2)) + np.array([[0, 0], [0, 3], [4, 0]])
    scores = Classify(TaskConfig(kind="classify")).summarize({"logits": logits}, labels)
    ranked = logits[..., 1] - logits[..., 0]
    expected = np.mean([roc_auc_score(labels[:, k], ranked[:, k]) for k in range(3)])
    assert scores["auroc"] == pytest.approx(expected, abs=1e-12)
    assert abs(expected - roc_auc_score(labels.ravel(), ranked.ravel())) > 1e-3
    assert scores["loss"] > 0


def test_regression_is_the_mean_squared_error_of_real_windows():
    prediction = np.random.default_rng(5).standard_normal((ROWS, 2)).astype(np.float32)
    target = np.random.default_rng(6).standard_normal((ROWS, 2)).astype(np.float32)
    task = Regress(TaskConfig(kind="regress"))
    loss, metrics = task.loss(FixedModel(prediction), labelled(target), keys())
    expected = np.mean((prediction - target)[:3] ** 2)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["rmse"]) == pytest.approx(np.sqrt(expected), rel=1e-6)
    scores = task.summarize({"logits": prediction}, target)
    assert scores["loss"] == pytest.approx(np.mean((prediction - target) ** 2), rel=1e-6)


def test_position_noise_is_a_matter_of_training_and_can_be_off():
    logits, labels = np.zeros((ROWS, 2), np.float32), np.zeros(ROWS, np.int32)
    for on in (True, False):
        model = FixedModel(logits)
        task = Classify(TaskConfig(kind="classify", position_noise=on))
        task.loss(model, labelled(labels), keys())
        assert (model.arguments["position_noise"] is not None) == on
        task.evaluate(model, labelled(labels), keys())
        assert model.arguments["position_noise"] is None
        assert model.arguments["rngs"] is None


def test_unnormalised_input_keeps_its_values_and_loses_its_padding():
    batch = padded_batch(1)
    signal = np.asarray(tasks.normalize(batch, "none"))
    assert (signal[0, -1] == 0).all()
    assert (signal[1, :, -2 * MICRO.patch_size :] == 0).all()
    np.testing.assert_array_equal(signal[2], batch["signal"][2])


@pytest.mark.parametrize("values", [{"mask_ratio": 1.0}, {"label_smoothing": 1.0}, {"local_views": 0}])
def test_impossible_tasks_are_refused(values):
    with pytest.raises(ValueError, match="task: "):
        TaskConfig(**values)
