"""Published results, as their papers print them: what `configs.task_sheet` sets beside ours.

One table per task; a row is a model, its scores in the order of the header ("value" or "value ± spread", "-" where
nothing was published, per cent where the header says so), and after a semicolon what sets the row apart; `lumamba` is
where its own row is printed, `others` what sets all models outside the family apart. Claims are the task sheet's,
unless a remark begins with a lower one.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

Level = Literal["comparable", "indicative", "not comparable"]


@dataclass(frozen=True)
class Score:
    """A published score and its spread over seeds, if it was given."""

    value: float
    sd: float | None = None


@dataclass(frozen=True)
class Published:
    """What one model scored on one task.

    scores: name of the metric as `lumamba_jax.metrics` has it -> score. source: where the numbers are printed. remark:
    what sets the row apart. level: the claim, where it is another than that of the task.
    """

    model: str
    scores: dict[str, Score] = field(default_factory=dict)
    source: str = ""
    remark: str = ""
    level: Level | None = None


FAMILY = ("LuMamba", "LUNA", "FEMBA")
"""First words of the models of one code base, which scores all of them alike."""
_LUMAMBA_CARD = "model card of LuMamba"
_LUMAMBA_BLOG = f"{_LUMAMBA_CARD}, blog post at thorirmar.com"
_LUMAMBA = f"LuMamba, arXiv 2603.19100, {_LUMAMBA_BLOG}"
_LUNA = "LUNA, arXiv 2510.22257"
_FEMBA = "FEMBA, arXiv 2502.06438"


def _table(columns: str, source: str, text: str, *, lumamba: str = "", others: str = "") -> tuple[Published, ...]:
    names = columns.split()
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        values, _, remark = (part.strip() for part in line.partition(";"))
        model, *cells = (cell.strip() for cell in values.split("|"))
        if len(cells) != len(names):
            raise ValueError(f"{model}: {len(cells)} cells for the columns {columns}")
        scores = {
            name.removesuffix("%"): _score(cell, percent=name.endswith("%"))
            for name, cell in zip(names, cells, strict=True)
            if cell != "-"
        }
        if not model.startswith(FAMILY):
            remark = "; ".join(filter(None, (others, remark)))
        level = next((level for level in get_args(Level) if remark.startswith(f"{level}: ")), None)
        remark = remark.removeprefix(f"{level}: ") if level else remark
        own = lumamba if model.startswith("LuMamba") else source
        rows.append(Published(model, scores, own, remark, level))
    return tuple(rows)


def _score(cell: str, *, percent: bool) -> Score:
    value, _, sd = cell.partition("±")
    scale = 100 if percent else 1
    return Score(round(float(value) / scale, 6), round(float(sd) / scale, 6) if sd else None)


TUAB = _table(
    "balanced_accuracy% aupr auroc",
    f"table 1 of {_LUNA}, table II of {_FEMBA}, and the papers they quote",
    """
    EEGNet            | 76.42 ± 0.36 | 0.8299 ± 0.0043 | 0.8412 ± 0.0031
    SPaRCNet          | 78.96 ± 0.18 | 0.8414 ± 0.0018 | 0.8676 ± 0.0012
    ContraWR          | 77.46 ± 0.41 | 0.8421 | 0.8456
    CNN-Transformer   | 77.77 ± 0.22 | 0.8433 | 0.8461
    FFCL              | 78.48 ± 0.38 | 0.8448 | 0.8569
    ST-Transformer    | 79.66 ± 0.23 | 0.8521 | 0.8707
    BENDR             | 76.96 ± 3.98 | -      | 0.8397
    BrainBERT         | -            | 0.8460 | 0.8530
    EEGFormer small   | -            | 0.8620 | 0.8620
    EEGFormer base    | -            | 0.8670 | 0.8670
    EEGFormer large   | -            | 0.8720 | 0.8760
    BIOT              | 79.59 ± 0.57 | 0.8692 | 0.8815 ; AUPR 0.8792 in the tables of CBraMod and its followers
    EEG2Rep           | 80.52 ± 2.22 | -      | 0.8843
    CEReBrO           | 81.67 ± 0.23 | 0.9049 | 0.8916
    LaBraM base       | 81.40        | 0.8965 | 0.9022
    LaBraM large      | 82.26        | 0.9130 | 0.9127
    LaBraM huge       | 82.58        | 0.9204 | 0.9162
    CBraMod           | 82.49 ± 0.25 | 0.9221 | 0.9156 ; own paper: 82.89 ± 0.22 %, 0.9258, 0.9227
    FEMBA base        | 81.05 ± 0.14 | 0.8894 | 0.8829
    FEMBA large       | 81.47 ± 0.11 | 0.8992 | 0.8856
    FEMBA huge        | 81.82 ± 0.16 | 0.9005 | 0.8921
    LUNA base         | 80.63 ± 0.08 | 0.8953 ± 0.0016 | 0.8868 ± 0.0015
    LUNA large        | 80.96 ± 0.10 | 0.8986 ± 0.0005 | 0.8924 ± 0.0010
    LUNA huge         | 81.57 ± 0.11 | 0.9029 ± 0.0014 | 0.8957 ± 0.0011
    LuMamba tiny      | 80.99        | 0.892  | 0.883  ; mixed objective; AUROC 0.8825 where four digits are given
    """,
    lumamba=_LUMAMBA,
    others="indicative: the length of its windows is not stated here",
)

TUAR_FAMILIES = _table(
    "auroc aupr",
    f"{_LUNA}, {_FEMBA}; spread of LUNA 0.003 to 0.011, of FEMBA 0.003 to 0.012",
    """
    EEGNet            | 0.752 | 0.433
    TCN               | 0.687 | 0.408
    EEG-GNN           | 0.837 | 0.488
    GraphS4mer        | 0.833 | 0.461
    BrainBERT         | 0.753 | 0.350
    EEGFormer small   | 0.847 | 0.488
    EEGFormer base    | 0.847 | 0.483
    EEGFormer large   | 0.852 | 0.483
    FEMBA tiny        | 0.918 | 0.518
    FEMBA base        | 0.900 | 0.559
    FEMBA large       | 0.915 | 0.521
    LUNA base         | 0.902 | 0.495
    LUNA large        | 0.918 | 0.505
    LUNA huge         | 0.921 | 0.528
    LuMamba tiny      | 0.914 | -     ; reconstruction only; of the AUPR only 0.5 is legible
    """,
    lumamba=_LUMAMBA_CARD,
)

TUAR_BINARY = _table(
    "auroc aupr",
    _FEMBA,
    """
    FEMBA tiny  | 0.937 | 0.912
    FEMBA base  | 0.949 | 0.932
    FEMBA large | 0.944 | 0.913
    """,
)

TUAR_PER_CHANNEL = _table(
    "auroc aupr",
    _FEMBA,
    """
    FEMBA tiny  | 0.887 | 0.645
    FEMBA base  | 0.909 | 0.634
    FEMBA large | 0.899 | 0.608
    """,
)

TUAR_FAMILY_PER_CHANNEL = _table(
    "auroc aupr",
    _FEMBA,
    """
    FEMBA tiny  | 0.893 | 0.504
    FEMBA base  | 0.888 | 0.518
    FEMBA large | 0.878 | 0.516
    """,
)

TUSL = _table(
    "auroc aupr",
    f"{_LUNA}, {_FEMBA}; spread of LUNA 0.005 to 0.023, of FEMBA 0.003 to 0.012",
    """
    EEGNet            | 0.635 | 0.351
    TCN               | 0.545 | 0.344
    EEG-GNN           | 0.721 | 0.381
    GraphS4mer        | 0.632 | 0.359
    BrainBERT         | 0.588 | 0.352
    EEGFormer small   | 0.683 | 0.397
    EEGFormer base    | 0.713 | 0.393
    EEGFormer large   | 0.679 | 0.389
    FEMBA tiny        | 0.708 | 0.277
    FEMBA base        | 0.731 | 0.289
    FEMBA large       | 0.714 | 0.282
    LUNA base         | 0.767 | 0.301
    LUNA large        | 0.771 | 0.293
    LUNA huge         | 0.802 | 0.289
    LuMamba tiny      | 0.708 | 0.289 ; reconstruction only
    """,
    lumamba=_LUMAMBA_CARD,
)

SEED_V = _table(
    "balanced_accuracy kappa f1_weighted",
    f"{_LUNA}, baselines from CBraMod, arXiv 2412.07236",
    """
    EEGNet          | 0.2961 | 0.1006 | 0.2749
    EEGConformer    | 0.3537 | 0.1772 | 0.3487
    SPaRCNet        | 0.2949 | 0.1121 | 0.2979
    ContraWR        | 0.3546 | 0.1905 | 0.3544
    CNN-Transformer | 0.3678 | 0.2072 | 0.3642
    FFCL            | 0.3641 | 0.2078 | 0.3645
    ST-Transformer  | 0.3052 | 0.1083 | 0.2833
    BIOT            | 0.3837 | 0.2261 | 0.3856
    LaBraM base     | 0.3976 | 0.2386 | 0.3974
    CBraMod         | 0.4091 | 0.2569 | 0.4101
    LUNA base       | 0.3730 | 0.1831 | 0.3389
    LUNA large      | 0.3918 | 0.2073 | 0.3586
    LUNA huge       | 0.3900 | 0.2037 | 0.3506
    LuMamba tiny    | 0.35   | 0.191  | - ; not comparable: reconstruction only; its loader of SEED-V is unknown
    """,
    lumamba=_LUMAMBA_CARD,
)

MUMTAZ2016 = _table(
    "balanced_accuracy aupr auroc",
    "table 10 of CBraMod, arXiv 2412.07236, as quoted in table 19 of NeurIPT",
    """
    EEGNet          | 0.9232 | 0.9626 | 0.9639
    EEGConformer    | 0.9308 | 0.9684 | 0.9702
    SPaRCNet        | 0.9316 | 0.9754 | 0.9781
    ContraWR        | 0.9195 | 0.9589 | 0.9621
    CNN-Transformer | 0.9305 | 0.9757 | 0.9742
    FFCL            | 0.9314 | 0.9717 | 0.9753
    ST-Transformer  | 0.9135 | 0.9578 | 0.9594
    BIOT            | 0.9358 | 0.9736 | 0.9758
    LaBraM base     | 0.9409 | 0.9798 | 0.9782
    CBraMod         | 0.9560 | 0.9923 | 0.9921 ; public re-runs: balanced accuracy 0.88 to 0.90
    LuMamba tiny    | 0.72   | 0.952  | 0.931  ; mixed objective; subjects 23+19, 5+4, 5+4
    """,
    lumamba=_LUMAMBA_CARD,
    others="not comparable: subjects 24+19, 5+4, 5+5",
)

_MEDFORMER = "Medformer, arXiv 2405.19363, and TeCh (ICLR 2026)"

APAVA = _table(
    "accuracy% f1_macro% auroc% aupr%",
    _MEDFORMER,
    """
    Autoformer                | 68.64 | 68.06 | 75.94 | 74.38
    FEDformer                 | 74.94 | 73.51 | 83.72 | 82.94
    Informer                  | 73.11 | 69.47 | 70.46 | 70.75
    iTransformer              | 74.55 | 72.30 | 85.59 | 84.39
    MTST                      | 71.14 | 64.01 | 68.87 | 71.06
    Nonstationary Transformer | 71.89 | 69.74 | 70.55 | 70.78
    PatchTST                  | 67.03 | 55.97 | 65.65 | 67.99
    Reformer                  | 78.70 | 75.93 | 73.94 | 76.04
    Transformer               | 76.30 | 73.75 | 72.50 | 73.23
    Medformer                 | 78.74 | 76.31 | 83.20 | 83.66
    TeCh                      | 86.86 | 86.30 | 94.02 | 93.79
    LuMamba tiny              | -     | -     | 95.5  | 97.0  ; mixed objective
    """,
    lumamba=_LUMAMBA,
    others="not comparable: samples of 1 s",
)

TDBRAIN = _table(
    "accuracy% f1_macro% auroc% aupr%",
    _MEDFORMER,
    """
    Autoformer                | 87.33 | 87.26 | 93.81 | 93.32
    FEDformer                 | 78.13 | 78.04 | 86.56 | 86.48
    Informer                  | 89.02 | 88.98 | 96.64 | 96.75
    iTransformer              | 74.67 | 74.65 | 83.37 | 83.73
    MTST                      | 76.96 | 76.88 | 85.27 | 82.81
    Nonstationary Transformer | 87.88 | 87.78 | 97.05 | 96.99
    PatchTST                  | 79.25 | 79.20 | 87.95 | 86.36
    Reformer                  | 87.92 | 87.85 | 96.30 | 96.40
    Transformer               | 87.17 | 87.10 | 96.28 | 96.34
    Medformer                 | 89.62 | 89.62 | 96.41 | 96.51
    TeCh                      | 93.21 | 93.20 | 98.68 | 98.72
    LuMamba tiny              | -     | -     | 96.1  | 96.0  ; mixed objective
    """,
    lumamba=_LUMAMBA_BLOG,
    others="not comparable: samples of 1 s",
)

MOBI = _table(
    "r2 rmse pearson",
    "",
    "LuMamba tiny | 0.116 | 0.1482 | 0.38 ; reconstruction only; targets are angles / 90, so this RMSE is 13.3 degrees",
    lumamba=_LUMAMBA_CARD,
)
