"""Channel names, electrode positions and the channel vocabulary.

One place knows how an electrode is called (`EEG FP1-REF`, `Fp1-LE` and `FP1` are the same channel), where it sits
(MNE's standard 10-05 template moved to the head frame, metres; a bipolar channel sits at the midpoint of its two
electrodes, a linear position with no orientation) and which row of the pre-training channel table it owns.

Names of this package are upper case. T3/T4/T5/T6 and T7/T8/P7/P8 are the old and new names of the same sites; both
occur in the vocabulary as rows of their own, so a name is kept as the file has it and `find_name` bridges the two.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Sorted union of the SEED-V (62), TUH bipolar (22) and Siena (29) names: the rows of the published channel tables.
CHANNEL_VOCABULARY: tuple[str, ...] = _names(
    """
    A1-T3 AF3 AF4 C1 C2 C3 C3-CZ C3-P3 C4 C4-P4 C4-T4 C5 C6 CB1 CB2 CP1 CP2 CP3 CP4 CP5 CP6 CPZ CZ CZ-C4 F1 F10 F2
    F3 F3-C3 F4 F4-C4 F5 F6 F7 F7-T3 F8 F8-T4 F9 FC1 FC2 FC3 FC4 FC5 FC6 FCZ FP1 FP1-F3 FP1-F7 FP2 FP2-F4 FP2-F8 FPZ
    FT7 FT8 FZ O1 O2 OZ P1 P2 P3 P3-O1 P4 P4-O2 P5 P6 P7 P8 PO3 PO4 PO5 PO6 PO7 PO8 POZ PZ T3 T3-C3 T3-T5 T4 T4-A2
    T4-T6 T5 T5-O1 T6 T6-O2 T7 T8 TP7 TP8
    """
)

_TUH_22 = _names(
    """
    FP1-F7 F7-T3 T3-T5 T5-O1 FP2-F8 F8-T4 T4-T6 T6-O2 T3-C3 C3-CZ CZ-C4 C4-T4 FP1-F3 F3-C3 C3-P3 P3-O1 FP2-F4 F4-C4
    C4-P4 P4-O2 A1-T3 T4-A2
    """
)

# Channel orders that pre-training and published results were made with. "tuh-bipolar-22" is the order every loader of
# the reference assumes, "tuh-bipolar-22-disk" the one its TUAB/TUAR/TUSL files really hold.
CHANNEL_ORDERS: dict[str, tuple[str, ...]] = {
    "tuh-bipolar-22": _TUH_22,
    "tuh-bipolar-20": _TUH_22[:20],
    "tuh-bipolar-22-disk": _names(
        """
    FP1-F7 F7-T3 T3-T5 T5-O1 FP2-F8 F8-T4 T4-T6 T6-O2 A1-T3 T3-C3 C3-CZ CZ-C4 C4-T4 T4-A2 FP1-F3 F3-C3 C3-P3 P3-O1
    FP2-F4 F4-C4 C4-P4 P4-O2
    """
    ),
    "siena-29": _names(
        """
    FP1 FP2 F3 C3 P3 O1 F7 T3 T5 FC1 FC5 CP1 CP5 F9 FZ CZ PZ F4 C4 P4 O2 F8 T4 T6 FC2 FC6 CP2 CP6 F10
    """
    ),
    "seed-v-62": _names(
        """
    FP1 FPZ FP2 AF3 AF4 F7 F5 F3 F1 FZ F2 F4 F6 F8 FT7 FC5 FC3 FC1 FCZ FC2 FC4 FC6 FT8 T7 C5 C3 C1 CZ C2 C4 C6 T8
    TP7 CP5 CP3 CP1 CPZ CP2 CP4 CP6 TP8 P7 P5 P3 P1 PZ P2 P4 P6 P8 PO7 PO5 PO3 POZ PO4 PO6 PO8 CB1 O1 OZ O2 CB2
    """
    ),
    "apava-16": _names("C3 C4 F3 F4 F7 F8 FP1 FP2 O1 O2 P3 P4 T3 T4 T5 T6"),
    "tdbrain-26": _names("FP1 FP2 F7 F3 FZ F4 F8 FC3 FCZ FC4 T7 C3 CZ C4 T8 CP3 CPZ CP4 P7 P3 PZ P4 P8 O1 OZ O2"),
    "mumtaz-19": _names("FP1 F3 C3 P3 O1 F7 T3 T5 FZ FP2 F4 C4 P4 O2 F8 T4 T6 CZ PZ"),
    "modma-128": tuple(f"E{i}" for i in range(1, 129)),
    "modma-13": _names("E3 E4 E9 E11 E36 E37 E45 E83 E92 E94 E104 E108 E116"),
    "mobi-60": _names(
        """
    FP1 FP2 F7 F3 FZ F4 F8 FC5 FC1 FC2 FC6 T7 C3 CZ C4 T8 CP5 CP1 CP2 CP6 P7 P3 PZ P4 P8 PO9 O1 OZ O2 PO10 AF7 AF3
    AF4 AF8 F5 F1 F2 F6 FT7 FC3 FC4 FT8 C5 C1 C2 C6 TP7 CP3 CPZ CP4 TP8 P5 P1 P2 P6 PO7 PO3 POZ PO4 PO8
    """
    ),
    "mobi-19": _names("FP1 FP2 F7 F3 FZ F4 F8 C3 CZ C4 P3 PZ P4 T7 T8 P7 P8 O1 O2"),
}

_OLD_AND_NEW = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8", "A1": "M1", "A2": "M2"}
_SAME_SITE = _OLD_AND_NEW | {new: old for old, new in _OLD_AND_NEW.items()}
_TEMPLATE_ALIASES = {"CB1": "POO7", "CB2": "POO8"}  # the template has no cerebellar sites; the reference's choice
_EAR_SITES = frozenset({"A1", "A2", "M1", "M2"})
_REFERENCE_SUFFIX = re.compile(r"\s*-\s*(REF|LE|AR|AVG|AV|CAR|LER|A1A2|M1M2|A1\+A2|M1\+M2)$")


@dataclass(frozen=True, eq=False)
class Montage:
    """An ordered set of channels with their positions.

    `ch_names` are upper-case names, `locations` is (C,3) float32, metres, head frame.
    Raises ValueError when names repeat, lengths differ or a position is not finite.
    """

    name: str
    ch_names: tuple[str, ...]
    locations: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_names", tuple(self.ch_names))
        locations = np.array(self.locations, dtype=np.float32)
        locations.flags.writeable = False
        object.__setattr__(self, "locations", locations)
        if not self.ch_names:
            raise ValueError(f"montage {self.name!r} has no channels")
        if locations.shape != (len(self.ch_names), 3):
            raise ValueError(
                f"montage {self.name!r}: {len(self.ch_names)} channels need locations of shape "
                f"({len(self.ch_names)}, 3), found {locations.shape}"
            )
        repeated = sorted({n for n in self.ch_names if self.ch_names.count(n) > 1})
        if repeated:
            raise ValueError(f"montage {self.name!r}: channel names repeat: {', '.join(repeated)}")
        lost = [n for n, xyz in zip(self.ch_names, locations, strict=True) if not np.isfinite(xyz).all()]
        if lost:
            raise ValueError(f"montage {self.name!r}: position is not finite for {', '.join(lost)}")

    def __len__(self) -> int:
        return len(self.ch_names)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Montage):
            return NotImplemented
        return (
            self.name == other.name
            and self.ch_names == other.ch_names
            and np.array_equal(self.locations, other.locations)
        )

    def __hash__(self) -> int:
        return hash((self.name, self.ch_names, self.locations.tobytes()))

    @property
    def channel_ids(self) -> np.ndarray:
        """(C,) int32: row of each channel in `CHANNEL_VOCABULARY`, -1 where the vocabulary lacks it."""
        return vocabulary_ids(self.ch_names)


def vocabulary_ids(ch_names: Iterable[str]) -> np.ndarray:
    """Rows of upper-case names in the vocabulary: (C,) int32, -1 where absent."""
    row = {name: i for i, name in enumerate(CHANNEL_VOCABULARY)}
    return np.array([row.get(name, -1) for name in ch_names], dtype=np.int32)


def normalize_name(label: str) -> str:
    """Upper-case name of the electrode or bipolar pair that a channel label means.

    `EEG FP1-REF`, `Fp1-LE`, `EEG Fp1`, `Fp1.` -> `FP1`; `EEG Fpz - Cz` -> `FPZ-CZ`. A label that means neither comes
    back cleaned but otherwise as it is; `is_electrode` tells them apart. Only a suffix is stripped.
    """
    name = " ".join(label.replace("\u2013", "-").upper().split()).strip("'\" ").rstrip(".")
    name = re.sub(r"^EEG[\s_:-]*(?=[A-Z])", "", name)
    name = _REFERENCE_SUFFIX.sub("", name)
    return re.sub(r"\s*-\s*", "-", name)


def split_pair(name: str) -> tuple[str, str] | None:
    """The two electrodes of a bipolar name (`FP1-F7`), or None for a single electrode."""
    first, dash, second = name.partition("-")
    return (first, second) if dash and first and second else None


def is_electrode(name: str) -> bool:
    """Whether a normalised name has a template position: a 10-05 site, a HydroCel sensor, or a pair of them."""
    pair = split_pair(name)
    sites = pair if pair is not None else (name,)
    return all(_template_site(site) is not None for site in sites)


def is_ear_reference(name: str) -> bool:
    """Whether a name means an ear lobe or mastoid (A1, A2, M1, M2, or the difference of two of them)."""
    return set(split_pair(name) or (name,)) <= _EAR_SITES


def find_name(wanted: str, available: Sequence[str]) -> str | None:
    """The entry of `available` (normalised names) that is the channel `wanted`, also under its old or new site name."""
    if wanted in available:
        return wanted
    pair = split_pair(wanted)
    if pair is None:
        other = _SAME_SITE.get(wanted)
        return other if other in available else None
    spellings = [[site, _SAME_SITE.get(site, site)] for site in pair]
    candidates = (f"{a}-{b}" for a in spellings[0] for b in spellings[1])
    return next((name for name in candidates if name in available), None)


def electrode_positions(ch_names: Sequence[str], *, frame: str = "head") -> np.ndarray:
    """Template positions of normalised names, (C,3) float64, metres; a pair sits at the midpoint of its electrodes.

    The template is MNE's standard 10-05 montage, attached to a measurement: MNE then moves it to the head frame
    (nasion and ear points), and these numbers, not the template's own, are what the published models were trained on.
    `E1`...`E257` are EGI HydroCel sensors (the net is the smallest that holds the largest number). `frame="template"`
    skips the move to the head frame: the reference does so for the HydroCel net of MODMA, and only there.

    Raises ValueError naming every channel without a template position.
    """
    unknown = [name for name in ch_names if not is_electrode(name)]
    if unknown:
        raise ValueError(
            f"no standard position for {', '.join(unknown)}: rename the channels to 10-20/10-05 names or give positions"
        )
    if frame not in ("head", "template"):
        raise ValueError(f"frame must be 'head' or 'template', found {frame!r}")
    sensors = [int(s[1:]) for n in ch_names for s in split_pair(n) or (n,) if _is_hydrocel(s)]
    hydrocel = _positions_of(_hydrocel_net(max(sensors)), frame) if sensors else {}
    standard = _positions_of("1005", frame)

    def site_position(site: str) -> np.ndarray:
        return hydrocel[site] if _is_hydrocel(site) else standard[_TEMPLATE_ALIASES.get(site, site)]

    rows = [np.mean([site_position(s) for s in split_pair(n) or (n,)], axis=0) for n in ch_names]
    return np.asarray(rows, dtype=np.float64).reshape(len(ch_names), 3)


def montage_of(ch_names: Sequence[str], *, locations: np.ndarray | None = None, name: str | None = None) -> Montage:
    """A montage of normalised names, at template positions unless `locations` (C,3), metres, head frame, are given.

    Its default name is the published channel order with the same names, else `eeg<C>-<hash of names and positions>`.
    """
    ch_names = tuple(ch_names)
    template = locations is None
    xyz = np.asarray(electrode_positions(ch_names) if template else locations, dtype=np.float32)
    if name is None:
        published = [key for key, order in CHANNEL_ORDERS.items() if order == ch_names] if template else []
        digest = hashlib.sha256("\n".join(ch_names).encode() + np.round(xyz, 6).tobytes()).hexdigest()[:6]
        name = published[0] if published else f"eeg{len(ch_names)}-{digest}"
    return Montage(name, ch_names, xyz)


def named_montage(name: str) -> Montage:
    """A published channel order (a key of `CHANNEL_ORDERS`) at its template positions.

    Raises ValueError naming the known orders. HydroCel positions are in the head frame here as everywhere; the
    reference's MODMA numbers are `electrode_positions(..., frame="template")`.
    """
    if name not in CHANNEL_ORDERS:
        raise ValueError(f"unknown montage {name!r}; known: {', '.join(sorted(CHANNEL_ORDERS))}")
    return montage_of(CHANNEL_ORDERS[name], name=name)


def bipolar_signal(signal: np.ndarray, ch_names: Sequence[str], pairs: Sequence[str]) -> np.ndarray:
    """First electrode minus second for each pair name: (C,T) signal of `ch_names` -> (len(pairs),T), same unit.

    A name recorded as it is (a pair, or a single electrode among the names asked for) is taken as it is.
    Raises ValueError listing every name that is neither recorded nor derivable.
    """
    ch_names = tuple(ch_names)
    rows, missing = [], []
    for pair in pairs:
        recorded = find_name(pair, ch_names)
        found = [find_name(site, ch_names) for site in split_pair(pair) or ()]
        if recorded is not None:
            rows.append(signal[ch_names.index(recorded)])
        elif found and None not in found:
            first, second = (signal[ch_names.index(name)] for name in found if name is not None)
            rows.append(first - second)
        else:
            missing.append(pair)
    if missing:
        raise ValueError(f"the montage asks for channels that are neither recorded nor derivable: {', '.join(missing)}")
    return np.stack(rows)


def _is_hydrocel(site: str) -> bool:
    return re.fullmatch(r"E[1-9]\d{0,2}", site) is not None and int(site[1:]) <= 256


def _hydrocel_net(largest: int) -> str:
    nets = ((32, "GSN-HydroCel-32"), (64, "GSN-HydroCel-65_1.0"), (128, "GSN-HydroCel-129"), (256, "GSN-HydroCel-257"))
    return next(net for size, net in nets if largest <= size)


def _template_site(site: str) -> str | None:
    if _is_hydrocel(site):
        return site
    site = _TEMPLATE_ALIASES.get(site, site)
    return site if site in _positions_of("1005", "head") else None


@functools.lru_cache(maxsize=8)
def _positions_of(template: str, frame: str) -> dict[str, np.ndarray]:
    """Upper-case site -> (3,) float64 metres. MNE renamed standard_1005 to colin27_1005 (the old name goes in 1.14)."""
    import mne

    if template == "1005":
        builtin = mne.channels.get_builtin_montages()
        template = "colin27_1005" if "colin27_1005" in builtin else "standard_1005"
    montage = mne.channels.make_standard_montage(template)
    if frame == "head":
        montage = mne.channels.montage.transform_to_head(montage)
    return {name.upper(): np.asarray(xyz, np.float64) for name, xyz in montage.get_positions()["ch_pos"].items()}
