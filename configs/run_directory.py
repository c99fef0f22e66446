"""What a run is, on disk: its configuration, its data, its code; and whether it may be continued as asked."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from configs.data import Windows
from configs.schema import ExperimentConfig, differences, read_yaml, to_mapping, write_yaml
from lumamba_jax.checkpoint import package_versions, read_metadata
from lumamba_jax.hosts import HostsConfig, code_version
from lumamba_jax.run_log import write_json

CONFIG_FILE, FACTS_FILE, SPLIT_FILE, VERSIONS_FILE = "config.yaml", "facts.json", "split.json", "versions.json"

# Fields that may differ between a run and its continuation: they change nothing that is computed, or rounding only
# (and, `trainer.micro_batch`, which windows share a draw of dropout).
MAY_CHANGE = frozenset(
    {
        "trainer.resume",
        "trainer.stop_after",
        "trainer.run_dir",
        "trainer.log_every",
        "trainer.baseline",
        "trainer.profile",
        "trainer.hang_seconds",
        "trainer.hang_exit_seconds",
        "trainer.non_finite",
        "trainer.non_finite_limit",
        "trainer.keep_checkpoints",
        "trainer.keep_every",
        "trainer.checkpoint_every",
        "trainer.micro_batch",
        "model.remat",
        "model.scan_implementation",
        "mesh.devices",
        "mesh.fsdp",
        "loader.reader_threads",
        "loader.prefetch",
        *(f"hosts.{field.name}" for field in dataclasses.fields(HostsConfig)),
    }
)
# Where the data lies may change too, as long as the windows and their division are the same.
_PLACES = frozenset({"data.train", "data.validation", "data.test", "data.split_file", "trainer.init_from"})


def facts(config: ExperimentConfig, windows: Windows) -> dict[str, str]:
    """What all processes of a run must have in common, and a continuation with its beginning.

    "configuration" (without how processes find each other), "code", "packages", "data" (windows and their division) and
    "initial weights"; digests or JSON.
    """
    root = Path(__file__).resolve().parent.parent
    source = config.trainer.init_from
    return {
        "configuration": json.dumps(to_mapping(config) | {"hosts": None}, sort_keys=True),
        "code": code_version(root / "lumamba_jax", root / "data_pipeline", root / "configs", root / "train.py"),
        "packages": json.dumps(package_versions(), sort_keys=True),
        "data": f"{windows.digest} {windows.split.digest}",
        "initial weights": json.dumps(read_metadata(source), sort_keys=True) if source else "",
    }


def open_run_directory(config: ExperimentConfig, windows: Windows, found: Mapping[str, str]) -> list[str]:
    """Write what the run is into its directory, or check that it fits the run that is there.

    Args:
        config: resolved; `trainer.run_dir` and `trainer.resume` are obeyed.
        windows: of the run.
        found: from `facts`.

    Returns: notes on what is another than when the run began, one sentence each.
    Raises: ValueError when the directory holds a run that is not to be resumed, or cannot be with this configuration or
        these windows; nothing is written then.
    """
    directory = Path(config.trainer.run_dir)
    if not (directory / CONFIG_FILE).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(package_versions(), directory / VERSIONS_FILE)
        write_json(dict(found), directory / FACTS_FILE)
        windows.save_split(directory / SPLIT_FILE)
        write_yaml(config, directory / CONFIG_FILE)  # last: what makes it a run
        return []
    if not config.trainer.resume:
        raise ValueError(
            f"{directory} already holds a run: continue it with --trainer.resume true, or choose another "
            "--trainer.run-dir"
        )
    begun = json.loads((directory / FACTS_FILE).read_text()) if (directory / FACTS_FILE).is_file() else {}
    if begun.get("data", found["data"]) != found["data"]:
        raise ValueError(
            f"{directory} cannot be resumed: its windows or their division into subjects are others than when it began "
            f"({begun['data']}, now {found['data']}). Give it the same stores, or start another run"
        )
    changed = differences(read_yaml(directory / CONFIG_FILE), config)
    forbidden = [line for name, line in changed if name not in MAY_CHANGE and not (begun and name in _PLACES)]
    if forbidden:
        raise ValueError(f"{directory} cannot be resumed with another configuration: {'; '.join(forbidden)}")
    shown = ("trainer.micro_batch", "trainer.non_finite", "model.remat", "model.scan_implementation", *_PLACES)
    notes = [f"{directory} goes on with a change: {line}" for name, line in changed if name in shown]
    other = [fact for fact in ("code", "packages") if begun.get(fact, found[fact]) != found[fact]]
    return notes + [
        f"{directory} was begun with other {fact}: what follows may differ from the unbroken run" for fact in other
    ]
