"""Where windows lie, which are unusable, and what a label table means."""

import numpy as np
import pytest

from data_pipeline.recording import Annotation, Recording
from data_pipeline.windows import Segment, annotation_segments, cut_windows, read_label_table

RNG = np.random.default_rng(0)


def recording(n=1000, sfreq=100.0, **changes):
    return Recording(**({"signal_uv": RNG.normal(size=(2, n)), "sfreq": sfreq, "ch_names": ("C3", "C4")} | changes))


def table(tmp_path, text, **options):
    (tmp_path / "labels.csv").write_text(text)
    return read_label_table(tmp_path / "labels.csv", **options)


def test_windows_tile_the_recording_and_the_tail_is_dropped():
    source = recording(n=1050)
    windows = cut_windows(source, n_times=200, stride=200)
    assert list(windows.start_samples) == [0, 200, 400, 600, 800]
    assert windows.signal.dtype == np.float32
    for start, window in zip(windows.start_samples, windows.signal, strict=True):
        np.testing.assert_array_equal(window, source.signal_uv[:, start : start + 200].astype(np.float32))
    assert windows.rejected == {}
    assert windows.labels == [None] * 5


def test_overlapping_windows_and_a_window_that_fits_exactly():
    assert list(cut_windows(recording(n=500), n_times=200, stride=100).start_samples) == [0, 100, 200, 300]
    assert list(cut_windows(recording(n=200), n_times=200, stride=100).start_samples) == [0]
    assert cut_windows(recording(n=199), n_times=200, stride=100).signal.shape == (0, 2, 200)


def test_windows_lie_wholly_inside_their_segment():
    segments = (Segment(0.0, 2.5, "a"), Segment(2.505, 7.0, "b"), Segment(9.5, None, "c"))
    windows = cut_windows(recording(), n_times=100, stride=100, segments=segments)
    assert list(zip(windows.start_samples, windows.labels, strict=True)) == [
        (0, "a"),
        (100, "a"),
        (251, "b"),
        (351, "b"),
        (451, "b"),
        (551, "b"),
    ]


def test_gaps_and_flat_windows_are_rejected_and_counted():
    source = recording(gaps=((3.0, 3.02),))
    source.signal_uv[:, 600:800] = 5.0
    source.signal_uv[0, 800:] = 5.0  # one living channel is enough
    windows = cut_windows(source, n_times=200, stride=200)
    assert list(windows.start_samples) == [0, 400, 800]
    assert windows.rejected == {"not finite": 1, "flat": 1}
    source.signal_uv[1, 450] = np.nan
    assert cut_windows(source, n_times=200, stride=200).rejected == {"not finite": 2, "flat": 1}


@pytest.mark.parametrize("segment", [Segment(5.0, 5.0), Segment(-1.0, 2.0), Segment(12.0, None)])
def test_segments_outside_the_recording_are_refused(segment):
    with pytest.raises(ValueError, match="segment"):
        cut_windows(recording(), n_times=100, stride=100, segments=(segment,))


def test_a_label_that_ends_after_the_recording_is_refused_beyond_rounding():
    assert len(cut_windows(recording(), n_times=100, stride=100, segments=(Segment(0, 10.9),)).signal) == 10
    with pytest.raises(ValueError, match="ends at 30 s, the recording at 10 s"):
        cut_windows(recording(), n_times=100, stride=100, segments=(Segment(0, 30),))


def test_annotations_become_segments():
    marks = (Annotation(1.0, 2.0, "T1"), Annotation(4.0, 0.0, "T2"), Annotation(9.0, 5.0, "T1"), Annotation(0, 1, "x"))
    segments, ignored = annotation_segments(
        recording(annotations=marks), {"T1": "left", "T2": "right"}, event_seconds=1.5
    )
    assert segments == (Segment(1.0, 3.0, "left"), Segment(4.0, 5.5, "right"), Segment(9.0, 10.0, "left"))
    assert ignored == 1


def test_class_table(tmp_path):
    found = table(
        tmp_path,
        "file,start,stop,label,subject\na.edf,0,10,rest,S1\na.edf,10,,task,S1\nb.edf,,,rest,S2\n",
    )
    assert found.segments == {
        "a.edf": (Segment(0, 10, "rest"), Segment(10, None, "task")),
        "b.edf": (Segment(0, None, "rest"),),
    }
    assert found.subjects == {"a.edf": "S1", "b.edf": "S2"}
    assert found.class_names == ("rest", "task")


def test_numbers_are_classes_in_numerical_order_and_fractions_are_targets(tmp_path):
    assert table(tmp_path, "file,label\na,10\nb,9\n").class_names == ("9", "10")
    found = table(tmp_path, "file,label\na,1.5\nb,2\n")
    assert found.class_names is None
    assert found.segments["b"] == (Segment(0, None, (2.0,)),)
    assert table(tmp_path, "file,label\na,1\nb,2\n", task="regression").class_names is None
    assert table(tmp_path, "file,label\na,1.5\nb,2\n", task="classification").class_names == ("1.5", "2")
    several = table(tmp_path, "file,age,score\na,30,1\n")
    assert several.segments["a"] == (Segment(0, None, (30.0, 1.0)),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs the columns file and label"),
        ("file,start\na,1\n", "needs the columns file and label"),
        ("file,label\n", "no rows"),
        ("file,label\na,\n", "line 2: label is empty"),
        ("file,label\n,x\n", "line 2: file is empty"),
        ("file,label,start\na,x,soon\n", "line 2: start is 'soon'"),
        ("file,label,start,stop\na,x,5,4\n", "enclose nothing"),
        ("file,label,subject\na,x,S1\na,y,S2\n", "line 3: file 'a' belongs to 'S1'"),
        ("file,age,sex\na,30,f\n", "must be numbers, found 'f'"),
    ],
)
def test_malformed_tables_name_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, text)


def test_missing_table_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.csv does not exist"):
        read_label_table(tmp_path / "no.csv")
