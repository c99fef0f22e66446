"""Presets and the command line: strict, complete, and the resolved configuration is itself a preset."""

import dataclasses

import pytest
import yaml

import configs
from configs import ExperimentConfig, schema


@pytest.mark.parametrize("name", configs.preset_names())
def test_every_preset_loads_and_comes_back_from_its_resolved_form(name, tmp_path):
    config = configs.load(name)
    configs.write_yaml(config, tmp_path / "config.yaml")
    assert configs.load(str(tmp_path / "config.yaml")) == config
    assert schema.differences(config, configs.load(str(tmp_path / "config.yaml"))) == []


def test_both_pretraining_recipes_are_there_by_name():
    corrected = configs.load("pretrain_lumamba_tiny")
    reference = configs.load("pretrain_lumamba_tiny_reference")
    assert (corrected.optimizer.recipe, reference.optimizer.recipe) == ("corrected", "reference")
    assert corrected.model == reference.model  # the published sizes
    found = {
        name: getattr(reference.optimizer.resolve("pretrain"), name)
        for name in ("betas", "weight_decay", "warmup_mode", "decay_mask", "lr")
    }
    expected = {"betas": (0.9, 0.999), "weight_decay": 0.01, "warmup_mode": "reference", "decay_mask": "all"}
    assert found == expected | {"lr": 1.25e-4}
    assert (reference.task.mask_scope, reference.task.sigreg_count) == ("reference", 2040)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "unknown key 'modle': did you mean 'model'"),
        ("model: {embed_dims: 3}", "unknown key 'model.embed_dims': did you mean 'embed_dim'"),
        ("trainer: {epochs: many}", "trainer.epochs must be int, not 'many'"),
        ("trainer: {epochs: true}", "trainer.epochs must be int, not True"),
        ("task: {objective: foo}", "must be one of 'reconstruction', 'lejepa', 'mixed'"),
        ("model: 3", "model is a section"),
        ("[1, 2]", "must hold sections"),
        ("model: {", "not valid YAML"),
        ("data: {fold: 1}", "num_folds and fold belong together"),
        ("data: {fold: 5, num_folds: 5}", "fold 5 is not one of 0..4"),
        ("task: {kind: classify}", "needs model.head attention, mamba or linear"),
        ("model: {head: none}", "needs model.head reconstruction"),
        ("data: {permute_labels: true}", "pre-training has no labels"),
        ("trainer: {steps: 0}", "steps must be at least 1"),
    ],
)
def test_mistakes_are_named_with_their_place(text, message, tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)preset.yaml.*{message}"):
        configs.load(str(path))


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("optimizer: {lr: 1e-4, betas: [0.9, 0.95], min_lr: 0}\ndata: {train: [a.h5, b.h5]}")
    config = configs.load(str(path))
    assert config.optimizer.lr == 1e-4  # YAML 1.1 reads this as text
    assert config.optimizer.betas == (0.9, 0.95)
    assert isinstance(config.optimizer.min_lr, float)
    assert config.data.train == ("a.h5", "b.h5")


def test_overrides_on_the_command_line():
    words = [
        "--data.train",
        "a.h5",
        "b.h5",
        "--trainer.resume",
        "true",
        "--optimizer.lr=2e-3",
        "--trainer.steps",
        "null",
    ]
    config = configs.cli(["debug", *words, "--model.head", "none", "--task.objective", "lejepa"], "train.py")
    assert config.data.train == ("a.h5", "b.h5")
    assert config.trainer.resume is True
    assert config.trainer.steps is None
    assert config.optimizer.lr == 2e-3
    assert config.model.head == "none"
    assert config.loader == configs.load("debug").loader


def test_unknown_presets_and_options_name_the_closest(capsys):
    with pytest.raises(ValueError, match="did you mean 'finetune_regress'"):
        configs.load("finetune_regres")
    with pytest.raises(SystemExit) as stopped:
        configs.cli(["debug", "--optimizer.learning-rte", "1"], "train.py")
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        configs.cli([], "train.py")
    assert stopped.value.code == 2
    assert "pretrain_lumamba_tiny" in capsys.readouterr().out


def test_differences_name_every_field():
    saved = ExperimentConfig()
    given = dataclasses.replace(
        saved,
        optimizer=dataclasses.replace(saved.optimizer, lr=1.0),
        trainer=dataclasses.replace(saved.trainer, resume=True),
    )
    assert dict(schema.differences(saved, given)) == {
        "optimizer.lr": "optimizer.lr was 0.0005, is now 1.0",
        "trainer.resume": "trainer.resume was False, is now True",
    }


def test_a_resolved_configuration_states_every_field(tmp_path):
    configs.write_yaml(ExperimentConfig(), tmp_path / "config.yaml")
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for section in dataclasses.fields(ExperimentConfig):
        names = {field.name for field in dataclasses.fields(getattr(ExperimentConfig(), section.name))}
        assert set(stored[section.name]) == names
