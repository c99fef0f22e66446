"""Options of signal chain and windows, for commands that leave them to the user: a folder of recordings, a BIDS set."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from data_pipeline.preprocess import PreprocessConfig


@dataclass(frozen=True, kw_only=True)
class SignalOptions:
    """What a user may ask of the chain and the windows; a command adds its own options."""

    sfreq: float = 256.0
    """output rate, hertz"""
    window: float = 5.0
    """length of a window, seconds"""
    stride: float | None = None
    """seconds between window starts (default: the window)"""
    l_freq: float | None = 0.1
    """lower band edge, hertz; None = no high-pass"""
    h_freq: float | None = 75.0
    """upper band edge, hertz; None = no low-pass; lowered where a recording's rate asks for it, or that is left out"""
    notch: Literal["50", "60", "none"] = "50"
    """mains frequency to remove, hertz"""
    montage: str = "auto"
    """auto, a published order (tuh-bipolar-22, siena-29, ...), or a comma-separated list of channels"""
    reference: str = "none"
    """none, average, or comma-separated electrodes"""
    flat: Literal["drop", "keep"] = "drop"
    """channels that are flat over a whole recording"""
    scale: float = 1.0
    """factor on every signal, for files that state a wrong unit"""
    accept_units: bool = False
    """take amplitudes that are not plausible for EEG as they are"""
    event_seconds: float | None = None
    """seconds that an event without duration labels (default: one window)"""

    @property
    def n_times(self) -> int:
        """Samples per window."""
        return round(self.window * self.sfreq)

    @property
    def stride_samples(self) -> int:
        """Samples between window starts."""
        return round(self._stride_seconds * self.sfreq)

    @property
    def _stride_seconds(self) -> float:
        return self.window if self.stride is None else self.stride

    def chain_config(self, rename: Mapping[str, str] | None = None) -> PreprocessConfig:
        """What the signal chain needs. Raises ValueError, one sentence, for settings that cannot be right."""
        return PreprocessConfig(
            montage=self.montage,
            l_freq=self.l_freq,
            h_freq=self.h_freq,
            notch=None if self.notch == "none" else float(self.notch),
            sfreq=self.sfreq,
            reference=self.reference,
            flat=self.flat,
            rename=rename or {},
            scale=self.scale,
            accept_units=self.accept_units,
        )

    def check_signal_options(self) -> None:
        """Raise ValueError, one sentence, for the first option that cannot be right."""
        self.chain_config()
        for name, seconds in (("--window", self.window), ("--stride", self._stride_seconds)):
            samples = seconds * self.sfreq
            if not (0.5 < samples < 2**31 and abs(samples - round(samples)) <= 1e-6 * samples):
                raise ValueError(f"{name} of {seconds:g} s is {samples:g} samples at {self.sfreq:g} Hz: not a whole "
                                 f"number above 0")  # fmt: skip
        if self.event_seconds is not None and not self.event_seconds > 0:
            raise ValueError(f"--event-seconds must be positive, found {self.event_seconds}")


def described_classes(items: tuple[str, ...]) -> dict[str, str]:
    """DESCRIPTION or DESCRIPTION=CLASS -> {description: class}; a description may hold `=` when a class follows."""
    split = [item.rpartition("=") if "=" in item else (item, "=", item) for item in items]
    return {description: name for description, _, name in split}
