"""Columns of names (who, which recording, which montage): one small number for each window, each name held once.

A store of 15 million windows has a few ten thousand names; as an array of strings each of its three columns would take
a gigabyte or more.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Names(NDArrayOperatorsMixin):
    """`table[codes]` without the strings: reads like an array (n,) of str, and NumPy functions take it for one.

    Attributes: table (K,) str, without repetitions; codes (n,) unsigned integers, as small as the table allows.
    """

    __slots__ = ("codes", "table")

    def __init__(self, table: Iterable[str], codes: np.ndarray) -> None:
        self.table = np.array([str(name) for name in table], dtype=str)
        codes = np.asarray(codes)
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < len(self.table):
            raise ValueError(f"codes of names must lie in 0..{len(self.table) - 1}")
        self.codes = codes.astype(np.min_scalar_type(max(len(self.table) - 1, 0)))

    @classmethod
    def of(cls, values: "Names | np.ndarray | Sequence[str]") -> "Names":
        """From one name for each window; `Names` are returned as they are."""
        if isinstance(values, Names):
            return values
        table, codes = np.unique(np.asarray(values, dtype=str), return_inverse=True)
        return cls(table, codes)

    @classmethod
    def repeated(cls, values: Sequence[str], counts: Sequence[int]) -> "Names":
        """Name `values[i]` for `counts[i]` windows, one after the other."""
        short = cls.of(values)
        return cls(short.table, np.repeat(short.codes, counts))

    @classmethod
    def concatenate(cls, parts: Sequence["Names | np.ndarray"]) -> "Names":
        """The windows of several columns, one after the other."""
        columns = [cls.of(part) for part in parts]
        table, places = np.unique(np.concatenate([column.table for column in columns]), return_inverse=True)
        places = places.astype(np.min_scalar_type(max(len(table) - 1, 0)))
        starts = np.cumsum([0, *(len(column.table) for column in columns)])
        return cls(
            table, np.concatenate([places[a:][column.codes] for a, column in zip(starts, columns, strict=False)])
        )

    def unique(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The names that occur among `rows`, (k,) str, sorted."""
        met = np.zeros(len(self.table), dtype=bool)
        met[self.codes[rows]] = True
        return np.sort(self.table[met])

    def take(self, rows: np.ndarray) -> "Names":
        """The column of `rows` alone, its table reduced to them."""
        codes = self.codes[rows]
        met = np.zeros(len(self.table), dtype=bool)
        met[codes] = True
        return Names(self.table[met], (np.cumsum(met) - 1).astype(self.codes.dtype)[codes])

    def isin(self, names: Iterable[str]) -> np.ndarray:
        """(n,) bool: whether a window has one of `names`."""
        return np.isin(self.table, np.array(list(names), dtype=str))[self.codes]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Any:
        """One name for an integer, else an array of names."""
        return self.table[self.codes[rows]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table[self.codes])

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        with_strings = all(x is self or isinstance(x, str) for x in inputs)
        if method == "__call__" and with_strings and not options:  # asked of each name once
            return ufunc(*(x.table if isinstance(x, Names) else x for x in inputs))[self.codes]
        arrays = [np.asarray(x) if isinstance(x, Names) else x for x in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001  (NumPy's protocol)
        if copy is False:
            raise ValueError("names are put together on request: they have no array to share")
        return self.table[self.codes].astype(dtype or self.table.dtype, copy=False)

    def __repr__(self) -> str:
        return f"Names of {len(self)} windows, {len(self.table)} different"
