"""Draws: exact counts, uniform in distribution, blind to padding, and a function of (seed, stream, step) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumamba_jax import masking


@pytest.fixture
def key():
    return masking.stream_key(0, "mask", 3)


@pytest.mark.parametrize("scope", ["per_sample", "reference"])
@pytest.mark.parametrize(("channels", "expected"), [(22, 352), (20, 320), (29, 464)])
def test_number_of_hidden_patches_is_the_references(key, channels, expected, scope):
    mask = np.asarray(masking.draw_mask(key, (3, channels, 1280), ratio=0.5, scope=scope))
    patches = mask.reshape(3, channels, 32, 40)
    assert np.all(patches.any(3) == patches.all(3))  # whole patches, aligned with the tokens
    assert patches.all(3).sum(axis=(1, 2)).tolist() == [expected] * 3
    identical = np.array_equal(mask[0], mask[1])
    assert identical == (scope == "reference")


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.57, 0.6, 0.7, 1.0])
def test_count_is_pythons_truncation(key, ratio):
    mask = np.asarray(masking.draw_mask(key, (2, 5, 80), ratio=ratio, patch=(1, 8)))
    assert (mask.sum(axis=(1, 2)) // 8).tolist() == [int(50 * ratio)] * 2


def test_every_patch_is_hidden_equally_often():
    draw = jax.jit(lambda step: masking.draw_mask(masking.stream_key(1, "mask", step), (64, 4, 200), ratio=0.3))
    share = np.mean([np.asarray(draw(step))[:, :, ::40].mean(0) for step in range(30)], axis=0)
    # 1920 draws of a patch: standard deviation 0.0105; 20 patches
    np.testing.assert_allclose(share, 0.3, atol=0.045)


def test_padding_is_never_hidden_and_the_count_follows_the_real_patches(key):
    channel_mask = np.arange(6)[None] < np.array([[6], [4], [1], [0]])
    patch_mask = np.arange(5)[None] < np.array([[5], [2], [5], [5]])
    draw = jax.jit(lambda c, p: masking.draw_mask(key, (4, 6, 200), ratio=0.5, channel_mask=c, patch_mask=p))
    hidden = np.asarray(draw(channel_mask, patch_mask))[:, :, ::40]
    real = channel_mask[:, :, None] & patch_mask[:, None, :]
    assert not np.any(hidden & ~real)
    assert hidden.sum(axis=(1, 2)).tolist() == [15, 4, 2, 0]


def test_ragged_rectangles_follow_each_scope(key):
    per_sample = np.asarray(masking.draw_mask(key, (1, 5, 40), ratio=1.0, patch=(2, 16)))
    assert per_sample.all()  # the ragged row and column are candidates too
    reference = np.asarray(masking.draw_mask(key, (1, 5, 40), ratio=1.0, patch=(2, 16), scope="reference"))
    # 2 x 2 = 4 draws out of a row-major list of 3 x 3: the first row of rectangles and one of the second (quirk 28)
    assert reference[0, :2].all()
    assert reference[0, 2:4, :16].all()
    assert reference.sum() == 2 * 40 + 2 * 16


def test_masked_patch_ratio_counts_real_patches_only(key):
    patch_mask = jnp.asarray([[True, True, False, False]])
    mask = masking.draw_mask(key, (1, 3, 160), ratio=0.5, patch_mask=patch_mask)
    valid = masking.valid_samples(jnp.zeros((1, 3, 160)), patch_mask=patch_mask)
    np.testing.assert_allclose(masking.masked_patch_ratio(mask, valid, 40), 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.2}, "between 0 and 1"),
        ({"patch": (1, 400)}, "do not fit"),
        ({"scope": "batch"}, "per_sample"),
    ],
)
def test_bad_mask_options_are_named(key, options, message):
    with pytest.raises((ValueError, TypeError), match=message):  # TypeError: from the annotation, when checked
        masking.draw_mask(key, (1, 4, 200), **options)


def test_streams_and_steps_are_independent_and_repeatable():
    def data(seed, name, step):
        return tuple(np.asarray(jax.random.key_data(masking.stream_key(seed, name, step))).tolist())

    keys = {data(seed, name, step) for seed in (0, 1) for name in masking.STREAMS for step in (0, 1, 2)}
    assert len(keys) == 2 * 5 * 3
    traced = jax.jit(lambda step: jax.random.key_data(masking.stream_key(1, "views", step)))(jnp.int32(2))
    assert tuple(np.asarray(traced).tolist()) == data(1, "views", 2)
    with pytest.raises(ValueError, match="unknown random stream 'rope'"):
        masking.stream_key(0, "rope", 0)


def test_views_start_anywhere_in_the_window_and_are_cut_there():
    config = masking.ViewConfig()
    signal = jnp.asarray(np.random.default_rng(0).normal(size=(500, 2, 648)), jnp.float32)
    local, global_ = masking.draw_view_starts(
        masking.stream_key(0, "views", 0), config, n_windows=500, n_times=648, patch_size=40
    )
    assert local.shape == (4, 500)
    assert sorted(set(np.asarray(global_).ravel().tolist())) == list(range(9))  # 0 .. 648 - 640, both ends
    assert int(local.min()) < 5
    assert int(local.max()) > 648 - 160 - 5
    assert int(local.max()) <= 648 - 160
    assert len(set(np.asarray(local[:, 0]).tolist())) > 1
    views = np.asarray(masking.crop_views(signal, local, 160))
    for v, b in [(0, 0), (3, 17), (1, 499)]:
        start = int(local[v, b])
        np.testing.assert_array_equal(views[v, b], np.asarray(signal)[b, :, start : start + 160])


def test_crop_equals_the_references_crop(golden_dir):
    from safetensors.numpy import load_file

    golden = load_file(golden_dir / "losses" / "pretrain_objectives.safetensors")
    signal, starts = golden["f64/normalized_input"], golden["in/start_local"].astype(np.int32)
    views = masking.crop_views(jnp.asarray(signal), jnp.asarray(starts), 160)
    for v in range(4):
        for b in range(3):
            np.testing.assert_array_equal(views[v, b], signal[b, :, starts[v, b] : starts[v, b] + 160])


def test_views_stay_inside_the_real_part_and_short_windows_are_marked():
    config = masking.ViewConfig(local_patches=2, global_patches=6)
    patch_mask = jnp.asarray(np.arange(10)[None] < np.array([[10], [7], [3]]))
    local, global_ = jax.jit(
        lambda key: masking.draw_view_starts(
            key, config, n_windows=3, n_times=400, patch_size=40, patch_mask=patch_mask
        )
    )(masking.stream_key(0, "views", 9))
    length = np.array([400, 280, 120])
    assert np.all(np.asarray(local) + 80 <= length)
    assert np.all(np.asarray(global_)[:, :2] + 240 <= length[:2])
    assert np.all(np.asarray(global_)[:, 2] == 0)
    marks = np.asarray(masking.view_patch_mask(global_, 6, 40, patch_mask, 400))
    assert marks[:, :2].all()
    assert marks[:, 2].tolist() == [[True] * 3 + [False] * 3] * 2


def test_view_longer_than_the_window_is_an_error():
    with pytest.raises(ValueError, match="16 patches of 40 samples is longer than the window of 200"):
        masking.draw_view_starts(
            masking.stream_key(0, "views", 0), masking.ViewConfig(), n_windows=2, n_times=200, patch_size=40
        )


def test_noise_and_directions_are_standard_normal_float32():
    noise = np.asarray(masking.draw_position_noise(masking.stream_key(0, "noise", 0), 64, 22))
    directions = np.asarray(masking.draw_sigreg_directions(masking.stream_key(0, "slices", 0), 384, 300))
    assert noise.shape == (64, 22, 3)
    for draw in (noise, directions):
        assert draw.dtype == np.float32
        assert abs(draw.mean()) < 4 / np.sqrt(draw.size)
        assert abs(draw.std() - 1) < 4 / np.sqrt(2 * draw.size)
