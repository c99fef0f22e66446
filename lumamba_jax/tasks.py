"""What a model is trained for: pre-training, classification, regression. Joins model, normalisation, draws and losses.

A task turns (model, batch, keys) into a scalar loss and metrics, turns evaluation batches into per-window outputs, and
summarises the collected outputs on the host. Its loss is in two halves: the model turns windows into a few terms each,
one window independent of the other, and a pure objective turns the terms of the whole batch into the loss. So a
gradient can be worked out block by block and device by device (`micro_batches`). The batch is the one of
docs/architecture.md; its padding masks are passed to everything, so a padded window counts exactly as the same window
alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from lumamba_jax import losses, masking, metrics, normalization, representation
from lumamba_jax.architectures import Model, ModelConfig
from lumamba_jax.femba import FembaConfig
from lumamba_jax.flops import forward_flops, stage_of
from lumamba_jax.heads import ModelOutput

Batch = Mapping[str, Array]
Keys = Mapping[str, Key[Array, ""]]
Metrics = dict[str, Float[Array, ""]]
Terms = dict[str, Float[Array, "B ..."]]
EMBEDDING, WINDOW_ERROR = "embedding", "window_error"
"""Outputs of an evaluation in pre-training: embedding of a window, mean error of its own hidden samples."""
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


class Draws(NamedTuple):
    """What one step draws; None where nothing of the kind is drawn.

    Attributes:
        mask: True = hidden.
        position_noise: standard normal.
        view_starts: first sample of every local and of every global view.
        directions: of SIGReg, Gaussian columns, not normalised; shared by all windows, as nothing else is.
    """

    mask: Bool[Array, "B C T"] | None = None
    position_noise: Float[Array, "B C 3"] | None = None
    view_starts: tuple[Int[Array, "B Vl"], Int[Array, "B Vg"]] | None = None
    directions: Float[Array, "M R"] | None = None

    def of_windows(self) -> "Draws":
        """Those whose first axis is the batch: what `Task.window_terms` may read."""
        return self._replace(directions=None)


class Task(ABC):
    """The contract between a task and `training`.

    Attributes:
        curved: names of the terms in which the objective is not linear. Its slope in the others is a function of the
            batch and the draws alone, known before any term is.
    """

    curved: tuple[str, ...] = ()

    @abstractmethod
    def draw(self, batch: Batch, keys: Keys, *, training: bool) -> Draws:
        """All draws for a batch; no position noise when not `training`."""

    @abstractmethod
    def window_terms(self, model: Model, batch: Batch, draws: Draws, rngs: nnx.Rngs | None) -> Terms:
        """What each window contributes, float32 or better: a function of that window, its draws and its dropout."""

    @abstractmethod
    def objective(self, terms: Terms, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], Metrics]:
        """Loss and metrics of the whole batch; of `batch` only masks and labels are read, never the signal's values."""

    def loss(
        self, model: Model, batch: Batch, keys: Keys, *, draws: Draws | None = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """Scalar training loss and scalar metrics; `keys` holds one key per stream of `masking.STREAMS`.

        `draws` take the place of those of `keys`, to repeat a step of another program.
        """
        draws = self.draw(batch, keys, training=True) if draws is None else draws
        terms = self.window_terms(model, batch, draws.of_windows(), dropout_stream(keys["dropout"]))
        return self.objective(terms, batch, draws)

    @abstractmethod
    def window_outputs(self, model: Model, batch: Batch, draws: Draws) -> Terms:
        """What an evaluation needs of each window: a function of that window alone, without dropout."""

    @abstractmethod
    def outputs(self, found: Terms, batch: Batch, draws: Draws) -> Terms:
        """Outputs per window of an evaluation, from the `window_outputs` of the whole batch."""

    def evaluate(self, model: Model, batch: Batch, keys: Keys) -> Terms:
        """Outputs per window, without dropout and noise."""
        draws = self.draw(batch, keys, training=False)
        return self.outputs(self.window_outputs(model, batch, draws.of_windows()), batch, draws)

    @abstractmethod
    def summarize(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None) -> dict[str, float]:
        """Metrics of the collected outputs of real windows `(n, ...)`; always has "loss" (lower is better)."""


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


def passes_flops(config: TaskConfig, model: ModelConfig, num_channels: int, num_samples: int) -> tuple[int, int]:
    """FLOPs of the forward passes of one window: of its reconstruction (or its logits), and of its views."""
    whole = sum(forward_flops(model, num_channels, num_samples).values())
    if config.kind != "pretrain" or config.objective == "reconstruction":
        return whole, 0
    views = 0
    for count, patches in ((config.local_views, config.local_patches), (config.global_views, config.global_patches)):
        stages = forward_flops(model, num_channels, patches * model.patch_size)
        views += count * (sum(stages.values()) - stages["head"])
    return (0 if config.objective == "lejepa" else whole), views


def step_flops(
    config: TaskConfig,
    model: ModelConfig,
    num_channels: int,
    num_samples: int,
    *,
    frozen_encoder: bool = False,
    adapted: Collection[str] = (),
) -> float:
    """Model FLOPs of one window in one training step: three times those of its forward passes, views included.

    A frozen encoder has no backward pass: it counts once. With adapters of the layers `adapted` it has one through its
    activations, from the first adapted stage on, which counts twice; the products with A and B, and what merging costs
    (`merging_flops`), do not count. Padding of a bucket counts like signal.
    """
    if frozen_encoder or adapted:
        stages = forward_flops(model, num_channels, num_samples)
        return float(sum(stages.values()) + sum(_pulled_back(stages, adapted).values()) + stages["head"])
    return 3.0 * sum(passes_flops(config, model, num_channels, num_samples))


def merging_flops(model: ModelConfig, num_channels: int, num_samples: int, adapted: Collection[str]) -> float:
    """What a step executes beyond `step_flops` because adapters are merged, per window and at most.

    The gradients of A and B come from that of their merged kernel: as much as one more pass where there are adapters.
    """
    pulled_back = _pulled_back(forward_flops(model, num_channels, num_samples), adapted)
    return float(sum(flops for stage, flops in pulled_back.items() if stage != "head"))


def _pulled_back(stages: Mapping[str, int], adapted: Collection[str]) -> dict[str, int]:
    """The stages, in the order of computation, from the first one with something to train on; the head is the last."""
    names = list(stages)
    first = min(names.index(stage_of(path)) for path in ("head", *adapted))
    return {name: stages[name] for name in names[first:]}


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
        batch.get("locations"),  # pyright: ignore[reportArgumentType]  (FEMBA needs none)
        channel_ids=batch.get("channel_ids"),
        mask=mask,
        channel_mask=batch.get("channel_mask"),
        patch_mask=batch.get("patch_mask"),
        position_noise=position_noise,
        position_encoding=batch.get("position_encoding"),
        rngs=rngs,
    )
    return output, signal


def dropout_stream(key: Key[Array, ""]) -> nnx.Rngs:
    """The stream of dropout, on the hardware generator: a threefry per dropout site doubles the time to compile."""
    return nnx.Rngs(dropout=jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg"))


class Pretrain(Task):
    """Masked reconstruction with query specialisation, LeJEPA, or both (arXiv 2603.19100; weights in `losses`)."""

    def __init__(self, config: TaskConfig, model: ModelConfig):
        self._config = config
        self._patch_size = model.patch_size
        self._width = model.width
        self._covered = model.covered if isinstance(model, FembaConfig) else (None, None)
        self._views = masking.ViewConfig(
            config.local_views, config.local_patches, config.global_views, config.global_patches
        )
        self._reconstructs = config.objective != "lejepa"
        self.curved = () if config.objective == "reconstruction" else ("local", "global")

    def draw(self, batch: Batch, keys: Keys, *, training: bool) -> Draws:
        """See `Task.draw`."""
        config = self._config
        rows, channels, samples = batch["signal"].shape
        mask = position_noise = starts = directions = None
        if self._reconstructs:
            mask = masking.draw_mask(
                keys["mask"],
                (rows, channels, samples),
                ratio=config.mask_ratio,
                patch=config.mask_patch,
                scope=config.mask_scope,
                channel_mask=batch["channel_mask"],
                patch_mask=batch["patch_mask"],
            )
            if config.position_noise and training:
                position_noise = masking.draw_position_noise(keys["noise"], rows, channels)
        if self.curved:
            local, global_ = masking.draw_view_starts(
                keys["views"],
                self._views,
                n_windows=rows,
                n_times=samples,
                patch_size=self._patch_size,
                patch_mask=batch["patch_mask"],
            )
            starts = local.T, global_.T
            directions = masking.draw_sigreg_directions(keys["slices"], self._width, config.sigreg_slices)
        return Draws(mask, position_noise, starts, directions)

    def window_terms(self, model: Model, batch: Batch, draws: Draws, rngs: nnx.Rngs | None) -> Terms:
        """Sums of errors `(B,)` and the embeddings of the views `(B, V, M)`, as far as the objective has them."""
        terms = self._errors(model, batch, draws, rngs) if self._reconstructs else {}
        return terms | (self._embeddings(model, batch, draws, rngs) if self.curved else {})

    def objective(self, terms: Terms, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], Metrics]:
        """See `Task.objective`."""
        config, window_mask = self._config, batch["window_mask"]
        reconstruction = query = lejepa = None
        metrics: Metrics = {}
        if self._reconstructs:
            errors = losses.ReconstructionErrors(terms["masked"], terms["unmasked"])
            counted = self._counted_samples(batch, draws)
            reconstruction = losses.reconstruction_terms(errors, counted, config.unmasked_weight)
            metrics |= {"masked": reconstruction.masked, "unmasked": reconstruction.unmasked}
        if "query" in terms:
            query = config.query_weight * losses.mean_over(terms["query"], _counted_patches(batch))
            metrics |= {"query": query}
        if self.curved:
            assert draws.directions is not None, "drawn for this objective"
            lejepa = losses.lejepa_terms(
                terms["local"].swapaxes(0, 1),
                terms["global"].swapaxes(0, 1),
                draws.directions,
                window_mask=window_mask,
                sigreg_count=config.sigreg_count,
                lambda_=config.lejepa_lambda,
            )
            metrics |= {"similarity": lejepa.similarity, "sigreg": lejepa.sigreg, "sigreg_global": lejepa.sigreg_global}
        return losses.pretraining_total(reconstruction, query, lejepa, lejepa_weight=config.lejepa_weight), metrics

    def window_outputs(self, model: Model, batch: Batch, draws: Draws) -> Terms:
        """The terms of the objective, and the embedding of the whole visible window `(B, M)`."""
        signal, patch_mask = normalize(batch, self._config.normalization), batch["patch_mask"]
        latent = model.encode(
            signal, batch["locations"], channel_mask=batch["channel_mask"], patch_mask=patch_mask
        ).latent
        padded = patch_mask.shape[1] == latent.shape[1]  # a fixed grid (FEMBA) has steps of its own and no padding
        embedding = losses.view_embeddings(latent[None], patch_mask[None] if padded else None)[0]
        return self.window_terms(model, batch, draws, None) | {EMBEDDING: embedding}

    def outputs(self, found: Terms, batch: Batch, draws: Draws) -> Terms:
        """The losses of the batch, repeated for each of its windows; each window's own error and embedding."""
        total, terms = self.objective(found, batch, draws)
        rows = batch["signal"].shape[0]
        outputs = {name: jnp.broadcast_to(value, (rows,)) for name, value in {"loss": total, **terms}.items()}
        if self._reconstructs:
            hidden = self._counted_samples(batch, draws).hidden
            samples = jnp.sum(hidden, axis=tuple(range(1, hidden.ndim)))
            outputs[WINDOW_ERROR] = found["masked"] / jnp.maximum(samples, 1)
        return outputs | {EMBEDDING: found[EMBEDDING]}

    def summarize(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None = None) -> dict[str, float]:  # noqa: ARG002
        """Means over windows (batch losses weighted by the number of real windows), and the use of the latent space."""
        found = {name: float(np.mean(v, dtype=np.float64)) for name, v in outputs.items() if name != EMBEDDING}
        if EMBEDDING in outputs:
            embeddings = outputs[EMBEDDING]
            found["effective_rank"] = representation.effective_rank(embeddings)
            found["isotropy"] = representation.isotropy(embeddings)
        return found

    def _counted_samples(self, batch: Batch, draws: Draws) -> losses.CountedSamples:
        """The samples that are compared: FEMBA reconstructs whole patches only and may leave a remainder."""
        assert draws.mask is not None, "drawn for this objective"
        channels, samples = self._covered
        valid = masking.valid_samples(batch["signal"], batch["channel_mask"], batch["patch_mask"])
        covered = (slice(None), slice(channels), slice(samples))
        return losses.counted_samples(draws.mask[covered], valid[covered], batch["window_mask"])

    def _errors(self, model: Model, batch: Batch, draws: Draws, rngs: nnx.Rngs | None) -> Terms:
        config = self._config
        output, signal = forward(
            model, batch, config.normalization, mask=draws.mask, position_noise=draws.position_noise, rngs=rngs
        )
        assert output.reconstruction is not None, "checked when the configuration was made"
        target = signal[tuple(slice(size) for size in output.reconstruction.shape)]
        counted = self._counted_samples(batch, draws)
        errors = losses.reconstruction_errors(output.reconstruction, target, counted, config.penalty)
        terms = errors._asdict()
        if output.attention_scores is not None:  # FEMBA has no queries to specialise
            scores, counted = output.attention_scores, _counted_patches(batch)
            terms["query"] = losses.query_overlap(scores, counted, batch["channel_mask"])
        return terms

    def _embeddings(self, model: Model, batch: Batch, draws: Draws, rngs: nnx.Rngs | None) -> Terms:
        config, starts = self._config, draws.view_starts
        assert starts is not None, "drawn for this objective"
        signal, patch_mask = normalize(batch, config.normalization), batch["patch_mask"]
        embeddings = []
        for start, patches in zip(starts, (config.local_patches, config.global_patches), strict=True):
            views = masking.crop_views(signal, start.T, patches * self._patch_size)  # (V, B, C, W)
            valid = masking.view_patch_mask(start.T, patches, self._patch_size, patch_mask, signal.shape[2])
            tokens = _encode_views(model, views, valid, batch, rngs)
            embeddings.append(losses.view_embeddings(tokens, valid).swapaxes(0, 1))
        return {"local": embeddings[0], "global": embeddings[1]}


def _counted_patches(batch: Batch) -> Bool[Array, "B S"]:
    return losses.real_entries(batch["patch_mask"].shape, batch["patch_mask"], batch["window_mask"])


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


class _Supervised(Task):
    """What classification and regression share: one forward pass per batch, outputs collected per window."""

    def __init__(self, config: TaskConfig):
        self._config = config

    def draw(self, batch: Batch, keys: Keys, *, training: bool) -> Draws:
        """See `Task.draw`."""
        if not (self._config.position_noise and training):
            return Draws()
        return Draws(position_noise=masking.draw_position_noise(keys["noise"], *batch["signal"].shape[:2]))

    def window_terms(self, model: Model, batch: Batch, draws: Draws, rngs: nnx.Rngs | None) -> Terms:
        """Sums `(B,)` over the outputs of each window."""
        noise = draws.position_noise
        output, _ = forward(model, batch, self._config.normalization, position_noise=noise, rngs=rngs)
        return self._sums(_logits(output), batch)

    @abstractmethod
    def _sums(self, logits: Float[Array, "B ..."], batch: Batch) -> Terms: ...

    def window_outputs(self, model: Model, batch: Batch, draws: Draws) -> Terms:  # noqa: ARG002
        """Raw outputs of the head, `logits (B, K)`."""
        return {"logits": _logits(forward(model, batch, self._config.normalization)[0])}

    def outputs(self, found: Terms, batch: Batch, draws: Draws) -> Terms:  # noqa: ARG002
        """The same."""
        return found


def _independent(labels: Array) -> bool:
    return jnp.issubdtype(labels.dtype, jnp.floating)


class Classify(_Supervised):
    """Softmax cross-entropy; sigmoid cross-entropy per output where the labels are `(B, K)` (one decision each)."""

    def __init__(self, config: TaskConfig, class_weights: np.ndarray | None = None):
        super().__init__(config)
        self._class_weights = None if class_weights is None else np.asarray(class_weights)

    def _sums(self, logits: Float[Array, "B ..."], batch: Batch) -> Terms:
        labels, window_mask = batch["label"], batch["window_mask"]
        if _independent(labels):
            counted = losses.real_entries(labels.shape, window_mask=window_mask)
            return {"loss": losses.binary_cross_entropy_sums(logits, labels, counted)}
        counted = losses.labelled(labels, window_mask)
        sums = losses.cross_entropy_sums(
            logits,
            labels,
            counted,
            class_weights=self._weights(),
            label_smoothing=self._config.label_smoothing,
        )
        correct = (jnp.argmax(logits, axis=-1) == labels) & counted
        return {"loss": sums, "correct": jnp.sum(correct, axis=tuple(range(1, labels.ndim))).astype(sums.dtype)}

    def objective(self, terms: Terms, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], Metrics]:  # noqa: ARG002
        """See `Task.objective`."""
        labels, window_mask = batch["label"], batch["window_mask"]
        if _independent(labels):
            counted = losses.real_entries(labels.shape, window_mask=window_mask)
            return losses.mean_over(terms["loss"], counted), {}
        counted = losses.labelled(labels, window_mask)
        loss = losses.mean_over_labels(terms["loss"], labels, counted, self._weights())
        return loss, {"accuracy": losses.mean_over(terms["correct"], counted)}

    def _weights(self) -> Float[Array, "K"] | None:
        return None if self._class_weights is None else jnp.asarray(self._class_weights)

    def summarize(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None) -> dict[str, float]:
        """Unweighted cross-entropy and the classification metrics, windows pooled; two classes for each channel are
        scored as independent outputs (`mc`, recipes 5)."""
        logits, labels = np.asarray(outputs["logits"]), np.asarray(labels)
        if np.issubdtype(labels.dtype, np.floating):
            loss = float(losses.binary_cross_entropy(jnp.asarray(logits), jnp.asarray(labels)))
            return {"loss": loss, **metrics.multilabel(logits, labels)}
        loss = float(losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels)))
        if labels.ndim == 2 and logits.shape[-1] == 2:
            return {"loss": loss, **metrics.multilabel(*metrics.as_yes_or_no(logits, labels))}
        return {"loss": loss, **metrics.classification(logits, labels)}


class Regress(_Supervised):
    """Mean squared error over windows and outputs."""

    def _sums(self, logits: Float[Array, "B ..."], batch: Batch) -> Terms:
        return {"loss": losses.squared_error_sums(logits, batch["label"], self._counted(batch))}

    def objective(self, terms: Terms, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], Metrics]:  # noqa: ARG002
        """See `Task.objective`."""
        loss = losses.mean_over(terms["loss"], self._counted(batch))
        return loss, {"rmse": jnp.sqrt(loss)}

    def _counted(self, batch: Batch) -> Bool[Array, "B K"]:
        return losses.real_entries(batch["label"].shape, window_mask=batch["window_mask"])

    def summarize(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray | None) -> dict[str, float]:
        """Mean squared error and the regression metrics."""
        prediction, labels = np.asarray(outputs["logits"], np.float64), np.asarray(labels, np.float64)
        return {"loss": float(np.mean((prediction - labels) ** 2)), **metrics.regression(prediction, labels)}
