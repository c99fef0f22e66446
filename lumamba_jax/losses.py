"""Losses of pre-training and fine-tuning: pure functions of arrays, exact under padding.

Each loss is a mean over the real entries of the batch: entries of padded channels, padded patches and filler windows
are left out of sums and counts alike, and their gradient is exactly zero. All sums run in float32 or better. Under
`jit` the batch axis is the global one, so a mean over it is the mean over all devices, as SIGReg's characteristic
function needs.

A mean over a batch comes in two halves, a sum per window and a count that only masks and labels decide: so a batch can
be worked through block by block (`micro_batches`), and the sums of the blocks give exactly the mean of the whole.

The total of pre-training (LuMamba arXiv 2603.19100; constants of its released code):

    masked + 0.05 unmasked  +  0.8 query specialisation  +  0.05 ((1 - 0.002) similarity + 0.002 SIGReg)
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

UNMASKED_WEIGHT = 0.05
"""Weight of the reconstruction error of visible samples (golden/README quirk 25)."""
QUERY_WEIGHT = 0.8
"""Weight of the query specialisation term (LUNA arXiv 2510.22257)."""
LEJEPA_WEIGHT = 0.05
"""Weight of the LeJEPA term in the total of LuMamba."""
LEJEPA_LAMBDA = 0.002
"""Share of SIGReg inside the LeJEPA term."""
SIGREG_POINTS, SIGREG_LIMIT = 17, 5.0
"""Quadrature of SIGReg: 17 equidistant nodes on [-5, 5], trapezoid rule."""
DIRECTION_EPS = 1e-12
"""Added to the norm of a SIGReg direction (the reference's constant)."""

Penalty = Literal["smooth_l1", "l1", "l2"]


def _float32_or_better(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _masked_mean(
    values: Float[Array, "*shape"], valid: Bool[Array, "*shape"], axis: int | None = None
) -> Float[Array, "..."]:
    """Mean of the valid entries; 0 where there is none."""
    count = _count(valid, axis).astype(values.dtype)
    return jnp.sum(jnp.where(valid, values, 0), axis=axis) / jnp.maximum(count, 1)


def mean_over(sums: Float[Array, "B"], counted: Bool[Array, "B ..."]) -> Float[Array, ""]:
    """Mean of the entries that count, of which `sums` are the sums per window; 0 where there is none."""
    return jnp.sum(sums) / jnp.maximum(_count(counted).astype(sums.dtype), 1)


def _sum_per_window(values: Float[Array, "B *rest"], counted: Bool[Array, "B *rest"]) -> Float[Array, "B"]:
    return jnp.sum(jnp.where(counted, values, 0), axis=tuple(range(1, values.ndim)))


def _count(counted: Bool[Array, "*shape"], axis: int | None = None) -> Int[Array, "..."]:
    """In integers: float32 stops counting at 2^24."""
    return jnp.sum(counted, axis=axis, dtype=jnp.int32)


def _windows_like(window_mask: Bool[Array, "B"] | None, shape: tuple[int, ...], axis: int = 0) -> Bool[Array, "..."]:
    """Spread `window_mask` along `axis` of an array of `shape`; no mask means every window counts."""
    if window_mask is None:
        return jnp.ones(shape, dtype=bool)
    aligned = [1] * len(shape)
    aligned[axis] = shape[axis]
    return jnp.broadcast_to(window_mask.reshape(aligned), shape)


def real_entries(
    shape: tuple[int, ...], valid: Bool[Array, "*shape"] | None = None, window_mask: Bool[Array, "B"] | None = None
) -> Bool[Array, "*shape"]:
    """Which entries of an array of `shape` (B, ...) count: the `valid` ones of windows that are no filler."""
    counted = _windows_like(window_mask, shape)
    return counted if valid is None else counted & valid


def penalty(difference: Float[Array, "*shape"], kind: Penalty) -> Float[Array, "*shape"]:
    """Elementwise penalty: `|d|`, `d^2`, or smooth-L1 with beta 1 (`d^2/2` below 1, `|d| - 1/2` above)."""
    if kind == "l2":
        return difference**2
    magnitude = jnp.abs(difference)
    if kind == "l1":
        return magnitude
    if kind == "smooth_l1":
        return jnp.where(magnitude < 1, 0.5 * difference**2, magnitude - 0.5)
    raise ValueError(f"unknown penalty {kind!r}: choose smooth_l1, l1 or l2")


# --- pre-training ----------------------------------------------------------------------------------------------------


class ReconstructionTerms(NamedTuple):
    """`total = masked + 0.05 unmasked`; the LuMamba task logs `total` as "masked_loss", the LUNA task logs `masked`."""

    total: Float[Array, ""]
    masked: Float[Array, ""]
    unmasked: Float[Array, ""]


class CountedSamples(NamedTuple):
    """Which samples of a batch count in the reconstruction, hidden from the model or visible to it."""

    hidden: Bool[Array, "B C T"]
    visible: Bool[Array, "B C T"]


def counted_samples(
    mask: Bool[Array, "B C T"],
    valid: Bool[Array, "B C T"] | None = None,
    window_mask: Bool[Array, "B"] | None = None,
) -> CountedSamples:
    """Divide the real samples of real windows by `mask`; arguments as in `masked_reconstruction`."""
    counted = real_entries(mask.shape, valid, window_mask)
    return CountedSamples(counted & mask, counted & ~mask)


class ReconstructionErrors(NamedTuple):
    """Sums per window of the error of hidden and of visible samples."""

    masked: Float[Array, "B"]
    unmasked: Float[Array, "B"]


def reconstruction_errors(
    reconstruction: Float[Array, "B C T"], target: Float[Array, "B C T"], counted: CountedSamples, kind: Penalty
) -> ReconstructionErrors:
    """The sums of which `reconstruction_terms` makes means."""
    # Padding is removed before the penalty: a non-finite value there must not reach the gradient.
    difference = _float32_or_better(reconstruction) - _float32_or_better(target)
    error = penalty(jnp.where(counted.hidden | counted.visible, difference, 0), kind)
    return ReconstructionErrors(*(_sum_per_window(error, which) for which in counted))


def reconstruction_terms(
    errors: ReconstructionErrors, counted: CountedSamples, unmasked_weight: float = UNMASKED_WEIGHT
) -> ReconstructionTerms:
    """Means over the samples of a batch, and their sum with `unmasked_weight`."""
    masked, unmasked = (mean_over(e, which) for e, which in zip(errors, counted, strict=True))
    return ReconstructionTerms(masked + unmasked_weight * unmasked, masked, unmasked)


def masked_reconstruction(
    reconstruction: Float[Array, "B C T"],
    target: Float[Array, "B C T"],
    mask: Bool[Array, "B C T"],
    *,
    valid: Bool[Array, "B C T"] | None = None,
    window_mask: Bool[Array, "B"] | None = None,
    kind: Penalty = "smooth_l1",
    unmasked_weight: float = UNMASKED_WEIGHT,
) -> ReconstructionTerms:
    """Reconstruction error of hidden samples plus a little of the visible ones (golden/README quirk 25).

    Args:
        reconstruction: output of the model.
        target: the *normalised* input.
        mask: True = hidden from the model.
        valid: True = real sample (`masking.valid_samples`); padding counts neither as hidden nor as visible.
        window_mask: False = filler window.
        kind: elementwise penalty.
        unmasked_weight: weight of the mean over visible samples.

    Returns:
        Scalars. With nothing hidden `masked` is 0, where the reference gives NaN (the mean of nothing); likewise
        `unmasked` with nothing visible.
    """
    counted = counted_samples(mask, valid, window_mask)
    return reconstruction_terms(reconstruction_errors(reconstruction, target, counted, kind), counted, unmasked_weight)


def query_overlap(
    attention_scores: Float[Array, "B S Q C"],
    counted: Bool[Array, "B S"],
    channel_mask: Bool[Array, "B C"] | None = None,
    kind: Penalty = "l2",
) -> Float[Array, "B"]:
    """The sums per window of which `query_specialization` is the mean; `counted`: real patches of real windows."""
    scores = jnp.where(counted[:, :, None, None], _float32_or_better(attention_scores), 0)
    if channel_mask is not None:
        scores = jnp.where(channel_mask[:, None, None, :], scores, 0)
    gram = jnp.einsum("bsqc,bskc->bsqk", scores, scores, precision=jax.lax.Precision.HIGHEST)
    diagonal = jnp.broadcast_to(jnp.eye(scores.shape[2], dtype=bool), gram.shape)
    per_patch = jnp.mean(penalty(jnp.where(diagonal, 0, gram), kind), axis=(2, 3))
    return _sum_per_window(per_patch, counted)


def query_specialization(
    attention_scores: Float[Array, "B S Q C"],
    *,
    channel_mask: Bool[Array, "B C"] | None = None,
    patch_mask: Bool[Array, "B S"] | None = None,
    window_mask: Bool[Array, "B"] | None = None,
    kind: Penalty = "l2",
    weight: float = QUERY_WEIGHT,
) -> Float[Array, ""]:
    """Penalise queries that look at the same channels: off-diagonal entries of `scores scores^T` (arXiv 2510.22257).

    Args:
        attention_scores: channel attention of each query, averaged over heads.
        channel_mask: True = real channel.
        patch_mask: True = real patch.
        window_mask: False = filler window.
        kind: penalty of the entries of the Gram matrix.
        weight: factor of the result.

    Returns:
        `weight` times the mean over real patches and all Q*Q entries, the zeroed diagonal included in the count
        (golden/README quirk 26).
    """
    counted = real_entries(attention_scores.shape[:2], patch_mask, window_mask)
    return weight * mean_over(query_overlap(attention_scores, counted, channel_mask, kind), counted)


def sigreg_statistic(
    embeddings: Float[Array, "B M"],
    directions: Float[Array, "M R"],
    window_mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """Distance of the embeddings of a batch from a standard normal, per sample (LeJEPA arXiv 2511.08544, Epps-Pulley).

    For each unit direction the empirical characteristic function `ecf(t) = mean_b exp(i t x_b.a)` is compared with that
    of N(0, 1): the integral of `|ecf - e^(-t^2/2)|^2 e^(-t^2/2)` over [-5, 5], averaged over directions. Multiply by a
    sample count for the test statistic (`sigreg`).

    Args:
        embeddings: one row per window of the *global* batch.
        directions: Gaussian columns, not normalised (`masking.draw_sigreg_directions`).
        window_mask: False = filler window.
    """
    x = _float32_or_better(embeddings)
    directions = directions.astype(x.dtype)
    directions = directions / (jnp.linalg.norm(directions, axis=0, keepdims=True) + DIRECTION_EPS)
    projected = jnp.matmul(x, directions, precision=jax.lax.Precision.HIGHEST)
    # The integrand is even in t, so the nodes t >= 0 with doubled weights give the 17-point rule at half the cost.
    step = 2 * SIGREG_LIMIT / (SIGREG_POINTS - 1)
    nodes = np.linspace(0, SIGREG_LIMIT, SIGREG_POINTS // 2 + 1)
    weights = np.full(nodes.shape, 2 * step)
    weights[[0, -1]] = step
    t = jnp.asarray(nodes, x.dtype)
    normal = jnp.exp(-(t**2) / 2)
    angles = projected[:, :, None] * t[None, None, :]  # (B, R, nodes)
    counted = _windows_like(window_mask, angles.shape)
    real = _masked_mean(jnp.cos(angles), counted, axis=0)
    imaginary = _masked_mean(jnp.sin(angles), counted, axis=0)
    distance = (real - normal[None, :]) ** 2 + imaginary**2
    return jnp.mean(jnp.sum(distance * (normal * jnp.asarray(weights, x.dtype))[None, :], axis=1))


def sigreg(
    embeddings: Float[Array, "B M"],
    directions: Float[Array, "M R"],
    count: float | Float[Array, ""] | None = None,
    window_mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """`count` times `sigreg_statistic`; `count=None` is the number of real windows of the batch (see `lejepa`)."""
    factor = _window_count(embeddings.shape[0], window_mask) if count is None else count
    return sigreg_statistic(embeddings, directions, window_mask) * factor


def _window_count(n_windows: int, window_mask: Bool[Array, "B"] | None) -> int | Int[Array, ""]:
    return n_windows if window_mask is None else jnp.sum(window_mask, dtype=jnp.int32)


class LeJEPATerms(NamedTuple):
    """`total = (1 - lambda) similarity + lambda sigreg`; `sigreg_global` is the value the reference logs."""

    total: Float[Array, ""]
    similarity: Float[Array, ""]
    sigreg: Float[Array, ""]
    sigreg_global: Float[Array, ""]


def view_embeddings(
    tokens: Float[Array, "V B S M"], patch_mask: Bool[Array, "V B S"] | None = None
) -> Float[Array, "V B M"]:
    """Mean over the real patches of each view (`masking.view_patch_mask`), in float32 or better."""
    tokens = _float32_or_better(tokens)
    if patch_mask is None:
        return jnp.mean(tokens, axis=2)
    return _masked_mean(tokens, jnp.broadcast_to(patch_mask[..., None], tokens.shape), axis=2)


def lejepa(
    local_tokens: Float[Array, "Vl B Sl M"],
    global_tokens: Float[Array, "Vg B Sg M"],
    directions: Float[Array, "M R"],
    *,
    local_patch_mask: Bool[Array, "Vl B Sl"] | None = None,
    global_patch_mask: Bool[Array, "Vg B Sg"] | None = None,
    window_mask: Bool[Array, "B"] | None = None,
    sigreg_count: float | None = None,
    lambda_: float = LEJEPA_LAMBDA,
) -> LeJEPATerms:
    """Similarity of local views to the mean of the global ones, plus SIGReg (golden/README quirk 29, arXiv 2511.08544).

    Gradients flow through the mean of the global views. SIGReg is computed per local view over the batch and averaged
    over views; all views share the directions of the step.

    Args:
        local_tokens: latents of the local views, one encoder pass per view.
        global_tokens: latents of the global views.
        directions: Gaussian columns, not normalised.
        local_patch_mask: True = real patch of a local view.
        global_patch_mask: True = real patch of a global view.
        window_mask: False = filler window.
        sigreg_count: factor of the statistic; None = the global batch. The reference *logs* the value for the global
            batch but its gradient is that of the per-device batch, because its all-reduce is not differentiated: pass
            the per-device batch of the run you reproduce (2040) to train like it (recipes R4).
        lambda_: share of SIGReg.
    """
    return lejepa_terms(
        view_embeddings(local_tokens, local_patch_mask),
        view_embeddings(global_tokens, global_patch_mask),
        directions,
        window_mask=window_mask,
        sigreg_count=sigreg_count,
        lambda_=lambda_,
    )


def lejepa_terms(
    local: Float[Array, "Vl B M"],
    global_: Float[Array, "Vg B M"],
    directions: Float[Array, "M R"],
    *,
    window_mask: Bool[Array, "B"] | None = None,
    sigreg_count: float | None = None,
    lambda_: float = LEJEPA_LAMBDA,
) -> LeJEPATerms:
    """`lejepa` of the views' embeddings (`view_embeddings`), of the *global* batch."""
    centre = jnp.mean(global_, axis=0)
    counted = _windows_like(window_mask, local.shape, axis=1)
    similarity = _masked_mean(jnp.where(counted, centre[None] - local, 0) ** 2, counted)
    per_view = jax.vmap(lambda view: sigreg_statistic(view, directions, window_mask))(local)
    statistic = jnp.mean(per_view)
    sigreg_global = statistic * _window_count(local.shape[1], window_mask)
    scaled = sigreg_global if sigreg_count is None else statistic * sigreg_count
    return LeJEPATerms((1 - lambda_) * similarity + lambda_ * scaled, similarity, scaled, sigreg_global)


def pretraining_total(
    reconstruction: ReconstructionTerms | None = None,
    query: Float[Array, ""] | None = None,
    lejepa_terms: LeJEPATerms | None = None,
    *,
    lejepa_weight: float = LEJEPA_WEIGHT,
) -> Float[Array, ""]:
    """Add the terms of an objective (golden/README quirk 29); a term that is None does not take part.

    Args:
        reconstruction: of `masked_reconstruction`.
        query: of `query_specialization`, its weight included.
        lejepa_terms: of `lejepa`.
        lejepa_weight: weight of the LeJEPA term.

    Raises:
        ValueError: no term at all.
    """
    terms = []
    if reconstruction is not None:
        terms.append(reconstruction.total)
    if query is not None:
        terms.append(query)
    if lejepa_terms is not None:
        terms.append(lejepa_weight * lejepa_terms.total)
    if not terms:
        raise ValueError("an objective needs at least one of reconstruction, query specialisation and LeJEPA")
    return sum(terms[1:], start=terms[0])


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Float[Array, "B *per K"],
    labels: Int[Array, "B *per"],
    *,
    class_weights: Float[Array, "K"] | None = None,
    label_smoothing: float = 0.0,
    window_mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """Softmax cross-entropy, averaged as PyTorch does: with class weights, divided by the weights of the labels.

    Args:
        logits: raw scores; an axis between batch and classes (one decision per channel) is allowed.
        labels: class index; a negative label means "no label" and is left out.
        class_weights: one weight per class.
        label_smoothing: share of the target that is spread evenly over all K classes.
        window_mask: False = filler window.

    Returns:
        Scalar; 0 when there is no labelled window.
    """
    counted = labelled(labels, window_mask)
    sums = cross_entropy_sums(logits, labels, counted, class_weights=class_weights, label_smoothing=label_smoothing)
    return mean_over_labels(sums, labels, counted, class_weights)


def labelled(labels: Int[Array, "B *per"], window_mask: Bool[Array, "B"] | None = None) -> Bool[Array, "B *per"]:
    """Which decisions count: those of real windows with a label."""
    return _windows_like(window_mask, labels.shape) & (labels >= 0)


def mean_over_labels(
    sums: Float[Array, "B"],
    labels: Int[Array, "B *per"],
    counted: Bool[Array, "B *per"],
    class_weights: Float[Array, "K"] | None = None,
) -> Float[Array, ""]:
    """Mean of which `sums` are the weighted sums per window: divided by the number of labels, or by their weights."""
    if class_weights is None:
        return mean_over(sums, counted)
    weights = class_weights.astype(sums.dtype)
    own = jax.nn.one_hot(labels, weights.shape[0], dtype=sums.dtype) @ weights
    norm = jnp.sum(jnp.where(counted, own, 0))
    return jnp.sum(sums) / jnp.where(norm > 0, norm, 1)


def cross_entropy_sums(
    logits: Float[Array, "B *per K"],
    labels: Int[Array, "B *per"],
    counted: Bool[Array, "B *per"],
    *,
    class_weights: Float[Array, "K"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """The weighted sums per window of `cross_entropy`; `counted` from `labelled`."""
    logits = _float32_or_better(logits)
    n_classes = logits.shape[-1]
    weights = jnp.ones(n_classes, logits.dtype) if class_weights is None else class_weights.astype(logits.dtype)
    log_p = jax.nn.log_softmax(jnp.where(counted[..., None], logits, 0), axis=-1)
    target = jax.nn.one_hot(labels, n_classes, dtype=logits.dtype)
    smoothed = (1 - label_smoothing) * target + label_smoothing / n_classes
    return _sum_per_window(-jnp.einsum("...k,...k,k->...", smoothed, log_p, weights), counted)


def binary_cross_entropy(
    logits: Float[Array, "B K"],
    labels: Float[Array, "B K"],
    *,
    valid: Bool[Array, "B K"] | None = None,
    window_mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """Sigmoid cross-entropy of K independent yes/no outputs (`mc`: one per channel), mean over windows and outputs.

    Args:
        logits: raw scores.
        labels: 0 or 1 (or a probability).
        valid: True = this output counts; for one output per channel pass the channel mask.
        window_mask: False = filler window.
    """
    counted = real_entries(logits.shape, valid, window_mask)
    return mean_over(binary_cross_entropy_sums(logits, labels, counted), counted)


def binary_cross_entropy_sums(
    logits: Float[Array, "B K"], labels: Float[Array, "B K"], counted: Bool[Array, "B K"]
) -> Float[Array, "B"]:
    """The sums per window of `binary_cross_entropy`."""
    logits = jnp.where(counted, _float32_or_better(logits), 0)
    labels = jnp.where(counted, labels.astype(logits.dtype), 0)
    return _sum_per_window(jax.nn.softplus(logits) - labels * logits, counted)


def mean_squared_error(
    prediction: Float[Array, "B K"],
    target: Float[Array, "B K"],
    *,
    window_mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """Mean over windows and outputs of the squared error, in squared units of the target."""
    counted = real_entries(target.shape, window_mask=window_mask)
    return mean_over(squared_error_sums(prediction, target, counted), counted)


def squared_error_sums(
    prediction: Float[Array, "B K"], target: Float[Array, "B K"], counted: Bool[Array, "B K"]
) -> Float[Array, "B"]:
    """The sums per window of `mean_squared_error`."""
    prediction = _float32_or_better(prediction)
    return _sum_per_window(jnp.where(counted, prediction - target.astype(prediction.dtype), 0) ** 2, counted)
