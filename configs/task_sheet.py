"""The task sheet: what each published task is, what its stores must hold, and what was published on it.

Classes, channels, window and rate of a task are those that `data_pipeline.corpora` prepares; here is what the corpora
do not know: how models are scored, what is published, and how far a comparison with that goes. `configs.task_presets`
makes a preset of each task for every model, `eval.py metrics --task NAME` sets the published numbers beside ours.

python -m configs.task_sheet          # the whole sheet
python -m configs.task_sheet tuab     # one task with what was published on it, but for ablations
"""

import argparse
import dataclasses
import difflib
import functools
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from configs import published
from configs.published import Level, Published
from data_pipeline.store import Store

if TYPE_CHECKING:
    from data_pipeline.corpora import Corpus

Kind = Literal["binary", "multi-class", "per channel, two classes", "per channel, several classes", "regression"]
_RANKED = ("balanced_accuracy", "aupr", "auroc")
_MIN_SEEDS = 3
_COUNT_TOLERANCE = 0.01
# Options of the corpora that decide labels, rows or windows. Those that only repeat or mend a slip of the released code
# (decimate, names, positions, channel_order) are none: published numbers may have been made either way.
_DECIDING = ("labels", "label_set", "several", "target", "unannotated", "trials", "channels", "targets", "step")
_DECIDING += ("filtering", "low_rate")
_JOINTS = ("GHR", "GKR", "GAR", "GHL", "GKL", "GAL", "PHR", "PKR", "PAR", "PHL", "PKL", "PAL")


@dataclass(frozen=True)
class EvaluationTask:
    """One task of the sheet (recipes 4.1, 6, 8).

    Attributes:
        name: of the task, first part of its presets.
        corpus: command of `data_pipeline.prepare` that makes its stores ...
        options: ... with these options.
        kind: what is decided. "per channel, ..." are the tasks `mc` and `mmc` of the published code.
        metrics: what the papers report, in their order.
        positive_class: the class whose probability ranks windows in a binary task.
        published: rows of other papers and of the published models.
        claim, reason: how far a comparison goes, and why, in one sentence.
        split_unit: what the corpus divides into parts (`data.split_unit`).
        few_windows: fewer training windows than a published batch, or hardly more.
        output_names: of the targets of a regression, in the order of the labels.
        measured: so many of them, the first, are measurements; the rest was predicted by another model (data.md Q17).
    """

    name: str
    corpus: str
    kind: Kind
    metrics: tuple[str, ...]
    claim: Level
    reason: str
    options: Mapping[str, Any] = field(default_factory=dict)
    positive_class: str | None = None
    published: tuple[Published, ...] = ()
    split_unit: Literal["subject", "recording", "time"] = "subject"
    few_windows: bool = False
    output_names: tuple[str, ...] = ()
    measured: int | None = None

    @property
    def per_channel(self) -> bool:
        """Whether there is one decision for each channel."""
        return self.kind.startswith("per channel")

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the rows of a window, in their order."""
        from data_pipeline.preprocess import wanted_names

        return wanted_names(self._prepared.common_chain().montage) or ()

    @property
    def orders(self) -> tuple[tuple[str, ...], ...]:
        """Orders that published windows may have: of `channels`, and of the released code's files (data.md Q1)."""
        if "channel_order" not in self.settings:
            return (self.channels,)
        return (self.channels, dataclasses.replace(self, options={**self.options, "channel_order": "D"}).channels)

    @property
    def samples(self) -> int:
        """Samples of a window."""
        return self._prepared.n_times

    @property
    def sfreq(self) -> float:
        """Hertz."""
        return self._prepared.common_chain().sfreq

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In the order of the labels; None for a regression."""
        return self._prepared.class_names()

    @property
    def num_outputs(self) -> int:
        """Classes of each decision, or targets."""
        return len(self.class_names) if self.class_names else getattr(self._prepared, "targets", 1)

    @property
    def test_windows(self) -> int | None:
        """Windows of the published test part, where that is known."""
        return self._prepared.expected.windows.get("test")

    @property
    def command(self) -> str:
        """What makes the stores."""
        options = "".join(f" --{key} {value}" for key, value in self.options.items())
        return f"python -m data_pipeline.prepare {self.corpus} --raw DIR --out DIR{options}"

    @property
    def settings(self) -> dict[str, Any]:
        """All options that its stores are prepared with, as they state them."""
        return self._prepared.settings()

    @property
    def _prepared(self) -> "Corpus":
        return _corpus(self.corpus, tuple(sorted(self.options.items())))


@functools.lru_cache(maxsize=64)
def _corpus(name: str, options: tuple[tuple[str, Any], ...]) -> "Corpus":
    from data_pipeline.corpora import CORPORA  # MNE is behind it

    return CORPORA[name](**dict(options))


def _few(subjects: str) -> str:
    advice = "read the scores of each of them and repeat the split"
    return f"{subjects} test subjects: the variance between subjects dominates, {advice}"


_SEEN = "encoders pre-trained without excluding its subjects (data.md Q5) may have seen those of the test part"
_TUAR_REASON = f"the split and the label rule behind the published TUAR numbers are unknown; {_SEEN}"

_SHEET = (
    EvaluationTask(
        "tuab", "tuab", "binary", _RANKED, "comparable",
        "the test set is official; expected of a fine-tuned released encoder: balanced accuracy within 1 point of "
        "80.99 % and AUROC within 0.01, over 3 seeds or more (our tolerance)",
        positive_class="abnormal", published=published.TUAB,
    ),
    EvaluationTask(
        "tuar_bc", "tuar", "binary", ("auroc", "aupr"), "not comparable", _TUAR_REASON,
        options={"labels": "binary_30"}, positive_class="artifact", published=published.TUAR_BINARY,
    ),
    EvaluationTask(
        "tuar_bc13", "tuar", "binary", ("auroc", "aupr"), "not comparable", _TUAR_REASON,
        options={"labels": "binary_any13"}, positive_class="artifact", published=published.TUAR_BINARY,
    ),
    EvaluationTask(
        "tuar_mc", "tuar", "per channel, two classes", ("auroc", "aupr"), "not comparable", _TUAR_REASON,
        options={"labels": "multi_binary"}, positive_class="artifact", published=published.TUAR_PER_CHANNEL,
    ),
    EvaluationTask(
        "tuar_mmc", "tuar", "per channel, several classes", ("auroc", "aupr"), "not comparable", _TUAR_REASON,
        options={"labels": "multi_label"}, published=published.TUAR_FAMILY_PER_CHANNEL,
    ),
    EvaluationTask(
        "tuar_mcc", "tuar", "multi-class", ("auroc", "aupr"), "not comparable",
        f"{_TUAR_REASON}; the rule of the five families is ours",
        options={"labels": "multi_class_5"}, published=published.TUAR_FAMILIES,
    ),
    EvaluationTask(
        "tuar_mcc6", "tuar", "multi-class", ("auroc", "aupr"), "not comparable",
        f"{_TUAR_REASON}, and they have no class of windows without artifact",
        options={"labels": "multi_class_6"}, published=published.TUAR_FAMILIES,
    ),
    EvaluationTask(
        "tusl", "tusl", "multi-class", ("auroc", "aupr"), "not comparable",
        f"the split behind the published TUSL numbers is unknown; {_SEEN}",
        published=published.TUSL,
    ),
    EvaluationTask(
        "seed_v", "seed-v", "multi-class", ("balanced_accuracy", "kappa", "f1_weighted"), "indicative",
        "trials of every session are divided, so subjects are in all parts; loaders of others may cut other windows",
        options={"trials": "as_reference"}, published=published.SEED_V, split_unit="recording",
    ),
    EvaluationTask(
        "apava", "apava", "binary", ("auroc", "aupr", "accuracy", "f1_macro"), "indicative", _few("4"),
        positive_class="alzheimer", published=published.APAVA, few_windows=True,
    ),
    EvaluationTask(
        "tdbrain", "tdbrain", "binary", ("auroc", "aupr", "accuracy", "f1_macro"), "indicative", _few("8"),
        positive_class="parkinson", published=published.TDBRAIN, few_windows=True,
    ),
    EvaluationTask(
        "mumtaz2016", "mumtaz2016", "binary", _RANKED, "indicative",
        f"{_few('9 or 10')}; published subject lists differ",
        positive_class="depression", published=published.MUMTAZ2016, few_windows=True,
    ),
    EvaluationTask(
        "modma_128", "modma", "binary", _RANKED, "indicative", _few("12"),
        options={"channels": 128}, positive_class="depression", few_windows=True,
    ),
    EvaluationTask(
        "modma_13", "modma", "binary", _RANKED, "indicative", _few("12"),
        options={"channels": 13}, positive_class="depression", few_windows=True,
    ),
    EvaluationTask(
        "mobi_60", "mobi", "regression", ("r2", "rmse", "pearson"), "indicative",
        "sessions are divided in time, so all 8 subjects are in all parts",
        options={"channels": 60}, published=published.MOBI, split_unit="time", output_names=_JOINTS, measured=6,
    ),
    EvaluationTask(
        "mobi_19", "mobi", "regression", ("r2", "rmse", "pearson"), "not comparable",
        "the published numbers were made with 60 channels, as far as is known",
        options={"channels": 19}, published=published.MOBI, split_unit="time", output_names=_JOINTS, measured=6,
    ),
    EvaluationTask(
        "eegmat", "eegmat", "binary", _RANKED, "not comparable", "nothing was published with these models",
        positive_class="arithmetic", few_windows=True,
    ),
)  # fmt: skip
TASKS: dict[str, EvaluationTask] = {task.name: task for task in _SHEET}


def find_task(name: str) -> EvaluationTask:
    """The task of that name. Raises ValueError with the closest one."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the task sheet has {', '.join(TASKS)}"
        raise ValueError(f"there is no task {name!r}: {hint}")
    return TASKS[name]


# --- does the data fit? -----------------------------------------------------------------------------------------------


def deviations(task: EvaluationTask, stores: Sequence[Store]) -> list[str]:
    """What the windows are other than the task says, in sentences: numbers made of them compare with no published ones.

    Raises: ValueError when the labels are those of another task.
    """
    found: list[str] = []
    for store in stores:
        _require_labels(task, store)
        found += _other_corpus(task, store)
        if (store.n_times, store.sfreq) != (task.samples, task.sfreq):
            found.append(
                f"{store.path} has windows of {store.n_times} samples at {store.sfreq:g} Hz, task {task.name} those of "
                f"{task.samples} at {task.sfreq:g} Hz"
            )
        for name, montage in store.montages.items():
            if montage.ch_names not in task.orders:
                same = set(montage.ch_names) == set(task.channels)
                what = "its channels in another order" if same else f"{len(montage.ch_names)} channels"
                found.append(
                    f"{store.path}, montage {name}, has {what}; task {task.name} {len(task.channels)} of its own"
                )
    return found


def _stated(store: Store) -> list[Mapping[str, Any]]:
    """What a store says it was made of; one entry for each of several stores that were converted into one."""
    provenance = store.info.provenance
    merged = provenance.get("stores")
    return [own.get("provenance", {}) for own in merged.values()] if isinstance(merged, Mapping) else [provenance]


def _other_corpus(task: EvaluationTask, store: Store) -> list[str]:
    """Where a store says that it holds another corpus than the task's, or one prepared with another rule."""
    wanted, found = task.settings, []
    for stated in _stated(store):
        corpus, options = stated.get("corpus"), stated.get("options", {})
        if corpus not in (None, task.corpus):
            found.append(f"{store.path} holds the corpus {corpus}, task {task.name} is of {task.corpus}")
            continue
        found += [
            f"{store.path} was prepared with --{key} {options[key]}, task {task.name} with --{key} {wanted[key]}"
            for key in _DECIDING
            if key in options and key in wanted and options[key] != wanted[key]
        ]
    return list(dict.fromkeys(found))


def stated_parts(stores: Sequence[Store]) -> set[str | None]:
    """The parts of their corpus that stores say they are: "train", "validation", "test"; None where one says nothing.

    A part belongs to a corpus that was prepared as such: a store of any other recordings has none.
    """
    return {stated.get("part") if "corpus" in stated else None for store in stores for stated in _stated(store)}


def _require_labels(task: EvaluationTask, store: Store) -> None:
    """Stores without class names (files of the reference pipeline) are judged by their label numbers alone."""
    if store.labels is None:
        raise ValueError(f"{store.path} has no labels, task {task.name} needs them: {task.command}")
    wanted = task.class_names or ()
    if store.class_names and tuple(store.class_names) != wanted:
        found = ", ".join(store.class_names)
        raise ValueError(f"{store.path} has the classes {found}, task {task.name} has "
                         f"{', '.join(wanted) or 'targets, no classes'}: {task.command}")  # fmt: skip
    targets = store.labels.dtype.kind == "f"
    rows = (len(task.channels),) if task.per_channel else (() if wanted else (task.num_outputs,))
    if targets != (not wanted) or store.labels.shape[1:] != rows or (wanted and store.labels.max() >= len(wanted)):
        what = f"{task.num_outputs} targets" if not wanted else f"class numbers below {len(wanted)}"
        raise ValueError(f"{store.path} has labels {store.labels.dtype} {store.labels.shape}, task {task.name} "
                         f"{what}{' for each channel' if task.per_channel else ''}: {task.command}")  # fmt: skip


def claim_of(
    task: EvaluationTask,
    *,
    part: str,
    windows: int,
    seeds: int,
    stated: Collection[str | None],
    deviating: Sequence[str] = (),
    alike: bool = True,
) -> tuple[Level, str]:
    """How far a comparison of these scores with published ones goes, and why.

    Args:
        task: of the sheet.
        part: scored part of the split.
        windows: scored windows.
        seeds: different ones among the runs that the scores are means of.
        stated: parts that the scored stores say they are, from `stated_parts`.
        deviating: from `deviations`.
        alike: whether the runs differ in nothing but the seed.
    """
    if deviating:
        return "not comparable", deviating[0]
    if part != "test":
        return "not comparable", f"these are {part} windows"
    others = sorted(name for name in stated if name not in ("test", None))
    if others:
        return "not comparable", f"not the published test part: the windows come from the {', '.join(others)} store"
    expected = task.test_windows
    if expected and abs(windows - expected) > _COUNT_TOLERANCE * expected and task.claim != "not comparable":
        return "not comparable", f"{windows:,} windows were scored, the published test part has {expected:,}"
    if task.claim == "not comparable":
        return task.claim, task.reason
    weak = []
    if "test" not in stated or None in stated:
        weak.append("the stores do not say which part of the corpus they are")
    if task.claim == "comparable" and not alike:
        weak.append("the runs differ in more than the seed")
    if task.claim == "comparable" and seeds < _MIN_SEEDS:
        weak.append({0: "the seed is not known", 1: "one seed only"}.get(seeds, f"{seeds} seeds only"))
    return ("indicative" if weak else task.claim), "; ".join([*weak, task.reason])


# --- the sheet on the terminal ----------------------------------------------------------------------------------------


def _print_sheet(console: Console) -> None:
    table = Table(title="Task sheet (presets: TASK_MODEL, see configs/task_presets.py)", title_justify="left")
    for column in ("task", "prepared by", "window", "decides", "positive", "reported", "published on it", "claim"):
        table.add_column(column, overflow="fold")
    for task in TASKS.values():
        window = f"{len(task.channels)} x {task.samples}, {task.sfreq:g} Hz"
        outputs = f"{task.num_outputs} targets" if task.class_names is None else ", ".join(task.class_names)
        options = " ".join(f"{key} {value}" for key, value in task.options.items())
        own = [row.model for row in task.published if row.model.startswith(published.FAMILY)]
        others = len(task.published) - len(own)
        rows = ", ".join([*own, *([f"{others} others"] if others else [])]) or "nothing"
        cells = (task.name, f"{task.corpus} {options}".strip(), window, f"{task.kind}: {outputs}")
        positive, metrics = task.positive_class or "-", ", ".join(task.metrics)
        table.add_row(*map(escape, (*cells, positive, metrics, rows, f"{task.claim}: {task.reason}")))
    console.print(table)


def _print_task(console: Console, task: EvaluationTask) -> None:
    facts = {
        "made by": task.command,
        "window": f"{len(task.channels)} channels x {task.samples} samples at {task.sfreq:g} Hz",
        "channels": ", ".join(task.channels),
        "decides": f"{task.kind}: {', '.join(task.class_names or task.output_names)}",
        "positive class": task.positive_class or "none",
        "divided by": task.split_unit,
        "claim": f"{task.claim}: {task.reason}",
    }
    for name, text in facts.items():
        console.print(f"{name}: {text}", markup=False, highlight=False)
    table = Table(title="Published", title_justify="left")
    for column in ("model", *task.metrics, "source", "remark"):
        table.add_column(column, overflow="fold")
    for row in task.published:
        cells = [format_score(row, metric) for metric in task.metrics]
        remark = f"{row.level}: {row.remark}" if row.level else row.remark
        table.add_row(*map(escape, (row.model, *cells, row.source, remark)))
    console.print(table)


def format_score(row: Published, metric: str) -> str:
    """A published score as text, "-" where there is none."""
    score = row.scores.get(metric)
    if score is None:
        return "-"
    return f"{score.value:.4f}" if score.sd is None else f"{score.value:.4f} ± {score.sd:.4f}"


def main(arguments: Sequence[str]) -> int:
    """Print the sheet, or the named tasks; exit status 2 for an unknown one."""
    parser = argparse.ArgumentParser(prog="task_sheet", description="The task sheet, or what is published on a task.")
    parser.add_argument("task", nargs="*", help=f"none = the whole sheet; {', '.join(TASKS)}")
    names = parser.parse_args(arguments).task
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        tasks = [find_task(name) for name in names]
    except ValueError as error:
        print(f"task_sheet: {error}", file=sys.stderr)
        return 2
    for task in tasks:
        _print_task(console, task)
    if not tasks:
        _print_sheet(console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
