"""What a model is trained for: pre-training, classification, regression. Joins model, normalisation, draws and losses.

A task turns (model, batch, keys) into a scalar loss and metrics, turns evaluation batches into per-window outputs, and
summarises the collected outputs on the host. The batch is the one of docs/architecture.md; its padding masks are passed
to everything, so a padded window counts exactly as the same window alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from lumamba_jax import losses, masking, metrics, normalization
from lumamba_jax.architectures import Model, ModelConfig
from lumamba_jax.femba import FembaConfig
from lumamba_jax.heads import ModelOutput

Batch = Mapping[str, Array]
Keys = Mapping[str, Key[Array, ""]]
Metrics = dict[str, Float[Array, ""]]
Objective = Literal["reconstruction", "lejepa", "mixed"]
Normalization = Literal["channel_zscore", "iqr", "fixed_affine", "none"]


@dataclass(frozen=True)
class TaskConfig:
    """What is optimised.

    Attributes:
        kind: "pretrain" (no labels), "classify" or "regress".
        normalization: of the input, per window; "none" for windows that were normalised when they were made.
        position_noise: noise on electrode positions in training (never in evaluation; recipes R9).
        objective: pre-training: masked reconstruction, LeJEPA, or both.
        mask_ratio: share of the patches that is hidden.
        mask_patch: channels and samples of one hidden rectangle.
        mask_scope: "per_sample", or "reference": one set of rectangles for the whole batch (recipes R3).
        penalty: elementwise reconstruction error.
        unmasked_weight: weight of the visible samples in the reconstruction (0 as published for FEMBA).
        query_weight: weight of the query specialisation.
        lejepa_weight: weight of the LeJEPA term in the total.
        lejepa_lambda: share of SIGReg in the LeJEPA term.
        sigreg_slices: random directions of SIGReg per step.
        sigreg_count: factor of SIGReg; None = the global batch (recipes R4).
        local_views, local_patches: number and length (in patches) of the local views.
        global_views, global_patches: number and length of the global views.
        class_weights: "balanced" weighs classes by inverse frequency in the training windows.
        label_smoothing: classification.
    """

    kind: Literal["pretrain", "classify", "regress"] = "pretrain"
    normalization: Normalization = "channel_zscore"
    position_noise: bool = True
    objective: Objective = "mixed"
    mask_ratio: float = 0.5
    mask_patch: tuple[int, int] = (1, 40)
    mask_scope: masking.MaskScope = "per_sample"
    penalty: losses.Penalty = "smooth_l1"
    unmasked_weight: float = losses.UNMASKED_WEIGHT
    query_weight: float = losses.QUERY_WEIGHT
    lejepa_weight: float = losses.LEJEPA_WEIGHT
    lejepa_lambda: float = losses.LEJEPA_LAMBDA
    sigreg_slices: int = 300
    sigreg_count: float | None = None
    local_views: int = 4
    local_patches: int = 4
    global_views: int = 2
    global_patches: int = 16
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"task: mask_ratio must lie between 0 and 1, not {self.mask_ratio}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"task: label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        counts = (self.sigreg_slices, self.local_views, self.local_patches, self.global_views, self.global_patches)
        if min(counts) < 1:
            raise ValueError("task: sigreg_slices and the numbers and lengths of views must be at least 1")


class Task(Protocol):
    """The contract between a task and `training`."""

    def loss(self, model: Model, batch: Batch, keys: Keys) -> tuple[Float[Array, ""], Metrics]:
        """Scalar training loss and scalar metrics; `keys` holds one key per stream of `masking.STREAMS`."""
        ...

    def evaluate(self, model: Model, batch: Batch, keys: Keys) -> dict[str, Float[Array, "B ..."]]:
        """Outputs per window, without dropout and noise."""
        ...

    def summarize(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None) -> dict[str, float]:
        """Metrics of the collected outputs of real windows `(n, ...)`; always has "loss" (lower is better)."""
        ...


def check_objective(config: TaskConfig, model: ModelConfig) -> None:
    """Raise ValueError when the architecture cannot be pre-trained with the objective."""
    if config.kind == "pretrain" and isinstance(model, FembaConfig) and config.objective != "reconstruction":
        raise ValueError("FEMBA's fixed grid has no shorter views: it needs task.objective reconstruction")


def make_task(config: TaskConfig, model: ModelConfig, class_weights: np.ndarray | None = None) -> Task:
    """The task of `config`. `class_weights (K,)` are applied to the training loss of a classification."""
    check_objective(config, model)
    if config.kind == "pretrain":
        return Pretrain(config, model)
    return Classify(config, class_weights) if config.kind == "classify" else Regress(config)


def normalize(batch: Batch, how: Normalization) -> Float[Array, "B C T"]:
    """The signal of a batch as the model sees it: microvolts -> normalised, padding exactly 0."""
    channel_mask, patch_mask = batch.get("channel_mask"), batch.get("patch_mask")
    if how == "none":
        valid = masking.valid_samples(batch["signal"], channel_mask, patch_mask)
        return jnp.where(valid, batch["signal"], 0)
    return getattr(normalization, how)(batch["signal"], channel_mask, patch_mask)


def forward(
    model: Model,
    batch: Batch,
    how: Normalization,
    *,
    mask: Bool[Array, "B C T"] | None = None,
    position_noise: Float[Array, "B C 3"] | None = None,
    rngs: nnx.Rngs | None = None,
) -> tuple[ModelOutput, Float[Array, "B C T"]]:
    """Normalise a batch and run the whole model. Returns (output, normalised signal)."""
    signal = normalize(batch, how)
    output = model(
        signal,
        batch.get("locations"),
        channel_ids=batch.get("channel_ids"),
        mask=mask,
        channel_mask=batch.get("channel_mask"),
        patch_mask=batch.get("patch_mask"),
        position_noise=position_noise,
        position_encoding=batch.get("position_encoding"),
        rngs=rngs,
    )
    return output, signal


def _dropout(keys: Keys) -> nnx.Rngs:
    """The stream of dropout, on the hardware generator: a threefry per dropout site doubles the time to compile."""
    words = jax.random.key_data(keys["dropout"])
    return nnx.Rngs(dropout=jax.random.wrap_key_data(jnp.tile(words, 2), impl="rbg"))


class PretrainDraws(NamedTuple):
    """What one step of pre-training draws; None where its objective draws nothing of the kind.

    Attributes:
        mask: True = hidden.
        position_noise: standard normal.
        view_starts: first sample of every local and of every global view.
        directions: of SIGReg, Gaussian columns, not normalised.
    """

    mask: Bool[Array, "B C T"] | None = None
    position_noise: Float[Array, "B C 3"] | None = None
    view_starts: tuple[Int[Array, "Vl B"], Int[Array, "Vg B"]] | None = None
    directions: Float[Array, "M R"] | None = None


class Pretrain:
    """Masked reconstruction with query specialisation, LeJEPA, or both (arXiv 2603.19100; weights in `losses`)."""

    def __init__(self, config: TaskConfig, model: ModelConfig):
        self._config = config
        self._patch_size = model.patch_size
        self._width = model.width
        self._views = masking.ViewConfig(
            config.local_views, config.local_patches, config.global_views, config.global_patches
        )

    def loss(
        self, model: Model, batch: Batch, keys: Keys, *, draws: PretrainDraws | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """See `Task.loss`. `draws` take the place of those of `keys`, to repeat a step of another program."""
        return self._objective(model, batch, draws or self._draw(batch, keys, noise=True), _dropout(keys))

    def evaluate(self, model: Model, batch: Batch, keys: Keys) -> dict[str, Float[Array, "B"]]:
        """The losses of the batch, repeated for each of its windows."""
        total, terms = self._objective(model, batch, self._draw(batch, keys, noise=False), None)
        rows = batch["signal"].shape[0]
        return {name: jnp.broadcast_to(value, (rows,)) for name, value in {"loss": total, **terms}.items()}

    def summarize(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None = None) -> dict[str, float]:  # noqa: ARG002
        """Means over windows: batch losses weighted by the number of real windows."""
        return {name: float(np.mean(values, dtype=np.float64)) for name, values in outputs.items()}

    def _draw(self, batch: Batch, keys: Keys, *, noise: bool) -> PretrainDraws:
        config = self._config
        rows, channels, samples = batch["signal"].shape
        mask = position_noise = starts = directions = None
        if config.objective != "lejepa":
            mask = masking.draw_mask(
                keys["mask"],
                (rows, channels, samples),
                ratio=config.mask_ratio,
                patch=config.mask_patch,
                scope=config.mask_scope,
                channel_mask=batch["channel_mask"],
                patch_mask=batch["patch_mask"],
            )
            if config.position_noise and noise:
                position_noise = masking.draw_position_noise(keys["noise"], rows, channels)
        if config.objective != "reconstruction":
            starts = masking.draw_view_starts(
                keys["views"],
                self._views,
                n_windows=rows,
                n_times=samples,
                patch_size=self._patch_size,
                patch_mask=batch["patch_mask"],
            )
            directions = masking.draw_sigreg_directions(keys["slices"], self._width, config.sigreg_slices)
        return PretrainDraws(mask, position_noise, starts, directions)

    def _objective(
        self, model: Model, batch: Batch, draws: PretrainDraws, rngs: nnx.Rngs | None
    ) -> tuple[Array, Metrics]:
        reconstruction = query = lejepa = None
        metrics: Metrics = {}
        if self._config.objective != "lejepa":
            reconstruction, query = self._reconstruction(model, batch, draws, rngs)
            metrics |= {"masked": reconstruction.masked, "unmasked": reconstruction.unmasked}
            metrics |= {} if query is None else {"query": query}
        if self._config.objective != "reconstruction":
            lejepa = self._lejepa(model, batch, draws, rngs)
            metrics |= {"similarity": lejepa.similarity, "sigreg": lejepa.sigreg, "sigreg_global": lejepa.sigreg_global}
        total = losses.pretraining_total(reconstruction, query, lejepa, lejepa_weight=self._config.lejepa_weight)
        return total, metrics

    def _reconstruction(
        self, model: Model, batch: Batch, draws: PretrainDraws, rngs: nnx.Rngs | None
    ) -> tuple[losses.ReconstructionTerms, Float[Array, ""] | None]:
        config, mask = self._config, draws.mask
        assert mask is not None, "drawn for this objective"
        output, signal = forward(
            model, batch, config.normalization, mask=mask, position_noise=draws.position_noise, rngs=rngs
        )
        assert output.reconstruction is not None, "checked when the configuration was made"
        window_mask = batch["window_mask"]
        valid = masking.valid_samples(signal, batch["channel_mask"], batch["patch_mask"])
        # FEMBA reconstructs whole patches only; a remainder that its strides leave is not compared.
        covered = tuple(slice(size) for size in output.reconstruction.shape)
        terms = losses.masked_reconstruction(
            output.reconstruction,
            signal[covered],
            mask[covered],
            valid=valid[covered],
            window_mask=window_mask,
            kind=config.penalty,
            unmasked_weight=config.unmasked_weight,
        )
        if output.attention_scores is None:  # FEMBA has no queries to specialise
            return terms, None
        query = losses.query_specialization(
            output.attention_scores,
            channel_mask=batch["channel_mask"],
            patch_mask=batch["patch_mask"],
            window_mask=window_mask,
            weight=config.query_weight,
        )
        return terms, query

    def _lejepa(self, model: Model, batch: Batch, draws: PretrainDraws, rngs: nnx.Rngs | None) -> losses.LeJEPATerms:
        config, starts, directions = self._config, draws.view_starts, draws.directions
        assert starts is not None, "drawn for this objective"
        assert directions is not None, "drawn for this objective"
        signal, patch_mask = normalize(batch, config.normalization), batch["patch_mask"]
        samples = signal.shape[2]
        tokens, masks = [], []
        for start, patches in zip(starts, (config.local_patches, config.global_patches), strict=True):
            views = masking.crop_views(signal, start, patches * self._patch_size)  # (V, B, C, W)
            valid = masking.view_patch_mask(start, patches, self._patch_size, patch_mask, samples)
            tokens.append(_encode_views(model, views, valid, batch, rngs))
            masks.append(valid)
        return losses.lejepa(
            tokens[0],
            tokens[1],
            directions,
            local_patch_mask=masks[0],
            global_patch_mask=masks[1],
            window_mask=batch["window_mask"],
            sigreg_count=config.sigreg_count,
            lambda_=config.lejepa_lambda,
        )


def _encode_views(
    model: Model, views: Float[Array, "V B C W"], valid: Bool[Array, "V B P"], batch: Batch, rngs: nnx.Rngs | None
) -> Float[Array, "V B P M"]:
    """Encode all views as one batch. Rows are window-major (b*V + v), so that a split over devices stays in place."""
    count, rows = views.shape[:2]
    latent = model.encode(
        views.swapaxes(0, 1).reshape(rows * count, *views.shape[2:]),  # (B*V, C, W)
        jnp.repeat(batch["locations"], count, axis=0),
        channel_mask=jnp.repeat(batch["channel_mask"], count, axis=0),
        patch_mask=valid.swapaxes(0, 1).reshape(rows * count, -1),
        rngs=rngs,
    ).latent
    return latent.reshape(rows, count, *latent.shape[1:]).swapaxes(0, 1)


def _logits(output: ModelOutput) -> Float[Array, "B ..."]:
    assert output.logits is not None, "the head is checked when the configuration is made"
    return output.logits


class _Supervised:
    """What classification and regression share: one forward pass per batch, outputs collected per window."""

    def __init__(self, config: TaskConfig):
        self._config = config

    def evaluate(self, model: Model, batch: Batch, keys: Keys) -> dict[str, Float[Array, "B ..."]]:  # noqa: ARG002
        """Raw outputs of the head, `logits (B, K)`."""
        return {"logits": _logits(forward(model, batch, self._config.normalization)[0])}

    def _training_logits(self, model: Model, batch: Batch, keys: Keys) -> Float[Array, "B K"]:
        noise = None
        if self._config.position_noise:
            noise = masking.draw_position_noise(keys["noise"], *batch["signal"].shape[:2])
        rngs = _dropout(keys)
        return _logits(forward(model, batch, self._config.normalization, position_noise=noise, rngs=rngs)[0])


class Classify(_Supervised):
    """Softmax cross-entropy; sigmoid cross-entropy per output where the labels are `(B, K)` (one decision each)."""

    def __init__(self, config: TaskConfig, class_weights: np.ndarray | None = None):
        super().__init__(config)
        self._class_weights = class_weights

    def loss(self, model: Model, batch: Batch, keys: Keys) -> tuple[Float[Array, ""], Metrics]:
        """See `Task.loss`."""
        logits, labels = self._training_logits(model, batch, keys), batch["label"]
        window_mask = batch["window_mask"]
        if jnp.issubdtype(labels.dtype, jnp.floating):
            return losses.binary_cross_entropy(logits, labels, window_mask=window_mask), {}
        weights = None if self._class_weights is None else jnp.asarray(self._class_weights)
        loss = losses.cross_entropy(
            logits,
            labels,
            class_weights=weights,
            label_smoothing=self._config.label_smoothing,
            window_mask=window_mask,
        )
        correct = (jnp.argmax(logits, axis=-1) == labels) & window_mask
        return loss, {"accuracy": jnp.sum(correct) / jnp.maximum(jnp.sum(window_mask), 1)}

    def summarize(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None) -> dict[str, float]:
        """Unweighted cross-entropy and the classification metrics, windows pooled."""
        logits, labels = np.asarray(outputs["logits"]), np.asarray(labels)
        if np.issubdtype(labels.dtype, np.floating):
            loss = float(losses.binary_cross_entropy(jnp.asarray(logits), jnp.asarray(labels)))
            return {"loss": loss, **metrics.multilabel(logits, labels)}
        loss = float(losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels)))
        return {"loss": loss, **metrics.classification(logits, labels)}


class Regress(_Supervised):
    """Mean squared error over windows and outputs."""

    def loss(self, model: Model, batch: Batch, keys: Keys) -> tuple[Float[Array, ""], Metrics]:
        """See `Task.loss`."""
        prediction = self._training_logits(model, batch, keys)
        loss = losses.mean_squared_error(prediction, batch["label"], window_mask=batch["window_mask"])
        return loss, {"rmse": jnp.sqrt(loss)}

    def summarize(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None) -> dict[str, float]:
        """Mean squared error and the regression metrics."""
        prediction, labels = np.asarray(outputs["logits"], np.float64), np.asarray(labels, np.float64)
        return {"loss": float(np.mean((prediction - labels) ** 2)), **metrics.regression(prediction, labels)}
