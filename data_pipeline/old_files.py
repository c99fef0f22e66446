"""HDF5 files of the reference pipeline, which do not describe themselves: which flavour, and how to read it.

The reference (pulp-bio/BioFoundation) writes four flavours: A (TUAB, TUAR, TUSL), B (TUEG, Siena), C (APAVA, TDBrain,
Mumtaz2016, MODMA) and D (MoBI). None says its rate or unit, most do not name their channels, A stores its rows in
another order than its readers assume, and B holds windows that were reshaped without a transpose. What is not in the
file is told from what it looks like, or by `OldFiles`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_pipeline.montages import (
    CHANNEL_ORDERS,
    Montage,
    electrode_positions,
    montage_of,
    named_montage,
    normalize_name,
)

LOADER_ORDER, DISK_ORDER = "tuh-bipolar-22", "tuh-bipolar-22-disk"
_NUMBERED = re.compile(r"data_group_\d+")


@dataclass(frozen=True)
class OldFiles:
    """How HDF5 files that do not describe themselves are read; stores of this package do, and ignore it.

    Attributes:
        channel_order: what the rows are. "by_name" = what they truly are, told from the file's names or its flavour,
            brought to the order of the pre-trained models; "as_reference" = the order that the reference's readers
            assume (wrong for 14 of the 22 rows of TUAB, TUAR and TUSL files); a published order such as "siena-29";
            or names with commas between.
        windows: "auto" = scrambled windows are detected and repaired; "as_stored" = as the reference reads them;
            "scrambled" = repaired without a test.
        non_finite: values that are not finite (float16 overflows): "zero" = read as 0, with a warning; "keep" = as
            they are, as the reference reads them (the loader then replaces or masks the windows).
        unit: of the numbers in the file; "auto" = known from the flavour. The reference takes every number as it is:
            "uV".
        sfreq: hertz; None = known from the flavour.
    """

    channel_order: str = "by_name"
    windows: Literal["auto", "as_stored", "scrambled"] = "auto"
    non_finite: Literal["zero", "keep"] = "zero"
    unit: Literal["auto", "uV", "mV", "V"] = "auto"
    sfreq: float | None = None

    def __post_init__(self) -> None:
        if self.windows not in ("auto", "as_stored", "scrambled"):
            raise ValueError(f"old_files: windows must be 'auto', 'as_stored' or 'scrambled', not {self.windows!r}")
        if self.non_finite not in ("zero", "keep"):
            raise ValueError(f"old_files: non_finite must be 'zero' or 'keep', not {self.non_finite!r}")
        if self.unit not in ("auto", "uV", "mV", "V"):
            raise ValueError(f"old_files: unit must be 'auto', 'uV', 'mV' or 'V', not {self.unit!r}")
        if self.sfreq is not None and not 0 < self.sfreq < 1e6:
            raise ValueError(f"old_files: sfreq must be a rate in hertz, not {self.sfreq}")

    @classmethod
    def as_reference(cls, *, sfreq: float | None = None) -> "OldFiles":
        """Every window exactly as the reference's readers hand it to the model: same numbers, names and positions."""
        return cls(channel_order="as_reference", windows="as_stored", non_finite="keep", unit="uV", sfreq=sfreq)


@dataclass(frozen=True)
class GroupLook:
    """What one group looks like: its name, the shape (n,C,T) and type of X, shape and kind of y (None: no y)."""

    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    label_shape: tuple[int, ...] | None
    label_kind: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Flavour:
    """A kind of file that the reference writes.

    `order` is what its rows truly are (None: nobody knows), `assumed` what the reference takes them for; both are keys
    of `CHANNEL_ORDERS`. `n_times`, `sfreq` and `unit` belong together: a file with another window length was made
    with other settings, so that its rate is not known.
    """

    letter: Literal["A", "B", "C", "D"]
    corpora: str
    order: str | None
    assumed: str
    n_times: int
    sfreq: float
    unit: Literal["uV", "V"]
    targets: bool = False

    @property
    def num_channels(self) -> int:
        """Rows of a window."""
        return len(CHANNEL_ORDERS[self.assumed])


FLAVOURS = (
    Flavour("A", "TUAB, TUAR or TUSL", DISK_ORDER, LOADER_ORDER, 1280, 256.0, "uV"),
    Flavour("B", "TUEG", LOADER_ORDER, LOADER_ORDER, 1280, 256.0, "uV"),
    Flavour("B", "TUEG", "tuh-bipolar-20", "tuh-bipolar-20", 1280, 256.0, "uV"),
    Flavour("B", "Siena", None, "siena-29", 1280, 256.0, "uV"),
    Flavour("C", "APAVA", "apava-16", "apava-16", 1280, 256.0, "uV"),
    Flavour("C", "TDBrain", "tdbrain-26", "tdbrain-26", 320, 256.0, "uV"),
    Flavour("C", "Mumtaz2016", "mumtaz-19", "mumtaz-19", 1280, 256.0, "V"),
    Flavour("C", "MODMA", "modma-128", "modma-128", 1280, 250.0, "uV"),
    Flavour("C", "MODMA", "modma-13", "modma-13", 1280, 250.0, "uV"),
    Flavour("D", "MoBI", "mobi-60", "mobi-60", 200, 100.0, "uV", targets=True),
    Flavour("D", "MoBI", "mobi-19", "mobi-19", 200, 100.0, "uV", targets=True),
)


def identify(groups: Sequence[GroupLook]) -> Flavour | None:
    """The flavour of a file without our attributes, None when it looks like none of the reference's.

    B is told by groups named by recordings, without labels, in float16 (or with the attribute `montage_name`); A, C
    and D by groups `data_group_<i>`, and among them by channels, kind of labels and window length.
    """
    if not groups:
        return None
    numbered = all(_NUMBERED.fullmatch(group.name) for group in groups)
    unlabelled = all(group.label_shape is None for group in groups)
    if not numbered and not (unlabelled and all(_is_recording_of_b(group) for group in groups)):
        return None
    _, channels, samples = groups[0].shape
    fitting = [f for f in FLAVOURS if f.num_channels == channels and (f.letter == "B") != numbered]
    if not unlabelled:
        fitting = [f for f in fitting if f.targets == any(_has_targets(group) for group in groups)]
    if len(fitting) > 1:
        fitting = [f for f in fitting if f.n_times == samples]
    return fitting[0] if len(fitting) == 1 else None


def _is_recording_of_b(group: GroupLook) -> bool:
    return group.dtype == np.float16 or "montage_name" in group.attributes


def _has_targets(group: GroupLook) -> bool:
    return group.label_shape is not None and len(group.label_shape) == 2 and group.label_kind == "f"


def orders_with(channels: int) -> list[str]:
    """The published orders of so many channels."""
    return [name for name, order in CHANNEL_ORDERS.items() if len(order) == channels]


def montage_of_rows(
    options: OldFiles, names: Sequence[str] | None, flavour: Flavour | None, channels: int
) -> tuple[Montage, np.ndarray | None]:
    """The montage that windows of `channels` rows are read in, and where its rows lie in the file (None: as stored).

    `names` are those of the file, if it has any. Raises ValueError, a clause without the file's name, when nothing
    says what the rows are.
    """
    order = options.channel_order
    if order == "as_reference":
        return _assumed_montage(flavour, channels), None
    if order in CHANNEL_ORDERS:
        return named_montage(order), None
    if order != "by_name":
        if "," not in order and channels > 1:
            raise ValueError(f"unknown channel order {order!r}; known: by_name, as_reference, "
                             f"{', '.join(sorted(CHANNEL_ORDERS))}, or names with commas between")  # fmt: skip
        return montage_of([normalize_name(name) for name in order.split(",")]), None
    if names is not None:
        return _in_loader_order([normalize_name(name) for name in names])
    if flavour is None:
        fitting = orders_with(channels)
        known = f"{channels} channels fit {' and '.join(fitting)}" if fitting else f"no known order has {channels}"
        raise ValueError(f"does not name its channels ({known}): say which with channel_order")
    if flavour.order is None:
        raise ValueError(
            f"looks like {flavour.corpora}, whose {channels} rows the reference stores in an order that differs from "
            f"run to run and is not in the file: prepare the corpus again, or take {flavour.assumed} for granted with "
            f"channel_order {flavour.assumed}"
        )
    if flavour.order == DISK_ORDER:
        return _in_loader_order(CHANNEL_ORDERS[DISK_ORDER])
    return _published_montage(flavour.order), None


def _assumed_montage(flavour: Flavour | None, channels: int) -> Montage:
    assumed = [flavour.assumed] if flavour else [order for order in orders_with(channels) if order != DISK_ORDER]
    if len(assumed) != 1:
        listed = ", ".join(assumed) or "none"
        raise ValueError(f"has {channels} channels, for which the reference assumes no single order (known: {listed}): "
                         f"say which with channel_order")  # fmt: skip
    return _published_montage(assumed[0])


def _published_montage(order: str) -> Montage:
    """At the reference's positions, which for MODMA's net are the template's own, not those of the head frame."""
    if not order.startswith("modma"):
        return named_montage(order)
    names = CHANNEL_ORDERS[order]
    return montage_of(names, locations=electrode_positions(names, frame="template"), name=f"{order}-template")


def _in_loader_order(names: Sequence[str]) -> tuple[Montage, np.ndarray | None]:
    wanted = CHANNEL_ORDERS[LOADER_ORDER]
    if tuple(names) == wanted or sorted(names) != sorted(wanted):
        return montage_of(names), None
    return named_montage(LOADER_ORDER), np.array([list(names).index(name) for name in wanted])


def subject_of_group(name: str) -> str | None:
    """The subject in the name of a flavour-B group (the stem of an EDF file), None when it has no known form."""
    if re.fullmatch(r"PN\d\d-.+", name):  # Siena
        return name.split("-")[0]
    fields = name.split("_")  # TUH: the last three; a few stems have a prefix
    named = len(fields) >= 3 and re.fullmatch(r"s\d+", fields[-2]) and re.fullmatch(r"t\d+", fields[-1])
    return fields[-3] if named else None


@dataclass(frozen=True)
class Seams:
    """Jumps of the signal (median, in the unit of the file) where pieces of it meet, under both readings of a block.

    `scrambled`: between pieces that follow each other if the block was reshaped without a transpose; `stored`: between
    windows that follow each other if it was not. The true reading has the small jumps. NaN: nothing to compare.
    """

    scrambled: float
    stored: float

    @property
    def ratio(self) -> float:
        """`scrambled / stored`: far below 1 for scrambled windows, far above for right ones; NaN when undecided."""
        return self.scrambled / self.stored if self.stored > 0 else float("nan")

    @property
    def unclear(self) -> bool:
        """Whether the signal does not decide: too few windows, noise, or windows in no order of time."""
        return not (self.ratio < 0.67 or self.ratio > 1.5)


def seam_jumps(head: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Absolute jumps at the seams under both readings, from the first m of n stored windows, (m,C,T).

    Reshaped without a transpose, stored row `c` of window `w` is piece `k = w*C + c` of all channels laid end to end,
    n pieces each: piece k+1 continues piece k unless a channel ends there. In a right block window w+1 continues
    window w in every channel.
    """
    first, last = head[..., 0].astype(np.float64), head[..., -1].astype(np.float64)
    pieces = np.arange(first.size - 1)
    with np.errstate(invalid="ignore"):  # inf - inf of overflowed float16
        along = np.abs(first.ravel()[1:] - last.ravel()[:-1])[pieces % n != n - 1]
        across = np.abs(first[1:] - last[:-1]).ravel()
    return along[np.isfinite(along)], across[np.isfinite(across)]


def measure_seams(heads: Sequence[tuple[np.ndarray, int]]) -> Seams:
    """The seams of several blocks together: (first windows, number of windows) of each. Blocks of one window say
    nothing: both readings are the same there."""
    jumps = [seam_jumps(head, n) for head, n in heads if n > 1 and head.shape[1] > 1 and len(head) > 1]
    along = np.concatenate([a for a, _ in jumps]) if jumps else np.zeros(0)
    across = np.concatenate([b for _, b in jumps]) if jumps else np.zeros(0)
    if not len(along) or not len(across):
        return Seams(float("nan"), float("nan"))
    return Seams(float(np.median(along)), float(np.median(across)))


def taken_for_scrambled(seams: Seams, flavour: Flavour | None) -> bool:
    """Whether to repair: the reference scrambles flavour B and nothing else, so where B's signal does not decide, it
    is taken to be scrambled; a file of unknown origin must show it clearly, the other flavours never are."""
    if flavour is None:
        return seams.ratio < 0.5
    return flavour.letter == "B" and not seams.ratio > 1.1
