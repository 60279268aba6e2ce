"""Annotators: the truth with nothing added, wider and tighter outlines, misses at their rate, readers who differ."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medfed.shift_profile import AnnotatorShift
from simulation.shift.annotator import annotate, reader_margin_px, signed_distance_px
from simulation.shift.draws import Drawn

Labels = npt.NDArray[np.uint8]


def label_map(seed: int = 0) -> Labels:
    """Two blobs side by side, classes 1 and 3."""
    rows, columns = np.mgrid[:64, :64]
    shift = np.random.default_rng(seed).integers(-4, 5, 4)
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[np.hypot(rows - 28 - shift[0], columns - 20 - shift[1]) < 10] = 1
    labels[np.hypot(rows - 36 - shift[2], columns - 44 - shift[3]) < 8] = 3
    return labels


def drawn_by(shift: AnnotatorShift, seed: int = 0, reader_px: float = 0.0) -> Labels:
    return annotate(label_map(), shift, reader_margin_px=reader_px, draws=Drawn(seed, ()))


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_annotator_without_habits_draws_the_truth(seed: int) -> None:
    truth = label_map(seed)
    assert np.array_equal(annotate(truth, AnnotatorShift(), reader_margin_px=0.0, draws=Drawn(seed, ())), truth)
    barely = AnnotatorShift(boundary_sd_px=1e-9)  # through the formula, not around it
    assert np.array_equal(annotate(truth, barely, reader_margin_px=0.0, draws=Drawn(seed, ())), truth)


@pytest.mark.parametrize("margin_px", [-3, -1, 1, 2])
def test_margin_is_a_dilation_or_erosion_by_a_disc(margin_px: int) -> None:
    """Oracle: pixels within the margin of the mask, counted one by one with a disc-shaped structuring element."""
    only = np.where(label_map() == 1, np.uint8(1), np.uint8(0))
    drawn = annotate(
        only, AnnotatorShift(margin_px=(margin_px, margin_px)), reader_margin_px=0.0, draws=Drawn(0, ())
    )  # fmt: skip
    size = abs(margin_px)
    rows, columns = np.mgrid[-size : size + 1, -size : size + 1]
    disc = np.hypot(rows, columns) < size + 0.5
    if margin_px > 0:
        expected = ndimage.binary_dilation(only == 1, disc)
    else:
        expected = ndimage.binary_erosion(only == 1, disc)
    assert np.array_equal(drawn == 1, expected)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(-4, 4), st.floats(0, 3), st.floats(0, 1))
def test_annotation_holds_no_class_that_was_not_there(seed: int, margin: float, sd: float, misses: float) -> None:
    shift = AnnotatorShift(margin_px=(margin, margin), boundary_sd_px=sd, misses=misses)
    once, again = drawn_by(shift, seed), drawn_by(shift, seed)
    assert np.array_equal(once, again)
    assert set(np.unique(once)) <= {0, 1, 3}
    assert once.dtype == np.uint8


def test_wider_outlines_never_overlap_and_grow() -> None:
    areas = [int((drawn_by(AnnotatorShift(margin_px=(m, m))) > 0).sum()) for m in (-2.0, 0.0, 2.0, 6.0)]
    assert areas == sorted(areas)
    assert len(set(areas)) == 4


def test_straying_outline_lies_on_average_where_it_should_and_strays_by_its_size() -> None:
    """Measured on a long straight edge; two thirds or three halves of the size would be told apart."""
    label = np.zeros((256, 256), dtype=np.uint8)
    label[:, :128] = 1
    shift = AnnotatorShift(boundary_sd_px=2.0, boundary_scale_px=4.0)
    edges = np.concatenate(
        [(annotate(label, shift, reader_margin_px=0.0, draws=Drawn(seed, ())) == 1).sum(axis=1) for seed in range(8)]
    ) - 128  # fmt: skip
    assert abs(float(edges.mean())) < 0.25
    assert 0.85 < float(edges.std()) / 2.0 < 1.2


def test_structures_are_overlooked_at_the_rate_that_is_asked_for() -> None:
    shift = AnnotatorShift(misses=0.3)
    seen = sum(len(np.unique(drawn_by(shift, seed))) - 1 for seed in range(300))
    missed = 600 - seen
    sd = np.sqrt(600 * 0.3 * 0.7)
    assert abs(missed - 180) < 4 * sd


def test_readers_of_a_site_are_few_and_do_not_agree() -> None:
    shift = AnnotatorShift(readers=3, disagreement_px=1.5)
    site = Drawn(7, ("north",))
    margins = {reader_margin_px(shift, site=site, patient=site.of(number)) for number in range(60)}
    assert len(margins) == 3
    agreeing = AnnotatorShift(readers=3)
    assert {reader_margin_px(agreeing, site=site, patient=site.of(number)) for number in range(9)} == {0.0}


def test_signed_distance_is_that_of_a_double_loop() -> None:
    mask = label_map()[::2, ::2] == 1
    inside, outside = np.argwhere(mask), np.argwhere(~mask)
    expected = np.zeros(mask.shape)
    for row, column in np.ndindex(mask.shape):
        others = outside if mask[row, column] else inside
        nearest = min(float(np.hypot(row - r, column - c)) for r, c in others)
        expected[row, column] = nearest - 0.5 if mask[row, column] else 0.5 - nearest
    np.testing.assert_allclose(signed_distance_px(mask), expected)


def test_mask_that_is_empty_or_full_has_no_outline() -> None:
    assert np.all(signed_distance_px(np.zeros((4, 4), dtype=bool)) == -np.inf)
    assert np.all(signed_distance_px(np.ones((4, 4), dtype=bool)) == np.inf)
