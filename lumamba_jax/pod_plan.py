"""A pod's training step without the pod: `python -m lumamba_jax.pod_plan PRESET --topology v5e:16x16 [--a.b value]`.

The real step (`training.make_train_step` with the configuration's task, optimizer, mesh and batch) is compiled ahead of
time for a TPU slice that is not there; needs the `libtpu` package (extra `pod`), no TPU and no data. Printed: memory
per chip against its limit, work and memory traffic, every collective, an estimate of the step and of the whole run.
Exit status 0 when it fits, 1 when it does not, 2 for bad input.

For GPUs (`--topology h100:8`) nothing can be cross-compiled: the step is compiled for as many simulated CPU devices,
which gives the collectives as they are and memory and traffic only roughly. Such a plan is marked as an estimate.

The estimate of the step, all parts of it printed (`Estimate`):

    compute  = executed FLOPs / (peak of the chip for the compute dtype x assumed efficiency)
    memory   = HBM bytes / HBM bandwidth
    program  = cycles that the TPU compiler expects for its own instructions / clock        (our kernels have none)
    send     = sum over collectives of bytes sent / bandwidth of the chip's links, plus hops x latency
    step     = max(compute, memory, program) + send            (sending overlaps with nothing: the pessimist's sum)

FLOPs are those of the model (`flops.forward_flops`), times 3 for forward and backward (less where the encoder is
frozen: `tasks.step_flops`), because XLA counts what is inside kernels and loops only partly. Weak scaling is given
against max(compute, memory), the shortest step there could be, and against the expected one: whatever makes a step
longer makes sending a smaller part of it.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import configs
from configs import ExperimentConfig
from lumamba_jax import hlo_costs
from lumamba_jax.accelerators import GIB, Topology, parse_topology
from lumamba_jax.adapters import abstract_adapted, adapted_layers
from lumamba_jax.femba import FembaConfig
from lumamba_jax.hlo_costs import Collective
from lumamba_jax.micro_batches import blocks_per_device
from lumamba_jax.optimizer import make_optimizer
from lumamba_jax.run_log import write_json
from lumamba_jax.sharding import batch_sharding, make_mesh
from lumamba_jax.tasks import make_task, merging_flops, passes_flops, step_flops
from lumamba_jax.training import abstract_state, make_train_step, trained_parameters

HOURS = 21_787.0
"""Of unlabelled EEG in the published pre-training corpus (arXiv 2603.19100)."""
SAMPLING_RATE = 256
EFFICIENCY = 0.4
"""Assumed share of a chip's peak that its matrix unit reaches; the model's products are narrow (64 to 1024)."""
WANTED = 0.9
"""Efficiency of weak scaling."""
WEAK_SCALING_SHAPES = {
    1: ((1,), (8,)),
    2: ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16)),
    3: ((1, 1, 1), (2, 2, 1), (2, 2, 4), (4, 4, 4), (4, 8, 8)),
}
"""Slices by number of sides; up to 256 chips."""


class DoesNotFitError(Exception):
    """The compiler needs more memory than the chip has; `needed` and `limit` in bytes, None when it did not say."""

    def __init__(self, message: str):
        found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
        self.needed, self.limit = (
            (None, None) if found is None else tuple(_bytes_of(found[i], found[i + 1]) for i in (1, 3))
        )
        super().__init__(message.split("\n", 1)[0])


def _bytes_of(number: str, unit: str) -> float:
    return float(number) * 1024 ** (" KMGT".index(unit))


class Window(NamedTuple):
    """Shape of one window."""

    channels: int
    samples: int

    @property
    def seconds(self) -> float:
        """At the sampling rate of the models."""
        return self.samples / SAMPLING_RATE


# ---- the step, compiled ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of one step, per chip.

    Attributes:
        argument_bytes, output_bytes, aliased_bytes, temporary_bytes, code_bytes: memory; aliased outputs lie in their
            arguments.
        xla_flops: operations by XLA's count: loops once, kernels as they state themselves.
        hbm_bytes: memory traffic (`hlo_costs.hbm_bytes`; of a simulated GPU XLA's "bytes accessed").
        program_cycles: `hlo_costs.estimated_cycles`; 0 where the compiler says nothing.
        collectives: of one step.
        unknown_loops: loops that are counted once for want of a trip count.
        compile_seconds: on this machine.
    """

    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    code_bytes: int
    xla_flops: float
    hbm_bytes: float
    program_cycles: int
    collectives: list[Collective]
    unknown_loops: list[str]
    compile_seconds: float

    @property
    def memory_bytes(self) -> int:
        """All that lies in a chip's memory during the step."""
        return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes + self.code_bytes


def compile_step(config: ExperimentConfig, topology: Topology, window: Window) -> CompiledStep:
    """Compile one training step of `config` for a topology.

    Raises:
        ValueError: no `libtpu`, a slice that the compiler does not know, or a batch that does not divide.
        DoesNotFitError: the compiler ran out of the chip's memory.
    """
    mesh = make_mesh(config.mesh, devices=topology_devices(topology))
    rows = config.loader.batch_size
    if rows % mesh.size:
        raise ValueError(f"loader.batch_size {rows} does not divide over {mesh.size} chips: choose a multiple of it")
    micro_batch = config.trainer.micro_batch or rows // mesh.size  # a simulated GPU takes all windows at once, too
    blocks = blocks_per_device(rows, micro_batch, mesh)
    optimizer = _optimizer(config, window)
    step = make_train_step(
        config.model,
        make_task(config.task, config.model),
        optimizer,
        mesh,
        seed=config.trainer.seed,
        freeze_encoder=config.trainer.freeze_encoder,
        adapters=config.adapters,
        micro_batch=micro_batch,
        skip_non_finite=config.trainer.non_finite == "skip",
    )
    state = abstract_state(config.model, optimizer, mesh, adapters=config.adapters)
    batch = _abstract_batch(config, window, mesh)
    started = time.perf_counter()
    try:
        compiled: Any = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
            raise DoesNotFitError(str(error)) from error
        raise
    return _read(compiled, topology, blocks, time.perf_counter() - started)


def _read(compiled: Any, topology: Topology, blocks: int, seconds: float) -> CompiledStep:
    program = hlo_costs.parse_program(compiled.as_text())
    memory, cost, on_tpu = compiled.memory_analysis(), compiled.cost_analysis(), topology.chip.kind == "tpu"
    return CompiledStep(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes if on_tpu else 0,
        cost.get("flops", 0.0),
        # A CPU program's loops over the steps of the scan, which a GPU has not, hold whole arrays in every round.
        hlo_costs.hbm_bytes(program) if on_tpu else cost.get("bytes accessed", 0.0) * blocks,
        hlo_costs.estimated_cycles(program),
        hlo_costs.collectives(program),
        program.unknown_loops,
        seconds,
    )


def topology_devices(topology: Topology) -> list[Any]:
    """Devices to compile for: of the TPU slice, or simulated ones in place of GPUs."""
    if topology.chip.kind == "gpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.size:
            raise ValueError(
                f"{topology.name} needs {topology.size} simulated devices, and this process has {len(devices)}: "
                f"set XLA_FLAGS=--xla_force_host_platform_device_count={topology.size}"
            )
        return devices[: topology.size]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("compiling for a TPU needs the libtpu package (no TPU): pip install 'lumamba-jax[pod]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # ask no metadata server: there is none
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    # JAX sees a chip of v4 as one device, as it is used; described without this, as its two cores.
    one_per_chip = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **one_per_chip).devices
    except Exception as error:  # what libtpu raises for a slice it does not know differs between its versions
        raise ValueError(f"libtpu has no topology {topology.name}: {' '.join(str(error).split())[:200]}") from error


def _optimizer(config: ExperimentConfig, window: Window) -> Any:
    """As `train.py` makes it; the lengths of the schedule are constants of the program."""
    steps = max(1, round(HOURS * 3600 / window.seconds / config.loader.batch_size))
    total = config.trainer.steps or config.trainer.epochs * steps
    return make_optimizer(
        config.optimizer,
        abstract_adapted(config.model, config.adapters),
        total_steps=-(-total // config.optimizer.accumulation),
        max_epochs=-(-total // steps),
        stage="pretrain" if config.task.kind == "pretrain" else "finetune",
        trainable=trained_parameters(freeze_encoder=config.trainer.freeze_encoder, adapters=config.adapters),
    )


def _abstract_batch(config: ExperimentConfig, window: Window, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Shapes of a batch (docs/architecture.md, "The batch")."""
    rows, (channels, samples) = config.loader.batch_size, window
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "signal": ((rows, channels, samples), jnp.float32),
        "locations": ((rows, channels, 3), jnp.float32),
        "channel_ids": ((rows, channels), jnp.int32),
        "channel_mask": ((rows, channels), jnp.bool),
        "patch_mask": ((rows, config.model.num_patches(samples)), jnp.bool),
        "window_mask": ((rows,), jnp.bool),
        "window_id": ((rows,), jnp.int32),
    }
    if config.task.kind == "classify":
        shapes["label"] = (rows,), jnp.int32
    elif config.task.kind == "regress":
        shapes["label"] = (rows, config.model.num_outputs or 1), jnp.float32
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, (shape, kind) in shapes.items()}


# ---- work and time --------------------------------------------------------------------------------------------------


def model_flops(config: ExperimentConfig, window: Window) -> float:
    """Of one window in one training step (`tasks.step_flops`)."""
    adapted = adapted_layers(config.model, config.adapters)
    frozen = config.trainer.freeze_encoder
    return step_flops(config.task, config.model, *window, frozen_encoder=frozen, adapted=adapted)


def executed_flops(config: ExperimentConfig, window: Window, chips: int) -> float:
    """Those of `model_flops`, the views once more where windows go block by block (`micro_batches`), and at most
    what it costs to merge adapters."""
    adapted = adapted_layers(config.model, config.adapters)
    merging = merging_flops(config.model, *window, adapted) if adapted else 0.0
    views = passes_flops(config.task, config.model, *window)[1]
    own = config.loader.batch_size // chips
    in_blocks = config.trainer.micro_batch not in (None, own)
    return model_flops(config, window) + in_blocks * views + merging


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step on one chip by cause; the model of it is at the head of this file."""

    compute: float
    memory: float
    program: float
    send: float

    @property
    def roofline(self) -> float:
        """The shortest step of a chip that waits for nobody."""
        return max(self.compute, self.memory)

    @property
    def alone(self) -> float:
        """The expected step of a chip that waits for nobody."""
        return max(self.roofline, self.program)

    @property
    def step(self) -> float:
        """Sending overlaps with nothing."""
        return self.alone + self.send


@dataclass(frozen=True)
class Plan:
    """A compiled step with what follows from it."""

    config: ExperimentConfig
    topology: Topology
    window: Window
    step: CompiledStep
    hours: float = HOURS
    efficiency: float = EFFICIENCY

    @property
    def chips(self) -> int:
        """That the mesh uses."""
        return self.config.mesh.devices or self.topology.size

    @property
    def rows_per_chip(self) -> int:
        """Windows of one chip per step."""
        return self.config.loader.batch_size // self.chips

    @property
    def peak_flops(self) -> float:
        """Of one chip in the configuration's compute dtype."""
        chip = self.topology.chip
        return chip.bfloat16_flops if self.config.model.compute_dtype == "bfloat16" else chip.float32_flops

    @property
    def fits(self) -> bool:
        """Whether the step lies in the memory of a chip."""
        return self.step.memory_bytes <= self.topology.chip.hbm_bytes

    @functools.cached_property
    def estimate(self) -> Estimate:
        """Of the step on this topology."""
        flops = self.rows_per_chip * executed_flops(self.config, self.window, self.chips)
        send = _seconds_of(self.step.collectives, self.topology)
        chip = self.topology.chip
        compute, memory = flops / (self.peak_flops * self.efficiency), self.step.hbm_bytes / chip.hbm_bandwidth
        return Estimate(compute, memory, self.step.program_cycles / chip.clock if chip.clock else 0.0, send)

    @property
    def windows_per_second(self) -> float:
        """Of all chips."""
        return self.config.loader.batch_size / self.estimate.step

    @property
    def mfu(self) -> float:
        """Model FLOPs of the step over what the chips could do at their peak in its time."""
        flops = self.rows_per_chip * model_flops(self.config, self.window)
        return flops / (self.estimate.step * self.peak_flops)

    @property
    def days(self) -> float:
        """For `hours` of windows, `trainer.epochs` times; no evaluation, no restart."""
        windows = self.hours * 3600 / self.window.seconds * self.config.trainer.epochs
        return windows / self.windows_per_second / 86400

    def weak_scaling(self) -> list["WeakScaling"]:
        """The same windows per chip on slices from 1 to 256 chips.

        The collectives are those of this plan; what is gathered from all chips grows with their number.
        """
        found = []
        for shape in WEAK_SCALING_SHAPES[len(self.topology.shape)]:
            slice_ = Topology(self.topology.chip, shape)
            send = _seconds_of([_on(c, slice_, self.chips) for c in self.step.collectives], slice_)
            least, expected = (alone / (alone + send) for alone in (self.estimate.roofline, self.estimate.alone))
            rows = math.ceil(self.rows_per_chip * WANTED / (1 - WANTED) * send / self.estimate.roofline)
            found.append(WeakScaling(slice_, least, expected, rows))
        return found


class WeakScaling(NamedTuple):
    """One slice: efficiency with the shortest and the expected step; windows per chip for `WANTED` with the former."""

    slice_: Topology
    least: float
    expected: float
    rows_wanted: int


def _seconds_of(collectives: Sequence[Collective], topology: Topology) -> float:
    return sum(c.count * topology.collective_seconds(c.kind, c.size, c.group) for c in collectives)


def _on(collective: Collective, topology: Topology, chips: int) -> Collective:
    """A collective of a program for `chips` chips, on another number of them."""
    if collective.group < chips:
        return dataclasses.replace(collective, group=min(collective.group, topology.size))
    grows = collective.kind in ("all-gather", "all-to-all")
    size = round(collective.size * topology.size / chips) if grows else collective.size
    return dataclasses.replace(collective, size=size, group=topology.size)


def with_batch(config: ExperimentConfig, rows: int) -> ExperimentConfig:
    """The same experiment with another global batch."""
    return dataclasses.replace(config, loader=dataclasses.replace(config.loader, batch_size=rows))


def largest_batch(plan: Plan) -> Plan:
    """The plan with the largest global batch that fits, by a straight line through two compiled steps.

    Memory is a constant plus so much per window. The batch that the line predicts is compiled, and made 1/16 smaller as
    long as it does not fit.
    """
    unit = plan.config.trainer.micro_batch or 1  # windows that a chip can have more or less
    own = plan.rows_per_chip
    other = own * 2 if plan.step.memory_bytes < plan.topology.chip.hbm_bytes / 3 else max(unit, own // 2 // unit * unit)
    if other == own:
        return plan
    second = _replanned(plan, other)
    per_row = (second.step.memory_bytes - plan.step.memory_bytes) / (other - own)
    room = plan.topology.chip.hbm_bytes - plan.step.memory_bytes
    rows = own + int(room / per_row) // unit * unit if per_row > 0 else other
    while rows > own:
        try:
            found = _replanned(plan, rows)
            if found.fits:
                return found
        except DoesNotFitError:
            pass
        rows = max(own, min(rows - unit, rows * 15 // 16 // unit * unit))
    return plan


def _replanned(plan: Plan, rows_per_chip: int) -> Plan:
    config = with_batch(plan.config, rows_per_chip * plan.chips)
    return dataclasses.replace(plan, config=config, step=compile_step(config, plan.topology, plan.window))


# ---- what is printed ------------------------------------------------------------------------------------------------


def report(plan: Plan) -> str:
    """The plan as text."""
    chip, step, estimate, config = plan.topology.chip, plan.step, plan.estimate, plan.config
    flops = plan.rows_per_chip * model_flops(config, plan.window)
    micro = f", {config.trainer.micro_batch} at a time" if config.trainer.micro_batch else ""
    lines = [
        f"{plan.topology.name}: {plan.chips} chips, mesh data {plan.chips // config.mesh.fsdp} x fsdp "
        f"{config.mesh.fsdp}; {config.model.architecture}, {config.model.compute_dtype}, compiled in "
        f"{step.compile_seconds:.0f} s",
    ]
    if chip.kind == "gpu":
        lines.append("ESTIMATE: no cross-compiler for GPUs; memory, work and traffic are of a program for CPU devices")
    lines += [
        f"batch      {config.loader.batch_size} windows of {plan.window.channels} x {plan.window.samples} samples, "
        f"{plan.rows_per_chip} per chip{micro}",
        f"memory     {_gib(step.memory_bytes)} of {_gib(chip.hbm_bytes)} per chip: state and batch "
        f"{_gib(step.argument_bytes)}, temporaries {_gib(step.temporary_bytes)}, outputs "
        f"{_gib(step.output_bytes - step.aliased_bytes)}, program {_gib(step.code_bytes)}",
        f"work       {flops / 1e12:.3f} TFLOP of the model per chip and step; XLA counts {step.xla_flops / 1e12:.3f}, "
        "loops once",
        f"traffic    {step.hbm_bytes / 1e9:.2f} GB of HBM per chip and step",
    ]
    if step.unknown_loops:
        lines.append(f"           {len(step.unknown_loops)} loop(s) without a trip count, taken to run once")
    total = sum(c.size * c.count for c in step.collectives)
    lines.append(f"send       {total / 1e6:.2f} MB in {sum(c.count for c in step.collectives)} collectives per step")
    lines += [f"           {c.count:4d} x {c.kind} of {_size(c.size)} over {c.group} chips" for c in step.collectives]
    lines += [
        f"estimate   compute {_ms(estimate.compute)} (at {plan.efficiency:.0%} of {_tera(plan.peak_flops)}FLOP/s), "
        f"memory {_ms(estimate.memory)} (at {chip.hbm_bandwidth / 1e9:.0f} GB/s),",
        f"           program {_ms(estimate.program)} (the compiler's cycles, kernels left out), send "
        f"{_ms(estimate.send)} (at {plan.topology.bandwidth / 1e9:.0f} GB/s)",
        f"step       {_ms(estimate.step)} = max(compute, memory, program) + send: {plan.windows_per_second:,.0f} "
        f"windows/s, MFU {plan.mfu:.1%}",
        f"run        {_duration(plan.days)} for {plan.hours:,.0f} h x {config.trainer.epochs} epochs "
        f"({config.trainer.epochs * plan.hours * 3600 / plan.window.seconds / config.loader.batch_size:,.0f} steps)",
    ]
    return "\n".join(lines)


def report_weak_scaling(plan: Plan) -> str:
    """Efficiency from 1 to 256 chips."""
    lines = [f"weak scaling, {plan.rows_per_chip} windows per chip, nothing overlaps: at least (expected)"]
    for slice_, least, expected, rows in plan.weak_scaling():
        lines.append(f"           {slice_.size:4d} chips ({slice_.name}): {least:.1%} ({expected:.1%}); "
                     f"{WANTED:.0%} at least with {rows} windows per chip")  # fmt: skip
    return "\n".join(lines)


def to_json(plan: Plan) -> dict[str, Any]:
    """All figures as plain values."""
    step = dataclasses.asdict(plan.step) | {"memory_bytes": plan.step.memory_bytes}
    return {
        "topology": plan.topology.name,
        "architecture": plan.config.model.architecture,
        "config": configs.to_mapping(plan.config),
        "window": plan.window._asdict(),
        "chips": plan.chips,
        "rows_per_chip": plan.rows_per_chip,
        "hbm_bytes": plan.topology.chip.hbm_bytes,
        "fits": plan.fits,
        "is_estimate": plan.topology.chip.kind == "gpu",
        "step": step,
        "model_flops_per_chip": plan.rows_per_chip * model_flops(plan.config, plan.window),
        "efficiency": plan.efficiency,
        "estimate_seconds": dataclasses.asdict(plan.estimate) | {"step": plan.estimate.step},
        "windows_per_second": plan.windows_per_second,
        "mfu": plan.mfu,
        "hours": plan.hours,
        "days": plan.days,
        "weak_scaling": {
            slice_.name: {"least": least, "expected": expected, "rows_for_90_percent": rows}
            for slice_, least, expected, rows in plan.weak_scaling()
        },
        "versions": {"jax": jax.__version__, "libtpu": _libtpu_version()},
    }


def _libtpu_version() -> str | None:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count:.0f} bytes"


def _duration(days: float) -> str:
    return f"{days:.2f} days" if days >= 1 else f"{days * 24:.2f} hours"


def _tera(count: float) -> str:
    return f"{count / 1e12:.0f} T"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


# ---- command line ---------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="pod_plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("preset", help="a preset or YAML file; --a.b value overrides its fields, as in train.py")
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p:8x8x8, v6e:8x8, v4:4x4x4, h100:8, ...")
    parser.add_argument("--channels", type=int, help="of a window (default: the fixed grid's of FEMBA, else 22)")
    parser.add_argument("--samples", type=int, help="of a window at 256 Hz (default: FEMBA's, else 1280: 5 s)")
    parser.add_argument("--hours", type=float, default=HOURS, help=f"of recordings per epoch (default {HOURS:,.0f})")
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY, help="share of the peak that products reach")
    parser.add_argument("--weak-scaling", action="store_true", help="print the efficiency from 1 to 256 chips")
    parser.add_argument("--largest-batch", action="store_true", help="find the largest batch that fits: more compiles")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options, overrides = parser.parse_known_args(arguments)
    sizes = [size for size in (options.channels, options.samples) if size is not None]
    if min(sizes, default=1) < 1 or options.hours <= 0 or not 0 < options.efficiency <= 1:
        raise ValueError("channels, samples and hours must be positive, and efficiency lie in (0, 1]")
    return options, overrides


def run(arguments: Sequence[str]) -> int:
    """Plan, print, and say whether it fits (0) or not (1)."""
    options, overrides = _options(arguments)
    topology = parse_topology(options.topology)
    config = configs.cli([options.preset, *overrides], "pod_plan")
    window = _window(config, options.channels, options.samples)
    if config.task.kind != "pretrain" and not config.model.num_outputs:  # "as many as the labels have": there are none
        config = dataclasses.replace(
            config, model=config.model.replace(num_outputs=1 + (config.task.kind == "classify"))
        )
    config.model.check_window(*window)
    if topology.chip.kind == "gpu" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", topology.size)
    try:
        plan = Plan(config, topology, window, compile_step(config, topology, window), options.hours, options.efficiency)
    except DoesNotFitError as error:
        needed = "" if error.needed is None else f" it needs {_gib(error.needed)} of {_gib(error.limit or 0)}:"
        rows = config.loader.batch_size
        print(f"{topology.name}: a batch of {rows} does not fit:{needed} {error}; choose a smaller "
              f"loader.batch_size, or trainer.micro_batch")  # fmt: skip
        return 1
    print(report(plan))
    if options.weak_scaling:
        print(report_weak_scaling(plan))
    figures = to_json(plan)
    if options.largest_batch:
        largest = largest_batch(plan)
        print(f"largest    batch that fits: {largest.config.loader.batch_size} ({largest.rows_per_chip} per chip, "
              f"{_gib(largest.step.memory_bytes)})")  # fmt: skip
        figures["largest_batch"] = largest.config.loader.batch_size
    if options.json:
        write_json(figures, options.json)
    if not plan.fits:
        print(f"does not fit: {_gib(plan.step.memory_bytes)} of {_gib(topology.chip.hbm_bytes)}")
    return 0 if plan.fits else 1


def _window(config: ExperimentConfig, channels: int | None, samples: int | None) -> Window:
    grid = config.model if isinstance(config.model, FembaConfig) else None
    usual = (22, 1280) if grid is None else (grid.num_channels, grid.num_samples)
    return Window(usual[0] if channels is None else channels, usual[1] if samples is None else samples)


def main() -> int:
    """Exit status 0, 1 when it does not fit, 2 for bad input (one sentence)."""
    jax.config.update("jax_platforms", "cpu")
    try:
        return run(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"pod_plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
