"""Damaged checkpoints and exports: found, named, passed over; never restored wrong in silence."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumamba_jax import checkpoint, manifest, train_checkpoints
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.manifest import named_leaves
from lumamba_jax.train_checkpoints import TrainCheckpoints

MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_heads=2, num_blocks=1, d_state=4, head="linear", num_outputs=3)


# Orbax leaves futures behind when it stumbles over damaged bytes.
STUMBLES = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")


def make_state(step: int) -> dict:
    rng = np.random.default_rng(step)
    state = {
        "step": np.int32(step),
        "params": {"kernel": rng.standard_normal((32, 48), np.float32), "bias": rng.standard_normal(48, np.float32)},
        "moments": (rng.standard_normal((32, 48), np.float32), np.zeros((5,), jnp.bfloat16)),
    }
    return jax.tree.map(jnp.asarray, state)


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def same_bits(found, expected) -> bool:
    found, expected = named_leaves(found), named_leaves(expected)
    return list(found) == list(expected) and all(
        np.asarray(found[name]).tobytes() == np.asarray(expected[name]).tobytes() for name in expected
    )


def save_steps(directory, *steps: int):
    with TrainCheckpoints(directory, keep=len(steps)) as saved:
        for step in steps:
            saved.save(step, make_state(step), {"best_value": step / 3})


def micro_params():
    rng = np.random.default_rng(0)
    fill = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype)  # noqa: E731
    return jax.tree.map(fill, checkpoint.abstract_params(MICRO))


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def flip(file, rng) -> str:
    """Flip one random bit; returns what was done."""
    data = bytearray(file.read_bytes())
    place, bit = int(rng.integers(len(data))), int(rng.integers(8))
    data[place] ^= 1 << bit
    file.write_bytes(data)
    return f"{file.name} byte {place} bit {bit}"


def outcome(function, *arguments) -> tuple:
    """(what it returned, None) or (None, its ValueError or OSError)."""
    try:
        return function(*arguments), None
    except (ValueError, OSError) as error:
        return None, error


def restore_one(work):
    with TrainCheckpoints(work / "one", say=pytest.fail) as saved:
        return saved.restore(ABSTRACT)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Two runs, with the steps (4) and (4, 8), and an export."""
    root = tmp_path_factory.mktemp("pristine")
    save_steps(root / "one", 4)
    save_steps(root / "two", 4, 8)
    checkpoint.save_pretrained(root / "export", MICRO, micro_params(), {"class_names": ["a", "b", "c"]})
    return root


@pytest.fixture
def work(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "work")
    return tmp_path / "work"


def test_no_flipped_bit_of_a_train_state_is_restored(work):
    rng, harmless = np.random.default_rng(5), []
    files = [file for file in files_of(work / "one") if file.stat().st_size]
    assert len(files) >= 9
    for number in range(200):
        file = files[number % len(files)]
        before = file.read_bytes()
        done = flip(file, rng)
        found, refusal = outcome(restore_one, work)
        if refusal is None:  # white space of the JSON file
            assert same_bits(found[0], make_state(4)), done
            assert found[1] == {"best_value": 4 / 3}, done
            harmless.append(done)
        else:
            assert isinstance(refusal, ValueError), done
            text = str(refusal)
            assert text.startswith(f"{work / 'one'}: no checkpoint to resume from is intact (step 4: "), done
            assert file.name in text, done
        file.write_bytes(before)
    assert all(done.startswith("manifest.json ") for done in harmless)
    assert len(harmless) < 10


@STUMBLES
def test_values_are_verified_without_the_files(work, monkeypatch):
    monkeypatch.setattr(train_checkpoints, "file_damage", lambda *_: None)
    rng, outcomes = np.random.default_rng(6), {"values": 0, "unreadable": 0, "harmless": 0}
    files = [file for file in files_of(work / "one" / "4" / "state") if file.stat().st_size]
    files += 10 * [file for file in files if file.parent.name == "d"]  # where the numbers are
    for number in range(60):
        file = files[number % len(files)]
        before = file.read_bytes()
        done = flip(file, rng)
        found, refusal = outcome(restore_one, work)
        if refusal is None:
            assert same_bits(found[0], make_state(4)), done
            outcomes["harmless"] += 1
        elif isinstance(refusal, ValueError):
            assert "step 4: leaf " in str(refusal), done
            outcomes["values"] += 1
        else:
            assert "cannot be loaded" in str(refusal), done
            outcomes["unreadable"] += 1
        file.write_bytes(before)
    assert outcomes["values"] >= 5, outcomes  # what Orbax alone would have restored wrong


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_the_older_step_is_taken_and_the_damaged_one_set_aside(work, damage):
    rng, directory, notes = np.random.default_rng(7), work / "two", []
    for file in files_of(directory / "8"):
        before = file.read_bytes()
        if damage != "delete" and not before:
            continue
        if damage == "flip":
            flip(file, rng)
        elif damage == "truncate":
            file.write_bytes(before[: len(before) // 2])
        else:
            file.unlink()
        notes.clear()
        with TrainCheckpoints(directory, keep=2, say=notes.append) as saved:
            state, progress = saved.restore(ABSTRACT)
            assert saved.steps == [4]
        assert same_bits(state, make_state(4))
        assert progress == {"best_value": 4 / 3}
        (note,) = notes
        assert note.startswith(f"{directory / '8'} is damaged: ")
        assert note.endswith("It is set aside as 8.damaged; step 4 is used instead")
        assert file.name in note
        (directory / "8.damaged").rename(directory / "8")
        file.write_bytes(before)


def test_when_nothing_is_intact_nothing_is_touched_and_all_is_said(work):
    directory = work / "two"
    (directory / "8" / "manifest.json").unlink()
    data = next(file for file in files_of(directory / "4") if file.parent.name == "d")
    data.write_bytes(data.read_bytes()[:-1])
    for _ in range(2):  # a job that is restarted must not begin from scratch
        with TrainCheckpoints(directory, say=pytest.fail) as saved:
            assert saved.latest_step == 8
            with pytest.raises(ValueError, match=r"step 8: manifest.json is missing.*; step 4: .* bytes, expected"):
                saved.restore(ABSTRACT)
    assert sorted(path.name for path in directory.iterdir()) == ["4", "8"]


def test_one_step_asked_for_is_that_one_or_an_error(work):
    (work / "two" / "8" / "manifest.json").write_text("{")
    with TrainCheckpoints(work / "two", say=pytest.fail) as saved:
        assert same_bits(saved.restore(ABSTRACT, 4)[0], make_state(4))
        with pytest.raises(ValueError, match=r"step 8: manifest.json is not valid JSON"):
            saved.restore(ABSTRACT, 8)
        with pytest.raises(FileNotFoundError, match="no checkpoint of step 5"):
            saved.restore(ABSTRACT, 5)


def test_another_tree_or_dtype_is_the_callers_error_and_no_damage(work):
    with TrainCheckpoints(work / "two", say=pytest.fail) as saved:
        with pytest.raises(ValueError, match=r"another architecture: missing more \(2,\)"):
            saved.restore(ABSTRACT | {"more": jax.ShapeDtypeStruct((2,), jnp.float32)})
        with pytest.raises(ValueError, match="other dtypes: step is int32, expected float32"):
            saved.restore(ABSTRACT | {"step": jax.ShapeDtypeStruct((), jnp.float32)})
        assert saved.steps == [4, 8]


def test_a_step_under_another_number_is_refused(work):
    (work / "one" / "4").rename(work / "one" / "12")
    with (
        TrainCheckpoints(work / "one") as saved,
        pytest.raises(ValueError, match=r"manifest.json is that of step 4"),
    ):
        saved.restore(ABSTRACT)


def test_a_second_damaged_step_of_the_same_number_is_kept_beside_the_first(work):
    for name in ("8.damaged", "8.damaged-2"):
        save_steps(work / "two", 4, 8)
        (work / "two" / "8" / "manifest.json").unlink()
        with TrainCheckpoints(work / "two", say=lambda _: None) as saved:
            saved.restore(ABSTRACT)
        assert (work / "two" / name).is_dir()


def test_report_says_which_steps_are_intact(work):
    command = [sys.executable, "-m", "lumamba_jax.train_checkpoints", str(work / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("intact")) == (0, 2), done
    data = next(file for file in files_of(work / "two" / "8") if file.parent.name == "d")
    flip(data, np.random.default_rng(0))
    assert train_checkpoints.main([str(work / "two")]) == 1
    assert train_checkpoints.main([str(work / "export")]) == 2
    assert [verdict.damage is None for verdict in train_checkpoints.verify(work / "two")] == [True, False]
    assert data.exists()


def test_no_flipped_bit_of_an_export_is_loaded(work):
    rng, path, harmless = np.random.default_rng(8), work / "export", 0
    files = [file for file in files_of(path) if file.stat().st_size]
    assert len(files) >= 8
    for number in range(200):
        file = files[number % len(files)]
        before = file.read_bytes()
        done = flip(file, rng)
        found, refusal = outcome(checkpoint.load_pretrained, path)
        if refusal is None:
            assert file.name == "metadata.json", done
            assert found[0] == MICRO
            assert same_bits(found[1], micro_params())
            assert found[2]["provenance"] == {"class_names": ["a", "b", "c"]}
            harmless += 1
        else:
            assert isinstance(refusal, ValueError), done
            assert file.name in str(refusal), done
            assert "\n" not in str(refusal)
        file.write_bytes(before)
    assert harmless < 10


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_truncated_and_missing_files_of_an_export_are_named(work, damage):
    path = work / "export"
    for file in files_of(path):
        before = file.read_bytes()
        if damage == "delete":
            file.unlink()
        elif before:
            file.write_bytes(before[:-2])  # the last byte of the JSON file is white space
        else:
            continue
        with pytest.raises((ValueError, FileNotFoundError), match=file.name):
            checkpoint.load_pretrained(path)
        file.write_bytes(before)
    assert same_bits(checkpoint.load_pretrained(path)[1], micro_params())


@STUMBLES
def test_values_of_an_export_are_verified_without_its_files(work, monkeypatch):
    monkeypatch.setattr(checkpoint, "file_damage", lambda *_: None)
    rng, path, caught = np.random.default_rng(9), work / "export", 0
    for file in 8 * [file for file in files_of(path / "weights") if file.parent.name == "d"]:
        before = file.read_bytes()
        flip(file, rng)
        try:
            assert same_bits(checkpoint.load_pretrained(path)[1], micro_params())
        except ValueError as error:
            caught += "damaged: leaf " in str(error)
        file.write_bytes(before)
    assert caught >= 2


def test_no_bit_turns_an_export_into_one_without_checksums(work):
    path = work / "export" / "metadata.json"
    before = path.read_bytes()
    assert before.startswith(b'{\n "format_version": 2,')
    for byte in range(24):
        for bit in range(8):
            path.write_bytes(before[:byte] + bytes([before[byte] ^ 1 << bit]) + before[byte + 1 :])
            try:
                assert checkpoint.read_metadata(path.parent)["format_version"] == 2
            except ValueError:
                continue


def test_exports_of_earlier_versions_still_load(work):
    path = work / "export" / "metadata.json"
    metadata = manifest.unseal(path.read_bytes())
    old = {key: value for key, value in metadata.items() if key not in ("leaves", "files")} | {"format_version": 1}
    path.write_text(manifest.json.dumps(old))
    config, params, _ = checkpoint.load_pretrained(path.parent)
    assert config == MICRO
    assert same_bits(params, micro_params())


def test_an_export_killed_between_its_two_renames_is_still_there(work):
    path = work / "export"
    path.rename(work / ".export.previous-0123abcd")
    assert checkpoint.is_export(path)
    assert same_bits(checkpoint.load_pretrained(path)[1], micro_params())
    checkpoint.save_pretrained(path, MICRO, micro_params(), {"class_names": ["d"]})
    assert checkpoint.read_metadata(path)["provenance"] == {"class_names": ["d"]}
