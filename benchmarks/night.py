"""A night as one window: `python -m benchmarks.night [--hours 8]` prints time, times of real time and peak memory."""

import argparse
import resource
import time

import jax
import numpy as np

from lumamba_jax.architectures import SIZES, build
from lumamba_jax.streaming import DEFAULT_PART, encode_recording

CHANNELS, SFREQ, PATCH = 22, 256, 40


def peak_gigabytes() -> float:
    """Largest resident size of this process so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """White noise, LuMamba tiny, latents of every patch; compiled on two parts first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--part", type=int, default=DEFAULT_PART, help="patches held at once")
    args = parser.parse_args()
    model = build(SIZES["LuMamba tiny"].replace(head="none"))
    samples = int(args.hours * 3600 * SFREQ) // PATCH * PATCH
    rng = np.random.default_rng(0)
    signal = np.empty((CHANNELS, samples), np.float32)
    for channel in signal:
        channel[:] = 20 * rng.standard_normal(samples, dtype=np.float32)
    locations = rng.normal(0, 0.1, (CHANNELS, 3)).astype(np.float32)
    encode_recording(model, signal[:, : 2 * args.part * PATCH], locations, part=args.part)  # pyright: ignore
    start = time.perf_counter()
    jax.block_until_ready(encode_recording(model, signal, locations, part=args.part))  # pyright: ignore
    seconds = time.perf_counter() - start
    print(f"{samples // PATCH:,} patches, {signal.nbytes / 2**20:,.0f} MB of signal: {seconds:.1f} s, ", end="")
    print(f"{args.hours * 3600 / seconds:,.0f} times real time, peak memory {peak_gigabytes():.2f} GB")


if __name__ == "__main__":
    main()
