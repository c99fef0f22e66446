"""Presets and the command line: `load(name or path)` and `cli(arguments)`."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from configs.schema import DataConfig, ExperimentConfig, TrainerConfig, from_mapping, read_yaml, to_mapping, write_yaml

# `task_presets` is imported where it is used: `python -m configs.task_sheet` must find its own module not yet imported.
__all__ = [
    "DataConfig",
    "ExperimentConfig",
    "TrainerConfig",
    "cli",
    "from_mapping",
    "load",
    "preset_names",
    "to_mapping",
    "write_yaml",
]


def preset_names() -> list[str]:
    """The names of the presets that are files of this package; `task_presets` has those of the task sheet."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def load(name: str) -> ExperimentConfig:
    """A preset by name, or any YAML file by path. Raises ValueError with the closest preset when there is none."""
    from configs.task_presets import load_task_preset, task_preset_names

    path = Path(__file__).parent / f"{name}.yaml"
    if name in preset_names():
        return read_yaml(path)
    if name in task_preset_names():
        return load_task_preset(name)
    if Path(name).is_file():
        return read_yaml(Path(name))
    close = difflib.get_close_matches(name, [*preset_names(), *task_preset_names()], n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"presets: {', '.join(preset_names())}, or TASK_MODEL"
    raise ValueError(f"{name!r} is neither a preset nor a file: {hint}")


def cli(arguments: Sequence[str], program: str) -> ExperimentConfig:
    """`PRESET [--section.field value ...]`: a preset or YAML file, then overrides; `--help` lists every field.

    Raises: ValueError for an unknown preset or contradictory values. Unknown options and malformed values are reported
        by tyro with the closest known ones, exit status 2.
    """
    from configs.task_presets import pattern

    if not arguments or arguments[0].startswith("-"):
        wants_help = bool({"-h", "--help"} & set(arguments))
        print(f"usage: {program} PRESET [--section.field value ...]")
        print(f"presets: {', '.join(preset_names())}, a YAML file, or a task of the task sheet:")
        print(pattern())
        print(f"every field with its default: {program} PRESET --help")
        sys.exit(0 if wants_help else 2)
    preset = load(arguments[0])
    return tyro.cli(
        ExperimentConfig,
        prog=f"{program} {arguments[0]}",
        default=preset,
        args=[_spelled_for_tyro(argument) for argument in arguments[1:]],
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )


def _spelled_for_tyro(argument: str) -> str:
    """YAML's `true`, `false` and `null` on the command line too, alone or after `=`."""
    name, equals, value = argument.rpartition("=")
    return name + equals + {"true": "True", "false": "False", "null": "None"}.get(value, value)
