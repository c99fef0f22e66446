"""Losses of pre-training and fine-tuning: pure functions of arrays, exact under padding.

Each loss is a mean over the real entries of the batch: entries of padded channels, padded patches and filler windows
are left out of sums and counts alike, and their gradient is exactly zero. All sums run in float32 or better. Under
`jit` the batch axis is the global one, so a mean over it is the mean over all devices, as SIGReg's characteristic
function needs.

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
    """Mean of the valid entries; 0 where there is none. Counted in integers: float32 stops counting at 2^24."""
    count = jnp.sum(valid, axis=axis, dtype=jnp.int32).astype(values.dtype)
    return jnp.sum(jnp.where(valid, values, 0), axis=axis) / jnp.maximum(count, 1)


def _windows_like(window_mask: Bool[Array, "B"] | None, shape: tuple[int, ...], axis: int = 0) -> Bool[Array, "..."]:
    """Spread `window_mask` along `axis` of an array of `shape`; no mask means every window counts."""
    if window_mask is None:
        return jnp.ones(shape, dtype=bool)
    aligned = [1] * len(shape)
    aligned[axis] = shape[axis]
    return jnp.broadcast_to(window_mask.reshape(aligned), shape)


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
    counted = _windows_like(window_mask, mask.shape)
    if valid is not None:
        counted = counted & valid
    # Padding is removed before the penalty: a non-finite value there must not reach the gradient.
    difference = jnp.where(counted, _float32_or_better(reconstruction) - _float32_or_better(target), 0)
    error = penalty(difference, kind)
    masked = _masked_mean(error, counted & mask)
    unmasked = _masked_mean(error, counted & ~mask)
    return ReconstructionTerms(masked + unmasked_weight * unmasked, masked, unmasked)


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
    scores = _float32_or_better(attention_scores)
    n_windows, n_patches, n_queries, _ = scores.shape
    counted = _windows_like(window_mask, (n_windows, n_patches))
    if patch_mask is not None:
        counted = counted & patch_mask
    scores = jnp.where(counted[:, :, None, None], scores, 0)
    if channel_mask is not None:
        scores = jnp.where(channel_mask[:, None, None, :], scores, 0)
    gram = jnp.einsum("bsqc,bskc->bsqk", scores, scores, precision=jax.lax.Precision.HIGHEST)
    diagonal = jnp.broadcast_to(jnp.eye(n_queries, dtype=bool), gram.shape)
    per_patch = jnp.mean(penalty(jnp.where(diagonal, 0, gram), kind), axis=(2, 3))
    return weight * _masked_mean(per_patch, counted)


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
    local = view_embeddings(local_tokens, local_patch_mask)
    centre = jnp.mean(view_embeddings(global_tokens, global_patch_mask), axis=0)
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
    logits = _float32_or_better(logits)
    n_classes = logits.shape[-1]
    weights = jnp.ones(n_classes, logits.dtype) if class_weights is None else class_weights.astype(logits.dtype)
    counted = _windows_like(window_mask, labels.shape) & (labels >= 0)
    log_p = jax.nn.log_softmax(jnp.where(counted[..., None], logits, 0), axis=-1)
    target = jax.nn.one_hot(labels, n_classes, dtype=logits.dtype)
    smoothed = (1 - label_smoothing) * target + label_smoothing / n_classes
    per_decision = -jnp.einsum("...k,...k,k->...", smoothed, log_p, weights)
    norm = jnp.sum(jnp.where(counted, jnp.einsum("...k,k->...", target, weights), 0))
    return jnp.sum(jnp.where(counted, per_decision, 0)) / jnp.where(norm > 0, norm, 1)


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
    logits = _float32_or_better(logits)
    counted = _windows_like(window_mask, logits.shape)
    if valid is not None:
        counted = counted & valid
    logits = jnp.where(counted, logits, 0)
    labels = jnp.where(counted, labels.astype(logits.dtype), 0)
    return _masked_mean(jax.nn.softplus(logits) - labels * logits, counted)


def mean_squared_error(
    prediction: Float[Array, "B K"],
    target: Float[Array, "B K"],
    *,
    window_mask: Bool[Array, "B"] | None = None,
) -> Float[Array, ""]:
    """Mean over windows and outputs of the squared error, in squared units of the target."""
    counted = _windows_like(window_mask, prediction.shape)
    prediction = _float32_or_better(prediction)
    return _masked_mean(jnp.where(counted, prediction - target.astype(prediction.dtype), 0) ** 2, counted)
