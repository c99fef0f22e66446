"""A run is continued as what it is: the same windows, configuration and weights; other places and numerics are said."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs import DataConfig, ExperimentConfig, TrainerConfig
from configs.data import open_windows
from configs.run_directory import facts, open_run_directory
from data_pipeline.montages import named_montage
from data_pipeline.store import StoreInfo, create_store
from lumamba_jax.hosts import HostsConfig
from lumamba_jax.sharding import MeshConfig


def make_store(path, *, subjects=6, amplitude=20.0):
    montage = named_montage("siena-29")
    with create_store(path, StoreInfo(sfreq=256.0, n_times=80, stride_seconds=0.3125)) as writer:
        for subject in range(subjects):
            signal = np.random.default_rng(subject).normal(0, amplitude, (2, len(montage), 80))
            places = {"subject": f"S{subject}", "recording": f"R{subject}", "start_samples": np.array([0, 80])}
            writer.add(f"g{subject}", signal, montage, **places)
    return str(path)


@pytest.fixture
def begun(tmp_path):
    """(configuration of a run that has begun, a function that continues it with changes)."""
    config = ExperimentConfig(
        data=DataConfig(train=(make_store(tmp_path / "windows.h5"),)),
        trainer=TrainerConfig(run_dir=str(tmp_path / "run"), resume=True),
    )

    def open_with(changed: ExperimentConfig) -> list[str]:
        windows = open_windows(changed.data, labelled=False)
        return open_run_directory(changed, windows, facts(changed, windows))

    assert open_with(config) == []
    return config, open_with


def replaced(config: ExperimentConfig, section: str, **changes: object) -> ExperimentConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def test_the_same_run_goes_on_silently_elsewhere_and_with_other_processes(begun):
    config, open_with = begun
    assert open_with(config) == []
    other = dataclasses.replace(config, mesh=MeshConfig(fsdp=2), hosts=HostsConfig(coordinator="a:1", count=2, index=1))
    assert open_with(replaced(other, "trainer", log_every=3, checkpoint_every=7, hang_seconds=None)) == []


def test_numerics_and_places_may_change_and_are_said(begun, tmp_path):
    config, open_with = begun
    (note,) = open_with(replaced(config, "trainer", micro_batch=4))
    assert "trainer.micro_batch was None, is now 4" in note
    (note,) = open_with(dataclasses.replace(config, model=config.model.replace(remat="blocks")))
    assert "model.remat was 'none', is now 'blocks'" in note
    moved = shutil.copy(config.data.train[0], tmp_path / "elsewhere.h5")
    (note,) = open_with(replaced(config, "data", train=(str(moved),)))
    assert "data.train was" in note


def test_another_configuration_is_refused_with_its_differences(begun):
    config, open_with = begun
    changed = replaced(replaced(config, "optimizer", lr=0.5), "loader", batch_size=7)
    with pytest.raises(ValueError, match=r"loader\.batch_size was 64, is now 7; optimizer\.lr was .*, is now 0\.5"):
        open_with(changed)
    with pytest.raises(ValueError, match="already holds a run"):
        open_with(replaced(config, "trainer", resume=False))


@pytest.mark.parametrize("change", [{"subjects": 7}, {"amplitude": 30.0}])
def test_other_windows_at_the_same_place_are_refused(begun, change):
    config, open_with = begun
    make_store(config.data.train[0], **change)
    with pytest.raises(ValueError, match="its windows or their division into subjects are others"):
        open_with(config)


def test_other_code_and_packages_are_said(begun):
    config, open_with = begun
    path = Path(config.trainer.run_dir) / "facts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "older", "packages": "{}"}))
    assert [note.split("begun with ")[1][:8] for note in open_with(config)] == ["other co", "other pa"]
