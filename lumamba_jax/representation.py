"""How much of its space an encoder uses: what collapses long before a loss shows it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lumamba_jax.losses import sigreg_statistic

_DIRECTIONS = 64
MOST_EMBEDDINGS = 4096
"""Windows whose embeddings are kept for these figures."""


def effective_rank(embeddings: Float[np.ndarray, "n M"]) -> float:
    """`exp(-sum_i p_i log p_i)` of the covariance's normalised eigenvalues p (Roy and Vetterli, EUSIPCO 2007).

    Between 1 (all windows on one line) and M (isotropic); nan for fewer than two windows, 0 when all are equal.
    """
    if len(embeddings) < 2:
        return float("nan")
    centred = np.asarray(embeddings, np.float64) - np.mean(embeddings, axis=0, dtype=np.float64)
    singular = np.linalg.svd(centred, compute_uv=False)
    variance = singular**2
    if not variance.sum() > 0:
        return 0.0
    share = variance / variance.sum()
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def isotropy(embeddings: Float[np.ndarray, "n M"]) -> float:
    """SIGReg's statistic per window: the distance of the embeddings from a standard normal, along fixed directions.

    0 for an isotropic normal of unit variance; 0.409 when all of them are 0.
    """
    width = embeddings.shape[1]
    directions = np.random.default_rng(0).standard_normal((width, _DIRECTIONS)).astype(np.float32)
    return float(sigreg_statistic(jnp.asarray(embeddings), jnp.asarray(directions)))
