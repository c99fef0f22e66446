"""MATLAB files of corpora: version 5 to 7 through SciPy, numeric variables of version 7.3 (HDF5) through h5py."""

from pathlib import Path

import numpy as np

from data_pipeline.readers.matlab5 import check_matlab5, is_matlab73


def read_numeric(path: Path) -> dict[str, np.ndarray]:
    """The numeric variables, in MATLAB's orientation. Raises ValueError for a file that cannot be read."""
    if is_matlab73(path):
        import h5py

        try:
            with h5py.File(path, "r") as file:
                datasets = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
                found = {_text(name): item[()].T for name, item in datasets.items()}
        except Exception as error:  # h5py raises many types for a damaged file
            raise ValueError(f"damaged: not a MATLAB file that can be read ({error})") from error
    else:
        found = {name: value for name, value in _load(path).items() if isinstance(value, np.ndarray)}
    return {name: value for name, value in found.items() if value.dtype.kind in "fiu"}


def read_struct(path: Path, name: str) -> np.void:
    """The 1x1 structure `name`: `value["field"]` is an array; a cell array is one of dtype object.

    Raises ValueError, one sentence, when there is none, or the file is version 7.3.
    """
    if is_matlab73(path):
        raise ValueError("a MATLAB file of version 7.3, the published one is version 5: save it again with -v7")
    variables = _load(path)
    value = variables.get(name)
    if not isinstance(value, np.ndarray) or value.dtype.names is None or value.size != 1:
        others = ", ".join(key for key in variables if not key.startswith("__")) or "no variables"
        raise ValueError(f"holds no 1x1 structure {name!r} but {others}")
    return value.reshape(-1)[0]


def _text(name: str | bytes) -> str:
    """h5py returns a name that is no UTF-8 as bytes."""
    return name if isinstance(name, str) else name.decode("latin-1")


def _load(path: Path) -> dict:
    import scipy.io

    check_matlab5(path)
    try:
        return scipy.io.loadmat(path)
    except Exception as error:  # SciPy raises many types for a damaged file
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(f"damaged: not a MATLAB file that can be read ({type(error).__name__}: {first})") from error
