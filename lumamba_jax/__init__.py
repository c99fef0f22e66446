"""LuMamba, an EEG foundation model, in JAX and Flax.

`LuMamba` and `LuMambaConfig` are the model; `load`, `embed` and `predict` are what most users need.
"""

from typing import TYPE_CHECKING, Any

from lumamba_jax.femba import Femba, FembaConfig
from lumamba_jax.heads import ModelOutput
from lumamba_jax.lumamba import LuMamba, LuMambaConfig
from lumamba_jax.luna import Luna, LunaConfig
from lumamba_jax.scan import selective_scan

if TYPE_CHECKING:
    from lumamba_jax.inference import LoadedModel, embed, embed_recording, load, predict

__all__ = [
    "Femba",
    "FembaConfig",
    "LoadedModel",
    "LuMamba",
    "LuMambaConfig",
    "Luna",
    "LunaConfig",
    "ModelOutput",
    "embed",
    "embed_recording",
    "load",
    "predict",
    "selective_scan",
]


def __getattr__(name: str) -> Any:
    # Reading checkpoints brings Orbax along; whoever only builds models does not wait for it.
    if name in {"LoadedModel", "embed", "embed_recording", "load", "predict"}:
        from lumamba_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
