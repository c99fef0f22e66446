"""Eight simulated CPU devices for every test, strict rank promotion, and the optional reference material."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling dominates the suite; without the optimiser it takes half the time, and no tolerance needs the optimiser.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"]
).strip()

import jax

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def x64():
    """Run one test with float64 enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    path = SHARED / "golden"
    if not (path / "manifest.json").is_file():
        pytest.skip("the full set of reference tensors is not beside this repository")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip("the real recordings are not beside this repository")
    return path
