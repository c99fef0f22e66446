"""Weights come out of every kind of published file as they went in; what is not weights is refused, and never run."""

import argparse
import builtins
import collections
import datetime as dt
import functools
import hashlib
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_checkpoint_writer import (
    call,
    foreign,
    mapping,
    name,
    number,
    program,
    sequence,
    state_dict,
    storage,
    storages,
    tensor,
    text,
    whole,
    with_64_bit_end,
    write_checkpoint,
)

from lumamba_jax.torch_files import read_tensors, sha256, weight_files

ARRAYS = {
    "proj.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.array([1.5, -2.0], np.float16),
    "brain": np.array([[0.5], [3.0]], ml_dtypes.bfloat16),
    "double": np.array(2.25),
}
W = ARRAYS["proj.weight"]


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, array in expected.items():
        assert found[key].dtype == array.dtype, key
        assert found[key].shape == array.shape, key
        assert found[key].tobytes() == np.ascontiguousarray(array).tobytes(), key


def refusal(path):
    """The one sentence about a file."""
    with pytest.raises(ValueError, match=r".") as error:
        read_tensors([path])
    sentence = str(error.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    assert "cannot be read" not in sentence  # which is said of exceptions nobody foresaw
    return sentence.removeprefix(f"{path}: ")


def write(path, content):
    path.write_bytes(content)
    return path


def checkpoint(tmp_path, top, stored=None):
    return write_checkpoint(tmp_path / "model.ckpt", program(top), stored or {})


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="F32", shape=(2,), start=0, stop=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def test_safetensors_round_trip_without_lightnings_prefix(tmp_path):
    save_file({f"model.{key}": array for key, array in ARRAYS.items()}, tmp_path / "a.safetensors")
    found = read_tensors([tmp_path / "a.safetensors"])
    assert_same(dict(sorted(found.items())), dict(sorted(ARRAYS.items())))


def test_several_files_are_united_and_a_name_may_occur_once(tmp_path):
    save_file({"a": W}, tmp_path / "a.safetensors")
    write_checkpoint(tmp_path / "b.pt", program(state_dict({"b": W})), storages({"b": W}))
    assert_same(read_tensors([tmp_path / "a.safetensors", str(tmp_path / "b.pt")]), {"a": W, "b": W})
    save_file({"model.a": W}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c\.safetensors: tensor 'a' occurs twice"):
        read_tensors([tmp_path / "a.safetensors", tmp_path / "c.safetensors"])


@pytest.mark.parametrize("size", [128, 5 * 256 + 128, 0x7B, 0x4B50])
def test_a_header_length_that_looks_like_another_format(tmp_path, size):
    # 0x80 0x02 begins a pickle, 0x7b is a brace, 0x4b50 is PK
    header = json.dumps({"w": entry()}).encode().ljust(size)
    path = write(tmp_path / "a.safetensors", safetensors(header, bytes(8)))
    assert_same(read_tensors([path]), {"w": np.zeros(2, np.float32)})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"<html>login</html>", "is a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(80), "is neither safetensors nor a PyTorch checkpoint"),
        (pickle.dumps({"w": [1.0]}, 2), "is a plain pickle"),
        (pickle.dumps({"w": [1.0]}, 5), "is a plain pickle"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2), "is in PyTorch's old format"),
        (b'{"architectures": ["LuMamba"]}', "is JSON but no index"),
        (safetensors({}), "holds no tensors"),
        (safetensors({"__metadata__": {"format": "pt"}}), "holds no tensors"),
        (struct.pack("<Q", 100 << 30) + b'{"w":', "claims a header of 107374182400 bytes"),
        (struct.pack("<Q", 2**64 - 1) + b'{"w":', "claims a header of 18446744073709551615 bytes"),
        (safetensors({"w": entry()}, bytes(7)), "truncated or damaged"),
        (safetensors({"w": entry()}, bytes(9)), "truncated or damaged"),
        (safetensors({"w": entry(), "v": entry(start=4, stop=12)}, bytes(12)), "'v' starts at byte 4"),
        (safetensors({"w": entry(), "v": entry(start=9, stop=17)}, bytes(17)), "'v' starts at byte 9"),
        (safetensors({"w": entry(shape=(3,))}, bytes(8)), "needs 12 bytes; its offsets span 8"),
        (safetensors({"w": entry(dtype="F64")}, bytes(8)), "needs 16 bytes; its offsets span 8"),
        (safetensors({"w": entry(dtype="Q4")}, bytes(8)), "is of no known dtype"),
        (safetensors({"w": entry(dtype=["F32"])}, bytes(8)), "is of no known dtype"),
        (safetensors({"w": entry(shape=(-2,))}, bytes(8)), "has no possible shape"),
        (safetensors({"w": entry(shape=(2.0,))}, bytes(8)), "has no possible shape"),
        (safetensors({"w": entry(shape=(True, 2))}, bytes(8)), "has no possible shape"),
        (safetensors({"w": entry(shape=(0, 2**62, 2**62), stop=0)}), "has no possible shape"),
        (safetensors({"w": entry(shape=[1] * 40 + [2])}, bytes(8)), "has no possible shape"),
        (safetensors({"w": entry(start=-8, stop=0)}, bytes(8)), "has no possible data_offsets"),
        (safetensors({"w": entry() | {"strides": [1]}}, bytes(8)), "exactly dtype, shape and data_offsets"),
        (safetensors({"w": [1, 2]}, bytes(8)), "exactly dtype, shape and data_offsets"),
        (safetensors({"__metadata__": {"a": 1}, "w": entry()}, bytes(8)), "__metadata__"),
        (safetensors(b'{"w":1,"w":2}'), "the safetensors header names 'w' twice"),
        (safetensors(b'{"w":{"dtype":"F32","dtype":"F32"}}'), "names 'dtype' twice"),
        (safetensors(b'{"w":\xff}'), "the safetensors header is damaged"),
        (safetensors(b'{"w":' + b"[" * 200_000), "the safetensors header is damaged"),
        (safetensors(b'{"w":' + b"9" * 5_000 + b"}"), "the safetensors header is damaged"),
    ],
)
def test_what_is_no_weight_file_is_refused_in_one_sentence(tmp_path, content, sentence):
    assert sentence in refusal(write(tmp_path / "model.safetensors", content))


def test_names_in_messages_can_be_printed(tmp_path):
    header = b'{"a\\n\\ud800' + b"b" * 5_000 + b'":1}'
    sentence = refusal(write(tmp_path / "a.safetensors", safetensors(header)))
    sentence.encode()
    assert len(sentence) < 300


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_tensors([tmp_path / "absent.safetensors"])
    assert "is not a file" in refusal(tmp_path)


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """An index of two shards, and its content to change."""
    save_file({"model.a": W, "model.b": W + 1}, tmp_path / "model-1.safetensors")
    save_file({"model.c": W + 2}, tmp_path / "model-2.safetensors")
    names = {"model.a": "model-1.safetensors", "model.b": "model-1.safetensors", "model.c": "model-2.safetensors"}
    index = {"metadata": {"total_size": 144}, "weight_map": names}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path, index


def rewritten(path, index):
    path.write_text(json.dumps(index))
    return path


def test_an_index_reads_its_shards(sharded):
    found = read_tensors(weight_files(sharded[0].parent))
    assert_same(dict(sorted(found.items())), {"a": W, "b": W + 1, "c": W + 2})


def test_an_index_and_its_shards_may_be_links_as_in_a_cache(sharded, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in tmp_path.glob("model*"):
        (snapshot / path.name).symlink_to(Path("..") / path.name)
    assert set(read_tensors(weight_files(snapshot))) == {"a", "b", "c"}


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "sub/model-2.safetensors", "..", ".", "", "c:\\a", "a\0b", 5, None],
)
def test_an_index_cannot_reach_out_of_its_folder(sharded, shard):
    path, index = sharded
    save_file({"model.c": W}, path.parent.parent / "secret.safetensors")
    index["weight_map"]["model.c"] = shard
    assert "puts tensor 'model.c' into" in refusal(rewritten(path, index))


def test_an_index_and_its_shards_must_agree(sharded):
    path, index = sharded
    index["weight_map"]["d"] = "model-2.safetensors"
    assert refusal(rewritten(path, index)) == "its shard 'model-2.safetensors' lacks tensors: 'd'"
    del index["weight_map"]["d"], index["weight_map"]["model.b"]
    assert refusal(rewritten(path, index)) == "its shard 'model-1.safetensors' has unlisted tensors: 'model.b'"
    index["weight_map"] = {"model.a": "model-2.safetensors", "model.c": "model-1.safetensors"}
    assert "lacks tensors" in refusal(rewritten(path, index))


def test_missing_and_damaged_shards_are_named(sharded):
    path, index = sharded
    (path.parent / "model-2.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert refusal(path).startswith("its shard 'model-2.safetensors': is a git-lfs pointer")
    write_checkpoint(path.parent / "model-2.safetensors", program(state_dict({"model.c": W})), storages({"model.c": W}))
    assert refusal(path) == "its shard 'model-2.safetensors': is not a safetensors file"
    (path.parent / "model-2.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"index\.json: 1 of 2 shards are not beside it: 'model-2\.safetensors'"
    ):
        read_tensors([path])
    assert "is JSON but no index" in refusal(rewritten(path, index | {"shards": 2}))


# --- PyTorch checkpoints, written by PyTorch -------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


class Recipe:
    """Stands for the classes of a training program that the reader does not have."""

    def __init__(self):
        self.depth = {1: {2: (3, [4.5, None])}}
        self.bound = functools.partial(int, base=2)


def as_numpy(torch, value):
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "uint16"]
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_state_dict(torch, tmp_path, dtype, protocol):
    values = {"a": torch.arange(12).reshape(3, 4), "empty": torch.zeros(0, 3), "scalar": torch.tensor(1)}
    values = {key: value.to(getattr(torch, dtype)) for key, value in values.items()}
    torch.save(values, tmp_path / "a.pt", pickle_protocol=protocol)
    assert_same(read_tensors([tmp_path / "a.pt"]), {key: as_numpy(torch, value) for key, value in values.items()})


def test_torch_module_state_dict_with_buffers(torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    expected = {key: as_numpy(torch, value) for key, value in model.state_dict().items()}
    assert expected["1.num_batches_tracked"].dtype == np.int64
    assert_same(read_tensors([tmp_path / "a.pt"]), expected)


def test_torch_views_ties_and_parameters(torch, tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    parameter = torch.nn.Parameter(base.clone())
    noted = torch.nn.Parameter(base[0].clone())
    noted.note = "kept as an attribute"
    values = {
        "base": base,
        "tied": base,
        "row": base[1],
        "last": base[2, 3, 4],
        "transposed": base.permute(2, 0, 1),
        "steps": base[::2, 1::2, ::3],
        "flat": base.view(-1)[7:19],
        "singleton": base[:, :1].expand(3, 1, 5),
        "nothing": base[:, 2:2],
        "parameter": parameter,
        "frozen": torch.nn.Parameter(base.clone(), requires_grad=False),
        "noted": noted,
    }
    torch.save({"state_dict": values}, tmp_path / "a.ckpt")
    found = read_tensors([tmp_path / "a.ckpt"])
    assert_same(found, {key: as_numpy(torch, value) for key, value in values.items()})
    found["tied"][:] = 0  # copies, not windows on one buffer
    assert found["base"][2, 3, 4] == 59


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_torch_training_checkpoint(torch, tmp_path, key):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = collections.OrderedDict((f"model.{name}", value) for name, value in model.state_dict().items())
    content = {
        "epoch": 3,
        "global_step": 10**12,
        "pytorch-lightning_version": "2.5.0",
        key: state,
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-3], "_step_count": 4, "verbose": False}],
        "callbacks": {"EarlyStopping{'monitor': 'loss'}": {"best": torch.tensor(0.5), "when": dt.date(2024, 1, 1)}},
        "hyper_parameters": argparse.Namespace(
            recipe=Recipe(), seen={1, "a"}, left=frozenset((2, 3)), folder=Path("a/b")
        ),
        "queue": collections.deque([1, 2]),
        "counts": collections.defaultdict(list, a=[1]),
        "spectrum": torch.zeros(2, dtype=torch.complex64),
        "noise": np.arange(3.0),
        (1, "a tuple"): b"\x00\xff",
    }
    torch.save(content, tmp_path / "last.ckpt")
    expected = {name: as_numpy(torch, value) for name, value in model.state_dict().items()}
    assert_same(read_tensors([tmp_path / "last.ckpt"]), expected)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_torch_tensors_that_are_not_plain(torch, tmp_path):
    def saved(value):
        torch.save({"w": torch.zeros(2), "odd": value}, tmp_path / "a.pt")
        return refusal(tmp_path / "a.pt")

    assert saved(torch.zeros(3).expand(1000, 3)) == "tensor 'odd' has overlapping elements; save it after .contiguous()"
    assert "weight 'odd' is" in saved(torch.eye(2).to_sparse())
    assert "a tensor in the unknown storage 'torch.ComplexFloatStorage'" in saved(torch.zeros(2, dtype=torch.complex64))
    assert "weight 'odd' is" in saved(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    assert "_rebuild_meta_tensor_no_storage" in saved(torch.zeros(2, device="meta"))


def test_torch_modules_and_old_files_are_refused(torch, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "holds an object of 'torch.nn.modules.linear.Linear' instead of weights" in refusal(tmp_path / "module.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "is in PyTorch's old format" in refusal(tmp_path / "old.pt")


def test_torch_reads_what_the_writer_of_these_tests_writes(torch, tmp_path):
    path = checkpoint(tmp_path, state_dict(ARRAYS), storages(ARRAYS))
    found = torch.load(path, weights_only=True)
    assert_same({key: as_numpy(torch, value) for key, value in found.items()}, ARRAYS)


# --- PyTorch checkpoints, written opcode by opcode -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".safetensors", ""])
def test_a_checkpoint_is_known_by_its_content(tmp_path, suffix):
    path = write_checkpoint(tmp_path / f"model{suffix}", program(state_dict(ARRAYS)), storages(ARRAYS))
    assert_same(read_tensors([path]), ARRAYS)


@pytest.mark.parametrize("byteorder", [None, b"little", b"big"])
def test_byte_order(tmp_path, byteorder):
    stored = {str(i): array.tobytes() for i, array in enumerate(ARRAYS.values())}
    if byteorder == b"big":
        integers = [array.view(f"u{array.itemsize}") for array in ARRAYS.values()]  # bfloat16 cannot be swapped
        stored = {str(i): array.byteswap().tobytes() for i, array in enumerate(integers)}
    path = write_checkpoint(tmp_path / "a.pt", program(state_dict(ARRAYS)), stored, byteorder=byteorder)
    assert_same(read_tensors([path]), ARRAYS)


def test_an_unknown_byte_order_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "a.pt", program(state_dict(ARRAYS)), storages(ARRAYS), byteorder=b"middle")
    assert refusal(path) == "has the unknown byte order b'middle'"


def test_weights_that_python_2_pickled(tmp_path):
    pairs = b"](" + b"".join(sequence(text(key), whole(key, W)) for key in "ab") + b"e"
    path = checkpoint(tmp_path, call(name("collections", "OrderedDict"), pairs), {"a": W.tobytes(), "b": W.tobytes()})
    assert_same(read_tensors([path]), {"a": W, "b": W})


@pytest.mark.parametrize(
    ("view", "sentence"),
    [
        (tensor(storage("0", 12), (3, 4), (4, 1), 1), "reaches outside its storage"),
        (tensor(storage("0", 12), (3, 5), (4, 1)), "has overlapping elements"),
        (tensor(storage("0", 12), (4, 4), (4, 1)), "reaches outside its storage"),
        (tensor(storage("0", 12), (3, 4), (0, 1)), "has overlapping elements"),
        (tensor(storage("0", 12), (2**40, 4), (0, 1)), "has overlapping elements"),
        (tensor(storage("0", 12), (2**31, 2**31), (2**31, 1)), "an impossible shape"),
        (tensor(storage("0", 12), (3, 4), (2**62, 1)), "reaches outside its storage"),
        (tensor(storage("0", 12), (0,), (1,), 13), "does not fit its storage"),
        (tensor(storage("0", 12), (3, 4), (4,)), "an impossible shape"),
        (tensor(storage("0", 12), (-3, 4), (4, 1)), "an impossible shape"),
        (tensor(storage("0", 12), (3, 4), (4, 1), -1), "an impossible shape"),
        (tensor(storage("0", 11), (3,), (1,)), "claims a storage of 44 bytes but has 48"),
        (tensor(storage("0", 12, "float64"), (3,), (1,)), "claims a storage of 96 bytes but has 48"),
        (tensor(storage("0", 2**60), (3,), (1,)), "bytes but has 48"),
        (tensor(storage("0", -1), (3,), (1,)), "a persistent object that is no storage"),
        (number(5), "weight 'w' is a Python int"),
        (mapping({}), "weight 'w' is a mapping"),
        (foreign({1, 2}), "weight 'w' is an object of '__builtin__.set'"),
        (name("os", "system"), "weight 'w' is the name 'os.system'"),
        (whole("0", W) + b"}b", "its pickle is damaged (BUILD at byte"),
        (whole("../data.pkl", W) + b"0" + whole("0", W), None),
    ],
)
def test_tensors_stay_within_their_storage(tmp_path, view, sentence):
    path = checkpoint(tmp_path, mapping({"v": whole("0", W), "w": view}), {"0": W.tobytes()})
    if sentence is None:
        assert_same(read_tensors([path]), {"v": W, "w": W})
    else:
        assert sentence in refusal(path)


def test_storages_that_are_missing_unused_or_read_too_often(tmp_path):
    assert refusal(checkpoint(tmp_path, mapping({"w": whole("0", W)}))) == "lacks the storage of tensor 'w': 'data/0'"
    path = checkpoint(tmp_path, mapping({"w": whole("0", W)}), {"0": W.tobytes(), "1": W.tobytes()})
    assert refusal(path) == "has storages that no tensor names: '1'"
    large = np.zeros(10_000, np.float32)
    path = checkpoint(tmp_path, mapping({f"w{i}": whole("0", large) for i in range(9)}), {"0": large.tobytes()})
    assert "at most 4 times are read" in refusal(path)


def test_where_the_weights_lie(tmp_path):
    stored = {"0": W.tobytes()}
    weights = mapping({"w": whole("0", W)})
    found = read_tensors([checkpoint(tmp_path, mapping({"state_dict": weights, "model": mapping({})}), stored)])
    assert_same(found, {"w": W})
    path = checkpoint(tmp_path, mapping({"state_dict": weights, "model": weights}), stored)
    assert "may hold its weights under state_dict or model" in refusal(path)
    path = checkpoint(tmp_path, mapping({"state_dict": weights}) + text("state_dict") + weights + b"s", stored)
    assert "tensor 'state_dict' occurs twice" in refusal(path)
    path = checkpoint(tmp_path, weights + text("w") + whole("0", W) + b"s", stored)
    assert "tensor 'w' occurs twice" in refusal(path)
    path = checkpoint(tmp_path, mapping({"w": whole("0", W), "model.w": whole("0", W)}), stored)
    assert "tensor 'w' occurs twice" in refusal(path)
    path = checkpoint(tmp_path, weights + number(3) + whole("0", W) + b"s", stored)
    assert "weights are named by a Python int" in refusal(path)
    assert "holds a Python tuple instead of weights" in refusal(checkpoint(tmp_path, sequence(weights), stored))
    assert "weight 'epoch' is a Python int" in refusal(checkpoint(tmp_path, mapping({"epoch": number(3)})))
    assert refusal(checkpoint(tmp_path, mapping({"state_dict": mapping({})}))).startswith(
        "weight 'state_dict' is a map"
    )
    assert refusal(checkpoint(tmp_path, mapping({}))) == "holds no tensors"


class Hostile:
    """Pickles as a call of any function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["beside the weights", "as a weight", "as the name of a weight", "as the top"])
def test_nothing_is_executed(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    calls = [
        Hostile(os.system, ("echo run > executed",)),
        Hostile(builtins.open, ("executed", "w")),
        Hostile(exec, ("open('executed', 'w')",)),
        Hostile(os.mkdir, ("executed",)),
    ]
    stored = {"0": W.tobytes()}
    for hostile in calls:
        weights = mapping({"w": whole("0", W)})
        if place == "beside the weights":
            path = checkpoint(
                tmp_path, mapping({"hyper_parameters": foreign([hostile]), "state_dict": weights}), stored
            )
            assert_same(read_tensors([path]), {"w": W})
        elif place == "as a weight":
            path = checkpoint(tmp_path, weights + text("v") + foreign(hostile) + b"s", stored)
            assert "weight 'v' is an object of" in refusal(path)
        elif place == "as the name of a weight":
            path = checkpoint(tmp_path, weights + foreign(hostile) + whole("0", W) + b"s", stored)
            assert "weights are named by an object of" in refusal(path)
        else:
            path = checkpoint(tmp_path, whole("0", W) + b"0" + foreign(hostile), stored)
            assert "instead of weights" in refusal(path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ckpt"]
    exec(Hostile(*calls[2].call).call[1][0])  # what would have happened
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("junk", "sentence"),
    [
        (b"N" + b"\x85" * 300_000 + b"0", None),  # nested deeper than C's stack, harmless
        (b"(" * 2_000 + b"1" * 2_000 + b"0", "or 1000 deep"),
        (b"N" * 150_000 + b"0" * 150_000, "over 1000000 opcodes long"),
        (b"N0" * 600_000, "over 1000000 opcodes long"),
        (b"}" + b"N" + b"\x85" * 300_000 + b"Ns0", None),  # as a key
        (b"\x8b" + struct.pack("<I", 2**31 - 1), "its pickle is damaged"),
        (b"\x8d" + struct.pack("<Q", 2**62), "its pickle is damaged"),
        (b"\x8e" + struct.pack("<Q", 2**40), "its pickle is damaged"),
        (b"I" + b"9" * 5_000 + b"\n0", "its pickle is damaged"),
        (b"V\\ud8\n0", "its pickle is damaged"),
        (b"X\x02\x00\x00\x00\xff\xfe0", "its pickle is damaged"),
        (b"Np9999999999999999999\n0", "its pickle is damaged (PUT"),
        (b"h\x07", "its pickle is damaged (BINGET"),
        (b"000", "its pickle is damaged (POP"),
        (b"Ra", "its pickle is damaged (REDUCE"),
        (b"NNe", "its pickle is damaged (APPENDS"),
        (b"NNa", "its pickle is damaged (APPEND"),
        (b"}(Nu0", "a key without a value"),
        (b"\x82\x01", "its pickle uses EXT1"),
        (b"Pid\n", "its pickle uses PERSID"),
        (b"\xff", "its pickle is damaged"),
        (b".", "it ends too early"),
    ],
)
def test_pickles_cannot_exhaust_or_break_the_reader(tmp_path, junk, sentence):
    path = checkpoint(tmp_path, mapping({"w": whole("0", W)}) + junk, {"0": W.tobytes()})
    if sentence is None:
        assert_same(read_tensors([path]), {"w": W})
    else:
        assert sentence in refusal(path)


def test_sizes_that_are_only_claimed_take_no_memory(tmp_path):
    path = checkpoint(tmp_path, state_dict(ARRAYS), storages(ARRAYS))
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    files = [struct.pack("<Q", 100 << 30) + b'{"w":' + bytes(100)]
    for at in (20, 24, 42):  # compressed and real size and place of the first entry, in the directory
        files += [content[: directory + at] + b"\xf0\xff\xff\x7f" + content[directory + at + 4 :]]
    files.append(content[:-10] + b"\xf0\xff\xff\x7f" + content[-6:])  # size of the directory
    tracemalloc.start()
    try:
        for content in files:
            refusal(write(tmp_path / "claim", content))
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_archives_that_are_no_plain_checkpoint(tmp_path):
    def archive(**entries):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
            for key, data in entries.items():
                file.writestr(key, data)
        return refusal(tmp_path / "a.pt")

    top, stored = program(state_dict(ARRAYS)), storages(ARRAYS)
    write_checkpoint(tmp_path / "a.pt", top, stored, compression=zipfile.ZIP_DEFLATED)
    assert "is not stored plainly" in refusal(tmp_path / "a.pt")
    write_checkpoint(tmp_path / "a.pt", top, stored, more={"code/model.py": b"def forward(self): ..."})
    assert "is a TorchScript archive" in refusal(tmp_path / "a.pt")
    write_checkpoint(tmp_path / "a.pt", top, stored)
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as file:
        file.writestr("archive/data/0", stored["0"])
    assert "two entries of one name" in refusal(tmp_path / "a.pt")
    assert "must hold one data.pkl" in archive(**{"word/document.xml": b"<xml>"})
    assert "must hold one data.pkl" in archive(**{"a/data.pkl": b"", "b/data.pkl": b""})
    assert "its pickle is damaged" in archive(**{"a/data.pkl": b""})
    content = write_checkpoint(tmp_path / "b.pt", top, stored).read_bytes()
    at = content.index(W.tobytes())
    assert "Bad CRC" in refusal(write(tmp_path / "a.pt", content[:at] + b"\x01" + content[at + 1 :]))
    assert "without its end" in refusal(write(tmp_path / "a.pt", content[:-1]))
    assert "without its end" in refusal(write(tmp_path / "a.pt", content + b"\0"))


def test_the_64_bit_end_of_a_zip_archive(tmp_path):
    write_checkpoint(tmp_path / "a.pt", program(state_dict(ARRAYS)), storages(ARRAYS))
    content = with_64_bit_end((tmp_path / "a.pt").read_bytes())
    assert_same(read_tensors([write(tmp_path / "a.pt", content)]), ARRAYS)

    def changed(place, value):
        return refusal(write(tmp_path / "a.pt", content[:-place] + value + content[-place + len(value) :]))

    assert "claims a zip directory of 4611686018427387904 bytes" in changed(58, (2**62).to_bytes(8, "little"))
    assert "two ends that disagree" in changed(34, bytes(8))  # where the locator says the record is
    assert "two ends that disagree" in changed(98, b"PK\x01\x02")


# --- folders and hashes ----------------------------------------------------------------------------------------------


def test_weight_files_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        weight_files(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no weight file .* only nothing"):
        weight_files(tmp_path)
    (tmp_path / "config.json").touch()
    (tmp_path / "._model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds no weight file .* only config\.json"):
        weight_files(tmp_path)
    (tmp_path / "last.CKPT").touch()
    assert weight_files(str(tmp_path)) == [tmp_path / "last.CKPT"]
    (tmp_path / "model.pt").touch()
    with pytest.raises(ValueError, match=r"several weight files; give one of last\.CKPT, model\.pt"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors.index.json"]
    (tmp_path / "other.safetensors.index.json").touch()
    with pytest.raises(ValueError, match="several weight files"):
        weight_files(tmp_path)
    with pytest.raises(ValueError, match="is a file, not a folder"):
        weight_files(tmp_path / "model.pt")


def test_sha256(tmp_path):
    content = bytes(range(256)) * 5_000
    assert sha256(write(tmp_path / "a", content)) == hashlib.sha256(content).hexdigest()
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        sha256(tmp_path / "absent")
    with pytest.raises(ValueError, match="is not a file"):
        sha256(tmp_path)
