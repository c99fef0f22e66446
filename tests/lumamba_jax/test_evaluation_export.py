"""A saved evaluation gives the numbers of the model, for any batch, in a process that never builds the model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from lumamba_jax import inference
from lumamba_jax.architectures import build
from lumamba_jax.checkpoint import save_pretrained
from lumamba_jax.evaluation_export import load_evaluation, save_evaluation
from lumamba_jax.lumamba import LuMambaConfig

MICRO = LuMambaConfig(embed_dim=16, num_queries=2, num_blocks=1, d_state=4, head="attention", num_outputs=3)
SHAPE = {"num_channels": 4, "num_samples": 160}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    return inference.load(save_pretrained(folder, MICRO, nnx.split(build(MICRO, seed=2))[1], {"sfreq": 256}))


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(0)
    return rng.normal(0, 20, (5, 4, 160)).astype(np.float32), rng.normal(0, 0.1, (4, 3)).astype(np.float32)


@pytest.mark.parametrize("output", ["embedding", "prediction"])
def test_reloaded_without_the_model_it_gives_the_same_numbers(model, windows, tmp_path, output):
    path = save_evaluation(model, tmp_path / "saved.evaluation", **SHAPE, output=output)
    expected = (inference.embed if output == "embedding" else inference.predict)(model, *windows)
    np.savez(tmp_path / "in.npz", signal=windows[0], locations=windows[1])
    code = (
        "import sys, numpy as np\n"
        "from lumamba_jax.evaluation_export import load_evaluation\n"
        "run, x = load_evaluation(sys.argv[1]), np.load(sys.argv[2])\n"
        "outs = [run(x['signal'][:n], x['locations']) for n in (5, 1)]\n"
        "assert not {'orbax', 'lumamba_jax.inference'} & set(sys.modules)\n"
        "np.savez(sys.argv[3], five=outs[0], one=outs[1])"
    )
    words = [sys.executable, "-c", code, path, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run([str(word) for word in words], check=True, cwd=REPOSITORY)
    out = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(out["five"], expected, atol=1e-5)
    np.testing.assert_allclose(out["one"], expected[:1], atol=1e-5)


def test_other_windows_damage_and_foreign_files_are_refused(model, windows, tmp_path):
    path = save_evaluation(model, tmp_path / "saved.evaluation", **SHAPE)
    run = load_evaluation(path)
    assert run.metadata["model"]["provenance"]["sfreq"] == 256
    with pytest.raises(ValueError, match="4 channels x 160 samples"):
        run(windows[0][:, :3], windows[1][:3])
    with pytest.raises(ValueError, match="NaN"):
        run(np.where(windows[0] > 40, np.nan, windows[0]), windows[1])
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", json.dumps({}).encode()):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match="no saved evaluation, or damaged"):
            load_evaluation(tmp_path / "damaged")
    with pytest.raises(FileNotFoundError):
        load_evaluation(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not a multiple of the patch size"):
        save_evaluation(model, tmp_path / "never", num_channels=4, num_samples=150)
    assert not (tmp_path / "never").exists()
