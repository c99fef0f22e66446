"""Recordings prepared for a model as its training windows were: rate, length, montage, filters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.file_results import one_line
from data_pipeline.montages import CHANNEL_ORDERS, find_name, split_pair
from data_pipeline.prepare import PrepareConfig, prepare
from lumamba_jax.architectures import ModelConfig
from lumamba_jax.femba import FembaConfig
from lumamba_jax.inference import LoadedModel

PUBLISHED_RATE, PUBLISHED_SECONDS = 256.0, 5.0
"""Of the published models, which do not record what they were trained on."""
_FEW = 3  # names in a line


@dataclass(frozen=True)
class RecordingSettings:
    """How recordings become windows; what is left out is as the model was trained, and said."""

    window: float | None = None
    """seconds per window, for recordings (default: as the model was trained)"""
    stride: float | None = None
    """seconds from one start to the next, for recordings; less than the window = overlap (default: the window)"""
    montage: str | None = None
    """for recordings: auto, a published order (tuh-bipolar-22, siena-29, ...), or a comma-separated list of channels
    (default: as the model was trained, where that was one order that matters, else auto)"""
    reference: str | None = None
    """for recordings: none, average, or comma-separated electrodes (default: as the model was trained)"""
    l_freq: float | Literal["none"] | None = None
    """lower band edge in hertz, for recordings (default: as the model was trained, else 0.1)"""
    h_freq: float | Literal["none"] | None = None
    """upper band edge in hertz, for recordings (default: as the model was trained, else 75)"""
    notch: Literal["50", "60", "none"] | None = None
    """mains frequency to remove, for recordings (default: as the model was trained, else 50)"""


def prepare_windows(
    source: Path, out: Path, model: LoadedModel, asked: RecordingSettings, say: Callable[[str], None]
) -> dict:
    """Cut a recording, or a folder of recordings, into windows for `model`; the manifest.

    What the windows are like is said in one line, then what `say_of_recordings` does of what was left out and why, and
    of what the chain noted. Raises ValueError, one sentence, when they would not fit the model or nothing can be used.
    """
    manifest = prepare(recording_config(source, out, model, asked, say))
    remarks = {}
    for name, entry in manifest["files"].items():
        lost = [f"{count} windows left out, {why}" for why, count in entry.get("rejected_windows", {}).items()]
        reason = [f"left out, {entry['reason']}"] if entry["status"] == "rejected" else lost
        remarks[name] = [*reason, *entry.get("notes", ())]
    say_of_recordings(remarks, say)
    return manifest


def say_of_recordings(remarks: Mapping[str, Sequence[str]], say: Callable[[str], None]) -> None:
    """One line for each remark, with the names of the recordings that it is about, three of them at most."""
    about: dict[str, list[str]] = {}
    for name, own in remarks.items():
        for remark in own:
            about.setdefault(one_line(remark), []).append(name)
    for remark, names in about.items():
        more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
        say(f"{', '.join(names[:_FEW])}{more}: {remark}")


def recording_config(
    source: Path,
    out: Path,
    model: LoadedModel,
    asked: RecordingSettings,
    say: Callable[[str], None],
    *,
    cut: bool = True,
) -> PrepareConfig:
    """Settings for `source` (a file or a folder): those asked for, else those of the training, else the usual ones.

    One line is said of what they are and which of them nobody stated; `cut` = whether it tells of windows.
    Raises: ValueError, one sentence, for settings that the model or the chain cannot take.
    """
    provenance = model.metadata["provenance"]
    stated = dict(provenance.get("filters") or {})
    if (trained_order := _order_that_matters(model.config, provenance.get("channels"))) is not None:
        stated["montage"] = trained_order
    sfreq = float(provenance.get("sfreq", PUBLISHED_RATE))
    usual = PrepareConfig(source, out)
    chain = {}
    for name in ("montage", "reference", "l_freq", "h_freq", "notch"):
        given = getattr(asked, name)
        chain[name] = _own_kind(name, stated.get(name, getattr(usual, name)) if given is None else given)
    seconds = trained_seconds(model) if asked.window is None else asked.window
    config = PrepareConfig(source, out, sfreq=sfreq, window=seconds, stride=asked.stride, **chain)
    config.checked()
    if cut:
        model.config.num_patches(config.n_times)  # refuses a length that does not fit
    unknown = [name for name in chain if getattr(asked, name) is None and name not in stated]
    length = f", windows of {seconds:g} s" if cut else ""
    assumed = f"; the training does not state, so assumed: {', '.join(unknown)}" if unknown else ""
    say(
        f"recordings are prepared with {sfreq:g} Hz{length}, montage {config.montage}, reference {config.reference}, "
        f"band {_or_none(config.l_freq)} to {_or_none(config.h_freq)} Hz, notch {config.notch}{assumed}"
    )
    return config


def trained_seconds(model: LoadedModel) -> float:
    """The length of the model's windows, seconds: FEMBA's own, else that of the training."""
    provenance = model.metadata["provenance"]
    sfreq = float(provenance.get("sfreq", PUBLISHED_RATE))
    samples = model.config.num_samples if isinstance(model.config, FembaConfig) else provenance.get("n_times")
    return PUBLISHED_SECONDS if samples is None else samples / sfreq


def has_fixed_channels(config: ModelConfig) -> bool:
    """Whether the place of a channel means something: FEMBA's grid, and outputs for each channel."""
    return isinstance(config, FembaConfig) or config.output_channels is not None


def check_channels(model: LoadedModel, ch_names: Sequence[str], where: str) -> None:
    """Raise ValueError, one sentence, when the place of a channel means something and these are not the model's.

    Old and new names of a site (T3, T7) are the same.
    """
    config, trained = model.config, model.metadata["provenance"].get("channels")
    if config.output_channels is not None and len(ch_names) != config.output_channels:
        raise ValueError(
            f"the model has outputs for {config.output_channels} channels, {where} has {len(ch_names)}: "
            "prepare it with the montage of the training"
        )
    if trained and has_fixed_channels(config):
        same = len(trained) == len(ch_names) and all(map(_same_site, trained, ch_names))
        if not same:
            raise ValueError(
                f"the model was trained on the channels {', '.join(trained)} in this order, {where} has "
                f"{', '.join(ch_names)}: prepare it with --montage {','.join(trained)}"
            )


def _same_site(first: str, second: str) -> bool:
    return find_name(first, (second,)) is not None


def _order_that_matters(config: ModelConfig, channels: Sequence[str] | None) -> str | None:
    """The montage to ask for: a published order or bipolar pairs, and any order where the model's channels are fixed.

    Other sets of electrodes were those of the recordings, and a model that takes any montage is given what there is.
    """
    if not channels:
        return None
    published = [name for name, order in CHANNEL_ORDERS.items() if order == tuple(channels)]
    if published:
        return published[0]
    if has_fixed_channels(config) or any(split_pair(name) for name in channels):
        return ",".join(channels)
    return None


def _or_none(frequency: float | None) -> str:
    return "none" if frequency is None else f"{frequency:g}"


def _own_kind(name: str, value: Any) -> Any:
    """A setting as `PrepareConfig` has it. Raises ValueError for a notch that it does not know."""
    if name in ("l_freq", "h_freq"):
        return None if value in (None, "none") else float(value)
    if name == "notch":
        notch = "none" if value in (None, "none") else f"{float(value):g}"
        if notch not in ("50", "60", "none"):
            raise ValueError(f"the model was trained with a notch at {notch} Hz: choose --notch 50, 60 or none instead")
        return notch
    return str(value)
