"""Write a parity folder for your own PyTorch LuMamba, LUNA or FEMBA: weights, one input, every stage, and its noise.

Stand-alone: run it where your PyTorch code lives. It needs torch, numpy and safetensors, nothing of this repository.

    python export_torch_stages.py parity/ --factory models.LuMamba:LuMamba --kwargs '{"num_queries": 6}' --mask \
        --weights LuMamba_tiny.safetensors
    python export_torch_stages.py parity/ --factory models.FEMBA:FEMBA --kwargs '{"num_blocks": 2, "embed_dim": 35}' \
        --mask --gradients --name femba
    python convert_torch_weights.py --check parity/manifest.json          (here, in this repository)

`--factory module:name` is a class or function that returns the `nn.Module`; `--kwargs` are its arguments, which are
stored, over its own defaults, as the case's configuration. The model is called with those of `x | x_signal`,
`channel_locations`, `channel_names`, `mask`, `loc_noise` that its `forward` takes; where it has no `loc_noise`, the
stored noise replaces `torch.randn_like`. FEMBA always gets a mask: the published code takes None for "hide everything".

`mamba_ssm` is replaced by a plain PyTorch Mamba block, because its CUDA kernels run neither on a CPU nor in float64;
`rotary_embedding_torch` and `timm` are replaced, by what LUNA uses of them, only where they are not installed.
Every stage is computed in float64 and in float32; the largest difference, over a few inputs of this shape, is the noise
floor that a faithful float32 implementation is measured against. `--gradients` adds the float64 gradient of
`sum(output * w_out)`, with `w_out` stored among the inputs, for every trainable parameter.
"""

import argparse
import copy
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (PyTorch's own convention)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT_VERSION = 1
Family = Literal["lumamba", "luna", "femba"]
Stages = dict[str, Tensor]


# --- plain equivalents of packages -----------------------------------------------------------------------------------


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

    def forward(self, u: Tensor, inference_params: None = None) -> Tensor:  # noqa: ARG002  (the published call has it)
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


class RotaryEmbedding(nn.Module):
    """Rotary positions (arXiv 2104.09864) on pairs (0, 1), (2, 3), ...; the frequencies are the stored `freqs`."""

    def __init__(self, dim: int, theta: float = 10000.0, **_unused: object) -> None:  # learned_freq, cache_...
        super().__init__()
        freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def rotate_queries_or_keys(self, t: Tensor) -> Tensor:
        """`(.., L, dim)`: pair i of position s is rotated by the angle `s * freqs[i]`."""
        positions = torch.arange(t.shape[-2], dtype=self.freqs.dtype, device=t.device)
        angles = positions[:, None] * self.freqs  # (L, dim/2)
        even, odd = t[..., 0::2], t[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class Mlp(nn.Module):
    """fc1, activation, norm if one is given, fc2: timm's `Mlp` at inference, `(.., inputs) -> (.., outputs)`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] | None = None,
        drop: float = 0.0,  # noqa: ARG002  (inference has no dropout)
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden)
        self.act = act_layer()
        self.norm = norm_layer(hidden) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden, out_features or in_features)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.fc2(self.norm(self.act(self.fc1(x))))


class DropPath(nn.Identity):
    """Stochastic depth at inference: nothing."""


PLAIN_PACKAGES: tuple[tuple[str, tuple[str, ...], Mapping[str, object]], ...] = (
    ("mamba_ssm", ("modules", "modules.mamba_simple"), {"Mamba": Mamba}),
    ("rotary_embedding_torch", (), {"RotaryEmbedding": RotaryEmbedding}),
    (
        "timm",
        ("layers", "models", "models.layers", "models.vision_transformer"),
        {"Mlp": Mlp, "DropPath": DropPath, "trunc_normal_": nn.init.trunc_normal_},
    ),
)


def install_plain_packages() -> None:
    """Make `import mamba_ssm` give the plain block, and the other packages importable where they are missing."""
    for package, submodules, contents in PLAIN_PACKAGES:
        present = package in sys.modules or importlib.util.find_spec(package) is not None
        if present and package != "mamba_ssm":
            continue
        for name in (package, *(f"{package}.{submodule}" for submodule in submodules)):
            module = types.ModuleType(name)
            module.__path__ = []
            vars(module).update(contents)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
            sys.modules[name] = module


# --- stages by module name -------------------------------------------------------------------------------------------

# Module name (a pattern), what to take ("in" = first argument, "out" = result or results), names of the stages with
# the pattern's groups filled in; {previous} is the first group less one.
Hook = tuple[str, str, tuple[str, ...]]

CHANNEL_UNIFICATION: tuple[Hook, ...] = (
    (r"patch_embed", "out", ("patch_embed",)),
    (r"patch_embed\.proj_in\.(\d+)", "out", ("patch_embed.proj_in.{0}",)),
    (r"freq_embed\.frequency_to_embed", "in", ("freq_features",)),
    (r"freq_embed", "out", ("freq_embed",)),
    (r"channel_location_embedder", "in", ("nerf_encoding",)),
    (r"channel_location_embedder", "out", ("channel_location_emb",)),
    (r"cross_attn", "in", ("tokens",)),
    (r"cross_attn\.((?:queries|keys|values)_norm|ffn)", "out", ("cross_attn.{0}",)),
    (r"cross_attn\.query_self_attn\.layers\.(\d+)", "out", ("cross_attn.query_self_attn.{0}",)),
    (r"cross_attn\.cross_attention", "out", ("cross_attn.mha_out",)),
    (r"cross_attn", "out", ("cross_attn_out", "attention_scores")),
)
BIDIRECTIONAL_MAMBA: tuple[Hook, ...] = (
    (r"mamba_blocks\.(\d+)\.mamba_fwd", "out", ("block{0}.mamba_fwd",)),
    (r"mamba_blocks\.(\d+)\.mamba_rev", "out", ("block{0}.mamba_rev_raw",)),
    (r"mamba_blocks\.(\d+)", "out", ("block{0}.mamba_out",)),
)
ENCODER_HOOKS: dict[Family, tuple[Hook, ...]] = {
    "lumamba": (
        *CHANNEL_UNIFICATION,
        *BIDIRECTIONAL_MAMBA,
        (r"norm_layers\.(\d+)", "out", ("block{0}.norm",)),
        (r"norm_layers\.([1-9]\d*)", "in", ("block{previous}.out",)),
        (r"decoder_head|classifier", "in", ("latent",)),
    ),
    "luna": (
        *CHANNEL_UNIFICATION,
        (r"blocks\.(\d+)\.(attn|mlp)", "out", ("block{0}.{1}",)),
        (r"blocks\.(\d+)", "out", ("block{0}.out",)),
        (r"norm", "out", ("latent",)),
    ),
    "femba": (
        (r"patch_embed", "out", ("patch_embed",)),
        (r"mamba_blocks\.(\d+)", "in", ("block{0}.in",)),
        *BIDIRECTIONAL_MAMBA,
        (r"norm_layers\.(\d+)", "in", ("block{0}.residual",)),
        (r"norm_layers\.(\d+)", "out", ("block{0}.out",)),
        (r"decoder\.dec_conv", "out", ("decoder.dec_conv",)),
    ),
}
# A head is recognised by a parameter that only it has.
HEAD_HOOKS: tuple[tuple[str, tuple[Hook, ...]], ...] = (
    (
        r"decoder_head\.norm\.weight",
        (
            (r"decoder_head\.decoder_pred", "in", ("decoder_queries",)),
            (r"decoder_head\.decoder_pred", "out", ("decoder.transformer_out",)),
            (r"decoder_head\.norm", "out", ("decoder.norm",)),
        ),
    ),
    (
        r"classifier\.learned_agg",
        ((r"classifier\.decoder_attn", "out", ("classifier.attn_out", "classifier.attn_weights")),),
    ),
    (
        r"classifier\.fc3\.weight",
        (
            (r"classifier\.(fc1|mamba_1)", "out", ("classifier.{0}",)),
            (r"classifier\.fc3", "in", ("classifier.pooled",)),
        ),
    ),
    (
        r"classifier\.fc1\.weight",
        (
            (r"classifier\.fc1", "in", ("classifier.pooled",)),
            (r"classifier\.fc1", "out", ("classifier.fc1",)),
            (r"classifier\.activation1", "out", ("logits",)),  # the published linear head forgets to return it
        ),
    ),
)


def recognise_family(parameter_names: Iterable[str]) -> Family:
    """The family whose parts these published parameter names are.

    Raises:
        ValueError: no family, or one of two cannot be told.
    """
    tops = {name.split(".")[0] for name in parameter_names}
    families: dict[Family, set[str]] = {
        "lumamba": {"cross_attn", "mamba_blocks"},
        "luna": {"cross_attn", "blocks"},
        "femba": {"pos_embed", "mamba_blocks"},
    }
    found: list[Family] = [family for family, parts in families.items() if parts <= tops]
    if len(found) != 1:
        raise ValueError(
            f"the model's parts ({', '.join(sorted(tops))}) are not those of one of {', '.join(families)}; "
            "give --family, or a factory that returns the model itself and not a module around it"
        )
    return found[0]


@contextmanager
def capture(model: nn.Module, family: Family, stages: Stages) -> Iterator[None]:
    """Fill `stages` during the next forward pass, in the order of computation."""
    parameters = list(model.state_dict())
    heads = (hooks for key, hooks in HEAD_HOOKS if any(re.fullmatch(key, name) for name in parameters))
    hooks = (*ENCODER_HOOKS[family], *next(heads, ()))
    handles = []
    for module_name, module in model.named_modules():
        for pattern, what, names in hooks:
            if match := re.fullmatch(pattern, module_name):
                groups = match.groups()
                previous = int(groups[0]) - 1 if groups and groups[0].isdecimal() else None
                record = _recorder(stages, [name.format(*groups, previous=previous) for name in names])
                if what == "in":
                    handles.append(module.register_forward_pre_hook(lambda _, values, record=record: record(values)))
                else:
                    handles.append(module.register_forward_hook(lambda _, __, result, record=record: record(result)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(stages: Stages, names: list[str]) -> Callable[[Any], None]:
    def record(values: Any) -> None:
        for name, value in zip(names, values if isinstance(values, tuple) else (values,), strict=False):
            if isinstance(value, Tensor):
                stages[name] = value.detach().clone()

    return record


@contextmanager
def faithful_arithmetic(noise: Tensor | None) -> Iterator[None]:
    """`randn_like` gives `noise` for its shape, `.float()` leaves float64 alone, attention takes no fused path."""
    randn_like, to_float = torch.randn_like, torch.Tensor.float
    fast_path = torch.backends.mha.get_fastpath_enabled()

    def draw(like: Tensor, **options: Any) -> Tensor:
        if noise is not None and like.shape == noise.shape:
            return noise.to(like)
        return randn_like(like, **options)

    torch.randn_like = draw
    torch.Tensor.float = lambda self, **options: self if self.dtype == torch.float64 else to_float(self, **options)
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.randn_like, torch.Tensor.float = randn_like, to_float
        torch.backends.mha.set_fastpath_enabled(value=fast_path)


def _call(model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor | None:
    """The first output, without dropout; None where the model returns none."""
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    taken = inspect.signature(model.forward).parameters
    values = cast | {"x_signal": cast["x"]}
    arguments = {name: values.get(name) for name in taken if name in (*values, "mask", "channel_names", "loc_noise")}
    with faithful_arithmetic(cast.get("loc_noise")):
        output = model(**arguments)
    output = output[0] if isinstance(output, tuple) else output
    return output if isinstance(output, Tensor) else None


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy for one run: a cache filled in one precision (rotary angles) must not reach the other."""
    return copy.deepcopy(model).to(device="cpu", dtype=dtype).eval()


def run(model: nn.Module, family: Family, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Stages:
    """The stages of one forward pass in `dtype`; the last one is `recon` or `logits`."""
    model = _copy(model, dtype)
    stages: Stages = {}
    with torch.no_grad(), capture(model, family, stages):
        output = _call(model, inputs, dtype)
    if output is not None:
        stages["logits" if isinstance(getattr(model, "classifier", None), nn.Module) else "recon"] = output
    return {name: value.contiguous() for name, value in stages.items()}


def gradients(model: nn.Module, inputs: Mapping[str, Tensor], *, seed: int = 0) -> dict[str, Tensor]:
    """`in/w_out` (standard normal), `f64/loss` = sum(output * w_out), and `grad/<name>` in float64.

    Parameters without `requires_grad` are left out; those that the output does not depend on have zeros.

    Raises:
        ValueError: the model returns no tensor.
    """
    model = _copy(model, torch.float64)
    output = _call(model, inputs, torch.float64)
    if output is None:
        raise ValueError("gradients need an output, and the model's forward returns none: let it return its result")
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    loss = (output * weight).sum()
    loss.backward()
    grads = {
        f"grad/{name}": torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {"in/w_out": weight, "f64/loss": loss.detach(), **grads}


# --- one case --------------------------------------------------------------------------------------------------------


def eeg_like_inputs(
    family: Family,
    batch: int,
    channels: int,
    samples: int,
    *,
    vocab_size: int = 90,
    patch_samples: int = 40,
    mask: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Normalised 1/f noise `(B, C, T)`; with `mask`, half of all patches hidden (FEMBA without: a mask of False).

    LuMamba and LUNA also get positions on the head (metres) and vocabulary rows, with `mask` standard normal
    `loc_noise (B, C, 3)`.
    """
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.normal(size=(batch, channels, samples)), axis=-1)
    x = np.fft.irfft(spectrum / np.sqrt(np.arange(spectrum.shape[-1]) + 1.0), n=samples, axis=-1)
    x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-8)
    inputs = {"x": torch.tensor(x, dtype=torch.float32)}
    if family != "femba":
        directions = rng.normal(size=(channels, 3))
        directions[:, 2] = np.abs(directions[:, 2])
        locations = 0.095 * directions / np.linalg.norm(directions, axis=-1, keepdims=True)
        names = rng.permutation(vocab_size)[:channels] if channels <= vocab_size else np.arange(channels) % vocab_size
        inputs["channel_locations"] = torch.tensor(locations, dtype=torch.float32).repeat(batch, 1, 1)
        inputs["channel_names"] = torch.tensor(names, dtype=torch.int64).repeat(batch, 1)
        if mask:
            inputs["loc_noise"] = torch.tensor(rng.normal(size=(batch, channels, 3)), dtype=torch.float32)
    if mask or family == "femba":
        hidden = rng.random((batch, channels, math.ceil(samples / patch_samples))) < (0.5 if mask else 0.0)
        inputs["mask"] = torch.tensor(np.repeat(hidden, patch_samples, axis=-1)[..., :samples])
    return inputs


def noise_floor(
    model: nn.Module, family: Family, inputs: dict[str, Tensor], reference: Stages, *, runs: int
) -> dict[str, dict[str, float]]:
    """Per stage the largest float32 error over `runs` inputs: the stored one and slightly different ones."""
    floor: dict[str, dict[str, float]] = {}
    generator = torch.Generator().manual_seed(0)
    for k in range(runs):
        x = inputs["x"] + 1e-3 * min(k, 1) * torch.randn(inputs["x"].shape, generator=generator)
        varied = inputs | {"x": x}
        exact = run(model, family, varied, torch.float64) if k else reference
        rounded = run(model, family, varied, torch.float32)
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
    model: nn.Module,
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    inputs: dict[str, Tensor],
    *,
    family: Family | None = None,
    runs: int = 4,
    with_gradients: bool = False,
) -> list[str]:
    """Write one case into `folder` (a case of the same name is replaced); returns the names of its stages.

    `family` None: recognised from the parameter names. FEMBA inputs without a mask get one of False, and its
    configuration states the size of its grid, which the weights do not show.

    Raises:
        ValueError: the family cannot be told, `name` is no file name, or gradients of a model without output.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{name!r} cannot name a case: it becomes a file name, use letters, digits, '_', '-' and '.'")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    family = family or recognise_family(state)
    if family == "femba":
        inputs = {"mask": torch.zeros(inputs["x"].shape, dtype=torch.bool)} | inputs
        config = {"num_channels": inputs["x"].shape[1], "seq_length": inputs["x"].shape[2]} | dict(config)
    exact = run(model, family, inputs, torch.float64)
    floor = noise_floor(model, family, inputs, exact, runs=runs)
    rounded = run(model, family, inputs, torch.float32)
    data = {f"in/{key}": value.contiguous() for key, value in inputs.items()}
    data |= {f"f64/{stage}": value for stage, value in exact.items()}
    data |= {f"f32/{stage}": value for stage, value in rounded.items() if "." not in stage}
    if with_gradients:
        data |= gradients(model, inputs)
    state_path, data_path = f"state/{name}.safetensors", f"cases/{name}.safetensors"
    _write(folder / state_path, lambda path: save_file(state, path))
    _write(folder / data_path, lambda path: save_file(data, path))
    case = {
        "name": name,
        "family": family,
        "config": dict(config),
        "state_files": [state_path],
        "data_file": data_path,
        "noise_floor_f32_vs_f64": floor,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    _add_to_manifest(folder / "manifest.json", case)
    return list(exact)


def _add_to_manifest(path: Path, case: dict[str, Any]) -> None:
    manifest = json.loads(path.read_text()) if path.exists() else {"format": FORMAT_VERSION, "cases": []}
    manifest["cases"] = [other for other in manifest["cases"] if other["name"] != case["name"]] + [case]
    text = json.dumps(manifest, indent=1) + "\n"
    _write(path, lambda temporary: temporary.write_text(text))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` first, so that what has its name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.writing")
    write(temporary)
    temporary.replace(path)


# --- command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; further cases may join the same folder")
    parser.add_argument("--factory", required=True, help="module:name of the class or function that makes the model")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="its arguments, as JSON")
    parser.add_argument(
        "--weights", type=Path, help="safetensors to load (strictly); otherwise whatever the factory set"
    )
    parser.add_argument(
        "--family", choices=("auto", *get_args(Family)), default="auto", help="auto: by the parameter names"
    )
    parser.add_argument("--name", default="mine", help="name of the case")
    parser.add_argument(
        "--inputs", type=Path, help="safetensors with x[, channel_locations, channel_names, mask, loc_noise]"
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, metavar=("B", "C", "T"), help="of generated inputs; else 2 windows, 22 x 1280"
    )
    parser.add_argument(
        "--mask", action="store_true", help="generated inputs: hide half of the patches, add location noise"
    )
    parser.add_argument("--gradients", action="store_true", help="float64 gradients of every trainable parameter too")
    parser.add_argument("--runs", type=int, default=4, help="inputs the noise floor is measured on")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _stated_config(factory: Callable[..., nn.Module], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The factory's plain defaults with `kwargs` over them: what the weights alone may not show (heads, strides)."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(factory).parameters.items()}
    plain = (bool, int, float, str, list, tuple)
    return {name: value for name, value in defaults.items() if isinstance(value, plain)} | dict(kwargs)


def _generated_inputs(model: nn.Module, family: Family, config: Mapping[str, Any], args: argparse.Namespace) -> Stages:
    embedding = model.state_dict().get("channel_emb.embeddings.weight")
    patch = config.get("patch_size", (2, 16) if family == "femba" else 40)
    batch, channels, samples = args.shape or (2, config.get("num_channels", 22), config.get("seq_length", 1280))
    return eeg_like_inputs(
        family,
        batch,
        channels,
        samples,
        vocab_size=90 if embedding is None else len(embedding),
        patch_samples=patch[1] if family == "femba" else patch,
        mask=args.mask,
        seed=args.seed,
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def _load_weights(model: nn.Module, path: Path) -> None:
    tensors = {name.removeprefix("model."): value for name, value in _read(path).items()}
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model that --factory and --kwargs make: {error}") from error


def main(arguments: list[str] | None = None) -> None:
    """Command line, see the top of the file."""
    parser = _parser()
    args = parser.parse_args(arguments)
    module, _, attribute = args.factory.partition(":")
    if not (module and attribute):
        parser.error(f"--factory {args.factory}: expected module:name, such as models.LUNA:LUNA")
    install_plain_packages()
    sys.path.insert(0, str(Path.cwd()))
    torch.manual_seed(args.seed)
    factory = getattr(importlib.import_module(module), attribute)
    model = factory(**args.kwargs)
    config = _stated_config(factory, args.kwargs)
    try:
        if args.weights:
            _load_weights(model, args.weights)
        family = recognise_family(model.state_dict()) if args.family == "auto" else args.family
        inputs = _read(args.inputs) if args.inputs else _generated_inputs(model, family, config, args)
        stages = export(
            model,
            args.folder,
            args.name,
            config,
            inputs,
            family=family,
            runs=args.runs,
            with_gradients=args.gradients,
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.name} ({family}): {len(stages)} stages in {args.folder}: {', '.join(stages)}")


if __name__ == "__main__":
    main()
