"""The peers' side of `benchmarks.speed`, in PyTorch, on the device `BENCHMARK_DEVICE`; see `protocol`.

Variants of a model: "plain" (the twin, its scan a loop over materialised decays, as in the published package without
its kernel), "lean" (the loop computes each decay when it is needed), "compiled" (`torch.compile` of the lean twin),
"chunk" (`torch.compile` of eight steps of the scan, the rest eager), "braindecode" (LUNA only, that package's), and on
a GPU "mamba_ssm" (the fused CUDA kernel, where it can be imported). Variants of a scan: "plain", "lean", "chunk",
"pscan" (mamba.py's parallel scan), "mamba_ssm".

OpenMP waits as PyTorch leaves it: `OMP_WAIT_POLICY=passive` would make PyTorch itself 1.4 to 1.7 times slower
(evaluation at batch 1 and 16, two cores); the pause before each turn is what keeps its threads out of our turns.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F  # noqa: N812  (PyTorch's own convention)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_lumamba import LuMamba  # pyright: ignore[reportMissingImports]  (tests/parity is on the path)
from torch_luna import LUNA  # pyright: ignore[reportMissingImports]

from benchmarks.workers.protocol import Prepared, serve
from benchmarks.workers.sizes import CHANNELS, PATCH, SAMPLES, STATES, WIDTH
from examples import export_torch_stages

DEVICE = torch.device(os.environ.get("BENCHMARK_DEVICE", "cpu"))
CHUNK = 8
STORE_BATCH = 64


def plain_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Decays and drives of all steps first, `(B, L, D, N)`, then the loop."""
    decay = torch.exp(delta[..., None] * a)
    drive = (delta * u)[..., None] * b[:, :, None, :]
    h = torch.zeros_like(drive[:, 0])
    outputs = []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + drive[:, t]
        outputs.append((h * c[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def lean_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The same step by step, nothing of size L D N."""
    h = torch.zeros(u.shape[0], *a.shape, dtype=u.dtype, device=u.device)
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * u[:, t])[..., None] * b[:, t, None, :]
        outputs.append((h * c[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def parallel_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """mamba.py's Blelloch scan."""
    from mambapy.pscan import pscan  # pyright: ignore[reportMissingImports]

    h = pscan(torch.exp(delta[..., None] * a), (delta * u)[..., None] * b[:, :, None, :])
    return (h @ c[..., None]).squeeze(-1)


SCANS: dict[str, Callable[..., Tensor]] = {"plain": plain_scan, "lean": lean_scan, "pscan": parallel_scan}


def chunk_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The loop compiled in chunks of eight steps."""
    h = torch.zeros(u.shape[0], *a.shape, dtype=u.dtype, device=u.device)
    outputs = []
    for t in range(0, u.shape[1], CHUNK):
        step = slice(t, t + CHUNK)
        y, h = _compiled_chunk(u[:, step], delta[:, step], a, b[:, step], c[:, step], h)
        outputs.append(y)
    return torch.cat(outputs, 1)


@torch.compile(dynamic=False)
def _compiled_chunk(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * u[:, t])[..., None] * b[:, t, None, :]
        outputs.append((h * c[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1), h


def fused_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """mamba_ssm's CUDA kernel; channels before time."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore

    u, delta, b, c = (x.transpose(1, 2).contiguous() for x in (u, delta, b, c))
    return selective_scan_fn(u, delta, a, b, c).transpose(1, 2)


SCANS: dict[str, Callable[..., Tensor]] = {
    "plain": plain_scan,
    "lean": lean_scan,
    "compiled": lean_scan,
    "chunk": chunk_scan,
    "pscan": parallel_scan,
    "mamba_ssm": fused_scan,
}


class PeerMamba(export_torch_stages.Mamba):
    """The twin's block with another scan."""

    scan: str

    def forward(self, u: Tensor, inference_params: None = None) -> Tensor:  # noqa: ARG002  (the published call has it)
        """As the parent."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.softplus(self.dt_proj(dt))
        y = SCANS[self.scan](x, delta, -torch.exp(self.A_log), b, c)
        return self.out_proj((y + self.D * x) * F.silu(z))


def make_model(name: str, variant: str, *, classes: int) -> nn.Module:
    """The twin, with its blocks' class exchanged where the variant says so; or braindecode's."""
    torch.manual_seed(0)
    if variant == "braindecode":
        return braindecode_luna(classes)
    if name.startswith("LUNA"):
        model: nn.Module = LUNA(num_classes=classes)
    elif name == "micro":
        model = LuMamba(num_queries=2, embed_dim=16, num_blocks=1, num_classes=classes)
    else:
        model = LuMamba(num_queries=6, num_classes=classes)
    blocks = [module for module in model.modules() if isinstance(module, export_torch_stages.Mamba)]
    if variant != "plain":
        for block in blocks:
            block.__class__ = PeerMamba
            vars(block)["scan"] = variant
    if variant in ("chunk", "mamba_ssm") and not blocks:
        raise ValueError(f"{name} has no scan")
    return model.to(DEVICE)


def braindecode_luna(classes: int) -> nn.Module:
    """LUNA base of braindecode (evaluation takes one scale for every channel, positions as ours)."""
    _without_torchaudio()
    from braindecode.models import LUNA as Theirs  # noqa: N811  # pyright: ignore

    model = Theirs(n_outputs=classes, n_chans=CHANNELS, n_times=SAMPLES, sfreq=256)
    return model.to(DEVICE)


def _without_torchaudio() -> None:
    """braindecode imports torchaudio for other models; its wheel may need CUDA libraries. LUNA uses nothing of it."""
    try:
        import torchaudio  # noqa: F401  # pyright: ignore
    except (ImportError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        empty = mock.MagicMock()
        sys.modules.update(dict.fromkeys(("torchaudio", "torchaudio.functional", "torchaudio.transforms"), empty))


def windows(count: int, samples: int = SAMPLES) -> dict[str, Tensor]:
    """The inputs of the JAX worker."""
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((count, CHANNELS, samples), np.float32)
    places = np.broadcast_to(rng.standard_normal((CHANNELS, 3)).astype(np.float32) * 0.1, (count, CHANNELS, 3))
    tensors = {"signal": torch.from_numpy(signal), "channel_locations": torch.from_numpy(places.copy())}
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def call_model(model: Any, inputs: dict[str, Tensor], dtype: str) -> Tensor:
    """No mask, no channel names: the classifier needs neither."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        out = model(inputs["signal"], channel_locations=inputs["channel_locations"])
    return out[0] if isinstance(out, tuple) else out


def evaluate(request: dict) -> Prepared:
    """Normalised windows in, logits out."""
    variant, dtype = request["variant"], request["dtype"]
    network, inputs = make_model(request["model"], variant, classes=2).eval(), windows(*request["size"])
    run = torch.compile(network) if variant == "compiled" else network

    def call() -> Tensor:
        with torch.inference_mode():
            return call_model(run, inputs, dtype)

    return call, {}


def store(request: dict) -> Prepared:
    """Every window of `benchmarks.evaluation`'s folder: read, normalised, logits; batches of one montage."""
    folder, variant = Path(os.environ["BENCHMARK_STORE"]), request["variant"]
    network = make_model("LuMamba tiny", variant, classes=2).eval()
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    run = torch.compile(network, dynamic=False) if variant == "compiled" else network

    def call() -> None:
        parts = [_logits(run, path) for path in sorted(folder.glob("montage_*.npy"))]
        np.save(folder / f"torch_{variant}.npy", np.concatenate(parts))

    return call, {"windows": int(request["size"][0])}


def _logits(run: Any, path: Path) -> np.ndarray:
    signal = np.load(path, mmap_mode="r")
    places = torch.from_numpy(np.load(path.with_name(path.name.replace("montage", "places"))))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(signal), STORE_BATCH):
            x = torch.from_numpy(np.array(signal[start : start + STORE_BATCH]))
            count = len(x)
            if count < STORE_BATCH:  # one shape for each montage, as a compiled program needs it
                x = torch.cat([x, torch.randn(STORE_BATCH - count, *x.shape[1:])])
            x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8)
            parts.append(run(x, channel_locations=places.expand(len(x), -1, -1))[:count].numpy())
    return np.concatenate(parts)


def train(request: dict) -> Prepared:
    """One AdamW step of fine-tuning."""
    variant, dtype = request["variant"], request["dtype"]
    network, inputs = make_model(request["model"], variant, classes=2).train(), windows(*request["size"])
    run = torch.compile(network) if variant == "compiled" else network
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.arange(request["size"][0], device=DEVICE) % 2

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(call_model(run, inputs, dtype).float(), labels).backward()
        optimizer.step()

    return call, {}


def scan(request: dict) -> Prepared:
    """The scan with softplus, skip and gate, forward."""
    inputs, variant = scan_inputs(*request["size"], dtype=request["dtype"]), request["variant"]

    def call() -> Tensor:
        with torch.inference_mode():
            return _scan(inputs, variant)

    return call, {}


def scan_gradient(request: dict) -> Prepared:
    """Value and gradients of every input."""
    variant = request["variant"]
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(*request["size"], dtype=request["dtype"]).items()}

    def call() -> None:
        for x in inputs.values():
            x.grad = None
        _scan(inputs, variant).float().square().sum().backward()

    return call, {}


def _scan(x: dict[str, Tensor], variant: str) -> Tensor:
    y = SCANS[variant](x["u"], F.softplus(x["delta"]), x["a"], x["b"], x["c"])
    return (y + x["d"] * x["u"]) * F.silu(x["z"])


def scan_inputs(batch: int, length: int, *, dtype: str = "float32") -> dict[str, Tensor]:
    """Sizes of LuMamba tiny; a and d stay float32, as mamba_ssm asks."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, getattr(torch, dtype))

    rows = (batch, length)
    a = -torch.arange(1.0, STATES + 1, device=DEVICE).repeat(WIDTH, 1)
    return {"u": normal(*rows, WIDTH), "delta": normal(*rows, WIDTH) - 3, "a": a, "b": normal(*rows, STATES)} | {
        "c": normal(*rows, STATES),
        "d": normal(WIDTH).float(),
        "z": normal(*rows, WIDTH),
    }


def long(request: dict) -> Prepared:
    """One window of many patches, through a classifier (the published model has no encoder alone)."""
    return evaluate({**request, "size": [1, request["size"][0] * PATCH]})


def versions(request: dict) -> dict:
    """PyTorch, its threads, and whose mamba_ssm there is."""
    del request
    return {"torch": torch.__version__, "torch threads": torch.get_num_threads(), "torch device": str(DEVICE)}


def wait(result: object) -> None:
    """Until the device has finished."""
    del result
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


KINDS: dict[str, Callable[[dict], Prepared]] = {
    "evaluate": evaluate,
    "store": store,
    "train": train,
    "scan": scan,
    "scan_gradient": scan_gradient,
    "long": long,
}


def main() -> None:
    """Serve. Every shape gets a program of its own: without the limits a ninth shape would run uncompiled."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096  # noqa: SLF001
    serve(KINDS, {"versions": versions}, wait=wait)


if __name__ == "__main__":
    main()
