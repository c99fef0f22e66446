"""The task sheet against the recipes it was copied from, its presets, and what it refuses."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import configs
from configs import task_sheet
from configs.published import Score
from configs.task_presets import task_preset_names
from configs.task_sheet import TASKS, claim_of, deviations, find_task, stated_parts
from data_pipeline.corpora.seed_v import TRIALS
from data_pipeline.montages import CHANNEL_ORDERS, montage_of
from data_pipeline.store import StoreInfo, WindowStore, create_store
from lumamba_jax.architectures import ARCHITECTURES, SIZES, abstract_model
from lumamba_jax.optimizer import make_optimizer

# recipes 4.1 (and data.md 1 for the rates): channels, samples, Hz, patches of 40, outputs, positive class
SHEET = {
    "tuab": (22, 1280, 256, 32, 2, "abnormal"),
    "tuar_bc": (22, 1280, 256, 32, 2, "artifact"),
    "tuar_bc13": (22, 1280, 256, 32, 2, "artifact"),
    "tuar_mc": (22, 1280, 256, 32, 2, "artifact"),
    "tuar_mmc": (22, 1280, 256, 32, 6, None),
    "tuar_mcc": (22, 1280, 256, 32, 5, None),
    "tuar_mcc6": (22, 1280, 256, 32, 6, None),
    "tusl": (22, 1280, 256, 32, 4, None),
    "seed_v": (62, 200, 200, 5, 5, None),
    "apava": (16, 1280, 256, 32, 2, "alzheimer"),
    "tdbrain": (26, 320, 256, 8, 2, "parkinson"),
    "mumtaz2016": (19, 1280, 256, 32, 2, "depression"),
    "modma_128": (128, 1280, 250, 32, 2, "depression"),
    "modma_13": (13, 1280, 250, 32, 2, "depression"),
    "mobi_60": (60, 200, 100, 5, 12, None),
    "mobi_19": (19, 200, 100, 5, 12, None),
    "eegmat": (19, 1280, 256, 32, 2, "arithmetic"),
}
# recipes 4, as released: batch, epochs, lr, weight decay, warm-up, its first rate, last rate, decay by layer, patience,
# precision; and what papers and cards say instead
RELEASED = {
    "lumamba_tiny": (512, 50, 5e-4, 0.05, 5, 1e-6, 1e-6, 0.75, 15, "bfloat16"),
    "luna_base": (1024, 30, 5e-4, 0.05, 10, 2.5e-7, 2.5e-6, 0.75, 8, "bfloat16"),
    "luna_huge": (1024, 30, 5e-4, 0.05, 10, 2.5e-7, 2.5e-6, 0.75, 8, "bfloat16"),
    "femba_base": (1024, 30, 5e-4, 0.5, 10, 2.5e-7, 2.5e-6, 0.75, None, "float32"),
}
DOCUMENTED = {
    "lumamba_tiny": (512, 50, 5e-4, 0.05, 5, 1e-6, 1e-6, 0.75, 10, "float32"),
    "luna_base": (1024, 50, 1e-4, 0.05, 5, 2.5e-7, 5e-6, 0.5, 10, "float32"),
    "luna_large": (1024, 50, 1e-4, 0.05, 5, 2.5e-7, 5e-6, 0.8, 10, "float32"),
    "luna_huge": (1024, 50, 1e-4, 0.05, 5, 2.5e-7, 5e-6, 0.8, 10, "float32"),
    "femba_base": (1024, 30, 1e-4, 0.0, 10, 2.5e-7, 2.5e-6, 0.75, None, "float32"),
}


@pytest.mark.parametrize("name", SHEET)
def test_tasks_have_the_windows_and_classes_of_the_recipes(name):
    task = TASKS[name]
    channels, samples, sfreq, patches, outputs, positive = SHEET[name]
    assert (len(task.channels), task.samples, task.sfreq, task.num_outputs) == (channels, samples, sfreq, outputs)
    assert task.samples / 40 == patches
    assert task.positive_class == positive
    if positive:  # the class whose probability ranks: number 1
        assert task.class_names.index(positive) == 1


def test_the_sheet_is_complete():
    assert TASKS.keys() == SHEET.keys()
    assert len(task_preset_names()) == len(TASKS) * len(SIZES) * 2
    not_comparable = {name for name, task in TASKS.items() if task.claim == "not comparable"}
    assert {name for name in TASKS if name.startswith(("tuar", "tusl"))} <= not_comparable
    assert [name for name, task in TASKS.items() if task.claim == "comparable"] == ["tuab"]
    for task in TASKS.values():
        assert all(row.source for row in task.published)
        reported = {name for row in task.published for name in row.scores}
        assert reported <= set(task.metrics)


PUBLISHED = [  # recipes 6, copied once more
    ("tuab", "LuMamba tiny", {"balanced_accuracy": 0.8099, "auroc": 0.883, "aupr": 0.892}),
    ("tuab", "LUNA huge", {"balanced_accuracy": 0.8157, "aupr": 0.9029, "auroc": 0.8957}),
    ("tuab", "FEMBA base", {"balanced_accuracy": 0.8105, "aupr": 0.8894, "auroc": 0.8829}),
    ("tuab", "LaBraM huge", {"balanced_accuracy": 0.8258, "aupr": 0.9204, "auroc": 0.9162}),
    ("tuab", "BENDR", {"balanced_accuracy": 0.7696, "auroc": 0.8397}),
    ("tuar_mcc", "LUNA large", {"auroc": 0.918, "aupr": 0.505}),
    ("tuar_mcc", "LuMamba tiny", {"auroc": 0.914}),
    ("tuar_bc", "FEMBA large", {"auroc": 0.944, "aupr": 0.913}),
    ("tuar_mc", "FEMBA base", {"auroc": 0.909, "aupr": 0.634}),
    ("tuar_mmc", "FEMBA tiny", {"auroc": 0.893, "aupr": 0.504}),
    ("tusl", "LUNA huge", {"auroc": 0.802, "aupr": 0.289}),
    ("tusl", "LuMamba tiny", {"auroc": 0.708, "aupr": 0.289}),
    ("seed_v", "LUNA large", {"balanced_accuracy": 0.3918, "kappa": 0.2073, "f1_weighted": 0.3586}),
    ("seed_v", "LuMamba tiny", {"balanced_accuracy": 0.35, "kappa": 0.191}),
    ("mumtaz2016", "CBraMod", {"balanced_accuracy": 0.956, "aupr": 0.9923, "auroc": 0.9921}),
    ("mumtaz2016", "LuMamba tiny", {"balanced_accuracy": 0.72, "aupr": 0.952, "auroc": 0.931}),
    ("apava", "LuMamba tiny", {"auroc": 0.955, "aupr": 0.97}),
    ("apava", "TeCh", {"accuracy": 0.8686, "f1_macro": 0.863, "auroc": 0.9402, "aupr": 0.9379}),
    ("tdbrain", "LuMamba tiny", {"auroc": 0.961, "aupr": 0.96}),
    ("tdbrain", "Medformer", {"accuracy": 0.8962, "f1_macro": 0.8962, "auroc": 0.9641, "aupr": 0.9651}),
    ("mobi_60", "LuMamba tiny", {"r2": 0.116, "rmse": 0.1482, "pearson": 0.38}),
]


@pytest.mark.parametrize(("task", "model", "scores"), PUBLISHED)
def test_published_numbers_are_those_of_the_papers(task, model, scores):
    (row,) = [row for row in TASKS[task].published if row.model == model]
    assert {name: score.value for name, score in row.scores.items()} == pytest.approx(scores, abs=1e-9)


def test_rows_of_lumamba_name_where_they_are_printed():
    """recipes 6.1: some rows are in the model card alone."""
    places = {name: _row(name, "LuMamba tiny").source for name in ("tuab", "apava", "tdbrain", "mumtaz2016")}
    assert all("model card" in source for source in places.values())
    assert [name for name, source in places.items() if "arXiv 2603.19100" in source] == ["tuab", "apava"]
    assert [name for name, source in places.items() if "blog" in source] == ["tuab", "apava", "tdbrain"]
    for name in ("tuar_mcc", "tusl", "seed_v", "mobi_60"):
        assert _row(name, "LuMamba tiny").source == places["mumtaz2016"]
    assert "arXiv" in _row("mumtaz2016", "CBraMod").source


def test_comparisons_mention_subjects_that_encoders_may_have_seen():
    """data.md Q5: of the TUH corpora, the released pre-training leaves out the subjects of TUAB alone."""
    told = {name for name, task in TASKS.items() if "Q5" in task.reason}
    assert told == {name for name in TASKS if name.startswith(("tuar", "tusl"))}


def _row(task, model):
    (row,) = [row for row in TASKS[task].published if row.model == model]
    return row


def test_spreads_and_remarks_of_published_numbers():
    rows = {row.model: row for row in TASKS["tuab"].published}
    assert len(rows) == 25
    assert rows["LUNA base"].scores["balanced_accuracy"] == Score(0.8063, 0.0008)
    assert rows["LUNA base"].scores["auroc"] == Score(0.8868, 0.0015)
    assert all(row.level == "not comparable" for row in TASKS["apava"].published if row.model != "LuMamba tiny")
    levels = {row.model: row.level for row in TASKS["mumtaz2016"].published}
    assert levels.pop("LuMamba tiny") is None  # the one row of our subject lists
    assert set(levels.values()) == {"not comparable"}
    assert {rows[name].level for name in ("LUNA base", "FEMBA huge", "LuMamba tiny")} == {None}
    assert {rows[name].level for name in ("BIOT", "LaBraM huge", "CBraMod", "EEGNet")} == {"indicative"}
    assert "own paper" in rows["CBraMod"].remark
    (ours,) = [row for row in TASKS["seed_v"].published if row.model == "LuMamba tiny"]
    assert ours.level == "not comparable"
    assert "loader" in ours.remark


# --- presets ---


def _numbers(config):
    optimizer, trainer = config.optimizer, config.trainer
    return (
        config.loader.batch_size, trainer.epochs, optimizer.lr, optimizer.weight_decay, optimizer.warmup_epochs,
        optimizer.warmup_lr_init, optimizer.min_lr, optimizer.layerwise_decay, trainer.patience,
        config.model.compute_dtype,
    )  # fmt: skip


def test_presets_have_the_numbers_of_the_recipes():
    assert {name: _numbers(configs.load(f"tuab_{name}_reference")) for name in RELEASED} == RELEASED
    assert {name: _numbers(configs.load(f"tuab_{name}")) for name in DOCUMENTED} == DOCUMENTED
    reference, documented = configs.load("tuab_lumamba_tiny_reference"), configs.load("tuab_lumamba_tiny")
    assert (reference.task.class_weights, documented.task.class_weights) == ("none", "balanced")
    assert (reference.loader.drop_remainder, documented.loader.drop_remainder) == (True, False)
    assert not configs.load("seed_v_luna_base_reference").loader.drop_remainder  # recipes 3: its module keeps it
    assert (reference.model.head, documented.model.head) == ("attention", "mamba")
    assert reference.optimizer.resolve("finetune").warmup_mode == "reference"
    assert documented.optimizer.resolve("finetune").warmup_mode == "shifted"
    found = {size: configs.load(f"tuab_luna_{size}").model.drop_path for size in ("base", "huge")}
    assert found == {"base": 0.1, "huge": 0.2}
    assert configs.load("tuab_luna_huge_reference").model.drop_path == 0.1
    smoothing = {name: configs.load(f"{name}_luna_base").task.label_smoothing for name in ("tuab", "tusl", "mobi_60")}
    assert smoothing == {"tuab": 0.0, "tusl": 0.1, "mobi_60": 0.0}
    assert configs.load("tusl_luna_base_reference").task.label_smoothing == 0.0
    femba = configs.load("tuab_femba_base")
    assert (femba.optimizer.name, femba.task.normalization) == ("adam", "fixed_affine")
    assert configs.load("tuab_femba_base_reference").optimizer.name == "adamw"


def test_the_preset_with_the_published_number_of_parameters():
    _, params = abstract_model(configs.load("tuab_lumamba_tiny").model)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(4_631_611, abs=1)


@pytest.mark.parametrize("task", TASKS)
def test_every_preset_of_a_task_loads_builds_and_fits_the_windows(task):
    sheet = TASKS[task]
    expected = {(True, False): (len(sheet.channels), sheet.num_outputs)}.get((sheet.per_channel, False))
    shapes = {(), (sheet.num_outputs,), expected} - {None}
    for model in SIZES:
        for suffix in ("", "_reference"):
            name = f"{task}_{model.lower().replace(' ', '_')}{suffix}"
            config = configs.load(name)
            assert config.data.evaluation_task == task
            assert config.trainer.run_dir == f"runs/{name}"
            assert config.task.kind == ("regress" if sheet.class_names is None else "classify")
            config.model.check_window(len(sheet.channels), sheet.samples)
            found = (config.model.output_channels, config.model.num_outputs)
            assert tuple(n for n in found if n is not None) in shapes
            assert (config.model.output_channels is not None) == sheet.per_channel
            assert config.model.replace(head="reconstruction", num_outputs=None, output_channels=None).embed_dim == (
                SIZES[model].embed_dim
            )


@pytest.mark.parametrize("model", ["LuMamba tiny", "LUNA base", "FEMBA tiny"])
@pytest.mark.parametrize("task", ["tuab", "tuar_mmc", "mobi_60"])
def test_presets_make_a_model_and_an_optimizer_of_their_outputs(model, task):
    """Abstractly: the model runs on a window of the task, and every parameter has a rate."""
    config = configs.load(f"{task}_{model.lower().replace(' ', '_')}")
    sheet = TASKS[task]
    _, params = abstract_model(config.model)
    make_optimizer(config.optimizer, params, total_steps=100, max_epochs=10, stage="finetune")
    architecture = ARCHITECTURES[config.model.architecture]

    def logits():
        module = architecture.module(config.model, rngs=nnx.Rngs(0))
        signal = np.zeros((1, len(sheet.channels), sheet.samples), np.float32)
        locations = np.zeros((1, len(sheet.channels), 3), np.float32)
        return module(signal, locations).logits

    shape = (1, len(sheet.channels), sheet.num_outputs) if sheet.per_channel else (1, sheet.num_outputs)
    assert jax.eval_shape(logits).shape == shape


def test_presets_are_files_too_and_overridden_on_the_command_line(tmp_path):
    config = configs.cli(["mobi_60_luna_base", "--optimizer.lr", "3e-4", "--model.head", "mamba"], "train.py")
    assert (config.optimizer.lr, config.model.head, config.data.split_unit) == (3e-4, "mamba", "time")
    configs.write_yaml(config, tmp_path / "config.yaml")
    assert configs.load(str(tmp_path / "config.yaml")) == config
    with pytest.raises(ValueError, match="did you mean 'tuab_lumamba_tiny'"):
        configs.load("tuab_lumamba_tny")
    with pytest.raises(ValueError, match="did you mean 'tuab'"):
        find_task("taub")


def test_the_list_of_presets_shows_task_presets_as_a_pattern(capsys):
    with pytest.raises(SystemExit):
        configs.cli([], "train.py")
    shown = capsys.readouterr().out
    assert "TASK_MODEL_reference" in shown
    assert "mumtaz2016" in shown
    assert "luna_huge" in shown
    assert len(shown.splitlines()) < 12


def test_the_sheet_is_printed_with_sources(capsys):
    assert task_sheet.main([]) == 0
    shown = capsys.readouterr().out
    assert not [name for name in TASKS if name not in shown]
    assert task_sheet.main(["tuab"]) == 0
    shown = capsys.readouterr().out
    assert "0.8063 ± 0.0008" in shown
    assert "arXiv 2510.22257" in shown
    assert task_sheet.main(["taub"]) == 2
    with pytest.raises(SystemExit) as ended:
        task_sheet.main(["--help"])
    assert ended.value.code == 0
    assert "usage: task_sheet" in capsys.readouterr().out


def test_the_sheet_runs_as_a_module_without_a_warning():
    root = Path(configs.__file__).parents[1]
    words = [sys.executable, "-W", "error::RuntimeWarning", "-m", "configs.task_sheet", "--help"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_stores_of_seed_v_are_made_with_the_published_trials():
    """As many test windows as published need 6/5/4 trials (data.md Q14), not the 5/5/5 of the corpus's default."""
    task = TASKS["seed_v"]
    assert "--trials as_reference" in task.command
    seconds = sum(int(t.stop) - int(t.start) for own in TRIALS.values() for t in own if t.number > 11)
    assert 16 * seconds == task.test_windows == 31_056
    assert task.settings["trials"] == "as_reference"


# --- stores ---


@pytest.fixture
def make_store(tmp_path):
    def make(channels, samples, sfreq, labels, class_names, provenance=None):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.h5"
        info = StoreInfo(sfreq=sfreq, n_times=samples, stride_seconds=1.0, class_names=class_names)
        info = dataclasses.replace(info, provenance=provenance or {})
        with create_store(path, info) as writer:
            signal = np.random.default_rng(0).normal(size=(len(labels), len(channels), samples))
            about = {"subject": "s", "recording": "r", "start_samples": samples * np.arange(len(labels))}
            writer.add("g", signal, montage_of(channels), **about, labels=np.asarray(labels))
        return WindowStore(path)

    return make


def test_stores_of_a_task_fit_and_others_are_told(make_store):
    task = TASKS["tdbrain"]
    names = list(task.class_names)
    assert deviations(task, [make_store(task.channels, 320, 256.0, [0, 1], names)]) == []
    (order,) = deviations(task, [make_store(task.channels[::-1], 320, 256.0, [0, 1], names)])
    assert "another order" in order
    (fewer,) = deviations(task, [make_store(task.channels[:5], 320, 256.0, [0, 1], names)])
    assert "5 channels" in fewer
    (longer,) = deviations(task, [make_store(task.channels, 640, 256.0, [0, 1], names)])
    assert "640 samples at 256 Hz" in longer
    assert deviations(task, [make_store(task.channels, 320, 256.0, [0, 1], None)]) == []  # old files name no classes


def test_stores_of_another_task_are_refused(make_store):
    task = TASKS["tdbrain"]
    with pytest.raises(ValueError, match=r"has the classes rest, task, task tdbrain has healthy, parkinson"):
        deviations(task, [make_store(task.channels, 320, 256.0, [0, 1], ["rest", "task"])])
    with pytest.raises(ValueError, match="class numbers below 2"):
        deviations(task, [make_store(task.channels, 320, 256.0, [0, 4], None)])
    with pytest.raises(ValueError, match="task tdbrain class numbers"):
        deviations(task, [make_store(task.channels, 320, 256.0, [[0.5], [1.0]], None)])
    with pytest.raises(ValueError, match="12 targets"):
        deviations(TASKS["mobi_19"], [make_store(TASKS["mobi_19"].channels, 200, 100.0, [[0.5]], None)])
    per_channel = TASKS["tuar_mmc"]
    labels = np.zeros((2, 22), int)
    good = make_store(per_channel.channels, 1280, 256.0, labels, list(per_channel.class_names))
    assert deviations(per_channel, [good]) == []
    with pytest.raises(ValueError, match="for each channel"):
        deviations(per_channel, [make_store(per_channel.channels, 1280, 256.0, [0, 1], list(per_channel.class_names))])


def _prepared(task, part="test", **options):
    return {"corpus": task.corpus, "part": part, "options": task.settings | options}


def test_stores_of_another_label_rule_or_corpus_are_told(make_store):
    """Windows, classes and shapes of these tasks are equal: only what the store says of itself tells them apart."""
    task = TASKS["tuar_bc"]

    def notes(provenance):
        return deviations(task, [make_store(task.channels, 1280, 256.0, [0, 1], list(task.class_names), provenance)])

    assert notes(_prepared(task)) == []
    assert notes({}) == []
    assert notes(_prepared(task, seed=7)) == []  # another draw of subjects: no other rule
    (rule,) = notes(_prepared(TASKS["tuar_bc13"]))
    assert "prepared with --labels binary_any13, task tuar_bc with --labels binary_30" in rule
    assert "--label_set artifacts" in notes(_prepared(task, label_set="artifacts"))[0]
    (corpus,) = notes(_prepared(TASKS["tuab"]))
    assert "holds the corpus tuab, task tuar_bc is of tuar" in corpus
    merged = {"stores": {"a.h5": {"provenance": _prepared(task)}, "b.h5": {"provenance": _prepared(TASKS["tuab"])}}}
    (found,) = notes(merged)
    assert "holds the corpus tuab" in found


def test_options_that_change_windows_deviate_and_slips_of_the_released_code_do_not(make_store):
    def notes(name, order=None, **options):
        task = TASKS[name]
        labels = np.arange(2) % task.num_outputs
        about = _prepared(task, **options)
        names = list(task.class_names)
        return deviations(task, [make_store(order or task.channels, task.samples, task.sfreq, labels, names, about)])

    (filtering,) = notes("apava", filtering="detrend")
    assert "--filtering detrend, task apava with --filtering fir" in filtering
    (rates,) = notes("tuab", low_rate="lower")
    assert "--low_rate lower" in rates
    assert notes("seed_v", decimate="stride") == []
    assert notes("mumtaz2016", names="as_reference") == []
    assert notes("modma_13", positions="head") == []
    disk = CHANNEL_ORDERS["tuh-bipolar-22-disk"]
    assert TASKS["tuab"].channels != disk
    assert notes("tuab", disk, channel_order="D") == []
    assert "another order" in notes("tuab", disk[::-1])[0]


def test_stores_say_which_part_of_their_corpus_they_are(make_store):
    task = TASKS["tdbrain"]

    def parts(*provenances):
        return stated_parts([make_store(task.channels, 320, 256.0, [0, 1], None, own) for own in provenances])

    assert parts(_prepared(task)) == {"test"}
    assert parts(_prepared(task, "train"), _prepared(task)) == {"train", "test"}
    assert parts({}) == parts({"part": "test"}) == {None}
    assert parts({"stores": {part: {"provenance": _prepared(task, part)} for part in ("train", "test")}}) == {
        "train",
        "test",
    }


def test_outputs_of_mobi_have_the_names_of_the_joints():
    task = TASKS["mobi_60"]
    assert len(task.output_names) == task.num_outputs
    assert [name[0] for name in task.output_names] == ["G"] * task.measured + ["P"] * 6  # goniometer, predicted


_PUBLISHED = {"part": "test", "windows": 74_010, "seeds": 3, "stated": {"test"}}


def _claim(task, **changes):
    return claim_of(task, **_PUBLISHED | changes)


def test_claims_shrink_with_what_was_done():
    tuab, apava = TASKS["tuab"], TASKS["apava"]
    assert _claim(tuab)[0] == "comparable"
    level, reason = _claim(tuab, seeds=1)
    assert level == "indicative"
    assert reason.startswith("one seed only")
    assert _claim(tuab, windows=73_900)[0] == "comparable"
    level, reason = _claim(tuab, windows=60_000)
    assert level == "not comparable"
    assert "74,010" in reason
    assert _claim(tuab, part="validation")[0] == "not comparable"
    assert _claim(tuab, deviating=["other windows"]) == ("not comparable", "other windows")
    assert _claim(apava, windows=159, seeds=1)[0] == "indicative"
    assert _claim(dataclasses.replace(tuab, corpus="tdbrain"), windows=5)[0] == "comparable"


def test_claims_need_the_published_test_part_and_runs_that_differ_in_the_seed_alone():
    tuab, apava = TASKS["tuab"], TASKS["apava"]
    for stated in ({"train"}, {"test", "train"}, {None, "validation"}):
        level, reason = _claim(tuab, stated=stated)
        assert level == "not comparable"
        assert reason.startswith("not the published test part")
    for stated in ({None}, {None, "test"}):
        level, reason = _claim(tuab, stated=stated)
        assert level == "indicative"
        assert reason.startswith("the stores do not say which part of the corpus they are")
    assert _claim(TASKS["tuar_bc"], windows=5, stated={None}) == ("not comparable", TASKS["tuar_bc"].reason)
    level, reason = _claim(tuab, alike=False)
    assert (level, reason.partition(";")[0]) == ("indicative", "the runs differ in more than the seed")
    assert _claim(apava, windows=159, alike=False) == ("indicative", apava.reason)
