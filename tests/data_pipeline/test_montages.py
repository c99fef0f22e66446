"""Names, positions and the vocabulary against the reference tables and the published check values."""

import json

import numpy as np
import pytest

from data_pipeline import montages
from data_pipeline.montages import CHANNEL_ORDERS, CHANNEL_VOCABULARY, Montage, montage_of, named_montage

CHECK_VALUES = {  # metres, head frame, five decimals: printed by the reference environment
    "FP1": (-0.03090, 0.11459, 0.02787),
    "FP2": (0.02841, 0.11535, 0.02772),
    "F3": (-0.05181, 0.08669, 0.07871),
    "F4": (0.05027, 0.08744, 0.07727),
    "F7": (-0.07188, 0.07310, 0.02579),
    "F8": (0.07144, 0.07451, 0.02510),
    "C3": (-0.06715, 0.02336, 0.10451),
    "C4": (0.06533, 0.02357, 0.10369),
    "P3": (-0.05504, -0.04421, 0.09991),
    "P4": (0.05364, -0.04433, 0.10052),
    "O1": (-0.03157, -0.08057, 0.05479),
    "O2": (0.02768, -0.08049, 0.05473),
    "T3": (-0.08598, 0.01487, 0.03117),
    "T4": (0.08326, 0.01526, 0.03097),
    "T5": (-0.07446, -0.04212, 0.04127),
    "T6": (0.07103, -0.04226, 0.04120),
    "A1": (-0.08794, 0.00260, -0.02686),
    "A2": (0.08393, 0.00197, -0.02691),
    "CZ": (-0.00137, 0.02762, 0.14020),
    "CB1": (-0.04512, -0.07475, 0.05139),
    "CB2": (0.04153, -0.07516, 0.05135),
    "FP1-F7": (-0.05139, 0.09385, 0.02683),
    "E1": (0.06266, 0.05977, 0.00143),
    "E55": (0.0, -0.01066, 0.13208),
}


def test_vocabulary_is_the_sorted_union_of_its_three_sources():
    union = {n for key in ("seed-v-62", "tuh-bipolar-22", "siena-29") for n in CHANNEL_ORDERS[key]}
    assert tuple(sorted(union)) == CHANNEL_VOCABULARY
    assert len(CHANNEL_VOCABULARY) == 90


def test_vocabulary_and_orders_equal_the_reference_tables(golden_dir):
    table = json.loads((golden_dir / "tables" / "channels.json").read_text())
    assert {n: i for i, n in enumerate(CHANNEL_VOCABULARY)} == table["channel_names_to_idx"]
    assert list(CHANNEL_ORDERS["tuh-bipolar-22"]) == table["tueg"]
    assert list(CHANNEL_ORDERS["siena-29"]) == table["siena"]
    assert list(CHANNEL_ORDERS["seed-v-62"]) == table["seed"]


def test_positions_equal_the_reference_tables(golden_dir):
    from safetensors.numpy import load_file

    stored = load_file(golden_dir / "tables" / "channel_locations.safetensors")
    for key, order in {"tueg": "tuh-bipolar-22", "siena": "siena-29", "seed": "seed-v-62"}.items():
        montage = named_montage(order)
        np.testing.assert_allclose(montage.locations, stored[f"{key}/locations_f32"], rtol=0, atol=1e-7)
        np.testing.assert_array_equal(montage.channel_ids, stored[f"{key}/indices"])
        exact = montages.electrode_positions(CHANNEL_ORDERS[order])
        np.testing.assert_allclose(exact, stored[f"{key}/locations_f64"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CHECK_VALUES)
def test_position_check_values(name):
    # the E check values belong to the 129-sensor net, so a 128th sensor is asked for with them
    extra = ["E128"] if name.startswith("E") else []
    np.testing.assert_allclose(montages.electrode_positions([name, *extra])[0], CHECK_VALUES[name], atol=6e-6)


def test_template_frame_of_the_hydrocel_net_is_an_option():
    found = montages.electrode_positions(["E1", "E55", "E128"], frame="template")
    expected = [(0.06266, 0.05977, -0.02791), (0.0, -0.02315, 0.09519), (-0.06624, 0.04898, -0.04774)]
    np.testing.assert_allclose(found, expected, atol=6e-6)


def test_disk_order_is_the_known_permutation_of_the_loader_order():
    to_loader = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 8, 13]
    disk = CHANNEL_ORDERS["tuh-bipolar-22-disk"]
    assert tuple(disk[i] for i in to_loader) == CHANNEL_ORDERS["tuh-bipolar-22"]


@pytest.mark.parametrize("order", CHANNEL_ORDERS)
def test_every_published_order_has_positions(order):
    montage = named_montage(order)
    assert montage.locations.shape == (len(CHANNEL_ORDERS[order]), 3)
    assert int(order.rsplit("-", 1)[-1] if order[-1].isdigit() else 22) == len(montage)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("EEG FP1-REF", "FP1"),
        ("EEG T3-LE", "T3"),
        ("Fp1-LE", "FP1"),
        ("EEG Fp1", "FP1"),
        ("Fc5.", "FC5"),
        ("EEG Fpz-Cz", "FPZ-CZ"),
        ("EEG F1-Ref", "F1"),
        (" Fp1 - F7 ", "FP1-F7"),
        ("EEG A2-A1", "A2-A1"),
        ("EEG 001", "EEG 001"),
        ("ECG ECG", "ECG ECG"),
        ("PO7", "PO7"),
    ],
)
def test_normalize_name(label, name):
    assert montages.normalize_name(label) == name


@pytest.mark.parametrize("name", ["FP1", "T3", "T7", "CB1", "E17", "FPZ-CZ", "A1-T3"])
def test_electrodes_are_known(name):
    assert montages.is_electrode(name)


@pytest.mark.parametrize("name", ["EOG1", "ECG ECG", "EEG 001", "STATUS", "EMG", "X", "FP1-ECG", "E0", "E300", ""])
def test_other_channels_are_not_electrodes(name):
    assert not montages.is_electrode(name)


def test_find_name_bridges_old_and_new_site_names():
    assert montages.find_name("T3", ["T7", "P7"]) == "T7"
    assert montages.find_name("T3", ["T7", "T3"]) == "T3"
    assert montages.find_name("F7-T3", ["F7-T7"]) == "F7-T7"
    assert montages.find_name("T4-A2", ["T8-M2"]) == "T8-M2"
    assert montages.find_name("CZ", ["T7"]) is None


def test_bipolar_signal_is_first_minus_second_and_takes_recorded_pairs():
    signal = np.array([[1.0, 2.0], [10.0, 20.0], [7.0, 7.0]])
    found = montages.bipolar_signal(signal, ["F7", "T7", "CZ-C4"], ["F7-T3", "CZ-C4"])
    np.testing.assert_array_equal(found, [[-9.0, -18.0], [7.0, 7.0]])
    with pytest.raises(ValueError, match="derivable: T5-O1"):
        montages.bipolar_signal(signal, ["F7", "T7", "C3"], ["F7-T3", "T5-O1"])


def test_montage_refuses_what_cannot_be_right():
    with pytest.raises(ValueError, match="repeat: C3"):
        Montage("m", ("C3", "C3"), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        Montage("m", ("C3", "C4"), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="not finite for C4"):
        Montage("m", ("C3", "C4"), np.array([[0, 0, 0], [0, np.nan, 0]]))
    with pytest.raises(ValueError, match="no standard position for XX"):
        montage_of(["C3", "XX"])
    with pytest.raises(ValueError, match="siena-29"):
        named_montage("siena")


def test_names_of_derived_montages_depend_on_names_and_positions():
    a = montage_of(["C3", "C4"])
    assert a == montage_of(["C3", "C4"])
    assert a.name != montage_of(["C4", "C3"]).name
    assert a.name != montage_of(["C3", "C4"], locations=a.locations + 0.01).name
    assert montage_of(CHANNEL_ORDERS["mumtaz-19"]).name == "mumtaz-19"
    np.testing.assert_array_equal(montage_of(["C3", "PO9"]).channel_ids, [5, -1])
