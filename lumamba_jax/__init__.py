"""LuMamba, an EEG foundation model, in JAX and Flax."""

from lumamba_jax.lumamba import LuMamba, LuMambaConfig, ModelOutput
from lumamba_jax.scan import selective_scan

__all__ = ["LuMamba", "LuMambaConfig", "ModelOutput", "selective_scan"]
