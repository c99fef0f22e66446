"""Damaged HDF5 stores: seeded mutations, each opened, read and audited in a process of its own kind.

    python tests/data_pipeline/fuzz_stores.py --count 2500 --seed 0

A case is right when the store is read, or refused with a ValueError of one line that names the file; and the audit
gives a status. Everything else (another exception, a crash of HDF5's library, more than a minute or 400 MB) is
listed and makes the exit status 1.
"""

import sys

import numpy as np
from fuzzing import main, mutated, run_cases

FINE = ("read", "refused")


def sources(folder):
    """Small files of every flavour and our own: the smaller the signal, the more mutations hit what describes it."""
    from flavour_files import LOADER, brain_noise, cut, flavour_a, flavour_b, flavour_c, flavour_d

    from data_pipeline.montages import montage_of
    from data_pipeline.store import StoreInfo, create_store

    rng = np.random.default_rng(0)
    labels = {"data_group_0": np.zeros(6, np.int64), "data_group_10": np.ones(6, np.int64)}
    blocks = {name: cut(brain_noise(rng, 22, 6 * 16), 16) for name in labels}
    files = [
        flavour_a(folder / "a.h5", blocks, labels),
        flavour_b(folder / "b.h5", {"aaaaaaaa_s001_t000": brain_noise(rng, 22, 6 * 16)}, 16, LOADER),
        flavour_c(folder / "c.h5", [rng.normal(size=(6, 16, 16))] * 2, [np.zeros(6)] * 2),
        flavour_d(folder / "d.h5", [rng.normal(size=(6, 60, 16))], [rng.normal(size=(6, 12))]),
    ]
    with create_store(folder / "own.h5", StoreInfo(100.0, 16, 0.16, class_names=["a", "b"])) as writer:
        for i in range(4):
            who = {"subject": f"s{i}", "recording": f"r{i}", "start_samples": np.arange(5) * 16}
            signal = rng.normal(size=(5, 2, 16))
            writer.add(f"g{i}", signal, montage_of(["C3", "C4"]), **who, labels=np.arange(5) % 2)
    return [path.read_bytes() for path in [*files, folder / "own.h5"]]


def outcome(path):
    """What became of one file: "read", "refused", or what is wrong."""
    from data_pipeline.audit import audit
    from data_pipeline.old_files import OldFiles
    from data_pipeline.store import WindowStore

    old = OldFiles(unit="uV", sfreq=100.0)
    try:
        store = WindowStore(path, old)
        for row in range(len(store)):
            window = store[row]["signal"]
            assert window.dtype == np.float32
            assert window.shape[1] == store.n_times
        result = "read"
    except ValueError as error:
        if "\n" in str(error) or str(path) not in str(error):
            return f"unclear message: {error}"
        result = "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    try:
        status = audit([path], old).status
    except BaseException as error:
        return f"audit, {type(error).__name__}: {error}"
    return result if status in (0, 1, 2) else f"audit: status {status}"


def prepare(folder):
    """The files; one of them is read once, so that what a first use loads is not counted."""
    contents = sources(folder)
    (folder / "warm.h5").write_bytes(contents[-1])
    outcome(folder / "warm.h5")
    return contents


def try_case(contents, folder, rng):
    path = folder / "case.h5"
    content = contents[int(rng.integers(len(contents)))]
    path.write_bytes(mutated(content, rng))
    return outcome(path)


def run(count, seed):
    """Go through `count` cases: (how often each outcome came, {case: what is wrong})."""
    return run_cases(__file__, count, seed, FINE)


if __name__ == "__main__":
    sys.exit(main(__file__, __doc__, FINE, prepare, try_case))
