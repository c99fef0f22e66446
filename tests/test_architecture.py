"""The import directions of docs/architecture.md, and what `import lumamba_jax` may load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"scan", "scan_pallas", "layers", "mamba", "attention", "tokens", "channel_unifier", "heads"}
MODEL = PARTS | {"long_windows", "montage_model", "lumamba", "luna", "femba", "architectures"}
MAY_IMPORT = {  # module of lumamba_jax -> what it may import from lumamba_jax
    "adapters": {"architectures", "manifest"},
    "agreement": set(),
    "hosts": set(),
    "manifest": {"agreement"},
    "train_checkpoints": {"agreement", "manifest"},
    "run_lock": {"agreement"},
    "checkpoint": {"agreement", "architectures", "manifest", "train_checkpoints"},
    "scan": {"scan_pallas"},
    "scan_pallas": set(),
    "accelerators": set(),
    "compilation": set(),
    "eegnet": set(),
    "hlo_costs": set(),
    "layers": set(),
    "losses": set(),
    "masking": set(),
    "metrics": set(),
    "micro_batches": {"architectures", "compilation", "sharding", "tasks"},
    "normalization": {"masking"},
    "pod_plan": {
        "accelerators",
        "adapters",
        "checkpoint",
        "femba",
        "flops",
        "hlo_costs",
        "micro_batches",
        "optimizer",
        "run_log",
        "sharding",
        "tasks",
        "training",
    },
    "report": {"metrics"},
    "representation": {"losses"},
    "run_clock": {"accelerators", "run_log"},
    "run_log": set(),
    "session": {"run_clock", "run_log", "watchdog"},
    "watchdog": set(),
    "sharding": set(),
    "mamba": {"scan", "layers"},
    "streaming": {"channel_unifier", "compilation", "layers", "lumamba", "mamba", "normalization", "tokens"},
    "evaluation_export": {"compilation", "inference"},
    "attention": {"layers"},
    "tokens": {"layers"},
    "channel_unifier": {"attention", "layers"},
    "heads": {"attention", "layers", "mamba", "scan"},
    "long_windows": {"layers", "mamba"},
    "montage_model": PARTS,
    "lumamba": PARTS | {"long_windows", "montage_model"},
    "luna": PARTS | {"montage_model"},
    "femba": PARTS,
    "architectures": MODEL,
    "flops": MODEL,
    "torch_files": {"torch_pickle"},
    "torch_pickle": set(),
    "torch_architecture": MODEL,
    "torch_keys": MODEL,
    "weight_sources": set(),
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


COMMANDS = {"pod_plan.py"}  # of the package, run with `python -m`; nothing imports them


@pytest.mark.parametrize("path", _modules("lumamba_jax"), ids=lambda p: p.name)
def test_the_model_knows_no_data_and_no_entry_script(path):
    tops = {name.split(".")[0] for name in _imports(path)}
    allowed = {"configs"} if path.name in COMMANDS else set()
    assert not tops & {"data_pipeline", "configs", "train", "eval", "torch"} - allowed


@pytest.mark.parametrize("path", _modules("data_pipeline"), ids=lambda p: p.name)
def test_data_knows_no_model_and_no_device(path):
    tops = {name.split(".")[0] for name in _imports(path)}
    assert not tops & {"lumamba_jax", "configs", "jax", "flax", "optax", "torch"}


@pytest.mark.parametrize("module", sorted(MAY_IMPORT))
def test_model_modules_import_downwards_only(module):
    inner = {
        name.split(".")[1]
        for name in _imports(ROOT / "lumamba_jax" / f"{module}.py")
        if name.startswith("lumamba_jax.")
    }
    assert inner <= MAY_IMPORT[module] | {module}, f"{module} imports {inner - MAY_IMPORT[module]}"


def test_importing_the_model_is_light():
    code = (
        "import sys, lumamba_jax; heavy = {'mne', 'matplotlib', 'sklearn', 'torch', 'grain', 'h5py', 'scipy.signal', "
        "'tensorboardX', 'tyro', 'orbax'} & set(sys.modules); print(sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_no_path_of_a_machine_is_committed():
    for path in [p for pattern in ("*.py", "*.md", "*.yaml", "*.toml", "Makefile") for p in ROOT.rglob(pattern)]:
        if {".venv", ".cache", "runs"} & set(path.parts):
            continue
        text = path.read_text(errors="replace")
        assert not re.search(r"(?<![\w.])/home/", text) or path.name == "test_architecture.py", path
