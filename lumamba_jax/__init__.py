"""LuMamba, an EEG foundation model, in JAX and Flax.

`LuMamba` and `LuMambaConfig` are the model; `load`, `embed` and `predict` are what most users need.
"""

from typing import TYPE_CHECKING, Any

from lumamba_jax.lumamba import LuMamba, LuMambaConfig, ModelOutput
from lumamba_jax.scan import selective_scan

if TYPE_CHECKING:
    from lumamba_jax.inference import LoadedModel, embed, load, predict

__all__ = ["LoadedModel", "LuMamba", "LuMambaConfig", "ModelOutput", "embed", "load", "predict", "selective_scan"]


def __getattr__(name: str) -> Any:
    # Reading checkpoints brings Orbax along; whoever only builds models does not wait for it.
    if name in {"LoadedModel", "embed", "load", "predict"}:
        from lumamba_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
