"""EEGNet (Lawhern et al., J. Neural Eng. 15:056013, 2018): the small network that every model is compared with.

It has one fixed montage and window, is trained from scratch on labelled windows, and stands beside the foundation
models as a baseline. EEGNet-8,2 with the paper's constraints: unit norm of spatial filters, 0.25 of the classifier's.
"""

import functools
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

_POOLS = (4, 8)
_SPATIAL_NORM, _CLASSIFIER_NORM = 1.0, 0.25


@dataclass(frozen=True)
class EEGNetConfig:
    """Sizes and training of the network.

    Attributes:
        num_filters: F1, temporal filters.
        depth: D, spatial filters of each temporal filter.
        kernel_seconds: length of the temporal filters; half a second in the paper.
        dropout: 0.5 within subjects, 0.25 across subjects in the paper.
        lr, batch_size, max_epochs, patience: Adam, ended when the validation loss has not fallen for `patience` epochs.
        seed: initialisation, order and dropout.
    """

    num_filters: int = 8
    depth: int = 2
    kernel_seconds: float = 0.5
    dropout: float = 0.25
    lr: float = 1e-3
    batch_size: int = 32
    max_epochs: int = 100
    patience: int = 15
    seed: int = 0


class EEGNet(nnx.Module):
    """`(B, C, T)` normalised signal -> logits `(B, K)`."""

    def __init__(
        self, config: EEGNetConfig, num_channels: int, num_samples: int, sfreq: float, num_classes: int, rngs: nnx.Rngs
    ):
        f1, f2 = config.num_filters, config.num_filters * config.depth
        if num_samples < _POOLS[0] * _POOLS[1]:
            raise ValueError(f"EEGNet pools over {_POOLS[0] * _POOLS[1]} samples, the windows have {num_samples}")
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.temporal = conv(1, f1, (1, max(1, round(config.kernel_seconds * sfreq))), padding="SAME")
        self.norm1 = nnx.BatchNorm(f1, momentum=0.9, rngs=rngs)
        self.spatial = conv(f1, f2, (num_channels, 1), padding="VALID", feature_group_count=f1)
        self.norm2 = nnx.BatchNorm(f2, momentum=0.9, rngs=rngs)
        length = max(1, round(sfreq / 4 / 2))  # half a second after the first pooling
        self.separable = conv(f2, f2, (1, length), padding="SAME", feature_group_count=f2)
        self.pointwise = conv(f2, f2, (1, 1))
        self.norm3 = nnx.BatchNorm(f2, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        steps = num_samples // _POOLS[0] // _POOLS[1]
        self.classifier = nnx.Linear(f2 * steps, num_classes, rngs=rngs)

    def __call__(self, signal: Float[Array, "B C T"]) -> Float[Array, "B K"]:
        """Raw logits."""
        x = self.norm1(_filtered(signal, self.temporal.kernel[...]))  # (B, C, T, F1)
        x = nnx.elu(self.norm2(_mixed(x, self.spatial.kernel[...])))  # (B, 1, T, F2)
        x = self.dropout(nnx.avg_pool(x, (1, _POOLS[0]), (1, _POOLS[0])))
        x = nnx.elu(self.norm3(self.pointwise(self.separable(x))))
        x = self.dropout(nnx.avg_pool(x, (1, _POOLS[1]), (1, _POOLS[1])))
        return self.classifier(x.reshape(len(x), -1))


def _filtered(signal: Float[Array, "B C T"], kernel: Float[Array, "1 R 1 F"]) -> Float[Array, "B C T F"]:
    """The temporal convolution as a product: XLA's own gradient of it in the kernel is four times slower on a CPU."""
    length, times = kernel.shape[1], signal.shape[-1]
    padded = jnp.pad(signal, ((0, 0), (0, 0), ((length - 1) // 2, length // 2)))
    frames = padded[..., jnp.arange(times)[:, None] + jnp.arange(length)[None]]  # (B, C, T, R)
    return jnp.einsum("bctr,rf->bctf", frames, kernel[0, :, 0])


def _mixed(x: Float[Array, "B C T F"], kernel: Float[Array, "C 1 1 G"]) -> Float[Array, "B 1 T G"]:
    """The spatial convolution as a product: D mixtures of the channels for each temporal filter."""
    filters = kernel[:, 0, 0].reshape(kernel.shape[0], x.shape[-1], -1)  # (C, F, D)
    return jnp.einsum("bctf,cfd->btfd", x, filters).reshape(x.shape[0], 1, x.shape[2], -1)


def _limited(params: nnx.State) -> nnx.State:
    """The parameters with the paper's maximum norms of spatial filters and of the classifier's columns."""

    def limit(kernel: Array, axes: tuple[int, ...], norm: float) -> Array:
        found = jnp.sqrt(jnp.sum(kernel**2, axis=axes, keepdims=True))
        return kernel * jnp.minimum(1.0, norm / jnp.maximum(found, 1e-12))

    limits = {"spatial": ((0, 1, 2), _SPATIAL_NORM), "classifier": ((0,), _CLASSIFIER_NORM)}

    def rule(path: tuple, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        wanted = name[0] in limits and "kernel" in name
        return limit(leaf, *limits[name[0]]) if wanted else leaf

    return jax.tree_util.tree_map_with_path(rule, params)


class EEGNetClassifier:
    """Fit on windows in microvolts, predict probabilities; channels are scaled by the training windows' deviation."""

    def __init__(self, num_classes: int, sfreq: float, config: EEGNetConfig | None = None):
        self._config = config or EEGNetConfig()
        self._num_classes, self._sfreq = num_classes, sfreq
        self._scale = self._model = None

    def fit(
        self,
        signal_uv: Float[np.ndarray, "n C T"],
        labels: Int[np.ndarray, "n"],
        validation: tuple[Float[np.ndarray, "m C T"], Int[np.ndarray, "m"]],
    ) -> Self:
        """Train on windows, keep the weights of the lowest loss on `validation` (other subjects).

        The loss of a window is weighted by the inverse of its class's share of the training windows, 1 for the most
        frequent class, as in the paper.

        Raises: ValueError when there are fewer windows than one batch needs to normalise (2).
        """
        if len(signal_uv) < 2:
            raise ValueError(f"EEGNet needs at least 2 training windows, found {len(signal_uv)}")
        if not len(validation[0]):
            raise ValueError("EEGNet needs validation windows of other subjects, to know when to stop: there are none")
        config = self._config
        centred = signal_uv - signal_uv.mean(-1, keepdims=True)
        self._scale = np.maximum(centred.std(axis=(0, 2), keepdims=True), 1e-6).astype(np.float32)[0]
        model = EEGNet(config, *signal_uv.shape[1:], self._sfreq, self._num_classes, nnx.Rngs(config.seed))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        optimizer = optax.adam(config.lr)
        weights = _class_weights(labels, self._num_classes)
        state, step = (params, rest, optimizer.init(params)), _make_step(graph, optimizer)
        best: tuple[float, Any] = (np.inf, (params, rest))
        waited, rng = 0, np.random.default_rng(config.seed)
        signal, size = self._normalised(signal_uv), min(config.batch_size, len(signal_uv))
        for _ in range(config.max_epochs):
            order = rng.permutation(len(signal))
            for start in range(0, len(order) - size + 1, size):
                rows = order[start : start + size]
                state = step(state, signal[rows], labels[rows], weights[labels[rows]])
            self._model = graph, state[0], state[1]
            chosen = np.log(np.maximum(self.predict_proba(validation[0]), 1e-12))
            loss = -float((weights[validation[1]] * chosen[np.arange(len(chosen)), validation[1]]).mean())
            waited += 1
            if loss < best[0]:
                best, waited = (loss, state[:2]), 0
            if waited >= config.patience:
                break
        self._model = graph, *best[1]
        return self

    def predict_proba(self, signal_uv: Float[np.ndarray, "n C T"], batch_size: int = 64) -> Float[np.ndarray, "n K"]:
        """Class probabilities. Raises ValueError before `fit`."""
        if self._model is None:
            raise ValueError("EEGNet was not fitted yet")
        signal, parts = self._normalised(signal_uv), []
        for start in range(0, len(signal), batch_size):
            rows = signal[start : start + batch_size]
            filled = np.concatenate([rows, np.zeros((batch_size - len(rows), *rows.shape[1:]), np.float32)])
            parts.append(np.asarray(_predict(*self._model, filled))[: len(rows)])
        return np.concatenate(parts)

    def _normalised(self, signal_uv: np.ndarray) -> np.ndarray:
        return ((signal_uv - signal_uv.mean(-1, keepdims=True)) / self._scale).astype(np.float32)


def _class_weights(labels: Int[np.ndarray, "n"], num_classes: int) -> Float[np.ndarray, "K"]:
    """Float32; 1 for the most frequent class and for those without windows."""
    counts = np.bincount(labels, minlength=num_classes)
    return (counts.max() / np.where(counts, counts, counts.max())).astype(np.float32)


def _make_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Any:
    def loss(params: nnx.State, rest: nnx.State, signal: Array, labels: Array, weights: Array) -> tuple:
        model = nnx.merge(graph, params, rest, copy=True)
        model.train()
        logits = model(signal)
        value = jnp.mean(weights * optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return value, nnx.split(model, nnx.Param, ...)[2]

    @jax.jit
    def step(state: tuple, signal: Array, labels: Array, weights: Array) -> tuple:
        params, rest, opt_state = state
        gradient, rest = jax.grad(loss, has_aux=True)(params, rest, signal, labels, weights)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return _limited(optax.apply_updates(params, updates)), rest, opt_state

    return step


@functools.partial(jax.jit, static_argnums=0)
def _predict(graph: nnx.GraphDef, params: nnx.State, rest: nnx.State, signal: Array) -> Float[Array, "n K"]:
    model = nnx.merge(graph, params, rest)
    model.eval()
    return jax.nn.softmax(model(signal))
