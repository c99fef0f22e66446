"""The corpora with a command of their own: `python -m data_pipeline.prepare NAME --raw DIR --out DIR`."""

from data_pipeline.corpora.base import Corpus
from data_pipeline.corpora.tuab import Tuab

CORPORA: dict[str, type[Corpus]] = {corpus.name: corpus for corpus in (Tuab,)}
