"""The environment of the peers: `.cache/benchmark-peers`, made or completed when its list of packages changed."""

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".cache" / "benchmark-peers"
PACKAGES = ("torch==2.13.0", "mambapy==1.2.0", "braindecode==1.8.1", "numpy", "safetensors")


def install_peers(environment: Path = ENVIRONMENT, packages: tuple[str, ...] = PACKAGES) -> Path:
    """The Python of the environment. A stamp beside it holds what was installed last.

    A package that cannot be installed is said and left out: its variants are then reported as problems.
    """
    python, stamp = environment / "bin" / "python", environment / "requirements.txt"
    wanted = "\n".join(packages) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return python
    print(f"installing {', '.join(packages)} into {environment}", file=sys.stderr)
    if not python.exists():
        venv.create(environment, with_pip=True)
    # The first package (torch, pinned) is named in each line, so that no other package changes its version.
    failed = [package for package in packages if _pip(python, *dict.fromkeys((packages[0], package)))]
    if failed:
        print(f"could not install {', '.join(failed)}: their variants are left out", file=sys.stderr)
    else:
        stamp.write_text(wanted)
    return python


def _pip(python: Path, *packages: str) -> int:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
