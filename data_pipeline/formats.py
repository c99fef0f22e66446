"""Window stores of either format by their paths: one HDF5 file, one ArrayRecord folder, or a folder of such stores."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.array_record_store import DESCRIPTION, ArrayRecordStore
from data_pipeline.old_files import OldFiles
from data_pipeline.store import Store, WindowStore

HDF5_SUFFIXES = (".h5", ".hdf5")


def is_store(path: Path) -> bool:
    """Whether the name is that of a store: an HDF5 suffix, or a folder with an ArrayRecord store's description."""
    return path.suffix in HDF5_SUFFIXES if not path.is_dir() else (path / DESCRIPTION).is_file()


def open_store(path: str | Path, old: OldFiles = OldFiles()) -> Store:  # noqa: B008  (frozen)
    """One store, whatever its format; `old` says how an HDF5 file that does not describe itself is read.

    Raises ValueError, one sentence, when there is none or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return ArrayRecordStore(path)
    return WindowStore(path, old)


def open_stores(paths: Sequence[str | Path], old: OldFiles = OldFiles()) -> list[Store]:  # noqa: B008  (frozen)
    """The stores of all `paths`, in their order; a folder of stores stands for those in it, sorted by name.

    `old` as in `open_store`. Raises ValueError as `open_store`, for a folder without a store, and when a store is
    named twice.
    """
    found = [own for path in paths for own in stores_at(Path(path))]
    twice = [str(path) for path, count in Counter(path.resolve() for path in found).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is named twice: every window store counts once")
    return [open_store(path, old) for path in found]


def stores_at(path: Path) -> list[Path]:
    """The path itself when it is a store (or nothing that is known), else the stores in the folder, sorted."""
    if not path.is_dir() or is_store(path):
        return [path]
    stores = [own for own in sorted(path.iterdir()) if is_store(own) and not own.name.startswith(".")]
    if not stores:
        raise ValueError(f"the folder {path} holds no window store: neither a {DESCRIPTION} (an ArrayRecord store) nor "
                         f"files *.h5 nor folders of that kind")  # fmt: skip
    return stores
