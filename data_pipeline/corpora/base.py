"""What a corpus has to say about itself; `data_pipeline.prepare_corpus` does the rest (docs/data.md).

A corpus is a frozen dataclass whose fields are the options of its command. It finds the files of its original layout
(`find`), makes recordings with labels of one file (`read`, in a worker), and says who is trained and tested on
(`split`). Paths, hashes, workers, the cache, filters, windows, stores, manifest and report are shared.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data_pipeline.file_results import name_inside
from data_pipeline.montages import Montage
from data_pipeline.preprocess import PreprocessConfig
from data_pipeline.recording import Recording
from data_pipeline.splits import check_disjoint, split_by_subject
from data_pipeline.windows import Segment

PARTS = ("train", "validation", "test")
Label = int | tuple[int, ...] | tuple[float, ...]


@dataclass(frozen=True)
class Drop:
    """In place of a label: the window is left out and counted under this reason."""

    reason: str


@dataclass(frozen=True)
class Source:
    """One file of a corpus that becomes windows.

    path: the file. name: its path inside the corpus, with slashes; the recording id in the store. subject: its id.
    part: "train", "validation" or "test" where the corpus has an official split. label: the class number of all its
    windows, where the path says it. classes: class numbers known to occur in it, for proportional splits.
    companions: other files that it is read with (annotations); their bytes belong to its identity.
    """

    path: Path
    name: str
    subject: str
    session: str = ""
    part: str = ""
    label: int | None = None
    classes: tuple[int, ...] = ()
    companions: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Catalogue:
    """What a folder holds: the sources, sorted by name, files left out (name -> reason), and things to know."""

    sources: Sequence[Source]
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(sorted(self.sources, key=lambda source: source.name)))

    def without(self, reasons: Mapping[str, str], *warnings: str) -> "Catalogue":
        """The same without the named sources, which are listed with their reasons; with more warnings."""
        kept = [source for source in self.sources if source.name not in reasons]
        return Catalogue(kept, {**self.left_out, **reasons}, (*self.warnings, *warnings))


@dataclass(frozen=True)
class Piece:
    """A recording that is filtered as a whole, and how its windows are labelled.

    recording: as read, at its own rate, labels of the file. label: of every window. segments: stretches (seconds) to
    cut windows from, whose own labels, class numbers here, come first. label_windows: or a function of the windows'
    first samples (n,) at the output rate and the length of the piece in such samples, that returns n labels or
    `Drop`s. name: tells the pieces of one file apart. onset: seconds from the beginning of the file. part: where the
    pieces of one file belong to different parts.
    """

    recording: Recording
    label: Label | None = None
    segments: Sequence[Segment] = (Segment(),)
    label_windows: Callable[[np.ndarray, int], Sequence[Label | Drop]] | None = None
    name: str = ""
    onset: float = 0.0
    part: str = ""


@dataclass(frozen=True)
class Division:
    """Who is in which part.

    parts: source name -> part; "" where pieces say it themselves. left_out: source name -> why it is in none.
    unit: what is never divided ("subject", "recording", "trial", "time"). rule: the rule in one sentence.
    """

    parts: Mapping[str, str]
    unit: str = "subject"
    rule: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """Published figures: windows per part ("all" = undivided), recordings, subjects, and where they are from."""

    windows: Mapping[str, int] = field(default_factory=dict)
    recordings: int | None = None
    subjects: int | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """One corpus with its options (the fields; a subclass adds its own).

    Class attributes: name (of the command), title, source (where to get it), licence, citation, layout (what `--raw`
    holds, one clause), expected, chain_settings (defaults of the signal chain), window and stride in seconds,
    recordings_per_store (None: one file per part, whatever its size), split_options (options that change only the
    split: results of single files are kept when they change).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    licence: ClassVar[str]
    citation: ClassVar[str]
    layout: ClassVar[str]
    expected: ClassVar[Expected] = Expected()
    chain_settings: ClassVar[PreprocessConfig]
    window: ClassVar[float] = 5.0
    stride: ClassVar[float] = 5.0
    recordings_per_store: ClassVar[int | None] = None
    split_options: ClassVar[frozenset[str]] = frozenset()

    low_rate: Literal["skip", "lower"] = "skip"
    """recordings whose Nyquist frequency is not above the band: leave out as the reference does, or lower the band"""

    @abstractmethod
    def find(self, root: Path) -> Catalogue:
        """The sources below `root`. Raises ValueError, one sentence naming `layout`, when there are none."""

    @abstractmethod
    def read(self, source: Source) -> Iterator[Piece]:
        """The pieces of one source. Raises ValueError, one sentence, for a file that cannot be used."""

    def split(self, catalogue: Catalogue) -> Division:
        """Who is in which part; by default everything is for training (corpora without labels)."""
        return Division({source.name: "train" for source in catalogue.sources}, rule="not divided: pre-training")

    def class_names(self) -> tuple[str, ...] | None:
        """Names of the class numbers, None for no labels or regression targets."""
        return None

    def completed(self, root: Path) -> "Corpus":  # noqa: ARG002  (a subclass may look into the folder)
        """The same with options that were left open filled in from the folder; these are what the outputs state."""
        return self

    def common_chain(self) -> PreprocessConfig:
        """The signal chain under these options, as the stores state it."""
        return self.chain_settings

    def chain(self, source: Source) -> PreprocessConfig:  # noqa: ARG002  (a subclass may depend on the source)
        """The signal chain of a source."""
        return self.common_chain()

    def placed(self, montage: Montage) -> Montage:
        """The montage that is stored; a subclass may replace template positions."""
        return montage

    @property
    def n_times(self) -> int:
        """Samples per window."""
        return round(self.window * self.common_chain().sfreq)

    @property
    def stride_samples(self) -> int:
        """Samples between window starts."""
        return round(self.stride * self.common_chain().sfreq)

    def settings(self) -> dict:
        """The options as JSON values."""
        return {key: _json_value(value) for key, value in dataclasses.asdict(self).items()}


def files_below(root: Path, *suffixes: str) -> list[tuple[str, Path]]:
    """(name inside `root` with slashes, path) of the files with these suffixes, any case, sorted; hidden ones left out.

    Raises ValueError when `root` is not a folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the folder of the corpus with --raw")
    found = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in relative.parts):
            found.append((name_inside(root, path), path))
    # A link into nowhere is a file whose content was not fetched (git-annex): reading it says so.
    return sorted((name, path) for name, path in found if path.is_file() or (path.is_symlink() and not path.exists()))


def unknown_layout(corpus: Corpus, root: Path, left_out: Mapping[str, str]) -> ValueError:
    """The error of a folder without any source: what was expected, and what was found instead."""
    expected = f"{root} does not hold {corpus.title}: expected {corpus.layout}"
    if not left_out:
        return ValueError(f"{expected}; found no such files")
    name, reason = next(iter(left_out.items()))
    return ValueError(f"{expected}; all {len(left_out)} files were left out, the first, {name}: {reason}")


def divide_subjects(
    sources: Sequence[Source], *, validation: float, test: float, seed: int, rule: str
) -> tuple[dict[str, str], str]:
    """Part of each source by a seeded draw of subjects, proportional in the sets of classes that subjects have.

    Returns {source name: part} and the rule as a sentence. Raises ValueError when there are too few subjects.
    """
    if seed < 0:
        raise ValueError(f"--seed must be 0 or above, found {seed}")
    rows = [(source.subject, label) for source in sources for label in source.classes or (source.label or 0,)]
    subjects, labels = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=np.int64)
    drawn = split_by_subject(subjects, labels, val_fraction=validation, test_fraction=test, seed=seed)
    part_of = {subject: part for part, own in zip(PARTS, drawn.subjects.values(), strict=True) for subject in own}
    return {source.name: part_of[source.subject] for source in sources}, f"{rule}, seed {seed}"


def checked_disjoint(division: Division, sources: Sequence[Source]) -> Division:
    """The same division. Raises ValueError when its unit is the subject and one is in two parts."""
    if division.unit == "subject":
        parts: dict[str, set[str]] = {part: set() for part in PARTS}
        for source in sources:
            if division.parts.get(source.name):
                parts[division.parts[source.name]].add(source.subject)
        check_disjoint({part: sorted(subjects) for part, subjects in parts.items()})
    return division


def _json_value(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_json_value(item) for item in value]
    return value.name if isinstance(value, Path) else value  # folders differ between machines, results must not
