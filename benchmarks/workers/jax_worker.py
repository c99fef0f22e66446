"""Our side of `benchmarks.speed`: makes cases ready as the library compiles them; see `protocol`.

Usage: python -m benchmarks.workers.jax_worker DEVICES, with DEVICES XLA devices on a CPU (1: its threads share every
operation; more: windows are spread over devices, as `compilation.use_cpu_cores` lets the library do).
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.workers.protocol import Prepared, serve
from benchmarks.workers.sizes import CHANNELS, PATCH, SAMPLES, STATES, WIDTH
from configs.outputs import evaluation_batches, store_columns
from data_pipeline.store import WindowStore
from lumamba_jax import inference
from lumamba_jax.architectures import SIZES, ModelConfig, abstract_model, build
from lumamba_jax.compilation import (
    WINDOWS,
    compiler_options,
    local_mesh,
    on_local_devices,
    over_windows,
    use_cpu_cores,
)
from lumamba_jax.flops import folded_flops, forward_flops, program_flops, transcendentals
from lumamba_jax.inference import load
from lumamba_jax.layers import gelu
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.normalization import channel_zscore
from lumamba_jax.optimizer import OptimizerConfig, make_optimizer
from lumamba_jax.scan import selective_scan, softplus
from lumamba_jax.sharding import MeshConfig, batch_sharding, make_mesh
from lumamba_jax.streaming import encode_recording
from lumamba_jax.tasks import TaskConfig, make_task
from lumamba_jax.training import init_state, make_train_step

GEMM_SIZE = 2048
VECTOR, REPETITIONS = 2**18, 50
"""Elements that stay in cache, and how often a function is applied to them in one call."""
COPIED = 2**26
COUNTED = (
    ("LuMamba tiny", "reconstruction"),
    ("LuMamba tiny", "attention"),
    ("LUNA base", "reconstruction"),
    ("LUNA base", "attention"),
    ("LUNA large", "reconstruction"),
    ("FEMBA tiny", "reconstruction"),
    ("FEMBA large", "mamba"),
)
"""Published sizes and heads whose programs are compiled to compare their FLOPs with the formula."""

MODELS = {**SIZES, "micro": LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=1)}
"""The published sizes, and one for tests of this script."""


def classifier(request: dict) -> ModelConfig:
    """The published size with its attention classifier for two classes."""
    config = MODELS[request["model"]]
    return config.replace(head="attention", num_outputs=2, compute_dtype=request["dtype"])


def windows(count: int, samples: int = SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Signals `(n, 22, T)` and positions `(n, 22, 3)`."""
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((count, CHANNELS, samples), np.float32)
    places = rng.standard_normal((CHANNELS, 3)).astype(np.float32) * 0.1
    return signal, np.broadcast_to(places, (count, CHANNELS, 3))


def evaluate(request: dict) -> Prepared:
    """Normalised windows in, logits out, as `inference.predict` compiles it."""
    graphdef, params = nnx.split(build(classifier(request)))
    params = on_local_devices(params)
    signal, places = windows(*request["size"])

    def part(params: nnx.State, some: Any) -> jax.Array:
        return nnx.merge(graphdef, params)(some["signal"], some["locations"]).logits  # pyright: ignore

    def run(params: nnx.State, batch: dict) -> jax.Array:
        return over_windows(part, params, batch)

    divides = request["size"][0] % local_mesh().size == 0
    sharding = NamedSharding(local_mesh(), PartitionSpec(WINDOWS if divides else None))
    batch = jax.device_put({"signal": signal, "locations": places}, sharding)
    compiled = jax.jit(run, compiler_options=compiler_options()).lower(params, batch).compile()
    return lambda: compiled(params, batch), _facts(compiled)


def store(request: dict) -> Prepared:
    """Every window of `benchmarks.evaluation`'s store: read, normalised, probabilities, as `eval.py predict` does."""
    folder = Path(os.environ["BENCHMARK_STORE"])
    model, windows_of = load(folder / "model"), WindowStore(folder / "windows.h5")
    before = _programs()

    def call() -> None:
        columns = store_columns(model, [windows_of], "prediction", batch_size=int(os.environ["BENCHMARK_BATCH"]))
        np.save(folder / f"jax_{len(jax.devices())}.npy", columns["predictions"])

    call()
    shapes = evaluation_batches(model, [windows_of]).shapes
    return call, {"windows": int(request["size"][0]), "programs": _programs() - before, "buckets": len(shapes)}


def _programs() -> int:
    """Programs that evaluation has compiled in this process."""
    return inference._compiled(inference._classify)._cache_size()  # noqa: SLF001  # pyright: ignore


def train(request: dict) -> Prepared:
    """One AdamW step of fine-tuning."""
    (rows,) = request["size"]
    config = classifier(request).replace(dropout=0.0, head_dropout=0.0)  # the PyTorch twin has none
    mesh = make_mesh(MeshConfig(devices=len(jax.devices())))
    task = make_task(TaskConfig(kind="classify", normalization="none", position_noise=False), config)
    options = OptimizerConfig(lr=1e-4, schedule="constant", warmup_epochs=0.0)
    params = nnx.split(build(config))[1]
    optimizer = make_optimizer(options, params, total_steps=1000, max_epochs=1)
    state = init_state(config, optimizer, mesh, seed=0)
    step = make_train_step(config, task, optimizer, mesh, seed=0)
    signal, places = windows(rows)
    batch = {
        "signal": signal,
        "locations": places,
        "channel_mask": np.ones((rows, CHANNELS), bool),
        "patch_mask": np.ones((rows, SAMPLES // PATCH), bool),
        "window_mask": np.ones(rows, bool),
        "label": np.arange(rows, dtype=np.int32) % 2,
    }
    batch = jax.device_put(batch, batch_sharding(mesh))
    compiled = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    held = [state]

    def call() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return held[0], metrics

    return call, _facts(compiled)


def scan(request: dict) -> Prepared:
    """The scan with softplus, skip and gate, forward."""
    inputs, implementation = scan_inputs(*request["size"], dtype=request["dtype"]), request["variant"]

    def run(arrays: dict) -> jax.Array:
        return selective_scan(**arrays, delta_softplus=True, implementation=implementation)[0]

    compiled = jax.jit(run, compiler_options=compiler_options()).lower(inputs).compile()
    return lambda: compiled(inputs), _facts(compiled)


def scan_gradient(request: dict) -> Prepared:
    """Value and gradients of every input."""
    inputs, implementation = scan_inputs(*request["size"], dtype=request["dtype"]), request["variant"]

    def loss(arrays: dict) -> jax.Array:
        y = selective_scan(**arrays, delta_softplus=True, implementation=implementation)[0]
        return jnp.square(y.astype(jnp.float32)).sum()

    compiled = jax.jit(jax.value_and_grad(loss), compiler_options=compiler_options()).lower(inputs).compile()
    return lambda: compiled(inputs), _facts(compiled)


def scan_inputs(batch: int, length: int, *, dtype: str = "float32") -> dict[str, jax.Array]:
    """Sizes of LuMamba tiny: D = 768, N = 16; A and D stay float32."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    rows = (batch, length)
    return {
        "u": normal(*rows, WIDTH),
        "delta": normal(*rows, WIDTH) - 3,
        "A": -jnp.broadcast_to(jnp.arange(1.0, STATES + 1), (WIDTH, STATES)),
        "B": normal(*rows, STATES),
        "C": normal(*rows, STATES),
        "D": normal(WIDTH).astype(jnp.float32),
        "z": normal(*rows, WIDTH),
    }


def long(request: dict) -> Prepared:
    """One window of many patches: latents of every patch."""
    config = MODELS[request["model"]].replace(head="none", compute_dtype=request["dtype"])
    encoder = build(config)
    signal, places = windows(1, request["size"][0] * PATCH)
    if request["variant"] == "streamed":
        return lambda: encode_recording(encoder, signal[0], places[0]), {}  # pyright: ignore
    graphdef, params = nnx.split(encoder)

    def run(params: nnx.State, signal: jax.Array, places: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).encode(channel_zscore(signal), places).latent

    arguments = (params, jnp.asarray(signal), jnp.asarray(places))
    compiled = jax.jit(run, compiler_options=compiler_options()).lower(*arguments).compile()
    return lambda: compiled(*arguments), _facts(compiled)


def long_train(request: dict) -> Prepared:
    """Loss and gradients of the blocks and the head on one window: `(1, S, M)` latents in, cross-entropy out."""
    config = classifier(request)
    graphdef, params = nnx.split(build(config))
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((1, request["size"][0], config.width), np.float32))

    def loss(params: nnx.State, latents: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graphdef, params)
        logits = model.head(model.temporal(latents, None, rngs=None, stages=None))
        return -jax.nn.log_softmax(logits)[0, 0]

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=compiler_options())
    compiled = step.lower(params, latents).compile()
    return lambda: compiled(params, latents), _facts(compiled)


# ---- the machine's rates --------------------------------------------------------------------------------------------

# Each keeps its argument within bounds when it is applied to its own result again and again.
FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exp": lambda x: jnp.exp(-x),
    "silu": lambda x: jax.nn.silu(x) + 0.5,
    "softplus": lambda x: softplus(x) - 0.5,
    "gelu": lambda x: gelu(x) + 0.1,
}


def rate(request: dict) -> Prepared:
    """A matrix product ("gemm"), a copy, or a function on all cores; "work" are a call's FLOPs, bytes or elements."""
    name = request["variant"]
    if name == "gemm":
        matrix = jnp.full((GEMM_SIZE, GEMM_SIZE), 0.5, request["dtype"])
        return _rate(lambda x: x @ x, matrix, 2 * GEMM_SIZE**3)
    if name == "copy":
        return _rate(lambda x: x + 1, jnp.zeros(COPIED, jnp.float32), 2 * 4 * COPIED)
    function = FUNCTIONS[name]

    def run(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, REPETITIONS, lambda _, x: function(x), x)

    return _rate(run, jnp.linspace(0.1, 2.0, VECTOR, dtype=jnp.float32), REPETITIONS * VECTOR)


def _rate(run: Callable[[jax.Array], jax.Array], x: jax.Array, work: int) -> Prepared:
    compiled = jax.jit(run, compiler_options=compiler_options()).lower(x).compile()
    return lambda: compiled(x), {"work": work}


def _facts(compiled: Any) -> dict:
    return {"temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20}


# ---- questions ------------------------------------------------------------------------------------------------------


def versions(request: dict) -> dict:
    """JAX, and what it runs on."""
    del request
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "platform": jax.default_backend()}


def work(request: dict) -> dict:
    """FLOPs and transcendental operations of one window of the classifier, by formula."""
    config = classifier(request)
    return {
        "flops": sum(folded_flops(config, CHANNELS, SAMPLES).values()),
        "nominal_flops": sum(forward_flops(config, CHANNELS, SAMPLES).values()),
        "transcendentals": transcendentals(config, CHANNELS, SAMPLES),
    }


def flops(request: dict) -> dict:
    """FLOPs of whole programs: by formula, and by XLA's cost analysis; "models" replaces the published ones."""
    values = {}
    for name, head in request.get("models", COUNTED):
        config = MODELS[name].replace(head=head, num_outputs=None if head == "reconstruction" else 2)
        counted = _counted_flops(config)
        formula = program_flops(config, CHANNELS, SAMPLES, folded=True)
        values[f"{name}, {head}"] = {"formula": formula, "xla": counted, "percent": 100 * (formula / counted - 1)}
    return values


def _counted_flops(config: ModelConfig) -> float:
    graphdef, params = abstract_model(config)

    def run(params: nnx.State, signal: jax.Array, locations: jax.Array, channel_ids: jax.Array) -> jax.Array:
        output: Any = nnx.merge(graphdef, params)(signal, locations, channel_ids=channel_ids)  # pyright: ignore
        return output.logits if config.classifies else output.reconstruction

    shapes = [jax.ShapeDtypeStruct((1, CHANNELS, *tail), jnp.float32) for tail in ((SAMPLES,), (3,))]
    ids = jax.ShapeDtypeStruct((1, CHANNELS), jnp.int32)
    analysis: Any = jax.jit(run).lower(params, *shapes, ids).compile().cost_analysis()
    return analysis["flops"]


KINDS: dict[str, Callable[[dict], Prepared]] = {
    "evaluate": evaluate,
    "store": store,
    "train": train,
    "scan": scan,
    "scan_gradient": scan_gradient,
    "long": long,
    "long_train": long_train,
    "rate": rate,
}


def main() -> None:
    """Serve."""
    use_cpu_cores(int(sys.argv[1]))
    serve(KINDS, {"versions": versions, "work": work, "flops": flops}, wait=jax.block_until_ready)


if __name__ == "__main__":
    main()
