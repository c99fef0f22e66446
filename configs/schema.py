"""`ExperimentConfig`: everything that decides a run, as frozen dataclasses, and its strict conversion from and to YAML.

A preset states only what differs from the defaults. An unknown key, a value of the wrong type or a contradiction
between sections is refused with the place and the closest known name. The resolved configuration that is saved with
each run is itself a preset.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from data_pipeline.loader import LoaderConfig
from data_pipeline.old_files import OldFiles
from lumamba_jax.adapters import AdapterConfig
from lumamba_jax.architectures import ARCHITECTURES, ModelConfig
from lumamba_jax.femba import FembaConfig
from lumamba_jax.hosts import HostsConfig
from lumamba_jax.lumamba import LuMambaConfig
from lumamba_jax.optimizer import OptimizerConfig
from lumamba_jax.sharding import MeshConfig
from lumamba_jax.tasks import TaskConfig, check_objective


@dataclass(frozen=True)
class DataConfig:
    """Which windows are trained on, and how subjects are divided.

    Attributes:
        train: window stores to train on: HDF5 files, ArrayRecord folders, or folders of such stores.
        validation: stores used for validation as they are; empty = subjects are split off from `train`.
        test: stores for the test at the end; empty = the test fold or the test fraction of `train`, if any.
        validation_fraction: share of the (remaining) subjects for validation.
        test_fraction: share of the subjects for the test; 0 = none. Ignored when folds are used.
        num_folds: divide the subjects into this many folds ...
        fold: ... and test on this one (0-based); the others are divided into training and validation.
        split_seed: decides the division. On the same store, the same seed gives pre-training and fine-tuning the same
            folds.
        split_file: use the division another run wrote to its `split.json`, on stores with the same subjects; or
            published lists of subjects or recordings (text, CSV, JSON or a folder; docs/data.md).
        leave_out: test on this subject; the others are divided into training and validation.
        few_shot: with `leave_out`: so many windows of each class of that subject join the training, contiguous in
            time; the rest of the subject is the test, without the neighbours of those windows.
        few_shot_others: False = train on the windows of that subject alone (the others validate).
        split_unit: what is never divided. "subject"; "recording" = subjects may be in several parts (trials of SEED-V);
            "time" = recordings too, in contiguous stretches one window apart (minutes of MoBI; one subject's data).
        compare_windows: refuse equal windows in two parts. "stored" = by the hashes that stores hold; "all" = read
            the windows of stores without hashes too; "none" = do not.
        old_files: how HDF5 files of the reference pipeline are read, which do not describe themselves.
        evaluation_task: name in the task sheet (`python -m configs.task_sheet`): the stores must hold its classes, and
            `eval.py metrics` sets the published numbers beside ours.
        permute_labels: sanity control: shuffle the labels of the training and validation windows (subjects, windows
            and counts stay). A model trained so must be at chance on the untouched test labels.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    validation_fraction: float = 0.2
    test_fraction: float = 0.0
    num_folds: int | None = None
    fold: int | None = None
    split_seed: int = 0
    split_file: str = ""
    leave_out: str = ""
    few_shot: int | None = None
    few_shot_others: bool = True
    split_unit: Literal["subject", "recording", "time"] = "subject"
    compare_windows: Literal["stored", "all", "none"] = "stored"
    old_files: OldFiles = field(default_factory=OldFiles)
    evaluation_task: str = ""
    permute_labels: bool = False

    def __post_init__(self):
        if (self.num_folds is None) != (self.fold is None):
            raise ValueError("data: num_folds and fold belong together: give both or neither")
        if self.num_folds is not None and self.fold is not None and not 0 <= self.fold < self.num_folds:
            raise ValueError(f"data: fold {self.fold} is not one of 0..{self.num_folds - 1}")
        if self.num_folds is not None and (self.validation or self.test or self.split_file):
            raise ValueError("data: folds divide the training stores: leave validation, test and split_file empty")
        if self.leave_out and (self.num_folds is not None or self.test or self.split_file or self.test_fraction):
            raise ValueError("data: leave_out tests one subject of the training stores: leave folds, test, "
                             "test_fraction and split_file out")  # fmt: skip
        if self.few_shot is not None and (not self.leave_out or self.few_shot < 1):
            raise ValueError("data: few_shot is a number of windows per class of the subject named by leave_out")
        if self.split_unit != "subject" and (self.num_folds is not None or self.leave_out):
            raise ValueError("data: folds and leave_out divide subjects: leave split_unit at subject")
        if not (0 <= self.validation_fraction < 1 and 0 <= self.test_fraction < 1):
            raise ValueError("data: validation_fraction and test_fraction must lie in [0, 1)")


@dataclass(frozen=True)
class TrainerConfig:
    """How long, how often, from where and into which directory.

    Attributes:
        run_dir: everything of the run is written here.
        seed: initialisation and every draw of the run.
        micro_batch: windows that each device works through at a time, in training and validation; a divisor of its
            share of the batch. Less memory, the same gradient; only the draws of dropout depend on it. None: 8 on a
            CPU, if they divide the share, else the whole share.
        epochs: passes over the training windows; used when `steps` is not given.
        steps: optimizer steps.
        log_every: steps between lines of metrics.
        validate_every: steps between validations, checkpoints included; None = once per epoch.
        patience: stop after this many validations without a better validation loss; None = never.
        keep_checkpoints: how many train states are retained, 2 or more to fall back on when one is damaged; the best
            model is always kept in `best`.
        checkpoint_every: steps between train states, besides those of validations.
        keep_every: train states of steps that are a multiple of it are retained as well.
        non_finite: what happens at a step whose loss or gradient is not finite. "stop" = the run ends with status 1;
            "skip" = the step leaves parameters and optimizer as they were; "rollback" = back to the newest checkpoint,
            and past the batches from there to that step. The windows are named in any case.
        non_finite_limit: the run ends after more skipped steps (or rollbacks) than this.
        hang_seconds: print the stacks of all threads when no step is done for so long; None = never.
        hang_exit_seconds: end the process, with status 70, when no step is done for so long; None = never.
        profile: write a trace of so many steps to `profile/` (TensorBoard, XProf), after two steps of warming up.
        stop_after: end this session after so many steps, saved and ready to be resumed; None = at the end.
        init_from: exported model (converted, or `best` of a run, or the run itself) whose encoder is loaded.
        resume: continue the run in `run_dir` where it stopped (or start it, when it never was).
        freeze_encoder: train the head only (and the adapters, if any, which leave the encoder as it is in any case).
        baseline: print band power + logistic regression on the same split beside every fine-tuning result.
    """

    run_dir: str = "runs/unnamed"
    seed: int = 42
    micro_batch: int | None = None
    epochs: int = 10
    steps: int | None = None
    log_every: int = 10
    validate_every: int | None = None
    patience: int | None = None
    keep_checkpoints: int = 2
    keep_every: int | None = None
    checkpoint_every: int | None = None
    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    non_finite_limit: int = 20
    hang_seconds: float | None = 1800.0
    hang_exit_seconds: float | None = 7200.0
    profile: int | None = None
    stop_after: int | None = None
    init_from: str = ""
    resume: bool = False
    freeze_encoder: bool = False
    baseline: bool = True

    def __post_init__(self):
        names = ("epochs", "steps", "log_every", "validate_every", "patience", "stop_after", "keep_checkpoints")
        for name in (
            *names,
            "micro_batch",
            "keep_every",
            "profile",
            "hang_seconds",
            "hang_exit_seconds",
            "checkpoint_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer: {name} must be at least 1, not {value}")


@dataclass(frozen=True)
class ExperimentConfig:
    """The whole of a run; sections belong to the modules that use them."""

    model: ModelConfig = field(default_factory=LuMambaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self):
        supervised = self.task.kind != "pretrain"
        if supervised != self.model.classifies:
            wanted = "attention, mamba or linear" if supervised else "reconstruction (or none for LeJEPA alone)"
            raise ValueError(f"task {self.task.kind!r} needs model.head {wanted}, not {self.model.head!r}")
        if self.task.kind == "pretrain" and self.task.objective != "lejepa" and self.model.head != "reconstruction":
            raise ValueError(f"objective {self.task.objective!r} reconstructs: it needs model.head reconstruction")
        check_objective(self.task, self.model)
        if isinstance(self.model, FembaConfig) and self.loader.channel_dropout:
            raise ValueError("FEMBA's fixed grid cannot hide channels: set loader.channel_dropout to 0")
        if self.adapters.rank and not supervised:
            raise ValueError("adapters fine-tune a pre-trained encoder: set adapters.rank to 0 for task 'pretrain'")
        if self.data.permute_labels and not supervised:
            raise ValueError("data.permute_labels is a control of supervised training: pre-training has no labels")


def from_mapping(values: Mapping[str, Any], default: Any, *, where: str = "") -> Any:
    """`default` (a frozen dataclass) with the nested `values` put in, checked field by field.

    Raises: ValueError naming the key, its place and the closest known key, or the type that was expected.
    """
    hints = typing.get_type_hints(type(default))
    changes = {}
    for key, value in values.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f": did you mean {close[0]!r}?" if close else f": known keys are {', '.join(hints)}"
            raise ValueError(f"unknown key {place!r}{hint}")
        current = getattr(default, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ValueError(f"{place} is a section: write its keys indented below it, not {value!r}")
            if "architecture" in value:
                current = _of_architecture(value["architecture"], current, place)
            changes[key] = from_mapping(value, current, where=place)
        else:
            changes[key] = _coerce(value, hints[key], place)
    return dataclasses.replace(default, **changes)


def _of_architecture(name: Any, current: Any, place: str) -> Any:
    """The defaults of architecture `name`, when `current` is the configuration of another one."""
    if name not in ARCHITECTURES:
        raise ValueError(f"{place}.architecture must be one of {', '.join(ARCHITECTURES)}, not {name!r}")
    return current if name == current.architecture else ARCHITECTURES[name].config()


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain values of every field, as YAML and JSON can hold them."""
    return {
        f.name: to_mapping(value) if dataclasses.is_dataclass(value) else _plain(value)
        for f in dataclasses.fields(config)
        for value in [getattr(config, f.name)]
    }


def differences(saved: Any, given: Any, *, where: str = "") -> list[tuple[str, str]]:
    """(field path, "path was X, is now Y") for every field in which two configurations differ."""
    found = []
    for f in dataclasses.fields(saved):
        name, old, new = f"{where}{f.name}", getattr(saved, f.name), getattr(given, f.name)
        if dataclasses.is_dataclass(old):
            found += differences(old, new, where=f"{name}.")
        elif old != new:
            found.append((name, f"{name} was {old!r}, is now {new!r}"))
    return found


def read_yaml(path: Path) -> ExperimentConfig:
    """Read a preset or the resolved configuration of a run. Raises ValueError with the file and what is wrong in it."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold sections such as `model:` and `trainer:`")
    try:
        return from_mapping(values, ExperimentConfig())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_yaml(config: ExperimentConfig, path: Path) -> None:
    """Write every field, so that the file alone reproduces the run; complete or not at all."""
    temporary = path.with_suffix(".writing")
    temporary.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))
    temporary.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _coerce(value: Any, hint: Any, place: str) -> Any:
    """`value` from YAML as the annotated type; only conversions that lose nothing."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _coerce(value, next(a for a in arguments if a is not type(None)), place)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{place} must be one of {', '.join(map(repr, arguments))}, not {value!r}")
    if origin is tuple and isinstance(value, list | tuple):
        items = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        if len(items) == len(value):
            return tuple(_coerce(v, item, place) for v, item in zip(value, items, strict=True))
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as text
            return float(value)
        except ValueError:
            pass
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    expected = getattr(hint, "__name__", None) if origin is None else str(hint)
    raise ValueError(f"{place} must be {expected}, not {value!r}")
