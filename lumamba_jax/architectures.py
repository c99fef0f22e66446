"""The three architectures by name: LuMamba, LUNA, FEMBA. Everything that works with any of them asks here."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from lumamba_jax.femba import Femba, FembaConfig
from lumamba_jax.lumamba import LuMamba, LuMambaConfig
from lumamba_jax.luna import Luna, LunaConfig

ModelConfig = LuMambaConfig | LunaConfig | FembaConfig
Model = LuMamba | Luna | Femba


class Architecture(NamedTuple):
    """Configuration and module of one architecture."""

    config: type[ModelConfig]
    module: type[Model]


ARCHITECTURES: Mapping[str, Architecture] = {
    "LuMamba": Architecture(LuMambaConfig, LuMamba),
    "LUNA": Architecture(LunaConfig, Luna),
    "FEMBA": Architecture(FembaConfig, Femba),
}

SIZES: Mapping[str, ModelConfig] = {
    "LuMamba tiny": LuMambaConfig(),
    "LUNA base": LunaConfig(),
    "LUNA large": LunaConfig(embed_dim=96, num_queries=6, num_blocks=10),
    "LUNA huge": LunaConfig(embed_dim=128, num_queries=8, num_blocks=24),
    "FEMBA tiny": FembaConfig(),
    "FEMBA base": FembaConfig(num_blocks=12),
    "FEMBA large": FembaConfig(num_blocks=4, embed_dim=79),
    "FEMBA huge": FembaConfig(num_blocks=20, embed_dim=79),
}
"""The published sizes, each with its pre-training head."""


def build(config: ModelConfig, *, seed: int = 0) -> Model:
    """A freshly initialised model."""
    return ARCHITECTURES[config.architecture].module(config, rngs=nnx.Rngs(seed))  # pyright: ignore[reportArgumentType]


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The static half of the model and its parameter tree as `jax.ShapeDtypeStruct`s; nothing is computed."""
    graphdef, params = _abstract_model(config)
    return graphdef, jax.tree.map(lambda leaf: leaf, params)  # a tree of the caller's own


@functools.lru_cache(maxsize=16)
def _abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: build(config)))


def config_from(architecture: str, values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that plain values (JSON) describe.

    Raises: ValueError for an unknown architecture, an unknown or no field, or a value that makes no model.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is unknown: choose one of {', '.join(ARCHITECTURES)}")
    config = ARCHITECTURES[architecture].config
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(config)})
    if unknown or not values:
        raise ValueError(f"the configuration of this {architecture} has unknown or no entries {unknown}")
    if values.get("architecture", architecture) != architecture:
        raise ValueError(f"the configuration is that of {values['architecture']!r}, not {architecture!r}")
    return config(**values)
