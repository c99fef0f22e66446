"""Collectives and loops read from HLO text, the arithmetic of a plan, exit codes, one real compile where it can be."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import configs
from lumamba_jax import pod_plan
from lumamba_jax.accelerators import ACCELERATORS, GIB, HOP_SECONDS, Topology, parse_topology
from lumamba_jax.checkpoint import abstract_params
from lumamba_jax.flops import forward_flops
from lumamba_jax.hlo_costs import Collective, array_bytes, collectives, estimated_cycles, hbm_bytes, parse_program
from lumamba_jax.pod_plan import CompiledStep, DoesNotFitError, Plan, Window
from lumamba_jax.sharding import MeshConfig, make_mesh

ROOT = Path(__file__).resolve().parents[2]
WINDOW = Window(22, 1280)

LOOP = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %a = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %reduced = f32[4,8]{1,0:T(8,128)} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %reduced)
}

%condition (p.1: (s32[], f32[4,8])) -> pred[] {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (w: f32[4,8], b: bf16[16]) -> f32[4,8] {
  %w = f32[4,8]{1,0} parameter(0)
  %b = bf16[16]{0} parameter(1)
  %start = (bf16[16]{0}, bf16[128]{0}) all-gather-start(%b), replica_groups=[1,8]<=[8], dimensions={0}
  %done = bf16[128]{0} all-gather-done(%start)
  %early = f32[4,8]{1,0} all-reduce-start(%w), channel_id=2, replica_groups={}, to_apply=%add
  %late = f32[4,8]{1,0} all-reduce-done(%early)
  %moved = f32[4,8]{1,0} collective-permute(%late), source_target_pairs={{0,1},{1,0}}
  %zero = s32[] constant(0)
  %in = (s32[], f32[4,8]{1,0}) tuple(%zero, %moved)
  %loop = (s32[], f32[4,8]{1,0}) while(%in), condition=%condition, body=%body, KNOWN
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def loop_text(trips: int | None = 3) -> str:
    known = "" if trips is None else f'backend_config={{"known_trip_count":{{"n":"{trips}"}},"known_init_step":{{}}}}'
    return LOOP.replace(", KNOWN", f", {known}" if known else "")


class TestHloCosts:
    def test_collectives_have_bytes_group_and_the_runs_of_their_loop(self):
        assert collectives(parse_program(loop_text())) == [
            Collective("all-reduce", 128, 4, 3),
            Collective("all-gather", 256, 8, 1),
            Collective("all-reduce", 128, 8, 1),
            Collective("collective-permute", 128, 2, 1),
        ]

    def test_a_loop_of_unknown_length_counts_once_and_is_named(self):
        program = parse_program(loop_text(None))
        assert program.unknown_loops == ["loop"]
        assert Collective("all-reduce", 128, 4, 1) in collectives(program)

    def test_nested_loops_multiply(self):
        inner = loop_text().replace("ENTRY %main", "%outer").replace("jit_step", "jit_nest")
        text = inner + '\nENTRY %e (x: f32[2]) -> f32[2] {\n  %x = f32[2]{0} parameter(0)\n'  # fmt: skip
        text += '  ROOT %l = f32[2]{0} while(%x), condition=%condition, body=%outer, "known_trip_count":{"n":"5"}\n}\n'
        assert parse_program(text).runs["body"] == 15

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [("f32[8,128]{1,0:T(8,128)S(1)}", 4096), ("(bf16[3], pred[5], s32[])", 15), ("token[]", 0), ("s4[6]", 3)],
    )
    def test_bytes_of_shapes(self, shape, expected):
        assert array_bytes(shape) == expected

    def test_a_program_without_entry_is_refused(self):
        with pytest.raises(ValueError, match="ENTRY"):
            parse_program("HloModule nothing")

    def test_the_condition_tells_how_often_a_loop_runs(self):
        text = loop_text(None).replace(
            "  ROOT %less = pred[] constant(true)",
            "  %n = s32[] constant(256)\n  %j = s32[] get-tuple-element(%p.1), index=0\n"
            "  ROOT %less = pred[] compare(%j, %n), direction=LT",
        )
        program = parse_program(text)
        assert (program.runs["body"], program.unknown_loops) == (256, [])

    @pytest.mark.parametrize(
        ("groups", "expected"),
        [
            ("{{0,1,2,3},{4,5,6,7}}", 4),
            ("[2,4]<=[8]", 4),
            ("[4,2]<=[2,4]T(1,0)", 2),
            ("mesh['a'=2,'b'=4] {'b'}, use_global_device_ids=true", 4),
            ("mesh['a'=2,'b'=4] {'a','b'}", 8),
            ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}", 4),
            ("{}", 8),
        ],
    )
    def test_groups_in_every_notation(self, groups, expected):
        text = loop_text().replace("{{0,1,2,3},{4,5,6,7}}", groups)
        assert max(collectives(parse_program(text)), key=lambda c: c.count).group == expected

    def test_traffic_is_of_hbm_tiled_and_repeated(self):
        """Per round an all-reduce of f32[4,8]: read as it lies, written in (8, 128) tiles."""
        once, thrice = (hbm_bytes(parse_program(loop_text(n))) for n in (1, 3))
        assert thrice - once == 2 * (128 + 4 * 8 * 128)
        # Outside: the two copies when they are done, the permutation from and to HBM.
        assert once - (128 + 4096) == 256 + 128 + 2 * 128

    def test_cycles_of_the_compiler_are_those_of_what_runs(self):
        text = loop_text(3).replace("to_apply=%add\n", 'to_apply=%add, backend_config={"estimated_cycles":"7"}\n')
        assert estimated_cycles(parse_program(text)) == (3 + 1) * 7

    def test_what_lies_on_the_chip_costs_no_traffic(self):
        on_chip = loop_text(3).replace("T(8,128)}", "T(8,128)S(1)}")
        assert hbm_bytes(parse_program(loop_text(3))) - hbm_bytes(parse_program(on_chip)) == 3 * 4 * 8 * 128

    def test_a_program_that_was_really_compiled(self):
        mesh = make_mesh(MeshConfig(fsdp=2))

        def scaled(x):
            def round_(total, _):
                return total + jax.lax.psum(x, ("data", "fsdp")), None

            return jax.lax.scan(round_, jnp.zeros_like(x), None, length=7)[0] + jax.lax.all_gather(x, "fsdp").sum(0)

        split = jax.shard_map(
            scaled, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False
        )
        text = jax.jit(split).lower(jnp.zeros((4 * 32, 16))).compile().as_text()
        assert text is not None
        found = {(c.kind, c.group): c for c in collectives(parse_program(text))}
        assert found["all-reduce", 8].size == 32 * 16 * 4
        assert found["all-reduce", 8].count in (1, 7)  # a value that does not change may be taken out of the loop
        assert found["all-gather", 2].size == 2 * 32 * 16 * 4


class TestTopology:
    def test_names_and_sizes(self):
        topology = parse_topology("V5P:8x8x8")
        assert (topology.name, topology.size, topology.chip.bfloat16_flops) == ("v5p:8x8x8", 512, 459e12)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("v5e", "must be ACCELERATOR:SHAPE"),
            ("v9:4x4", "unknown"),
            ("v5e:4x4x4", "2 positive"),
            ("h100:2x4", "1 positive"),
        ],
    )
    def test_bad_ones_are_explained(self, text, complaint):
        with pytest.raises(ValueError, match=complaint):
            parse_topology(text)

    def test_a_whole_pod_of_v5e_reduces_at_its_documented_rate(self):
        """ "All-reduce bandwidth per Pod: 51.2 TB/s" of the documentation is 256 chips times their links one way."""
        assert 256 * parse_topology("v5e:16x16").bandwidth == pytest.approx(51.2e12)

    def test_a_part_of_a_pod_has_no_rings(self):
        assert parse_topology("v6e:8x8").bandwidth == pytest.approx(2 * 100e9)
        assert parse_topology("v4:4x4x4").bandwidth == pytest.approx(6 * 50e9)

    def test_seconds_of_an_all_reduce(self):
        topology = parse_topology("v5e:16x16")
        bytes_seconds = 2 * (255 / 256) * 1e9 / 200e9
        assert topology.collective_seconds("all-reduce", 1e9, 256) == pytest.approx(
            bytes_seconds + 2 * 16 * HOP_SECONDS
        )
        assert topology.collective_seconds("all-gather", 1e9, 256) == pytest.approx(
            bytes_seconds / 2 + 16 * HOP_SECONDS
        )
        assert topology.collective_seconds("all-reduce", 1e9, 1) == 0


def made_plan(**changes) -> Plan:
    step = CompiledStep(
        3 * GIB, 2 * GIB, 2 * GIB, 3 * GIB, GIB, 1e12, 8.19e9, 0, [Collective("all-reduce", 4_000_000, 256, 2)], [], 1
    )
    config = pod_plan.with_batch(configs.load("pretrain_lumamba_tiny"), 256 * 64)
    return dataclasses.replace(Plan(config, parse_topology("v5e:16x16"), WINDOW, step, hours=1000.0), **changes)


class TestPlan:
    def test_memory(self):
        plan = made_plan()
        assert plan.step.memory_bytes == 7 * GIB
        assert plan.fits
        assert not made_plan(step=dataclasses.replace(plan.step, temporary_bytes=13 * GIB)).fits

    def test_flops_of_the_mixed_objective_hold_all_views(self):
        config = configs.load("pretrain_lumamba_tiny")
        whole = sum(forward_flops(config.model, 22, 1280).values())
        views = 0
        for count, samples in ((4, 160), (2, 640)):
            stages = forward_flops(config.model, 22, samples)
            views += count * (sum(stages.values()) - stages["head"])
        assert pod_plan.model_flops(config, WINDOW) == 3 * (whole + views)
        blocks = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, micro_batch=8))
        assert pod_plan.executed_flops(blocks, WINDOW, 8) == 3 * (whole + views) + views
        assert pod_plan.executed_flops(config, WINDOW, 8) == 3 * (whole + views)

    def test_the_step_is_its_slowest_part_and_what_is_sent(self):
        plan = made_plan()
        flops = 64 * pod_plan.model_flops(plan.config, WINDOW)
        send = 2 * plan.topology.collective_seconds("all-reduce", 4_000_000, 256)
        assert plan.estimate.memory == pytest.approx(0.01)
        assert plan.estimate.compute == pytest.approx(flops / (0.4 * 197e12))
        assert plan.estimate.step == pytest.approx(max(0.01, plan.estimate.compute) + send)
        slow = made_plan(step=dataclasses.replace(plan.step, program_cycles=60_000_000))
        assert slow.estimate.step == pytest.approx(0.04 + send)
        assert plan.mfu == pytest.approx(flops / plan.estimate.step / 197e12)

    def test_days_of_a_run(self):
        plan = made_plan()
        windows = 1000 * 3600 / 5 * plan.config.trainer.epochs
        assert plan.days == pytest.approx(windows / (256 * 64 / plan.estimate.step) / 86400)

    def test_weak_scaling_is_whole_for_one_chip_and_the_plans_own_for_its_slice(self):
        plan = made_plan(step=dataclasses.replace(made_plan().step, program_cycles=60_000_000))
        first, *others = plan.weak_scaling()
        assert (first.least, first.expected) == (1, 1)
        assert max(s.expected for s in others) < 1
        assert all(s.least < s.expected for s in others)
        assert others[-1].expected == pytest.approx(plan.estimate.alone / plan.estimate.step)

    def test_so_many_windows_per_chip_scale_as_wanted(self):
        plan = made_plan()
        last = plan.weak_scaling()[-1]
        for rows, reached in ((last.rows_wanted, True), (last.rows_wanted - 1, False)):
            work = plan.estimate.roofline * rows / plan.rows_per_chip
            assert (work / (work + plan.estimate.send) >= pod_plan.WANTED) == reached

    def test_what_is_gathered_grows_with_the_chips(self):
        slice_ = Topology(ACCELERATORS["v5e"], (4, 4))
        gathered = pod_plan._on(Collective("all-gather", 2560, 256, 1), slice_, 256)
        assert (gathered.size, gathered.group) == (160, 16)
        assert pod_plan._on(Collective("all-reduce", 2560, 256, 1), slice_, 256).size == 2560

    def test_the_largest_batch_is_found_on_a_line_and_verified(self, monkeypatch):
        compiled = []

        def compile_step(config, topology, window):
            rows = config.loader.batch_size // topology.size
            compiled.append(rows)
            if rows > 200:  # what the compiler says, whatever the line promises
                raise DoesNotFitError("RESOURCE_EXHAUSTED")
            return dataclasses.replace(
                made_plan().step,
                argument_bytes=0,
                output_bytes=0,
                aliased_bytes=0,
                code_bytes=0,
                temporary_bytes=rows * GIB // 16,
            )

        monkeypatch.setattr(pod_plan, "compile_step", compile_step)
        start = made_plan()
        start = dataclasses.replace(start, step=compile_step(start.config, start.topology, WINDOW))
        found = pod_plan.largest_batch(start)
        assert compiled == [64, 128, 256, 240, 225, 210, 196]
        assert found.rows_per_chip == 196

    def test_the_report_names_what_was_assumed(self):
        text = pod_plan.report(made_plan())
        for expected in ("7.00 GiB of 16.00 GiB", "2 x all-reduce of 4.00 MB over 256 chips", "40% of 197 TFLOP/s"):
            assert expected in text
        gpu = made_plan(topology=parse_topology("h100:8"))
        assert "ESTIMATE" in pod_plan.report(gpu)
        assert pod_plan.to_json(gpu)["is_estimate"]
        assert math.isfinite(json.loads(json.dumps(pod_plan.to_json(made_plan())))["days"])


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["debug", "--topology", "v9:4x4"], "unknown"),
            (["debugg", "--topology", "h100:8"], "did you mean 'debug'"),
            (["debug", "--topology", "h100:8", "--samples", "1281"], "not a multiple of the patch size"),
            (["debug", "--topology", "h100:8", "--loader.batch-size", "9"], "does not divide over 8 chips"),
            (["debug", "--topology", "h100:8", "--efficiency", "2"], "efficiency"),
            (["debug", "--topology", "h100:64", "--loader.batch-size", "64"], "simulated devices"),
        ],
    )
    def test_mistakes_get_one_sentence_and_status_2(self, arguments, complaint, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["pod_plan", *arguments])
        assert pod_plan.main() == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("preset", "window"), [("apava_femba_tiny", (16, 1280)), ("pretrain_lumamba_tiny", (22, 1280))]
    )
    def test_the_usual_window_fits_the_model(self, preset, window, monkeypatch):
        def compiled(config, topology, window):
            raise pod_plan.DoesNotFitError(f"{window.channels} x {window.samples}")

        monkeypatch.setattr(pod_plan, "compile_step", compiled)
        said = []
        monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text))
        assert pod_plan.run([preset, "--topology", "v5e:2x2"]) == 1
        assert f"{window[0]} x {window[1]}" in said[0]

    def test_without_libtpu_a_tpu_is_refused(self, monkeypatch, capsys):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(sys, "argv", ["pod_plan", "debug", "--topology", "v5e:2x2"])
        assert pod_plan.main() == 2
        assert "lumamba-jax[pod]" in capsys.readouterr().err

    def test_what_does_not_fit_has_status_1(self, monkeypatch, capsys):
        def compile_step(*_):
            raise DoesNotFitError("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.50G of 15.75G hbm.")

        monkeypatch.setattr(pod_plan, "compile_step", compile_step)
        assert pod_plan.run(["debug", "--topology", "v5e:2x2"]) == 1
        assert "20.50 GiB of 15.75 GiB" in capsys.readouterr().out

    def test_gpus_are_planned_on_simulated_devices(self, tmp_path, capsys):
        file = tmp_path / "plan.json"
        arguments = ["debug", "--topology", "h100:8", "--loader.batch-size", "16", "--channels", "4"]
        status = pod_plan.run([*arguments, "--samples", "320", "--weak-scaling", "--json", str(file)])
        figures = json.loads(file.read_text())
        assert status == 0
        assert figures["is_estimate"]
        assert "ESTIMATE" in capsys.readouterr().out
        gradient = [c for c in figures["step"]["collectives"] if c["kind"] == "all-reduce" and c["group"] == 8]
        config = configs.load("debug")
        parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(config.model)))
        assert sum(c["size"] * c["count"] for c in gradient) >= 4 * 0.9 * parameters


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra pod)")
def test_a_tiny_step_compiles_for_a_slice(tmp_path):
    """In a process of its own: libtpu must not meet this one's simulated devices."""
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "lumamba_jax.pod_plan", "debug", "--topology", "v5e:2x2", "--channels", "4"]
    options = [
        "--samples",
        "320",
        "--loader.batch-size",
        "8",
        "--task.objective",
        "reconstruction",
        "--json",
        str(file),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert 0 < figures["step"]["memory_bytes"] < 16 * GIB
    assert any(c["kind"] == "all-reduce" and c["group"] == 4 for c in figures["step"]["collectives"])
