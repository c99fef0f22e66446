"""Write a parity folder for your own PyTorch LuMamba: weights, one input, every stage, and the float32 noise of each.

Stand-alone: run it where your PyTorch code lives. It needs torch, numpy and safetensors, nothing of this repository.

    python export_torch_stages.py parity/ --factory models.LuMamba:LuMamba --kwargs '{"num_queries": 6}' --mask \
        --weights LuMamba_tiny.safetensors
    python convert_torch_weights.py --check parity/manifest.json          (here, in this repository)

`--factory module:name` is a class or function that returns the `nn.Module`; `--kwargs` are its arguments and are stored
as the case's configuration. The model is called with those of `x | x_signal`, `channel_locations`, `channel_names`,
`mask`, `loc_noise` that its `forward` takes; where it has no `loc_noise`, the stored noise replaces `torch.randn_like`.

`mamba_ssm` is replaced by a plain PyTorch Mamba block, because its CUDA kernels run neither on a CPU nor in float64.
Every stage is computed in float64 and in float32; the largest difference, over a few inputs of this shape, is the noise
floor that a faithful float32 implementation is measured against.
"""

import argparse
import importlib
import inspect
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own convention)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT_VERSION = 1
Stages = dict[str, Tensor]


class Mamba(nn.Module):
    """One Mamba-1 block (arXiv 2312.00752) with the parameter names of `mamba_ssm.Mamba`: `(B, L, M) -> (B, L, M)`."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        **_unused: object,  # of the CUDA package: layer_idx, use_fast_path, device, ...
    ) -> None:
        super().__init__()
        inner = expand * d_model
        self.d_state = d_state
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Run forward over axis 1, the recurrence as a loop."""
        length = u.shape[1]
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :length].transpose(1, 2))
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.softplus(self.dt_proj(dt))
        decay = torch.exp(delta[..., None] * -torch.exp(self.A_log))  # (B, L, D, N)
        drive = (delta * x)[..., None] * b[:, :, None, :]
        h = torch.zeros_like(drive[:, 0])
        outputs = []
        for t in range(length):
            h = decay[:, t] * h + drive[:, t]
            outputs.append((h * c[:, t, None, :]).sum(-1))
        return self.out_proj((torch.stack(outputs, 1) + self.D * x) * F.silu(z))


def install_plain_mamba() -> None:
    """Make `import mamba_ssm` give the plain block, whether the CUDA package is installed or not."""
    for name in ("mamba_ssm", "mamba_ssm.modules", "mamba_ssm.modules.mamba_simple"):
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module)["Mamba"] = Mamba
        sys.modules[name] = module


# --- stages by module name -------------------------------------------------------------------------------------------

# module name (a pattern), what to take ("in" = first argument, "out" = result or results), names of the stages
HOOKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (r"patch_embed", "out", ("patch_embed",)),
    (r"patch_embed\.proj_in\.(\d+)", "out", ("patch_embed.proj_in.{0}",)),
    (r"freq_embed\.frequency_to_embed", "in", ("freq_features",)),
    (r"freq_embed", "out", ("freq_embed",)),
    (r"channel_location_embedder", "in", ("nerf_encoding",)),
    (r"channel_location_embedder", "out", ("channel_location_emb",)),
    (r"cross_attn", "in", ("tokens",)),
    (r"cross_attn\.((?:queries|keys|values)_norm|ffn|query_self_attn)", "out", ("cross_attn.{0}",)),
    (r"cross_attn\.query_self_attn\.layers\.(\d+)", "out", ("cross_attn.query_self_attn.{0}",)),
    (r"cross_attn\.cross_attention", "out", ("cross_attn.mha_out",)),
    (r"cross_attn", "out", ("cross_attn_out", "attention_scores")),
    (r"norm_layers\.(\d+)", "out", ("block{0}.norm",)),
    (r"mamba_blocks\.(\d+)\.mamba_fwd", "out", ("block{0}.mamba_fwd",)),
    (r"mamba_blocks\.(\d+)\.mamba_rev", "out", ("block{0}.mamba_rev_raw",)),
    (r"mamba_blocks\.(\d+)", "out", ("block{0}.mamba_out",)),
    (r"decoder_head|classifier", "in", ("latent",)),
    (r"decoder_head\.decoder_pred", "in", ("decoder_queries",)),
    (r"decoder_head\.decoder_pred", "out", ("decoder.transformer_out",)),
    (r"decoder_head\.norm", "out", ("decoder.norm",)),
    (r"classifier\.decoder_attn", "out", ("classifier.attn_out", "classifier.attn_weights")),
    (r"classifier\.(fc1|mamba_1)", "out", ("classifier.{0}",)),
    (r"classifier\.fc3", "in", ("classifier.pooled",)),
)


@contextmanager
def capture(model: nn.Module, stages: Stages) -> Iterator[None]:
    """Fill `stages` during the next forward pass, in the order of computation."""
    handles = []
    for name, module in model.named_modules():
        for pattern, what, names in HOOKS:
            if match := re.fullmatch(pattern, name):
                resolved = [stage.format(*match.groups()) for stage in names]
                if resolved != ["cross_attn.query_self_attn"]:  # its last layer is the same tensor
                    handles.append(module.register_forward_hook(_recorder(stages, what, resolved)))
        if match := re.fullmatch(r"norm_layers\.([1-9]\d*)", name):  # the sum before it is the previous block's output
            handles.append(module.register_forward_hook(_recorder(stages, "in", [f"block{int(match[1]) - 1}.out"])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(stages: Stages, what: str, names: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def record(_module: nn.Module, arguments: Any, result: Any) -> None:
        values = arguments[:1] if what == "in" else result if isinstance(result, tuple) else (result,)
        for name, value in zip(names, values, strict=False):
            if isinstance(value, Tensor):
                stages[name] = value.detach().clone()

    return record


@contextmanager
def stored_noise(noise: Tensor | None) -> Iterator[None]:
    """`torch.randn_like` gives `noise` for tensors of its shape, and `.float()` leaves float64 alone."""
    randn_like, to_float = torch.randn_like, torch.Tensor.float

    def draw(like: Tensor, **options: Any) -> Tensor:
        if noise is not None and like.shape == noise.shape:
            return noise.to(like)
        return randn_like(like, **options)

    torch.randn_like = draw
    torch.Tensor.float = lambda self, **options: self if self.dtype == torch.float64 else to_float(self, **options)
    try:
        yield
    finally:
        torch.randn_like, torch.Tensor.float = randn_like, to_float


def run(model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Stages:
    """One forward pass in `dtype`, without dropout and without PyTorch's fused attention path."""
    model = model.to(dtype).eval()
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    taken = inspect.signature(model.forward).parameters
    values = cast | {"x_signal": cast["x"]}
    arguments = {name: values.get(name) for name in taken if name in (*values, "mask", "channel_names", "loc_noise")}
    stages: Stages = {}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        with torch.no_grad(), capture(model, stages), stored_noise(cast.get("loc_noise")):
            output = model(**arguments)
    finally:
        torch.backends.mha.set_fastpath_enabled(value=fast_path)
    output = output[0] if isinstance(output, tuple) else output
    if isinstance(output, Tensor):
        stages["recon" if hasattr(model, "decoder_head") else "logits"] = output
    return {name: value.cpu().contiguous() for name, value in stages.items()}


# --- one case --------------------------------------------------------------------------------------------------------


def eeg_like_inputs(
    batch: int, channels: int, samples: int, *, vocab_size: int, patch_size: int, mask: bool, seed: int
) -> dict[str, Tensor]:
    """Normalised 1/f noise `(B, C, T)`, positions on the head (metres), vocabulary rows; half of the patches hidden."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.normal(size=(batch, channels, samples)), axis=-1)
    x = np.fft.irfft(spectrum / np.sqrt(np.arange(spectrum.shape[-1]) + 1.0), n=samples, axis=-1)
    x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-8)
    directions = rng.normal(size=(channels, 3))
    directions[:, 2] = np.abs(directions[:, 2])
    locations = 0.095 * directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    names = rng.permutation(vocab_size)[:channels] if channels <= vocab_size else np.arange(channels) % vocab_size
    inputs = {
        "x": torch.tensor(x, dtype=torch.float32),
        "channel_locations": torch.tensor(locations, dtype=torch.float32).repeat(batch, 1, 1),
        "channel_names": torch.tensor(names, dtype=torch.int64).repeat(batch, 1),
    }
    if mask:
        hidden = rng.random((batch, channels, samples // patch_size)) < 0.5
        inputs["mask"] = torch.tensor(np.repeat(hidden, patch_size, axis=-1))
        inputs["loc_noise"] = torch.tensor(rng.normal(size=(batch, channels, 3)), dtype=torch.float32)
    return inputs


def noise_floor(
    model: nn.Module, inputs: dict[str, Tensor], reference: Stages, *, runs: int
) -> dict[str, dict[str, float]]:
    """Per stage the largest float32 error over `runs` inputs: the stored one and slightly different ones."""
    floor: dict[str, dict[str, float]] = {}
    generator = torch.Generator().manual_seed(0)
    for k in range(runs):
        x = inputs["x"] + 1e-3 * min(k, 1) * torch.randn(inputs["x"].shape, generator=generator)
        varied = inputs | {"x": x}
        exact = run(model, varied, torch.float64) if k else reference
        rounded = run(model, varied, torch.float32)
        for stage, value in exact.items():
            error = (rounded[stage].double() - value).abs()
            entry = floor.setdefault(stage, {"max_abs_err": 0.0, "rms_err": 0.0})
            entry["max_abs_err"] = max(entry["max_abs_err"], float(error.max()))
            entry["rms_err"] = max(entry["rms_err"], float(error.square().mean().sqrt()))
    for stage, entry in floor.items():
        entry["max_abs_ref"] = float(reference[stage].abs().max())
        entry["rms_ref"] = float(reference[stage].square().mean().sqrt())
    return floor


def export(
    model: nn.Module, folder: Path, name: str, config: Mapping[str, Any], inputs: dict[str, Tensor], *, runs: int = 4
) -> list[str]:
    """Write one case into `folder` (a case of the same name is replaced); returns the names of its stages."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    exact = run(model, inputs, torch.float64)
    floor = noise_floor(model, inputs, exact, runs=runs)
    finals = {f"f32/{stage}": value for stage, value in run(model, inputs, torch.float32).items() if "." not in stage}
    data = {f"in/{key}": value.contiguous() for key, value in inputs.items()}
    data |= {f"f64/{stage}": value for stage, value in exact.items()} | finals
    files = {f"state/{name}.safetensors": state, f"cases/{name}.safetensors": data}
    for path, tensors in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / path)
    manifest_path = folder / "manifest.json"
    manifest = (
        json.loads(manifest_path.read_text()) if manifest_path.exists() else {"format": FORMAT_VERSION, "cases": []}
    )
    state_path, data_path = files
    case = {
        "name": name,
        "family": "lumamba",
        "config": dict(config),
        "state_files": [state_path],
        "data_file": data_path,
        "noise_floor_f32_vs_f64": floor,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    manifest["cases"] = [other for other in manifest["cases"] if other["name"] != name] + [case]
    temporary = manifest_path.with_suffix(".json.writing")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(manifest_path)
    return list(exact)


def main(arguments: list[str] | None = None) -> None:
    """Command line, see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; further cases may join the same folder")
    parser.add_argument("--factory", required=True, help="module:name of the class or function that makes the model")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="its arguments, as JSON")
    parser.add_argument(
        "--weights", type=Path, help="safetensors to load (strictly); otherwise whatever the factory set"
    )
    parser.add_argument("--name", default="mine", help="name of the case")
    parser.add_argument(
        "--inputs", type=Path, help="safetensors with x, channel_locations[, channel_names, mask, loc_noise]"
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(2, 22, 1280), metavar=("B", "C", "T"), help="else generated"
    )
    parser.add_argument(
        "--mask", action="store_true", help="generated inputs: hide half of the patches, add location noise"
    )
    parser.add_argument("--runs", type=int, default=4, help="inputs the noise floor is measured on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    install_plain_mamba()
    sys.path.insert(0, str(Path.cwd()))
    module, _, attribute = args.factory.partition(":")
    torch.manual_seed(args.seed)
    model = getattr(importlib.import_module(module), attribute)(**args.kwargs)
    if args.weights:
        tensors = {name.removeprefix("model."): value for name, value in load_file(args.weights).items()}
        model.load_state_dict(tensors, strict=True)
    if args.inputs:
        inputs = load_file(args.inputs)
    else:
        embedding = model.state_dict().get("channel_emb.embeddings.weight")
        batch, channels, samples = args.shape
        inputs = eeg_like_inputs(
            batch,
            channels,
            samples,
            vocab_size=90 if embedding is None else len(embedding),
            patch_size=args.kwargs.get("patch_size", 40),
            mask=args.mask,
            seed=args.seed,
        )
    stages = export(model, args.folder, args.name, args.kwargs, inputs, runs=args.runs)
    print(f"{args.name}: {len(stages)} stages in {args.folder}: {', '.join(stages)}")


if __name__ == "__main__":
    main()
