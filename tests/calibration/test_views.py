from __future__ import annotations

import numpy as np

from calibration.views import coarse_views, mirrored, other_views


def test_other_views_are_mirrored_and_magnified() -> None:
    crop = np.zeros((1, 11, 11, 3), np.uint8)
    crop[0, :, 0], crop[0, 5, 5], crop[0, 5, 3] = 9, 1, 2
    view = other_views(crop)
    assert view.shape == crop.shape
    assert view[0, 5, 5, 0] == 1
    assert view[0, 5, 7, 0] == 2
    assert not (view == 9).any()


def test_mirrored_views_are_mirrored() -> None:
    crop = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    assert np.array_equal(mirrored(crop)[0, :, 0], crop[0, :, 1])


def test_coarse_views_keep_the_colours_and_lose_the_details() -> None:
    crop = np.zeros((1, 224, 224, 3), np.uint8)
    # The left half is grey, the right half has stripes of one pixel with the same mean.
    crop[0, :, :112] = 100
    crop[0, :, 112::2] = 200
    (view,) = coarse_views(crop)
    assert view.shape == crop.shape[1:]
    assert view.dtype == np.uint8
    assert np.ptp(crop[0, :, 120:216].astype(int)) == 200
    assert np.ptp(view[:, 128:208].astype(int)) < 40
    assert abs(float(view[:, 128:208].mean()) - 100) < 5
    assert (view[:, :90] == 100).all()


def test_a_coarse_view_of_a_small_image_still_shows_something() -> None:
    crop = np.zeros((1, 32, 32, 3), np.uint8)
    crop[0, :, 16:] = 255
    (view,) = coarse_views(crop)
    assert view[16, 4, 0] < 20
    assert view[16, 28, 0] > 235
