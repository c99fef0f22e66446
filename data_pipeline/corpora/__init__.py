"""The corpora with a command of their own: `python -m data_pipeline.prepare NAME --raw DIR --out DIR`."""

from data_pipeline.corpora.base import Corpus
from data_pipeline.corpora.siena import Siena
from data_pipeline.corpora.tuab import Tuab
from data_pipeline.corpora.tuar import Tuar
from data_pipeline.corpora.tueg import Tueg
from data_pipeline.corpora.tusl import Tusl

_ALL: tuple[type[Corpus], ...] = (
    Siena,
    Tuab,
    Tuar,
    Tueg,
    Tusl,
)
CORPORA: dict[str, type[Corpus]] = {corpus.name: corpus for corpus in _ALL}
