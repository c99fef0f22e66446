"""Damaged recordings and their companions: seeded mutations, each read, filtered and cut as a corpus's worker does it.

    python tests/data_pipeline/fuzz_recordings.py --count 2500 --seed 0

The files are small ones written here and, where the real recordings lie beside the repository, those too. A case is
right when every source of its folder becomes windows that are finite and whole, or is refused with a ValueError of one
line that names the file. Everything else (another exception, a lack of memory, a crash, more than a minute or 400 MB)
is listed and makes the exit status 1.
"""

import gzip
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import scipy.io
from corpus_trees import TUAR_ROWS, tuh_labels, tusl_tree, write_csv, write_edf
from corpus_trees_other import (
    SEED_V_66,
    apava_tree,
    bids_tree,
    mobi_tree,
    modma_tree,
    noise,
    tdbrain_tree,
    write_cnt,
    write_fif,
)
from fuzzing import main, mutated, mutated_text, run_cases

from data_pipeline.corpora import mobi
from data_pipeline.corpora.apava import Apava
from data_pipeline.corpora.base import Catalogue, Corpus, Piece, Source, files_below
from data_pipeline.corpora.bids import Bids
from data_pipeline.corpora.mobi import Mobi
from data_pipeline.corpora.modma import Modma
from data_pipeline.corpora.seed_v import SeedV
from data_pipeline.corpora.tdbrain import TdBrain
from data_pipeline.corpora.tuar import Tuar
from data_pipeline.corpora.tueg import Tueg
from data_pipeline.corpora.tusl import Tusl
from data_pipeline.preprocess import PreprocessConfig
from data_pipeline.readers import read_recording, why_not_a_recording
from data_pipeline.source_windows import SourceTask, process_source, read_blocks

FINE = ("windows", "refused")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
_TEXT = (".csv", ".tsv", ".txt", ".json", ".tse_agg", ".csv_bi", ".vhdr", ".vmrk")
_LONGEST_REASON = 700
_SITES = tuple(name.removeprefix("EEG ").removesuffix("-REF") for name in tuh_labels(without=("A1", "A2"), extras=()))


@dataclass(frozen=True, kw_only=True)
class AnyRecordings(Corpus):
    """Whatever file it finds, with names for labels that say nothing: as little as possible is refused."""

    name: ClassVar[str] = "any"
    layout: ClassVar[str] = "files"
    chain_settings: ClassVar[PreprocessConfig] = PreprocessConfig(
        rename={f"EXG Channel {i}": name for i, name in enumerate(_SITES)}
        | {f"EEG {i:03d}": name for i, name in enumerate(_SITES)},
        accept_units=True,
    )
    window: ClassVar[float] = 1.0
    stride: ClassVar[float] = 1.0
    low_rate: str = "lower"

    def find(self, root: Path) -> Catalogue:
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        reasons = {name: why_not_a_recording(root / name) for name in names}
        sources = [Source(root / name, name, "s") for name, reason in reasons.items() if not reason]
        return Catalogue(sources, {name: reason for name, reason in reasons.items() if reason})

    def read(self, source: Source) -> Iterator[Piece]:
        try:
            yield Piece(read_recording(source.path))
        except ValueError as error:
            if not str(error).startswith(f"{source.path.name}: ") or "\n" in str(error):
                raise RuntimeError(f"unclear message: {error}") from error
            raise


@dataclass(frozen=True)
class Kit:
    """A folder of one corpus: files by their names inside; one of `targets` is mutated."""

    corpus: Corpus
    files: dict[str, bytes]
    targets: tuple[str, ...] = ()


# --- files written here -----------------------------------------------------------------------------------------------


def _brainvision(folder):
    labels = "\n".join(f"Ch{i}={name},,0.1,µV" for i, name in enumerate(_SITES[:6], 1))
    (folder / "a.vhdr").write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n"
        "MarkerFile=a.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\nNumberOfChannels=6\n"
        f"SamplingInterval=4000\n\n[Binary Infos]\nBinaryFormat=INT_16\n\n[Channel Infos]\n{labels}\n"
    )
    (folder / "a.vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n\n[Common Infos]\nCodepage=UTF-8\nDataFile=a.eeg\n\n"
        "[Marker Infos]\nMk1=New Segment,,1,1,0,20200101120000000000\nMk2=Stimulus,S  1,200,1,0\n"
    )
    noise(np.random.default_rng(0), 6, 1250, 200.0).T.astype("<i2").tofile(folder / "a.eeg")


def _eeglab(folder):
    signal = noise(np.random.default_rng(1), 4, 1000).astype(np.float32)
    places = np.array(
        [(name, 0.1 * i, 0.05, 0.08) for i, name in enumerate(_SITES[:4])],
        dtype=[("labels", object), ("X", object), ("Y", object), ("Z", object)],
    )
    about = {"setname": "a", "nbchan": 4.0, "trials": 1.0, "pnts": 1000.0, "srate": 200.0, "xmin": 0.0, "xmax": 4.995}
    about |= {"data": signal, "chanlocs": places, "event": [], "icawinv": []}
    scipy.io.savemat(folder / "a.set", {"EEG": about})


def _texts(folder):
    rng = np.random.default_rng(2)
    cells = [[f"{x:.3f}" for x in row] for row in rng.normal(0, 20, (600, 4))]
    rows = [",".join([f"{i / 128:.6f}", *own, str(i // 200)]) for i, own in enumerate(cells)]
    (folder / "a.csv").write_text("\n".join(["time,C3 [uV],C4 [uV],O1,O2,label", *rows]) + "\n")
    rows = [", ".join([str(i % 250), *own, "0.0"]) for i, own in enumerate(cells)]
    head = "%OpenBCI Raw EXG Data\n%Number of channels = 4\n%Sample Rate = 250 Hz\n"
    columns = ", ".join(["Sample Index", *(f"EXG Channel {i}" for i in range(4)), "Other"])
    (folder / "log.txt").write_text(head + columns + "\n" + "\n".join(rows) + "\n")


def _bdf(folder):
    from edfio import Bdf, BdfSignal

    rng = np.random.default_rng(3)
    signals = [
        BdfSignal(rng.normal(0, 20, 1024), 256, label=name, physical_dimension="uV", physical_range=(-500, 500))
        for name in _SITES[:5]
    ]
    Bdf(signals).write(folder / "a.bdf")


def _edf_plus(folder):
    from edfio import Edf, EdfAnnotation, EdfSignal

    rng = np.random.default_rng(4)
    signals = [EdfSignal(rng.normal(0, 20, 800), 200, label=name, physical_range=(-500, 500)) for name in _SITES[:4]]
    slow = EdfSignal(rng.normal(0, 1, 40), 10, label="RESP", physical_range=(-5, 5))
    Edf([*signals, slow], annotations=[EdfAnnotation(0.5, 1.0, "rest"), EdfAnnotation(2, None, "go")]).write(
        folder / "plus.edf"
    )


def _fif(folder):
    write_fif(folder / "a_raw.fif", _SITES[:5], noise(np.random.default_rng(5), 5, 800), sfreq=200)


def _tuar(folder):
    path = write_edf(folder / "edf/01_tcp_ar/aaaaaaaa_s001_t000.edf", tuh_labels(), seconds=6)
    write_csv(path, TUAR_ROWS)


def _seed_v(folder):
    counts = np.round(noise(np.random.default_rng(6), 66, 34 * 200) * 10).astype("<i2")
    write_cnt(folder / "EEG_raw/1_1_20180804.cnt", SEED_V_66, counts, sfreq=200)


def _mobi(folder):
    """The beginning of a session: its parts follow each other within 12 s, so that mutations hit what is used."""
    mobi._STRETCHES = ((0, 4), (4, 8), (8, 12))
    mobi_tree(folder, minutes=(1,))
    shutil.rmtree(folder / "SL02-T01")
    for name in ("eeg.txt", "joints.txt"):
        path = folder / "SL01-T01" / name
        path.write_bytes(_lines(path, 1202))


def _written(folder):
    """Kits of files written here."""
    makers = {
        "brainvision": (AnyRecordings(), _brainvision),
        "eeglab": (AnyRecordings(), _eeglab),
        "texts": (AnyRecordings(), _texts),
        "bdf": (AnyRecordings(), _bdf),
        "edf": (AnyRecordings(), _edf_plus),
        "fif": (AnyRecordings(), _fif),
        "tuar": (Tuar(), _tuar),
        "tusl": (Tusl(), tusl_tree),
        "bids": (Bids(label_column="group"), bids_tree),
        "apava": (Apava(), apava_tree),
        "modma": (Modma(), modma_tree),
        "tdbrain": (TdBrain(), tdbrain_tree),
        "seed-v": (SeedV(), _seed_v),
        "mobi": (Mobi(), _mobi),
    }
    kits = []
    for name, (corpus, make) in makers.items():
        (folder / name).mkdir()
        make(folder / name)
        kits += _kits_of(corpus, folder / name)
    return kits


def _kits_of(corpus, root):
    """A kit for every source of a folder: with its companions, the tables of the corpus, and nothing else."""
    found = corpus.completed(root)
    tables = [path for _, path in files_below(root, ".tsv", ".json")]
    kits = []
    for source in found.find(root).sources:
        group = {p for p in source.path.parent.glob(f"{source.path.stem}.*") if p.is_file()}
        used = [source.path, *sorted(group - {source.path}), *source.companions, *tables]
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in used}
        own = [source.path, *(group - {source.path}), *source.companions]
        kits.append(Kit(corpus, files, tuple(sorted({path.relative_to(root).as_posix() for path in own}))))
    return kits if len(kits) <= 3 else [*kits[:2], kits[-1]]


# --- real ones --------------------------------------------------------------------------------------------------------


def _lines(path, count):
    return b"".join(path.read_bytes().splitlines(keepends=True)[:count])


def _real():
    """Kits of real recordings; long ones are cut, so that mutations hit what describes the signal."""
    if not DATA.is_dir():
        return []

    def kit(name, *others, corpus=None, content=None):
        path = DATA / name
        names = [path, *(DATA / other for other in others)]
        files = {p.name: p.read_bytes() for p in names} | ({path.name: content} if content else {})
        return Kit(corpus or AnyRecordings(), files, tuple(files))

    special, eeglab, mne_files = "edf_special", "eeglab", "mne_test_files"
    uci = next((DATA / "uci_eeg_alcoholism").rglob("*.gz"))
    trial = {"trial.rd.gz": uci.read_bytes(), "trial.txt": gzip.decompress(uci.read_bytes())}
    kits = [
        kit(f"{special}/short_psg.edf"),
        kit(f"{special}/test_subsecond.edf"),
        kit(f"{special}/SC4001EC-Hypnogram.edf"),
        kit("eegmat/Subject02_1.edf", content=(DATA / "eegmat/Subject02_1.edf").read_bytes()[:200_000]),
        kit(f"{eeglab}/test.edf"),
        kit(f"{eeglab}/eeglab_data.set", f"{eeglab}/eeglab_data.fdt"),
        kit(f"{eeglab}/eeglab_data_epochs_ica.set"),
        kit(f"{eeglab}/testmusemonitor.csv"),
        *(kit(f"{mne_files}/{name}") for name in ("test.bdf", "test_bdf_stim_channel.bdf", "test_bin_raw.fif")),
        *(kit(f"{mne_files}/{name}") for name in ("test_edf_stim_channel.edf", "test_uneven_samp.edf")),
        *(kit(f"{mne_files}/{name}") for name in ("duplicate_channel_labels.edf", "test_stim_channel.edf")),
        kit(f"{mne_files}/test.vhdr", f"{mne_files}/test.vmrk", f"{mne_files}/test.eeg"),
        kit(f"{mne_files}/test_units.vhdr", f"{mne_files}/test.vmrk", f"{mne_files}/test.eeg"),
        kit("emotiv_eye_state/eeg-eye-state.csv", content=_lines(DATA / "emotiv_eye_state/eeg-eye-state.csv", 1500)),
        Kit(AnyRecordings(), trial, tuple(trial)),
    ]
    log = "openbci/OpenBCI_GUI-v6-blinks-jawClench-alpha.txt"
    kits.append(kit(log, content=_lines(DATA / log, 1500)))
    kits += _kits_of(Tueg(), DATA / "tuh_layout" / "tuh")[:1]
    return kits


# --- one case ---------------------------------------------------------------------------------------------------------


def prepare(folder):
    """The kits; each is tried whole once, so that what a first use loads is not counted as a case's."""
    (folder / "written").mkdir()
    kits = [*_written(folder / "written"), *_real()]
    for i, kit in enumerate(kits):
        own = folder / f"whole{i}"
        own.mkdir()
        _write(kit, own)
        found = outcome(kit.corpus, own)
        assert found in FINE, f"{list(kit.files)}: {found}"
    return kits


def try_case(kits, folder, rng):
    kit = kits[int(rng.integers(len(kits)))]
    own = folder / "raw"
    own.mkdir()
    _write(kit, own)
    target = kit.targets[int(rng.integers(len(kit.targets)))]
    (own / target).write_bytes(damaged(target, kit.files[target], rng))
    return outcome(kit.corpus, own)


def damaged(name, content, rng):
    """Text is changed as text, mostly; of other files half the changes fall on the beginning, which describes them."""
    suffix = Path(name).suffix
    if suffix in _TEXT and rng.random() < 0.8:
        return mutated_text(content, rng)
    if rng.random() < 0.5:
        return mutated(content, rng)
    head, rest = content[:4096], content[4096:]
    as_text = suffix in (".edf", ".bdf") and rng.random() < 0.7  # fields of fixed width
    return (mutated_text(head, rng, widths=True) if as_text else mutated(head, rng)) + rest


def outcome(corpus, root):
    """What became of a folder: "windows", "refused", or what is wrong."""
    try:
        corpus = corpus.completed(root)
        sources = corpus.find(root).sources
    except ValueError as error:
        return "refused" if _is_sentence(str(error)) else f"unclear message: {error}"
    except BaseException as error:
        return f"find, {type(error).__name__}: {error}"
    found = [_of_source(SourceTask(source, corpus, root.parent / "results")) for source in sources]
    wrong = [own for own in found if own not in FINE]
    return wrong[0] if wrong else "windows" if "windows" in found else "refused"


def _of_source(task):
    try:
        entry = process_source(task)
        json.dumps(entry, allow_nan=False)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if entry["status"] == "rejected":
        fine = _is_sentence(entry["reason"]) and not entry["transient"] and not entry["reason"].startswith("unexpected")
        return "refused" if fine else f"rejected: {entry['reason']}"
    blocks = list(read_blocks(task.files(entry["key"])[1]))
    shape = (len(blocks[0].montage), task.corpus.n_times)
    whole = all(b.signal.shape[1:] == shape and b.signal.dtype == np.float32 for b in blocks)
    finite = all(np.isfinite(b.signal).all() and np.isfinite(b.montage.locations).all() for b in blocks)
    labelled = all(b.labels is None or (len(b.labels) == len(b.signal) and np.isfinite(b.labels).all()) for b in blocks)
    if not (whole and finite and labelled and sum(len(b.signal) for b in blocks) == entry["windows"]):
        return f"windows that cannot be: whole {whole}, finite {finite}, labelled {labelled}"
    return "windows"


def _is_sentence(text):
    return bool(text.strip()) and "\n" not in text and len(text) < _LONGEST_REASON


def _write(kit, folder):
    for name, content in kit.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def run(count, seed):
    """Go through `count` cases: (how often each outcome came, {case: what is wrong})."""
    return run_cases(__file__, count, seed, FINE)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, FINE, prepare, try_case))
