"""The one type between a file and its windows: a continuous multichannel signal in microvolts."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Annotation:
    """A stretch of a recording with a description: onset and duration in seconds from the first sample."""

    onset: float
    duration: float
    description: str


@dataclass(frozen=True, eq=False)
class Recording:
    """A continuous recording.

    signal_uv: (C,T) float64 or float32, microvolts. sfreq: hertz. ch_names: C distinct names; labels of the file until
    `preprocess.select_channels` turns them into electrode names. annotations: in seconds from the first sample.
    subject, session: ids, empty where the file does not tell. positions: (C,3) float64, metres, head frame, NaN where
    the file has none; None when it has none at all. unit: the unit of the file and where it was stated. gaps: stretches
    (start, stop) in seconds whose samples are not measurements. dropped: channels left out so far, label -> reason.
    notes: what was done or assumed on the way, one sentence each.

    Raises ValueError when these contradict each other.
    """

    signal_uv: np.ndarray
    sfreq: float
    ch_names: tuple[str, ...]
    annotations: tuple[Annotation, ...] = ()
    subject: str = ""
    session: str = ""
    positions: np.ndarray | None = None
    unit: str = "uV"
    gaps: tuple[tuple[float, float], ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_names", tuple(self.ch_names))
        signal = self.signal_uv
        if signal.ndim != 2 or signal.dtype not in (np.float32, np.float64):
            raise ValueError(f"a signal is (C,T) of float32 or float64, found {signal.shape} of {signal.dtype}")
        if len(signal) != len(self.ch_names):
            raise ValueError(f"{len(signal)} channels of signal, {len(self.ch_names)} channel names")
        if len(set(self.ch_names)) != len(self.ch_names):
            repeated = sorted({n for n in self.ch_names if self.ch_names.count(n) > 1})
            raise ValueError(f"channel names repeat: {', '.join(repeated)}")
        if not (np.isfinite(self.sfreq) and self.sfreq > 0):
            raise ValueError(f"the sampling rate must be positive, found {self.sfreq}")
        if self.positions is not None and self.positions.shape != (len(signal), 3):
            raise ValueError(f"positions must be ({len(signal)}, 3), found {self.positions.shape}")

    @property
    def n_times(self) -> int:
        """Samples per channel."""
        return self.signal_uv.shape[1]

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.n_times / self.sfreq

    def pick(self, rows: Sequence[int], *, dropped: dict[str, str] | None = None) -> "Recording":
        """The channels at `rows`, in that order; `dropped` (label -> reason) joins the list of left-out channels."""
        rows = list(rows)
        return dataclasses.replace(
            self,
            signal_uv=self.signal_uv[rows],
            ch_names=tuple(self.ch_names[i] for i in rows),
            positions=None if self.positions is None else self.positions[rows],
            dropped=self.dropped | (dropped or {}),
        )

    def noting(self, *sentences: str) -> "Recording":
        """The same recording with more notes."""
        return dataclasses.replace(self, notes=(*self.notes, *sentences))
