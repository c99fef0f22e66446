"""A user's script from its first line to its first prediction, for `benchmarks.cold`; prints its parts as JSON.

python -m benchmarks.workers.first_result make FOLDER     an exported LuMamba tiny classifier and its saved evaluation
python -m benchmarks.workers.first_result load FOLDER     import, `lumamba_jax.load`, `predict` of one window
python -m benchmarks.workers.first_result saved FOLDER    import, `load_evaluation`, one window
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.workers.sizes import CHANNELS, SAMPLES

MODEL, PROGRAM = "model", "model.evaluation"


def make(folder: Path) -> None:
    """Both files."""
    from flax import nnx

    from lumamba_jax import inference
    from lumamba_jax.architectures import SIZES, build
    from lumamba_jax.checkpoint import save_pretrained
    from lumamba_jax.evaluation_export import save_evaluation

    config = SIZES["LuMamba tiny"].replace(head="attention", num_outputs=2)
    save_pretrained(folder / MODEL, config, nnx.split(build(config))[1], {})
    model = inference.load(folder / MODEL)
    save_evaluation(model, folder / PROGRAM, num_channels=CHANNELS, num_samples=SAMPLES, output="prediction")


def first(kind: str, folder: Path) -> dict[str, float]:
    """Seconds of the import, of loading, and of the first prediction with its compilation."""
    rng = np.random.default_rng(0)
    signal = rng.normal(0, 20, (CHANNELS, SAMPLES)).astype(np.float32)
    places = rng.normal(0, 0.1, (CHANNELS, 3)).astype(np.float32)
    times = [time.perf_counter()]
    if kind == "load":
        import lumamba_jax

        times.append(time.perf_counter())
        model = lumamba_jax.load(folder / MODEL)
        times.append(time.perf_counter())
        lumamba_jax.predict(model, signal, places)
    else:
        from lumamba_jax.evaluation_export import load_evaluation

        times.append(time.perf_counter())
        program = load_evaluation(folder / PROGRAM)
        times.append(time.perf_counter())
        program(signal[None], places[None])
    times.append(time.perf_counter())
    return {
        name: after - before for name, before, after in zip(("import", "load", "first"), times, times[1:], strict=False)
    }


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        print(json.dumps(first(sys.argv[1], Path(sys.argv[2]))))
