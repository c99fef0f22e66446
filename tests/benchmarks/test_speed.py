"""The speed benchmark: turns that survive hanging and crashing peers, the figures of its table, its cases at tiny
sizes. No time is asserted."""

import json
import sys
import time

import numpy as np
import pytest

from benchmarks import peers, speed
from benchmarks.cold import read_night
from benchmarks.plot_speed import comparisons, draw
from benchmarks.speed_cases import Case, Target, copy_share, cpu_cases, cpu_targets, gpu_cases, gpu_targets, times
from benchmarks.turns import ROOT, Worker, WorkerError, measure
from benchmarks.workers import jax_worker
from benchmarks.workers.protocol import take_turn

PEER = """
import os, time
from benchmarks.workers.protocol import serve

def kind(request):
    name = request["variant"]
    if name == "hang":
        time.sleep(600)
    if name == "crash":
        os.abort()
    if name == "cannot":
        raise ImportError("no such package\\nsecond line")
    calls = []
    def call():
        calls.append(print("a library talks"))
        if name == "crash later" and len(calls) > 2:
            os.abort()
        time.sleep(0.001)
    return call, {"temporary_mb": 3.0}

serve({"evaluate": kind}, {"versions": lambda request: {"peer": "1"}}, wait=lambda result: None)
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    made = Worker("torch", [sys.executable, str(script)], limit=5)
    yield made
    made.close()


def case(*names: str, **changes) -> Case:
    variants = tuple(f"torch: {name}" for name in names)
    return Case("a case", "evaluate", (1,), variants, 3, pause=0.0, fill=0.01, **changes)


def test_a_peer_that_hangs_crashes_or_refuses_is_reported_and_the_rest_is_timed(worker):
    result = measure(case("good", "hang", "crash", "cannot", "crash later"), {"torch": worker})["variants"]
    assert result["torch: good"]["turns"] == 3
    assert result["torch: good"]["temporary_mb"] == 3.0
    low, high = result["torch: good"]["quartiles_ms"]
    assert 1 <= low <= result["torch: good"]["median_ms"] <= high
    assert result["torch: hang"] == {"problem": "not within 5 s"}
    assert result["torch: crash"]["problem"].startswith("the process ended (signal 6)")
    assert result["torch: cannot"] == {"problem": "ImportError: no such package"}
    assert "the process ended" in result["torch: crash later"]["problem"]
    assert "median_ms" not in result["torch: crash later"]
    assert worker.ask(do="versions") == {"peer": "1"}  # after all that


def test_a_worker_that_cannot_start_says_so(tmp_path):
    broken = Worker("torch", [sys.executable, "-c", "raise SystemExit('no torch here')"], limit=60)
    with pytest.raises(WorkerError, match=r"status 1.*no torch here"):
        broken.ask(do="versions")
    assert measure(case("any"), {"torch": broken})["variants"]["torch: any"]["problem"]


def test_a_turn_leaves_its_first_call_out_and_makes_one_of_a_long_call():
    calls = []
    assert (
        len(take_turn(lambda: calls.append(time.sleep(0.002)), lambda _: None, pause=0.0, fill=0.02)) == len(calls) - 1
    )
    assert len(calls) > 3
    calls.clear()
    assert len(take_turn(lambda: calls.append(time.sleep(0.51)), lambda _: None, pause=0.0, fill=9.0)) == 1
    assert len(calls) == 2


def test_verdicts_and_ratios():
    results = {
        "a": {
            "variants": {
                "jax: ours": {"median_ms": 10.0},
                "jax devices: ours": {"median_ms": 5.0},
                "torch: compiled": {"problem": "not within 300 s"},
                "torch: chunk": {"median_ms": 20.0},
            }
        }
    }
    best = Target("best", 3.5, 5, times("a", ("torch: compiled", "torch: chunk")))
    assert best.read(results) == 4.0
    assert [best.verdict(x) for x in (4.0, 5.0, 3.0, None)] == ["floor", "goal", "below the floor", "not measured"]
    assert Target("m", 32, 12, best.read, less=True).verdict(20) == "floor"
    assert times("a", ("torch: compiled",))(results) is None
    assert times("absent", ("torch: chunk",))({}) is None


def test_targets_read_what_the_cases_measure():
    """Every figure of the table finds its case and variants by name."""
    for cases, targets, special in (
        (cpu_cases(), cpu_targets(), speed.SPECIAL),
        (gpu_cases(), gpu_targets(), ()),
    ):
        facts = {"median_ms": 8.0, "quartiles_ms": [7.0, 9.0], "temporary_mb": 5.0, "peak_growth_mb": 6.0}
        facts["per_second"] = 1e9
        results = {
            case.name: {"name": case.name, "kind": case.kind, "variants": dict.fromkeys(case.variants, facts)}
            for case in cases
        }
        values = {"share": 80.0, "furthest": 2.0, "peak GB": 1.0, "times real time": 2000.0}
        results |= {name: {"name": name, "values": values} for name in special}
        results["first result"] = {"name": "first result", "kind": "process", "variants": {"load, warm cache": facts}}
        missing = [target.what for target in targets if target.read(results) is None]
        assert not missing
        lines = speed.target_lines(targets, results, only_measured=False)
        assert len(lines) == len(targets) + 3
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert all(line for case in results.values() for line in speed.case_lines(case)[1:2])


def test_roofline_and_bandwidth_by_hand():
    rates = {f"jax: {name}": {"work": 1e6, "median_ms": 1.0} for name in ("gemm", "exp", "silu", "softplus", "gelu")}
    results = {
        "rates": speed.with_rates({"variants": rates}),
        speed.ROOFLINE_CASE: {"size": [64], "variants": {"jax: ours": {"median_ms": 64.0}}},
    }
    work = {"flops": 5e5, "nominal_flops": 6e5, "transcendentals": {"exp": 1e5, "softmax": 1e5, "spectrum": 1e5}}
    values = speed.roofline(results, work)["values"]
    assert values["predicted us"] == pytest.approx(800)  # (5e5 + 3e5) / 1e9 per second
    assert values["share"] == pytest.approx(80)
    assert values["MFU of nominal FLOPs"] == pytest.approx(60)
    assert "problem" in speed.roofline({}, work)
    scans = {
        "s": {"variants": {"jax: auto": {"median_ms": 1.0}}},
        "rates": {"variants": {"jax: copy": {"per_second": 1e9}}},
    }
    assert copy_share("s", (1, 10), 4)(scans) == pytest.approx(100 * 10 * 12416 / 1e-3 / 1e9)


def test_the_picture_compares_what_was_timed(tmp_path):
    results = {
        "cases": [
            {"name": "a", "variants": {"jax: ours": {"median_ms": 2.0}, "torch: plain": {"median_ms": 6.0}}},
            {"name": "failed", "variants": {"jax: ours": {"median_ms": 2.0}, "torch: plain": {"problem": "no"}}},
            {"name": "FLOPs", "values": {"furthest": 1.0}},
        ]
    }
    assert comparisons(results) == [("a", {"jax: ours": 1.0, "torch: plain": 3.0})]
    draw(results, tmp_path / "speed.svg")
    assert (tmp_path / "speed.svg").read_text().count("<svg")


def test_the_line_of_the_night_is_read():
    text = "184,320 patches, 619 MB of signal: 27.7 s, 1,040 times real time, peak memory 1.80 GB\n"
    assert read_night(text) == {"seconds": 27.7, "times real time": 1040.0, "peak GB": 1.8}


def test_peers_are_installed_again_when_the_list_changes(tmp_path, monkeypatch):
    installed = []
    monkeypatch.setattr(peers, "_pip", lambda python, *packages: installed.append(packages) or 0)
    monkeypatch.setattr(peers.venv, "create", lambda folder, with_pip: (folder / "bin").mkdir(parents=True))
    folder = tmp_path / "peers"
    python = peers.install_peers(folder, ("torch==1", "numpy"))
    python.touch()
    assert installed == [("torch==1",), ("torch==1", "numpy")]
    peers.install_peers(folder, ("torch==1", "numpy"))
    assert len(installed) == 2
    peers.install_peers(folder, ("torch==1", "numpy", "extra"))
    assert installed[-1] == ("torch==1", "extra")
    monkeypatch.setattr(peers, "_pip", lambda python, *packages: 1 if "absent" in packages else 0)
    peers.install_peers(folder, ("torch==1", "absent"))
    assert "absent" not in (folder / "requirements.txt").read_text()


@pytest.mark.parametrize(
    ("kind", "variant", "size", "dtype"),
    [
        ("evaluate", "ours", [8], "float32"),
        ("evaluate", "ours", [1], "bfloat16"),
        pytest.param("train", "ours", [8], "float32", marks=pytest.mark.slow),
        ("scan", "auto", [2, 5], "bfloat16"),
        ("scan_gradient", "chunked", [1, 20], "float32"),
        ("long", "streamed", [40], "float32"),
        ("long", "at once", [40], "float32"),
        ("long_train", "ours", [40], "float32"),
        ("rate", "gelu", [], "float32"),
    ],
)
def test_our_cases_run_at_tiny_sizes(kind, variant, size, dtype):
    request = {"model": "micro", "size": size, "variant": variant, "dtype": dtype}
    call, facts = jax_worker.KINDS[kind](request)
    leaves = [np.asarray(x, np.float32) for x in jax_worker.jax.tree.leaves(call())]
    assert all(np.isfinite(x).all() for x in leaves)
    assert facts.get("temporary_mb", 0) >= 0


def test_peers_run_at_tiny_sizes_and_agree_on_the_scan():
    pytest.importorskip("torch")
    sys.path.insert(0, str(ROOT / "tests" / "parity"))
    from benchmarks.workers import torch_worker

    inputs = torch_worker.scan_inputs(2, 9)
    assert inputs["u"].shape == (2, 9, 768)
    arguments = [inputs[name] for name in ("u", "delta", "a", "b", "c")]
    arguments[1] = torch_worker.F.softplus(arguments[1])
    expected = torch_worker.plain_scan(*arguments)
    np.testing.assert_allclose(torch_worker.lean_scan(*arguments), expected, atol=1e-5)
    for kind in ("evaluate", "train"):
        request = {"model": "micro", "size": [2], "variant": "lean", "dtype": "float32"}
        torch_worker.KINDS[kind](request)[0]()


@pytest.mark.slow
def test_the_command_runs_a_case_from_end_to_end(tmp_path):
    """Real processes, without the peers' environment."""
    workers = {
        "jax": Worker("jax", [sys.executable, "-m", "benchmarks.workers.jax_worker", "1"], {"XLA_FLAGS": ""}, 120)
    }
    args = speed.parse(["--only", "rates", "--rounds", "1", "--out", str(tmp_path / "out.json")])
    tiny = Case("LuMamba, evaluation", "evaluate", (2,), ("jax: ours",), 1, "micro", pause=0.0, fill=0.01)
    rates = Case("rates", "rate", (), ("jax: exp",), 1, pause=0.0, fill=0.01)
    try:
        speed.run([tiny, rates], ["roofline"], workers, args, {"machine": speed.machine("")})
        answer = workers["jax"].ask(do="flops", models=[["micro", "reconstruction"]])
    finally:
        workers["jax"].close()
    assert abs(answer["micro, reconstruction"]["percent"]) < 10
    kept = {case["name"]: case for case in json.loads((tmp_path / "out.json").read_text())["cases"]}
    assert kept["LuMamba, evaluation"]["variants"]["jax: ours"]["median_ms"] > 0
    assert kept["rates"]["variants"]["jax: exp"]["per_second"] > 1e6
    assert "problem" in kept["roofline"]  # nothing to compare with


def test_bad_options_are_one_sentence(capsys):
    assert speed.main(["--only", "no such case"]) == 2
    assert capsys.readouterr().err == "no case is called no such case\n"
    with pytest.raises(SystemExit):
        speed.parse(["--rounds", "0"])
    assert "must be positive" in capsys.readouterr().err
