"""Checksums: the formula, every single bit, and no dependence on how an array lies on devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lumamba_jax import manifest

M64 = 2**64


def split_mix(axis: int, index: int) -> int:
    z = (index * 0x9E3779B97F4A7C15 + (axis + 1) * 0xD1B54A32D192ED03) % M64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % M64
    return (z ^ (z >> 31)) | 1


def formula(values: np.ndarray) -> int:
    """The sum of the module's docstring, element by element in whole numbers."""
    total = 0
    for index in np.ndindex(values.shape):
        bits = int.from_bytes(values[index].tobytes(), "little")
        mixed = bits * 0x9E3779B97F4A7C15 % M64
        mixed ^= mixed >> 32
        total += mixed * math.prod(split_mix(axis, i) for axis, i in enumerate(index or (0,) * (not values.ndim)))
    return total % M64


def checksum(values) -> str:
    return manifest.leaf_records({"x": values})["x"].checksum


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7,), (3, 4, 5), (2, 1, 3, 2), (5, 300)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.bool_, jnp.bfloat16, np.complex64])
def test_checksum_is_the_sum_of_the_docstring(shape, dtype):
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    assert checksum(values) == f"{formula(values):016x}"


def test_blocks_and_long_axes_do_not_show(monkeypatch):
    rng = np.random.default_rng(1)
    for shape in ((50, 7), (3, 200), (2, 3, 41), (97,)):
        values = rng.standard_normal(shape).astype(np.float32)
        for block in (1, 8, 64, 2**14):
            monkeypatch.setattr(manifest, "_BLOCK", block)
            assert checksum(values) == f"{formula(values):016x}", (shape, block)


def test_every_single_bit_and_every_swap_changes_it():
    values = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    values[1, 2] = 0.0
    seen = {checksum(values)}
    for byte in range(values.nbytes):
        for bit in range(8):
            other = values.copy()
            other.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
            seen.add(checksum(other))
    for a in range(values.size):
        for b in range(a):
            other = values.copy()
            other.flat[a], other.flat[b] = values.flat[b], values.flat[a]
            seen.add(checksum(other))
    swaps = values.size * (values.size - 1) // 2
    assert len(seen) == 1 + 8 * values.nbytes + swaps
    assert checksum(values.T) not in seen
    assert checksum(np.full(3, np.nan, np.float32)) != checksum(-np.full(3, np.nan, np.float32))


SPECS = [
    PartitionSpec(),
    PartitionSpec("data"),
    PartitionSpec("fsdp"),
    PartitionSpec(("data", "fsdp")),
    PartitionSpec(None, "fsdp"),
    PartitionSpec("fsdp", "data"),
    PartitionSpec("data", None, "fsdp"),
]


@pytest.mark.parametrize("grid", [(1, 1), (8, 1), (2, 4), (4, 2)])
def test_checksum_does_not_depend_on_the_sharding(grid):
    values = np.random.default_rng(3).standard_normal((16, 8, 4)).astype(np.float32)
    mesh = jax.make_mesh(grid, ("data", "fsdp"), devices=jax.devices()[: math.prod(grid)])
    for spec in SPECS:
        placed = jax.device_put(values, NamedSharding(mesh, spec))
        assert checksum(placed) == checksum(values), spec


def test_damage_names_leaf_and_count():
    leaves = {name: np.arange(4.0) for name in ("a", "b", "c")}
    records = manifest.leaf_records(leaves)
    assert manifest.leaf_damage(records, leaves) is None
    other = {"a": np.arange(4.0), "b": np.arange(4.0) + 1, "c": np.arange(4, dtype=np.float32)}
    problem = manifest.leaf_damage(records, other) or ""
    assert problem.startswith("leaf b is float64[4] with checksum ")
    assert problem.endswith("was saved, and 1 more leaf")
    assert "leaf c is absent" in (manifest.leaf_damage({"c": records["c"]}, {}) or "")


def test_files_larger_than_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_PIECE", 1000)
    monkeypatch.setattr(manifest, "_READ", 300)
    (tmp_path / "sub").mkdir()
    data = np.random.default_rng(4).bytes(2500)
    for name, part in {"a": data, "sub/b": data[:1000], "empty": b""}.items():
        (tmp_path / name).write_bytes(part)
    records = manifest.file_records(tmp_path)
    assert {name: len(record["sha256"]) for name, record in records.items()} == {"a": 3, "empty": 1, "sub/b": 1}
    assert manifest.file_damage(tmp_path, records) is None
    (tmp_path / "a").write_bytes(data[:2400] + bytes([data[2400] ^ 4]) + data[2401:])
    assert "a has changed since it was written (SHA-256 of its bytes 2,000 to 2,500" in (
        manifest.file_damage(tmp_path, records) or ""
    )
    (tmp_path / "empty").write_bytes(b"x")
    (tmp_path / "sub/b").unlink()
    problem = manifest.file_damage(tmp_path, records)
    assert problem == "empty has 1 bytes, expected 0, and 1 more file"


def test_a_seal_covers_all_of_the_content():
    content = {"a": 1, "b": [0.1, None, "text"], "c": {"d": True}}
    text = manifest.seal(content).encode()
    assert manifest.unseal(text) == content
    messages = []
    for byte in range(len(text)):
        for bit in range(8):
            changed = text[:byte] + bytes([text[byte] ^ 1 << bit]) + text[byte + 1 :]
            try:
                assert manifest.unseal(changed) == content
            except ValueError as error:
                messages.append(str(error))
    assert all(message.startswith(("is not valid JSON", "has changed since")) for message in messages)
    assert len(messages) > 6 * len(text)
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest.seal({"loss": float("nan")})
