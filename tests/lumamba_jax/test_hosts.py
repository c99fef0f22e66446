"""How processes find each other: what is asked of JAX, and which failures may be tried again."""

import jax
import pytest

from lumamba_jax.hosts import HostsConfig, NotTogetherError, connect

GIVEN = HostsConfig(coordinator="node0:1234", count=2, index=1, connect_seconds=7, heartbeat_seconds=9)
CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in CLUSTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_times_are_passed_on_and_an_end_waits_less_than_a_start(monkeypatch):
    asked = {}

    def initialize(shutdown_timeout_seconds=300, **arguments):
        asked.update(arguments, shutdown=shutdown_timeout_seconds)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    connect(GIVEN)
    assert (asked["coordinator_address"], asked["num_processes"], asked["process_id"]) == ("node0:1234", 2, 1)
    assert (asked["initialization_timeout"], asked["heartbeat_timeout_seconds"]) == (7, 9)
    assert asked["shutdown"] < 300


def test_a_jax_that_knows_no_time_to_shut_down_is_not_given_one(monkeypatch):
    asked = []

    def initialize(
        coordinator_address, num_processes, process_id, cluster_detection_method, initialization_timeout,
        heartbeat_timeout_seconds,
    ):  # fmt: skip
        asked.append(process_id)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    connect(GIVEN)
    assert asked == [1]


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            RuntimeError("DEADLINE_EXCEEDED: 1/2 connected\nmore"),
            NotTogetherError,
            "not come together at node0:1234",
        ),
        (ValueError("coordinator_address should be defined."), ValueError, "hosts: node0:1234 cannot be joined"),
    ],
)
def test_others_that_are_late_and_a_wrong_address_are_told_apart(monkeypatch, error, kind, says):
    def initialize(**_):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(kind, match=says) as raised:
        connect(GIVEN)
    assert isinstance(raised.value, ConnectionError) == (kind is NotTogetherError)
    assert "\n" not in str(raised.value)


def test_without_a_cluster_auto_is_one_process_and_a_named_one_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: asked.append(arguments))
    connect(HostsConfig())
    assert asked == []
    connect(HostsConfig(cluster="slurm"))
    connect(HostsConfig(cluster="tpu"))
    assert [arguments.get("cluster_detection_method") for arguments in asked] == ["slurm", None]
