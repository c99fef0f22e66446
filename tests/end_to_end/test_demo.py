"""The demo from its command line: on synthetic recordings, on a folder of the user's, and with bad input."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.synthetic import write_recordings

REPOSITORY = Path(__file__).resolve().parents[2]


def _demo(*options: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "examples" / "demo.py"), *map(str, options)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def _assert_complete(out: Path, result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr
    page = (out / "report.html").read_text()
    sections = re.findall(r'<section id="([^"]+)">', page)
    assert sections == [
        "summary",
        "scores",
        "decisions-on-the-test-windows",
        "training",
        "masked-reconstruction",
        "where-the-queries-look",
        "embeddings",
    ]
    lines = re.findall(r"^\d+\. .*\d+\.\d s$", result.stdout, flags=re.MULTILINE)
    assert len(lines) == len(set(lines)) >= 8
    assert "LuMamba" in result.stdout
    assert "band power" in result.stdout
    return page


@pytest.mark.slow
def test_the_synthetic_demo_and_that_it_can_be_repeated(tmp_path):
    out = tmp_path / "demo"
    _assert_complete(out, _demo("--out", out, "--quick", cwd=tmp_path))
    scores = json.loads((out / "scores.json").read_text())
    assert scores["part"] == "test"
    with np.load(out / "embeddings_untrained.npz") as before, np.load(out / "embeddings_pretrain.npz") as after:
        assert before["embeddings"].shape == after["embeddings"].shape
        assert not np.allclose(before["embeddings"], after["embeddings"])
    assert len((out / "commands.txt").read_text().splitlines()) == 8
    _assert_complete(out, _demo("--out", out, "--quick", cwd=tmp_path))  # a second run replaces the first


@pytest.mark.slow
def test_recordings_of_the_user_with_whole_file_labels_and_targets(tmp_path):
    folder = tmp_path / "mine"
    files = write_recordings(folder, subjects=6, seconds=10)
    with (folder / "labels.csv").open("w", newline="") as file:  # one target for each file: a regression
        rows = [(path.name, 20.5 + i) for i, path in enumerate(files)]
        csv.writer(file).writerows([("file", "label"), *rows])
    page = _assert_complete(tmp_path / "out", _demo("--out", "out", "--data", folder, "--quick", cwd=tmp_path))
    assert "Predictions of LuMamba" in page
    assert (folder / "labels.csv").is_file()


def test_bad_input_is_one_sentence_and_touches_nothing(tmp_path):
    folder, full = tmp_path / "recordings", tmp_path / "full"
    folder.mkdir()
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    cases = {
        "labels.csv does not exist": ("--out", tmp_path / "new", "--data", folder),
        "was not made by the demo": ("--out", full),
    }
    for sentence, options in cases.items():
        result = _demo(*options, cwd=tmp_path)
        assert result.returncode == 2
        assert sentence in result.stderr
        assert "Traceback" not in result.stderr
    assert (full / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_a_failing_step_stops_the_demo_with_its_own_message_and_status(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    (folder / "labels.csv").write_text("file,label\nmissing.edf,rest\n")
    result = _demo("--out", tmp_path / "out", "--data", folder, cwd=tmp_path)
    assert result.returncode == 2
    assert "holds" in result.stderr  # the step's own sentence
    assert "the step 'recordings to windows' failed" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "report.html").exists()
