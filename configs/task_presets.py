"""A preset by name for every task of the task sheet, every model and both recipes: TASK_ARCHITECTURE_SIZE[_reference].

`tuab_lumamba_tiny` fine-tunes as documented, with the deviations of the released code corrected; with `_reference` as
that code runs it. Either is one of the fine-tuning presets (YAML files beside this one), with the task's head, outputs
and division of the data, and the numbers of recipes 4 put in. Everything is overridden on the command line as ever.
"""

from pathlib import Path
from typing import Any

from configs.schema import ExperimentConfig, from_mapping, read_yaml
from configs.task_sheet import TASKS, EvaluationTask
from lumamba_jax.architectures import SIZES

_REFERENCE = "_reference"
_FEW_WINDOWS_BATCH = 64
_LABEL_SMOOTHING = 0.1

_SCHEDULE = {"warmup_epochs": 10, "warmup_lr_init": 2.5e-7, "min_lr": 2.5e-6}

# recipes 4: what the configurations of the released code say, by architecture
_AS_RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    "LuMamba": {
        "loader": {"batch_size": 512},
        "optimizer": {"lr": 5e-4, "weight_decay": 0.05, "warmup_epochs": 5, "warmup_lr_init": 1e-6, "min_lr": 1e-6},
        "trainer": {"epochs": 50, "patience": 15},
        "model": {"head": "attention", "compute_dtype": "bfloat16"},
    },
    "LUNA": {
        "loader": {"batch_size": 1024},
        "optimizer": {"lr": 5e-4, "weight_decay": 0.05, **_SCHEDULE},
        "trainer": {"epochs": 30, "patience": 8},
        "model": {"head": "attention", "drop_path": 0.1, "compute_dtype": "bfloat16"},
    },
    "FEMBA": {
        "loader": {"batch_size": 1024},
        "optimizer": {"lr": 5e-4, "weight_decay": 0.5, **_SCHEDULE},
        "trainer": {"epochs": 30, "patience": None},
        "model": {"head": "mamba"},
    },
}
# What papers and model cards say instead. The Mamba head: with it LuMamba has the 4.6M parameters that are published.
# The precision is ours: they name none.
_AS_DOCUMENTED: dict[str, dict[str, dict[str, Any]]] = {
    "LuMamba": {"trainer": {"patience": 10}, "model": {"head": "mamba", "compute_dtype": "float32"}},
    "LUNA": {
        "optimizer": {"lr": 1e-4, "warmup_epochs": 5, "min_lr": 5e-6},
        "trainer": {"epochs": 50, "patience": 10},
        "model": {"compute_dtype": "float32"},
    },
    "FEMBA": {"optimizer": {"name": "adam", "lr": 1e-4, "weight_decay": 0.0}},
}
_OF_SIZE: dict[str, dict[str, dict[str, Any]]] = {
    "LUNA base": {"optimizer": {"layerwise_decay": 0.5}},
    "LUNA large": {"optimizer": {"layerwise_decay": 0.8}},
    "LUNA huge": {"optimizer": {"layerwise_decay": 0.8}, "model": {"drop_path": 0.2}},
}
_BASE = {"LUNA": "finetune_classify_luna", "FEMBA": "finetune_classify_femba"}


def _name(task: str, model: str) -> str:
    return f"{task}_{model.lower().replace(' ', '_')}"


_PARTS = {
    _name(task, model) + suffix: (task, model, bool(suffix))
    for task in TASKS
    for model in SIZES
    for suffix in ("", _REFERENCE)
}


def task_preset_names() -> list[str]:
    """All of them, sorted."""
    return sorted(_PARTS)


def pattern() -> str:
    """What the names are made of, in a few lines."""
    models = ", ".join(_name("", model).lstrip("_") for model in SIZES)
    return (
        f"TASK_MODEL fine-tunes as documented, TASK_MODEL{_REFERENCE} as the released code runs, with\n"
        f"  TASK: {', '.join(TASKS)} (python -m configs.task_sheet shows them)\n  MODEL: {models}"
    )


def load_task_preset(name: str) -> ExperimentConfig:
    """The preset of that name. Raises KeyError for one that `task_preset_names` lacks."""
    task_name, model_name, reference = _PARTS[name]
    task, model = TASKS[task_name], SIZES[model_name]
    architecture = model.architecture
    layers = [_AS_RELEASED[architecture]]
    if not reference:
        layers += [_AS_DOCUMENTED[architecture], _OF_SIZE.get(model_name, {})]
    layers.append(_of_task(task, architecture, name, reference=reference))
    sizes = {key: getattr(model, key) for key in ("embed_dim", "num_queries", "num_blocks") if hasattr(model, key)}
    values: dict[str, dict[str, Any]] = {"model": {"architecture": architecture, **sizes}}
    for layer in layers:
        for section, own in layer.items():
            values[section] = values.get(section, {}) | own
    base = _BASE.get(architecture, "finetune_classify_reference" if reference else "finetune_classify")
    return from_mapping(values, read_yaml(Path(__file__).parent / f"{base}.yaml"))


def _of_task(task: EvaluationTask, architecture: str, name: str, *, reference: bool) -> dict[str, dict[str, Any]]:
    """What the task decides: head, outputs, loss, division of the data, and sizes that are fixed by its windows."""
    model: dict[str, Any] = {"num_outputs": task.num_outputs}
    if task.per_channel:  # the Mamba head alone has one row of outputs for each channel
        model |= {"head": "mamba", "output_channels": len(task.channels)}
    if architecture == "FEMBA":
        model |= {"num_channels": len(task.channels), "num_samples": task.samples}
    classes = 0 if task.kind == "regression" else task.num_outputs
    smooths = architecture == "LUNA" and not reference and classes > 2
    by_trials = task.split_unit == "recording"  # the released module of SEED-V keeps the last batch (recipes 3)
    loader: dict[str, Any] = {"drop_remainder": reference and not task.few_windows and not by_trials}
    if task.few_windows and not reference:
        loader["batch_size"] = _FEW_WINDOWS_BATCH
    return {
        "model": model,
        "task": {
            "kind": "classify" if classes else "regress",
            "class_weights": "none" if reference or not classes else "balanced",
            "label_smoothing": _LABEL_SMOOTHING if smooths else 0.0,
        },
        "loader": loader,
        "optimizer": {"recipe": "reference" if reference else "corrected"},
        "data": {"evaluation_task": task.name, "split_unit": task.split_unit},
        "trainer": {"run_dir": f"runs/{name}", "baseline": not task.per_channel},
    }
