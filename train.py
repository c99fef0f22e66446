"""Pre-train or fine-tune: `python train.py PRESET --data.train FILE.h5 --trainer.run-dir runs/NAME [--a.b value]`.

config -> windows -> mesh -> task -> state (fresh, warm start or resume) -> loop -> best model, results, checkpoints.
A run is its directory: `config.yaml` (itself a preset), `split.json`, `metrics.jsonl`, `tensorboard`, `checkpoints` (to
resume), `best` (the exported model of the lowest validation loss), `results.json`, `predictions_*.npz`.
"""

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import configs
from configs import ExperimentConfig
from configs.data import Windows, open_windows, resolve
from configs.results import (
    SHOWN,
    baseline_predictions,
    kind_of,
    measured_scores,
    origin_of,
    predictions_of,
    print_table,
    save_predictions,
    score,
)
from configs.run_directory import facts, open_run_directory
from configs.task_sheet import deviations, find_task
from data_pipeline.loader import Batches
from lumamba_jax.adapters import abstract_adapted, adapted_layers
from lumamba_jax.agreement import from_all_processes, gathered_errors, on_first
from lumamba_jax.checkpoint import (
    BEST_DIRECTORY,
    TrainCheckpoints,
    abstract_params,
    load_pretrained,
    read_metadata,
    require_same_encoder,
    save_pretrained,
)
from lumamba_jax.compilation import enable_compilation_cache
from lumamba_jax.hosts import any_process, connect, is_first, require_agreement, wait_for_all
from lumamba_jax.micro_batches import blocks_per_device
from lumamba_jax.optimizer import make_optimizer, make_schedule
from lumamba_jax.run_clock import goodput_line
from lumamba_jax.run_lock import DirectoryInUseError, RunLock
from lumamba_jax.run_log import write_json
from lumamba_jax.session import Session
from lumamba_jax.sharding import make_mesh, place, state_shardings, to_global
from lumamba_jax.tasks import EMBEDDING, WINDOW_ERROR, make_task, step_flops
from lumamba_jax.train_checkpoints import steps_in
from lumamba_jax.training import (
    WINDOW_FINITE,
    Evaluation,
    PerShape,
    Progress,
    TrainState,
    WarmStart,
    abstract_state,
    count_parameters,
    evaluate,
    init_state,
    make_eval_step,
    make_merge,
    make_train_step,
    mean_metrics,
    non_finite_steps,
    select_pretrained,
    trained_parameters,
)
from lumamba_jax.watchdog import Watchdog

STARTED = time.time()

DIVERGED, WRONG_INPUT, CRASHED, STOPPED = 1, 2, 70, 75  # the last two: start it again
_ASK_SECONDS = 10.0  # how often the processes of a run ask each other for a signal
_SAVE_TRIES = 3


class _RollBackError(Exception):
    """Go back to the newest checkpoint, because of a step that was not finite."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class _NotReadyError(Exception):
    """The disk (full, away) or another process let the run down: the same command goes on when that is over."""


_MISTAKES = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


class _Programs(NamedTuple):
    train: PerShape
    validation: PerShape


class Run:
    """One training run: what is built once, and the loop over it."""

    def __init__(self, config: ExperimentConfig, windows: Windows):
        self.config, self.windows = config, windows
        self.directory = Path(config.trainer.run_dir)
        self.mesh = make_mesh(config.mesh)
        hosts = {"host_index": jax.process_index(), "host_count": jax.process_count()}
        self.train_batches: Batches = windows.batches("train", config.loader, **hosts)
        self.evaluation_batches: dict[str, Batches] = {
            part: windows.batches(part, config.loader.for_evaluation(), **hosts)
            for part in ("validation", "test")
            if len(windows.parts[part])
        }
        if "validation" not in self.evaluation_batches:
            raise ValueError("there are no validation windows to select the model on: raise data.validation_fraction")
        self.steps_per_epoch = len(self.train_batches)
        self.total_steps = config.trainer.steps or config.trainer.epochs * self.steps_per_epoch
        self.validate_every = config.trainer.validate_every or self.steps_per_epoch
        weights = windows.class_weights() if config.task.class_weights == "balanced" else None
        self.task = make_task(config.task, config.model, weights)
        schedule = {
            "total_steps": -(-self.total_steps // config.optimizer.accumulation),
            "max_epochs": -(-self.total_steps // self.steps_per_epoch),
            "stage": "pretrain" if config.task.kind == "pretrain" else "finetune",
        }
        self.rate = make_schedule(config.optimizer, **schedule)
        self.adapted = adapted_layers(config.model, config.adapters)
        freeze = config.trainer.freeze_encoder
        self.trained = trained_parameters(freeze_encoder=freeze, adapters=config.adapters)
        self.params = abstract_adapted(config.model, config.adapters)
        self.optimizer = make_optimizer(config.optimizer, self.params, **schedule, trainable=self.trained)
        self.plain = make_merge(config.model, config.adapters, self.mesh)
        seed, micro_batch = config.trainer.seed, config.trainer.micro_batch
        blocks_per_device(config.loader.batch_size, micro_batch, self.mesh)  # refuses what does not fit
        self._ask_every, self._failed_saves, self._bad_windows = 1, 0, 0
        self.eval_step = make_eval_step(config.model, self.task, self.mesh, seed=seed, micro_batch=micro_batch)

    def what_is_trained(self) -> str:
        """One line: how many parameters are trained, of how many."""
        trained, total = count_parameters(self.params, self.trained)
        rank = self.config.adapters.rank
        with_adapters = f", with adapters of rank {rank} on {len(self.adapted)} layers" if self.adapted else ""
        return f"{trained:,} of {total:,} parameters are trained{with_adapters}"

    def _abstract_state(self) -> TrainState:
        return abstract_state(self.config.model, self.optimizer, self.mesh, adapters=self.config.adapters)

    def start(self, checkpoints: TrainCheckpoints, warm: WarmStart | None) -> tuple[TrainState, Progress]:
        """The state to continue from: the newest checkpoint, or fresh parameters with the warm start's put in."""
        if checkpoints.latest_step is not None:
            state, progress = checkpoints.restore(self._abstract_state())
            return state, Progress(**progress)
        given = {"adapters": self.config.adapters, "pretrained": None if warm is None else warm.loaded}
        seed = self.config.trainer.seed
        return init_state(self.config.model, self.optimizer, self.mesh, seed=seed, **given), Progress()

    def train(
        self,
        checkpoints: TrainCheckpoints,
        lock: RunLock,
        watchdog: Watchdog,
        state: TrainState,
        progress: Progress,
    ) -> tuple[bool, str]:
        """Run the loop; returns (finished, why it ended)."""
        trainer = self.config.trainer
        start = int(state.step)
        if start >= self.total_steps or self._out_of_patience(progress):
            return True, "this run was already finished"
        stop_at = min(self.total_steps, start + (trainer.stop_after or self.total_steps))
        watched = {"start_step": start, "total_steps": self.total_steps, "mesh": self.mesh, "started": STARTED}
        watched |= {"compute_dtype": self.config.model.compute_dtype, "silent": not is_first()}
        with Session(self.directory, watchdog, **watched, profile=trainer.profile) as session:
            programs = self._programs(session)
            while True:
                try:
                    return self._steps(session, programs, checkpoints, lock, state, progress, stop_at)
                except _RollBackError as wanted:
                    bad_step = wanted.step
                del state  # its buffers make room for those that are restored
                state, progress = self._back_to_checkpoint(session, checkpoints, progress, bad_step)

    def _programs(self, session: Session) -> "_Programs":
        """The compiled steps; each says when it compiles."""
        trainer = self.config.trainer
        train_step = make_train_step(
            self.config.model,
            self.task,
            self.optimizer,
            self.mesh,
            seed=trainer.seed,
            freeze_encoder=trainer.freeze_encoder,
            adapters=self.config.adapters,
            micro_batch=trainer.micro_batch,
            skip_non_finite=trainer.non_finite == "skip",
        )
        report_train = session.compiled("training step", len(self.train_batches.shapes), timed=True)
        shapes = self.evaluation_batches["validation"].shapes
        report_validation = session.compiled("validation step", len(shapes), timed=False)
        return _Programs(PerShape(train_step, report_train), PerShape(self.eval_step, report_validation))

    def _steps(
        self,
        session: Session,
        programs: "_Programs",
        checkpoints: TrainCheckpoints,
        lock: RunLock,
        state: TrainState,
        progress: Progress,
        stop_at: int,
    ) -> tuple[bool, str]:
        """Steps from `state` to `stop_at`, or to a stop request. Raises _RollBackError as `non_finite` says."""
        trainer, start, passed = self.config.trainer, int(state.step), progress.passed_over
        batches = self.train_batches.iterate(start + passed, stop_at + passed)
        for step, host_batch in session.steps(batches, start + 1):
            batch = to_global(host_batch, self.mesh)
            with jax.transfer_guard("disallow"):
                state, metrics = programs.train(state, batch)
            session.dispatched(step, metrics, **self._work_of(host_batch, batch))
            validates = step % self.validate_every == 0 or step == self.total_steps
            logs = step % trainer.log_every == 0 or validates or step == stop_at
            leaves = step == stop_at or self._stop_asked(session, step)
            saves = validates or leaves or step % (trainer.checkpoint_every or self.total_steps) == 0
            if logs or saves:
                self._record(session, progress, step)
                saves |= self._save_failed(session, checkpoints)
            if saves:
                with on_first() as first:
                    if first:
                        lock.check()
            if validates:
                with session.clock.phase("validation"):
                    self._validate(session, programs, state, progress, step)
            finished = step == self.total_steps or self._out_of_patience(progress)
            if saves:
                with session.clock.phase("checkpoint"):
                    checkpoints.save(step, state, progress.to_json())
            if finished:
                return True, f"finished after {step} steps"
            if leaves:
                return False, f"stopped and saved at step {step} of {self.total_steps}: continue with resume"
        raise AssertionError("the loop ends at stop_at")

    def _stop_asked(self, session: Session, step: int) -> bool:
        """Whether a signal asks to stop. It may reach one process only: all ask each other at the same steps."""
        if jax.process_count() == 1:
            return session.stop.requested
        return step % self._ask_every == 0 and any_process(flag=session.stop.requested)

    def _save_failed(self, session: Session, checkpoints: TrainCheckpoints) -> bool:
        """Whether a save in the background failed since the last time: said, and to be tried again with this state.

        Raises: OSError when several in a row failed.
        """
        problem = checkpoints.failure()
        if problem is None:
            return False
        self._failed_saves += 1
        if self._failed_saves >= _SAVE_TRIES:
            raise OSError(problem)
        session.log.say(f"{problem}. Trying again with the state of now ({self._failed_saves} of {_SAVE_TRIES} tries)")
        return True

    def _work_of(self, host_batch: Mapping[str, np.ndarray], batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Windows, model FLOPs and common montage of a batch, for the session's figures."""
        rows, channels, samples = batch["signal"].shape
        frozen = self.config.trainer.freeze_encoder
        shape = channels, samples
        flops = step_flops(self.config.task, self.config.model, *shape, frozen_encoder=frozen, adapted=self.adapted)
        one_montage = self.config.loader.grouping == "montage" and self.windows.has_several_montages
        group = self.windows.montage_names_of(host_batch["window_id"][:1])[0] if one_montage else ""
        return {"windows": rows, "flops": rows * flops, "group": str(group)}

    def _record(self, session: Session, progress: Progress, step: int) -> None:
        """Fetch the metrics since the last time, act on steps that are not finite, and log means over steps."""
        fetched, groups = session.fetch()
        if bad := non_finite_steps(fetched):
            self._act_on_non_finite(session, progress, {k: fetched[k][WINDOW_FINITE] for k in bad})
        trainer, means = self.config.trainer, mean_metrics(fetched)
        for group in sorted({name for name in groups.values() if name}):
            own = {k: metrics for k, metrics in fetched.items() if groups[k] == group}
            means[f"loss/{group}"] = mean_metrics(own)["loss"]
        if trainer.non_finite == "skip":
            means["skipped_steps"] = progress.skipped_steps
        optimizer = self.config.optimizer
        means["learning_rate"] = float(self.rate((step - 1) // optimizer.accumulation, optimizer.lr))
        session.record(step, means)
        if jax.process_count() > 1:  # all must ask at the same steps: the slowest decides
            slowest = max(float(text) for text in from_all_processes(f"{session.step_seconds:.6f}"))
            self._ask_every = max(1, min(trainer.log_every, int(_ASK_SECONDS / max(slowest, 1e-6))))

    def _act_on_non_finite(self, session: Session, progress: Progress, finite: Mapping[int, np.ndarray]) -> None:
        """Name the windows of the steps `finite` tells of, and skip, roll back or end as the configuration says.

        Raises: _RollBackError, or FloatingPointError when the run must not go on.
        """
        trainer, first = self.config.trainer, min(finite)
        named = {step: self._blamed(step, progress, windows) for step, windows in finite.items()}
        for step, text in named.items():
            session.log.write_performance({"event": "non_finite", "step": step, "windows": text})
        found = f"the loss of step {first} (or its gradient) is not finite: {named[first]}"
        advice = "lower optimizer.lr or set optimizer.clip_grad_norm"
        if trainer.non_finite == "stop":
            raise FloatingPointError(f"{found}; {advice}, or let trainer.non_finite skip such steps. Checkpoints in "
                                     f"{self.directory}, if any, are from before that step")  # fmt: skip
        if trainer.non_finite == "skip":
            progress.skipped_steps += len(finite)
        count = progress.skipped_steps if trainer.non_finite == "skip" else progress.rollbacks + 1
        session.log.say(f"{found}: {'skipped' if trainer.non_finite == 'skip' else 'rolling back'} ({count} so far)")
        if count > trainer.non_finite_limit:
            raise FloatingPointError(f"{found}; that is more than trainer.non_finite_limit "
                                     f"({trainer.non_finite_limit}) allows: {advice}")  # fmt: skip
        if trainer.non_finite == "rollback":
            raise _RollBackError(first)

    def _blamed(self, step: int, progress: Progress, finite: np.ndarray) -> str:
        """The windows whose own terms were not finite, or all when only the gradient of their sum was not."""
        own = self.train_batches.batch(step - 1 + progress.passed_over)["window_id"].tolist()
        ids = np.concatenate([json.loads(text) for text in from_all_processes(json.dumps(own))])
        if finite.all():
            return f"no window by itself, but the gradient of windows {', '.join(map(str, sorted(ids)))}"
        places = [self.train_batches.locate(int(i)) for i in sorted(ids[~finite])]
        return ", ".join(f"window {row} of {self.windows.stores[number].path.name}" for number, row in places)

    def _back_to_checkpoint(
        self, session: Session, checkpoints: TrainCheckpoints, progress: Progress, bad_step: int
    ) -> tuple[TrainState, Progress]:
        """The newest state from before a step that is not finite, and the batches from there to it passed over."""
        if checkpoints.latest_step is None:
            raise FloatingPointError(
                f"the loss of step {bad_step} is not finite, and there is no checkpoint to go back to yet"
            )
        state, saved = checkpoints.restore(self._abstract_state())
        back = dataclasses.replace(
            Progress(**saved),
            rollbacks=progress.rollbacks + 1,
            passed_over=progress.passed_over + bad_step - int(state.step),
        )
        session.rewind(int(state.step))
        return state, back

    def _validate(
        self, session: Session, programs: "_Programs", state: TrainState, progress: Progress, step: int
    ) -> None:
        batches = self.evaluation_batches["validation"]
        params = self.plain(state.params)
        evaluation = evaluate(programs.validation, params, session.each(batches), self.mesh)
        self._report_bad_windows(session, step)
        metrics = self.task.summarize(evaluation.outputs, evaluation.label)
        session.log.write(step, "validation", metrics | self._losses_by_montage(evaluation))
        best = progress.update(metrics["loss"], step)
        if best:
            save_pretrained(self.directory / BEST_DIRECTORY, self.config.model, params, self._provenance(step))
        shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in SHOWN if name in metrics)
        session.log.say(f"step {step}/{self.total_steps}  validation {shown}{'  (best)' if best else ''}")
        session.alive()

    def _report_bad_windows(self, session: Session, step: int) -> None:
        """Say how many unusable windows were met so far, when there are new ones."""
        own = self.train_batches.num_bad_windows + self.evaluation_batches["validation"].num_bad_windows
        count = sum(int(text) for text in from_all_processes(str(own)))
        if count > self._bad_windows:
            self._bad_windows = count
            session.log.say(
                f"{count} windows so far are flat or not finite: replaced (training), left out (validation)"
            )
            session.log.write_performance({"event": "bad_windows", "step": step, "count": count})

    def _losses_by_montage(self, evaluation: Evaluation) -> dict[str, float]:
        """The loss of each montage's windows; in pre-training the error of their own hidden samples, if any."""
        if not self.windows.has_several_montages:
            return {}
        names, found = self.windows.montage_names_of(evaluation.window_id), {}
        for name in np.unique(names):
            rows = names == name
            outputs = {k: v[rows] for k, v in evaluation.outputs.items() if len(v) == len(rows) and k != EMBEDDING}
            label = None if evaluation.label is None else evaluation.label[rows]
            metrics = self.task.summarize(outputs, label)
            found[f"loss/{name}"] = metrics.get(WINDOW_ERROR, metrics["loss"])
        return found

    def _out_of_patience(self, progress: Progress) -> bool:
        patience = self.config.trainer.patience
        return patience is not None and progress.validations_since_best >= patience

    def _provenance(self, step: int) -> dict:
        store = self.windows.stores[0]
        return {
            "run": self.directory.name,
            "step": step,
            "task": configs.to_mapping(self.config.task),
            "class_names": self.windows.class_names,
            "sfreq": store.sfreq,
            "n_times": store.n_times,
            **self.windows.preparation,
            "evaluation_task": self.config.data.evaluation_task or None,
            "split": self.windows.split.digest,
            "initialized_from": self.config.trainer.init_from or None,
            **({"adapters": configs.to_mapping(self.config.adapters)} if self.adapted else {}),
            **self._origin(),
        }

    def _origin(self) -> dict[str, Any]:
        """The weights that training started from, and their licence note: it holds for what they become."""
        if not self.config.trainer.init_from:
            return {}
        metadata = read_metadata(self.config.trainer.init_from)
        own = metadata["provenance"]
        kept = {key: own[key] for key in ("licence", "licence_note") if own.get(key)}
        return {"origin": origin_of(metadata), **kept}

    def score_best(self, watchdog: Watchdog) -> dict[str, dict[str, float]]:
        """Metrics of the best model on validation and test, with the baseline beside; predictions are saved.

        Every process works all of it out, so that none waits for another one's baseline; the first one writes.
        Raises: FloatingPointError when no validation loss was finite, so that there is no best model.
        """
        if not (self.directory / BEST_DIRECTORY).is_dir():
            raise FloatingPointError(f"no validation of {self.directory} had a finite loss: there is no best model")
        params = load_pretrained(self.directory)[1]
        params = place(params, state_shardings(abstract_params(self.config.model), self.mesh))
        eval_step, sheet = self._test_step(), self.config.data.evaluation_task
        results = {}
        for part, batches in self.evaluation_batches.items():
            watchdog.alive()
            evaluation = evaluate(eval_step, params, watchdog.each(batches), self.mesh)
            results[part] = self.task.summarize(evaluation.outputs, evaluation.label)
            if self.windows.labels is not None:
                kind = kind_of(self.config.task.kind, self.windows.labels)
                predictions = predictions_of(evaluation, self.windows)
                results[part] |= measured_scores(predictions, kind, sheet)
                if is_first():
                    path = self.directory / f"predictions_{part}.npz"
                    save_predictions(path, predictions, self.windows.class_names)
                if self.config.trainer.baseline:
                    results[f"{part}, band power"] = score(baseline_predictions(self.windows, part), kind, sheet)
        return results

    def _test_step(self) -> Callable:
        """What the best model is scored with: float32 where there are labels, as the published code tests."""
        model, trainer = self.config.model, self.config.trainer
        if model.compute_dtype != "bfloat16" or self.config.task.kind == "pretrain":
            return self.eval_step
        model = model.replace(compute_dtype="float32")
        return make_eval_step(model, self.task, self.mesh, seed=trainer.seed, micro_batch=trainer.micro_batch)


def warm_start(config: ExperimentConfig) -> WarmStart | None:
    """Read the encoder of `trainer.init_from`; prints what is loaded, new and unused."""
    source = config.trainer.init_from
    if not source or steps_in(Path(config.trainer.run_dir) / "checkpoints"):  # a resume has its own state
        return None
    found, params, _ = load_pretrained(source)
    require_same_encoder(found, config.model, source)
    warm = select_pretrained(config.model, params)
    print(f"{source}: {len(warm.loaded)} tensors loaded, {len(warm.new)} new, {len(warm.unused)} unused")
    for title, names in (("new", warm.new), ("unused", warm.unused)):
        if names:
            print(f"  {title}: {', '.join(sorted({'/'.join(name.split('/')[:2]) for name in names}))}")
    return warm


def run(config: ExperimentConfig) -> bool:
    """One training session from configuration to results; whether the run is finished."""
    with gathered_errors("opening the data"):
        windows = open_windows(config.data, labelled=config.task.kind != "pretrain")
        config = resolve(config, windows)
        _say_deviations(config, windows)
        found = facts(config, windows)
    require_agreement(found)
    with gathered_errors("building the run"):
        this = Run(config, windows)
        warm = warm_start(config)
    try:
        return _train_and_score(this, warm, found)
    except (ConnectionError, DirectoryInUseError, *_MISTAKES):
        raise
    except OSError as error:
        raise _NotReadyError(str(error)) from error


def _say_deviations(config: ExperimentConfig, windows: Windows) -> None:
    """What the windows are other than the task sheet says. Raises ValueError for the labels of another task."""
    if config.data.evaluation_task:
        for note in deviations(find_task(config.data.evaluation_task), windows.stores):
            print(f"train.py: {note}: scores will not compare with published ones", file=sys.stderr)


def _train_and_score(this: Run, warm: WarmStart | None, found: Mapping[str, str]) -> bool:
    config, windows, trainer = this.config, this.windows, this.config.trainer
    with RunLock(this.directory) as lock, Watchdog(trainer.hang_seconds, trainer.hang_exit_seconds) as watchdog:
        with on_first() as first:
            if first:
                for note in open_run_directory(config, windows, found):
                    print(f"train.py: {note}", file=sys.stderr)
        if is_first():
            print(this.what_is_trained())
        retention = {"keep": trainer.keep_checkpoints, "keep_every": trainer.keep_every}
        with TrainCheckpoints(this.directory / "checkpoints", **retention) as checkpoints:
            finished, ending = this.train(checkpoints, lock, watchdog, *this.start(checkpoints, warm))
        if is_first():
            print(f"{this.directory}: {ending}")
            print(goodput_line(this.directory))
        if finished:
            wait_for_all("the best model is written")
            results = this.score_best(watchdog)
            if is_first():
                write_json(results, this.directory / "results.json")
                print_table(results, title=f"{this.directory}: best model, windows")
    return finished or trainer.stop_after is not None


def main() -> int:
    """Exit status 0 finished, 1 diverged, 2 wrong input, 70 crashed, 75 stopped by a signal or the surroundings.

    After 70 and 75 the same command goes on; after 1 and 2 it would only end so again.
    """
    enable_compilation_cache()
    status = CRASHED
    try:
        config = configs.cli(sys.argv[1:], "train.py")
        connect(config.hosts)
        status = 0 if run(config) else STOPPED
    except FloatingPointError as error:
        status = _say(error, DIVERGED)
    except (
        ConnectionError,
        DirectoryInUseError,
        _NotReadyError,
    ) as error:  # others late, lost or at work there; the disk
        status = _say(error, STOPPED)
    except (ValueError, OSError) as error:
        status = _say(error, WRONG_INPUT)
    except Exception:  # a bug, a lost process, a device out of memory: whoever reads it needs the stack
        traceback.print_exc()
        _say(RuntimeError("crashed; the same command goes on from the last checkpoint"), CRASHED)
        if jax.process_count() > 1:  # the others wait for this process in a collective: let them notice at once
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(CRASHED)
    return status


def _say(error: Exception, status: int) -> int:
    print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
