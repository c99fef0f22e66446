"""Many hosts as one run: how their processes find each other, and what they must have in common before step 0.

`connect` before JAX is first used, `require_agreement` before the first step. Everything else of a run is written for
the global view (`jit` over a mesh) and knows hosts only where it reads or writes files.
"""

import hashlib
import inspect
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

Cluster = Literal["auto", "none", "tpu", "slurm", "ompi", "k8s"]

_NAME_BYTES = 64
_DIGEST_BYTES = 8
# A process that ends waits so long for the others, which may be lost: JAX's own 300 s would delay every restart.
_SHUTDOWN_SECONDS = 60


class NotTogetherError(ConnectionError):
    """The other processes were not there in time: starting again may help."""


@dataclass(frozen=True)
class HostsConfig:
    """How the processes of a run find each other.

    Attributes:
        cluster: "auto" = explicit addresses if given, else what the environment shows (SLURM, Open MPI, several TPU
            workers on Kubernetes), else one process; "none" = one process whatever the environment says; the others are
            asked for by name, and JAX reads addresses and numbers from them. Cloud TPU VMs show their workers only to
            who asks the metadata server, so that "auto" takes each for one process: they need "tpu".
        coordinator: HOST:PORT of process 0, with `count` and `index`; or `JAX_COORDINATOR_ADDRESS`.
        count: processes of the run; or `JAX_NUM_PROCESSES`.
        index: number of this process, from 0; or `JAX_PROCESS_ID`.
        connect_seconds: how long to wait for the others.
        heartbeat_seconds: a process that is silent for so long is given up, and with it the run.
    """

    cluster: Cluster = "auto"
    coordinator: str = ""
    count: int | None = None
    index: int | None = None
    connect_seconds: int = 300
    heartbeat_seconds: int = 100

    def __post_init__(self):
        if self.coordinator and ":" not in self.coordinator:
            raise ValueError(f"hosts: coordinator must be HOST:PORT, not {self.coordinator!r}")
        if self.count is not None and self.index is not None and not 0 <= self.index < self.count:
            raise ValueError(f"hosts: index {self.index} is not one of 0..{self.count - 1}")


def connect(config: HostsConfig) -> None:
    """Join the other processes of the run; nothing happens where there are none. Call before JAX is first used.

    Raises: ValueError when addresses or numbers are incomplete, or the cluster asked for is not this one;
        NotTogetherError when the others are not there in time.
    """
    arguments = _arguments(config)
    if arguments is None:
        return
    address = arguments.get("coordinator_address", f"the cluster ({config.cluster})")
    if "shutdown_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        arguments["shutdown_timeout_seconds"] = _SHUTDOWN_SECONDS
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=config.connect_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )
    except ValueError as error:
        raise ValueError(f"hosts: {address} cannot be joined: {_first_line(error)}") from error
    except RuntimeError as error:
        raise NotTogetherError(
            f"the processes of the run did not come together at {address}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _arguments(config: HostsConfig) -> dict | None:
    """Arguments of `jax.distributed.initialize`; None for a run of one process."""
    address = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if config.cluster == "none" or (config.cluster == "auto" and not address and not _found_cluster()):
        return None
    if config.cluster != "auto":
        names = {"tpu": None, "ompi": "ompi", "slurm": "slurm", "k8s": "k8s"}
        return {} if names[config.cluster] is None else {"cluster_detection_method": names[config.cluster]}
    if not address:
        return {}
    numbers = {
        "count": _number(config.count, "JAX_NUM_PROCESSES"),
        "index": _number(config.index, "JAX_PROCESS_ID"),
    }
    missing = [name for name, value in numbers.items() if value is None]
    if missing:
        raise ValueError(
            f"hosts: coordinator {address} needs hosts.count and hosts.index (or JAX_NUM_PROCESSES and "
            f"JAX_PROCESS_ID): {' and '.join(missing)} missing"
        )
    return {
        "coordinator_address": address,
        "num_processes": numbers["count"],
        "process_id": numbers["index"],
        "cluster_detection_method": "deactivate",
    }


def _number(given: int | None, variable: str) -> int | None:
    if given is not None:
        return given
    text = os.environ.get(variable, "")
    if text and not text.isdigit():
        raise ValueError(f"hosts: {variable} must be a number, not {text!r}")
    return int(text) if text else None


def _found_cluster() -> bool:
    """Whether the environment is one task of several: SLURM, Open MPI, or a TPU slice of several workers."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    return any(text.isdigit() and int(text) > 1 for text in tasks) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def is_first() -> bool:
    """Whether this process writes what a run writes once: configuration, metrics, the best model."""
    return jax.process_index() == 0


def require_agreement(facts: Mapping[str, str]) -> None:
    """Compare what all processes must have in common, and name those that differ from the majority.

    Args:
        facts: by name, in the same order everywhere: resolved configuration, code version, data manifest, ...

    Raises: ValueError on every process when any two differ: which fact, and on which processes and hosts.
    """
    if jax.process_count() == 1:
        return
    own = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES], np.uint8)
                    for text in facts.values()])  # fmt: skip
    name = np.frombuffer(socket.gethostname().encode()[:_NAME_BYTES].ljust(_NAME_BYTES), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(own))  # (processes, facts, 8)
    hosts = [bytes(row).decode(errors="replace").strip() for row in np.asarray(multihost_utils.process_allgather(name))]
    problems = []
    for number, fact in enumerate(facts):
        values = [bytes(row) for row in digests[:, number]]
        usual = max(values, key=values.count)
        if others := [f"process {i} ({hosts[i]})" for i, value in enumerate(values) if value != usual]:
            problems.append(f"{fact} of {', '.join(others)}")
    if problems:
        raise ValueError(
            f"the processes of this run do not agree: another {'; another '.join(problems)} than the rest. Give all "
            "of them the same configuration, code and data"
        )


def code_version(*roots: Path) -> str:
    """A digest of the Python sources below the folders (or of single files): the same wherever they lie."""
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(f"{path.relative_to(root.parent)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def any_process(*, flag: bool) -> bool:
    """Whether the flag is set on any process; every process must ask at the same point of the program."""
    if jax.process_count() == 1:
        return flag
    return bool(np.asarray(multihost_utils.process_allgather(np.array(flag))).any())


def wait_for_all(point: str) -> None:
    """Return when every process has come to the same named point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)
