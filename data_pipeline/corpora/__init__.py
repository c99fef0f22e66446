"""The corpora with a command of their own: `python -m data_pipeline.prepare NAME --raw DIR --out DIR`."""

from data_pipeline.corpora.apava import Apava
from data_pipeline.corpora.base import Corpus
from data_pipeline.corpora.bids import Bids
from data_pipeline.corpora.eegmat import Eegmat
from data_pipeline.corpora.mobi import Mobi
from data_pipeline.corpora.modma import Modma
from data_pipeline.corpora.mumtaz2016 import Mumtaz2016
from data_pipeline.corpora.seed_v import SeedV
from data_pipeline.corpora.siena import Siena
from data_pipeline.corpora.tdbrain import TdBrain
from data_pipeline.corpora.tuab import Tuab
from data_pipeline.corpora.tuar import Tuar
from data_pipeline.corpora.tueg import Tueg
from data_pipeline.corpora.tusl import Tusl

_ALL: tuple[type[Corpus], ...] = (
    Apava,
    Bids,
    Eegmat,
    Mobi,
    Modma,
    Mumtaz2016,
    SeedV,
    Siena,
    TdBrain,
    Tuab,
    Tuar,
    Tueg,
    Tusl,
)
CORPORA: dict[str, type[Corpus]] = {corpus.name: corpus for corpus in _ALL}
