"""Splits that are published as places of the subjects in an order within their class."""

from collections.abc import Mapping, Sequence

from data_pipeline.corpora.base import PARTS, Division, Source

Places = tuple[slice, slice, slice]


def unexpected_counts(
    sources: Sequence[Source], counts: Mapping[int, int], class_names: Sequence[str]
) -> tuple[str, ...]:
    """A sentence for every class with another number of subjects than published: the places then mean others."""
    found = {label: len({source.subject for source in sources if source.label == label}) for label in counts}
    return tuple(
        f"{found[label]} subjects are of class {class_names[label]}, {count} were expected: the published split goes "
        "by their places in order, and may mean others"
        for label, count in counts.items()
        if found[label] != count
    )


def divide_by_place(
    sources: Sequence[Source], order: Mapping[int, Sequence[str]], places: Mapping[int, Places], rule: str
) -> Division:
    """Part of each source by the place of its subject.

    order: class number -> its subjects in the published order, also those without files. places: class number -> the
    places of training, validation and test. Sources of subjects at other places are left out.
    """
    part_of: dict[str, str] = {}
    for label, subjects in order.items():
        for part, place in zip(PARTS, places[label], strict=True):
            part_of |= dict.fromkeys(subjects[place], part)
    everywhere = [s for subjects in order.values() for s in subjects]
    unused = {s: f"its subject, {s}, is in no part of the published split" for s in everywhere if s not in part_of}
    parts = {source.name: part_of[source.subject] for source in sources if source.subject in part_of}
    left_out = {source.name: unused[source.subject] for source in sources if source.subject in unused}
    return Division(parts, rule=rule, left_out=left_out)
