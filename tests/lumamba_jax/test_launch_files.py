"""What the launch files do with each exit status and signal, with stand-ins for the clusters' commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def run(command: list[object], **variables: object) -> subprocess.CompletedProcess:
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture
def path_with(tmp_path):
    """`PATH` with stand-ins by name; each also appends its arguments to `NAME.calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(**texts: str) -> str:
        for name, text in texts.items():
            script(folder / name, f'printf "%s\\n" "$*" >> "{tmp_path}/{name}.calls"\n{text}')
        return f"{folder}:{os.environ['PATH']}"

    return make


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(path):
    done = run(["bash", "-n", path])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("statuses", [[0], [1], [2], [75, 70, 137, 0], [70, 2], [75, 1]])
def test_a_command_is_started_again_until_it_is_through(tmp_path, statuses):
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    command = script(tmp_path / "train", 'cd "$(dirname "$0")"; s=$(head -n1 statuses); sed -i 1d statuses; exit "$s"')
    done = run([LAUNCH / "keep_running.sh", tmp_path / "lock", command], PAUSE=0)
    assert done.returncode == statuses[-1], done.stderr
    assert (tmp_path / "statuses").read_text() == ""
    assert done.stderr.count("starting again") == len(statuses) - 1


def test_a_crash_that_repeats_itself_is_given_up(tmp_path):
    done = run([LAUNCH / "keep_running.sh", tmp_path / "lock", "bash", "-c", "exit 70"], PAUSE=0, RESTARTS=3)
    assert done.returncode == 70
    assert done.stderr.count("starting again") == 3
    assert "given up after 3 restarts" in done.stderr


def test_a_signal_reaches_the_command_and_a_second_run_is_refused_meanwhile(tmp_path):
    command = script(tmp_path / "train", 'trap "exit 75" TERM; echo up; for i in {1..600}; do sleep 0.1; done')
    words = [str(word) for word in (LAUNCH / "keep_running.sh", tmp_path / "lock", command)]
    loop = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert loop.stdout is not None
        assert loop.stdout.readline() == "up\n"
        second = run([LAUNCH / "keep_running.sh", tmp_path / "lock", "true"])
        assert (second.returncode, second.stderr) == (2, "keep_running.sh: a run is on already\n")
        loop.send_signal(signal.SIGTERM)
        _, said = loop.communicate(timeout=60)
    finally:
        loop.kill()
    assert loop.returncode == 75
    assert "starting again" not in said
    assert run([LAUNCH / "keep_running.sh", tmp_path / "lock", "true"]).returncode == 0


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (70, 0, True), (75, 3, True), (137, 0, True), (75, 100, False)],
)
def test_a_slurm_job_goes_back_into_the_queue_when_that_helps(tmp_path, path_with, status, restarts, again):
    path = path_with(srun=f"exit {status}", scontrol="")
    job = {"SLURM_JOB_ID": 42, "SLURM_JOB_NAME": "eeg", "SLURM_RESTART_COUNT": restarts, "DATA": "a.h5 b.h5"}
    done = run(["bash", LAUNCH / "slurm.sh"], PATH=path, ARGUMENTS="--mesh.fsdp 2", **job)
    assert done.returncode == status
    assert (tmp_path / "scontrol.calls").exists() == again
    if again:
        assert (tmp_path / "scontrol.calls").read_text() == "requeue 42\n"
    (call,) = (tmp_path / "srun.calls").read_text().splitlines()
    assert "--gpu-bind=none" in call
    assert call.endswith("--data.train a.h5 b.h5 --trainer.run-dir runs/eeg --trainer.resume true --mesh.fsdp 2")
    text = (LAUNCH / "slurm.sh").read_text()
    assert "#SBATCH --gpus-per-task" not in text  # hides from process i the GPU that JAX has it use
    assert "#SBATCH --signal=TERM@" in text  # "B:" would signal the shell only


def test_a_slurm_script_outlives_the_signal_that_ends_the_job(tmp_path, path_with):
    path = path_with(srun="echo up; sleep 1; exit 75", scontrol="")
    environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "eeg", "DATA": "a.h5"}
    job = subprocess.Popen(["bash", str(LAUNCH / "slurm.sh")], stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "up\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 75
    finally:
        job.kill()
        job.communicate()
    assert (tmp_path / "scontrol.calls").read_text() == "requeue 42\n"


def test_a_jobset_restarts_as_a_whole_and_not_after_wrong_input():
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]
    rules = spec["failurePolicy"]["rules"]
    assert rules == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [1, 2]}
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")  # what a podFailurePolicy asks for
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    (cache,) = (e["value"] for e in pod["containers"][0]["env"] if e["name"] == "JAX_COMPILATION_CACHE_DIR")
    assert cache.startswith(mounts["runs"] + "/")  # outlives the pod


# `ssh --command TEXT` runs the text in a folder that stands for the home directory of the one host.
HOST = 'while [ $# -gt 0 ]; do if [ "$1" = --command ]; then cd "$HOST_HOME" && exec bash -c "$2"; fi; shift; done'


@pytest.mark.parametrize("running", [False, True])
def test_a_start_on_tpu_hosts_is_refused_while_a_run_is_on(tmp_path, path_with, running):
    home = tmp_path / "home"
    (home / "lumamba_jax").mkdir(parents=True)
    (home / "lumamba_jax" / "old").touch()
    source = tmp_path / "source"
    (source / "launch").mkdir(parents=True)
    (source / "launch" / "keep_running.sh").write_text((LAUNCH / "keep_running.sh").read_text())
    (source / ".venv" / "bin").mkdir(parents=True)
    script(source / ".venv" / "bin" / "python", 'trap "exit 75" TERM; echo "$@"; for i in {1..600}; do sleep 0.1; done')
    subprocess.run(["tar", "czf", tmp_path / "source.tar.gz", "-C", source, "."], check=True)
    gcloud = f'if [ "$1" = storage ]; then exec cat {tmp_path}/source.tar.gz; fi\n{HOST}'
    variables = {"PATH": path_with(gcloud=gcloud, python3="exit 0"), "HOST_HOME": home, "PAUSE": 0}
    holder = None
    if running:
        holder = subprocess.Popen(["flock", "--no-fork", home / "lumamba_jax.lock", "sleep", "100"])
        while run(["flock", "--nonblock", home / "lumamba_jax.lock", "true"]).returncode == 0:
            time.sleep(0.01)
    try:
        done = run([LAUNCH / "tpu_pod.sh", "start"], **variables)
    finally:
        if holder is not None:
            holder.kill()
            holder.wait()
    if running:
        assert done.returncode != 0
        assert "a run is on, stop it first" in done.stderr
        assert (home / "lumamba_jax" / "old").exists()  # nothing was removed under it
        return
    try:
        assert done.returncode == 0, done.stderr
        assert not (home / "lumamba_jax" / "old").exists()
        log, deadline = home / "lumamba_jax" / "run.log", time.monotonic() + 60
        while not log.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "--hosts.cluster tpu" in log.read_text()
        assert run([LAUNCH / "tpu_pod.sh", "start"], **variables).returncode != 0
    finally:
        assert run([LAUNCH / "tpu_pod.sh", "stop"], **variables).returncode == 0
    while run(["flock", "--nonblock", home / "lumamba_jax.lock", "true"]).returncode and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "starting again" not in log.read_text()
