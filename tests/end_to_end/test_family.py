"""LUNA and FEMBA through real processes: pre-training, fine-tuning, scores, embeddings, export; and FEMBA's refusal."""

import numpy as np
import pytest
from test_train_eval import call

from lumamba_jax.checkpoint import load_pretrained

pytestmark = pytest.mark.slow
LUNA = ["--model.embed-dim", "16", "--model.num-queries", "2", "--model.num-blocks", "1"]
FEMBA = ["--model.num-channels", "4", "--model.num-samples", "640", "--model.embed-dim", "4", "--model.num-blocks", "1"]
SHORT = ["--trainer.steps", "2", "--loader.batch-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    call("-m", "data_pipeline.synthetic", folder / "recordings", "--subjects", "4", "--seconds", "10")
    options = ("--labels", folder / "recordings" / "labels.csv", "--window", "2.5", "--jobs", "1")
    call("-m", "data_pipeline.prepare", folder / "recordings", folder / "mixed.h5", *options)
    call("-m", "data_pipeline.prepare", folder / "recordings", folder / "four.h5", *options, "--montage", "F3,F4,C3,C4")
    return folder


@pytest.mark.parametrize(
    ("family", "store", "sizes"), [("luna", "mixed.h5", LUNA), ("femba", "four.h5", FEMBA)], ids=["LUNA", "FEMBA"]
)
def test_life_of_a_model(folder, family, store, sizes):
    preset = {"luna": "pretrain_luna_base", "femba": "pretrain_femba_tiny"}[family]
    runs = [folder / f"{family}_pretrained", folder / f"{family}_tuned"]
    data = ["--data.train", folder / store, *SHORT]
    call("train.py", preset, *sizes, *data, "--trainer.run-dir", runs[0])
    tuning = ["--trainer.init-from", runs[0], "--trainer.run-dir", runs[1], "--data.test-fraction", "0.25"]
    call("train.py", f"finetune_classify_{family}", *sizes, *data, *tuning)
    assert "metrics_test.json" in call("eval.py", "metrics", runs[1]).stdout
    out = folder / f"{family}.npz"
    call("eval.py", "embed", runs[1], folder / store, "--out", out)
    assert np.load(out)["embeddings"].shape == (32, load_pretrained(runs[1])[0].width)
    weights = folder / f"{family}_torch" / "weights.safetensors"
    call("convert_torch_weights.py", "--export", runs[1], weights)
    assert {"luna": "LUNA", "femba": "FEMBA"}[family] in call("convert_torch_weights.py", "--inspect", weights).stdout


def test_femba_refuses_a_store_of_other_montages(folder):
    words = [*FEMBA, "--data.train", folder / "mixed.h5", "--trainer.run-dir", folder / "never", *SHORT]
    error = call("train.py", "pretrain_femba_tiny", *words, status=2).stderr
    assert "fixed grid" in error
    assert not (folder / "never").exists()


def test_another_architecture_is_not_loaded_as_an_encoder(folder):
    words = ["--data.train", folder / "mixed.h5", *SHORT]
    call("train.py", "pretrain_luna_base", *LUNA, *words, "--trainer.run-dir", folder / "source")
    words += ["--trainer.init-from", folder / "source", "--trainer.run-dir", folder / "other"]
    assert "a LuMamba is asked for" in call("train.py", "finetune_classify", *words, status=2).stderr
