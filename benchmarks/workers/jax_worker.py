"""Our side of `benchmarks.speed`: prepares a case once, then times single calls of it; JSON lines in and out."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumamba_jax.architectures import SIZES, ModelConfig, build
from lumamba_jax.compilation import compiler_options, in_blocks
from lumamba_jax.normalization import channel_zscore
from lumamba_jax.optimizer import OptimizerConfig, make_optimizer
from lumamba_jax.scan import selective_scan
from lumamba_jax.sharding import MeshConfig, make_mesh
from lumamba_jax.streaming import encode_recording
from lumamba_jax.tasks import TaskConfig, make_task
from lumamba_jax.training import init_state, make_train_step

CHANNELS, SAMPLES = 22, 1280
WIDTH, STATES = 768, 16
Prepared = tuple[Callable[[], Any], dict]


def classifier(name: str) -> ModelConfig:
    """The published size with its attention classifier for two classes."""
    return SIZES[name].replace(head="attention", num_outputs=2)


def windows(count: int, samples: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Signals `(n, 22, T)` and positions `(n, 22, 3)`."""
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((count, CHANNELS, samples), np.float32)
    places = rng.standard_normal((CHANNELS, 3)).astype(np.float32) * 0.1
    return signal, np.broadcast_to(places, (count, CHANNELS, 3))


def evaluate(model: str, size: list[int], variant: str) -> Prepared:
    """Normalised windows in, logits out, as `inference.predict` compiles it."""
    del variant
    graphdef, params = nnx.split(build(classifier(model)))
    signal, places = map(jnp.asarray, windows(size[0]))

    def run(params: nnx.State, batch: dict) -> jax.Array:
        def part(some: dict) -> jax.Array:
            return nnx.merge(graphdef, params)(some["signal"], some["locations"]).logits

        return in_blocks(part, batch)

    batch = {"signal": signal, "locations": places}
    compiled = jax.jit(run, compiler_options=compiler_options()).lower(params, batch).compile()
    return lambda: compiled(params, batch), _facts(compiled)


def train(model: str, size: list[int], variant: str) -> Prepared:
    """One AdamW step of fine-tuning."""
    del variant
    config = classifier(model)
    mesh = make_mesh(MeshConfig(devices=1))
    task = make_task(TaskConfig(kind="classify", normalization="none", position_noise=False), config)
    options = OptimizerConfig(lr=1e-4, schedule="constant", warmup_epochs=0.0)
    params = nnx.split(build(config))[1]
    optimizer = make_optimizer(options, params, total_steps=1000, max_epochs=1)
    state = init_state(config, optimizer, mesh, seed=0)
    step = make_train_step(config, task, optimizer, mesh, seed=0)
    signal, places = windows(size[0])
    batch = {
        "signal": jnp.asarray(signal),
        "locations": jnp.asarray(places),
        "channel_mask": jnp.ones((size[0], CHANNELS), bool),
        "patch_mask": jnp.ones((size[0], SAMPLES // 40), bool),
        "window_mask": jnp.ones(size[0], bool),
        "label": jnp.arange(size[0], dtype=jnp.int32) % 2,
    }
    compiled = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    held = [state]

    def call() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return held[0], metrics

    return call, _facts(compiled)


def scan(model: str, size: list[int], variant: str) -> Prepared:
    """The scan with softplus, skip and gate, forward."""
    del model
    inputs = scan_inputs(*size)

    def run(arrays: dict) -> jax.Array:
        return selective_scan(**arrays, delta_softplus=True, implementation=variant)[0]  # pyright: ignore

    compiled = jax.jit(run, compiler_options=compiler_options()).lower(inputs).compile()
    return lambda: compiled(inputs), _facts(compiled)


def scan_gradient(model: str, size: list[int], variant: str) -> Prepared:
    """Value and gradients of every input."""
    del model
    inputs = scan_inputs(*size)

    def loss(arrays: dict) -> jax.Array:
        y = selective_scan(**arrays, delta_softplus=True, implementation=variant)[0]  # pyright: ignore
        return jnp.square(y).sum()

    compiled = jax.jit(jax.value_and_grad(loss), compiler_options=compiler_options()).lower(inputs).compile()
    return lambda: compiled(inputs), _facts(compiled)


def scan_inputs(batch: int, length: int) -> dict[str, jax.Array]:
    """Sizes of LuMamba tiny: D = 768, N = 16."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    rows = (batch, length)
    return {
        "u": normal(*rows, WIDTH),
        "delta": normal(*rows, WIDTH) - 3,
        "A": -jnp.broadcast_to(jnp.arange(1.0, STATES + 1), (WIDTH, STATES)),
        "B": normal(*rows, STATES),
        "C": normal(*rows, STATES),
        "D": normal(WIDTH),
        "z": normal(*rows, WIDTH),
    }


def long(model: str, size: list[int], variant: str) -> Prepared:
    """One window of many patches: latents of every patch."""
    config = SIZES[model].replace(head="none")
    encoder = build(config)
    signal, places = windows(1, size[0] * 40)
    if variant == "streamed":
        return lambda: encode_recording(encoder, signal[0], places[0]), {}  # pyright: ignore
    graphdef, params = nnx.split(encoder)

    def run(params: nnx.State, signal: jax.Array, places: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).encode(channel_zscore(signal), places).latent

    arguments = (params, jnp.asarray(signal), jnp.asarray(places))
    compiled = jax.jit(run, compiler_options=compiler_options()).lower(*arguments).compile()
    return lambda: compiled(*arguments), _facts(compiled)


def _facts(compiled: Any) -> dict:
    return {"temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20}


KINDS = {"evaluate": evaluate, "train": train, "scan": scan, "scan_gradient": scan_gradient, "long": long}


def main() -> None:
    """Answer requests until the input ends."""
    prepared: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "versions":
            answer = {"jax": jax.__version__}
        elif request["do"] == "forget":
            prepared.clear()
        elif request["do"] == "prepare":
            call, answer = KINDS[request["kind"]](request["model"], request["size"], request["variant"])
            jax.block_until_ready(call())
            prepared[request["variant"]] = call
        else:
            start = time.perf_counter()
            jax.block_until_ready(prepared[request["variant"]]())
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
