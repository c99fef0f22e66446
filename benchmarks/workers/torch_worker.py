"""The peers' side of `benchmarks.speed`, in PyTorch: prepares a case once, then times single calls of it.

Variants of a model: "plain" (the twin, its scan a loop over materialised decays, as in the published package without
its kernel), "lean" (the loop computes each decay when it is needed), "compiled" (`torch.compile` of the lean twin).
Variants of a scan: "plain", "lean", and "pscan" (mamba.py's parallel scan).
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own convention)
from torch import Tensor, nn
from torch_lumamba import LuMamba
from torch_luna import LUNA

from examples import export_torch_stages

CHANNELS, SAMPLES = 22, 1280
WIDTH, STATES = 768, 16


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
    h = torch.zeros(u.shape[0], *a.shape, dtype=u.dtype)
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta[:, t] * u[:, t])[..., None] * b[:, t, None, :]
        outputs.append((h * c[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def parallel_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """mamba.py's Blelloch scan."""
    from mambapy.pscan import pscan

    h = pscan(torch.exp(delta[..., None] * a), (delta * u)[..., None] * b[:, :, None, :])
    return (h @ c[..., None]).squeeze(-1)


SCANS = {"plain": plain_scan, "lean": lean_scan, "pscan": parallel_scan}


class LeanMamba(export_torch_stages.Mamba):
    """The twin's block with the lean loop."""

    def forward(self, u: Tensor, inference_params: None = None) -> Tensor:  # noqa: ARG002  (the published call has it)
        """As the parent."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.softplus(self.dt_proj(dt))
        y = lean_scan(x, delta, -torch.exp(self.A_log), b, c)
        return self.out_proj((y + self.D * x) * F.silu(z))


def make_model(name: str, variant: str, *, classes: int) -> nn.Module:
    """The twin, with its blocks' class exchanged where the variant says so."""
    torch.manual_seed(0)
    if name.startswith("LUNA"):
        model: nn.Module = LUNA(num_classes=classes)
    else:
        model = LuMamba(num_queries=6, num_classes=classes)
    if variant != "plain":
        for module in model.modules():
            if isinstance(module, export_torch_stages.Mamba):
                module.__class__ = LeanMamba
    return model


def windows(count: int, samples: int = SAMPLES) -> dict[str, Tensor]:
    """The inputs of the JAX worker."""
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((count, CHANNELS, samples), np.float32)
    places = np.broadcast_to(rng.standard_normal((CHANNELS, 3)).astype(np.float32) * 0.1, (count, CHANNELS, 3))
    return {"x": torch.from_numpy(signal), "channel_locations": torch.from_numpy(places.copy())}


def call_model(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """No mask, no channel names: the classifier needs neither."""
    out = model(inputs["x"], inputs["channel_locations"])
    return out[0] if isinstance(out, tuple) else out


def evaluate(model: str, size: list[int], variant: str) -> Callable[[], Any]:
    """Normalised windows in, logits out."""
    network, inputs = make_model(model, variant, classes=2).eval(), windows(size[0])
    run = torch.compile(network) if variant == "compiled" else network

    def call() -> Tensor:
        with torch.inference_mode():
            return call_model(run, inputs)

    return call


def train(model: str, size: list[int], variant: str) -> Callable[[], Any]:
    """One AdamW step of fine-tuning."""
    network, inputs = make_model(model, variant, classes=2).train(), windows(size[0])
    run = torch.compile(network) if variant == "compiled" else network
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.arange(size[0]) % 2

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(call_model(run, inputs), labels).backward()
        optimizer.step()

    return call


def scan(model: str, size: list[int], variant: str) -> Callable[[], Any]:
    """The scan with softplus, skip and gate, forward."""
    del model
    inputs = scan_inputs(*size)

    def call() -> Tensor:
        with torch.inference_mode():
            return _scan(inputs, variant)

    return call


def scan_gradient(model: str, size: list[int], variant: str) -> Callable[[], Any]:
    """Value and gradients of every input."""
    del model
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(*size).items()}

    def call() -> None:
        for x in inputs.values():
            x.grad = None
        _scan(inputs, variant).square().sum().backward()

    return call


def _scan(x: dict[str, Tensor], variant: str) -> Tensor:
    y = SCANS[variant](x["u"], F.softplus(x["delta"]), x["a"], x["b"], x["c"])
    return (y + x["d"] * x["u"]) * F.silu(x["z"])


def scan_inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Sizes of LuMamba tiny."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = (batch, length)
    a = -torch.arange(1.0, STATES + 1).repeat(WIDTH, 1)
    return {"u": normal(*rows, WIDTH), "delta": normal(*rows, WIDTH) - 3, "a": a, "b": normal(*rows, STATES)} | {
        "c": normal(*rows, STATES),
        "d": normal(WIDTH),
        "z": normal(*rows, WIDTH),
    }


def long(model: str, size: list[int], variant: str) -> Callable[[], Any]:
    """One window of many patches, through a classifier (the published model has no encoder alone)."""
    network, inputs = make_model(model, variant, classes=2).eval(), windows(1, size[0] * 40)

    def call() -> Tensor:
        with torch.inference_mode():
            return call_model(network, inputs)

    return call


KINDS = {"evaluate": evaluate, "train": train, "scan": scan, "scan_gradient": scan_gradient, "long": long}


def main() -> None:
    """Answer requests until the input ends; what a library cannot do is an answer too."""
    prepared: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "versions":
            answer = {"torch": torch.__version__, "torch threads": torch.get_num_threads()}
        elif request["do"] == "forget":
            prepared.clear()
        elif request["do"] == "prepare":
            try:
                call = KINDS[request["kind"]](request["model"], request["size"], request["variant"])
                call()
                prepared[request["variant"]] = call
            except Exception as error:
                answer = {"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        else:
            start = time.perf_counter()
            prepared[request["variant"]]()
            answer = {"seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
