import numpy as np
import pytest
import torch

from medfed.metrics.surface import surface_distances


def _outline(mask):
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner)


def _slow(predicted, mask, spacing):
    """Distances between all pairs of outline pixels."""
    a, b = _outline(predicted) * np.array(spacing), _outline(mask) * np.array(spacing)
    distance = np.linalg.norm(a[:, None] - b[None], axis=-1)
    to_mask, to_predicted = distance.min(axis=1), distance.min(axis=0)
    hd95 = max(np.percentile(to_mask, 95), np.percentile(to_predicted, 95))
    return hd95, np.concatenate([to_mask, to_predicted]).mean()


def _blobs(seed):
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:40, :48]
    masks = []
    for _ in range(2):
        y, x, radius = generator.uniform(10, 30), generator.uniform(10, 30), generator.uniform(4, 9)
        masks.append((rows - y) ** 2 + (columns - x) ** 2 * generator.uniform(0.5, 2) < radius**2)
    return masks


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 2.5)])
@pytest.mark.parametrize("seed", range(4))
def test_distances_are_those_between_all_pairs_of_outline_pixels(seed, spacing):
    predicted, mask = _blobs(seed)
    hd95, average = surface_distances(torch.tensor(predicted)[None], torch.tensor(mask)[None], spacing=spacing)
    slow_hd95, slow_average = _slow(predicted, mask, spacing)
    assert hd95[0] == pytest.approx(slow_hd95, rel=1e-5)
    assert average[0] == pytest.approx(slow_average, rel=1e-5)


def test_shift_by_three_pixels_is_three_pixels_or_as_many_millimetres():
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 8:20, 8:20] = True
    shifted = torch.roll(mask, 3, dims=1)
    assert surface_distances(shifted, mask, spacing=(1.0, 1.0))[0][0] == pytest.approx(3.0)
    assert surface_distances(shifted, mask, spacing=(0.5, 1.0))[0][0] == pytest.approx(1.5)


def test_masks_at_the_edge_of_the_image_are_measured_as_any_other():
    mask, predicted = np.zeros((20, 20), dtype=bool), np.zeros((20, 20), dtype=bool)
    mask[:6, :6], predicted[:9, :6] = True, True
    found = surface_distances(torch.tensor(predicted)[None], torch.tensor(mask)[None], spacing=(1.0, 1.0))
    assert [float(value[0]) for value in found] == pytest.approx(_slow(predicted, mask, (1.0, 1.0)), rel=1e-5)


def test_empty_masks_have_no_distance_and_equal_ones_none():
    empty, full = torch.zeros(16, 16, dtype=torch.bool), torch.zeros(16, 16, dtype=torch.bool)
    full[4:9, 4:9] = True
    predicted, mask = torch.stack([empty, full, empty, full]), torch.stack([full, empty, empty, full])
    hd95, average = surface_distances(predicted, mask, spacing=(1.0, 1.0))
    assert np.isnan(hd95[:3]).all()
    assert np.isnan(average[:3]).all()
    assert (hd95[3], average[3]) == (0.0, 0.0)
    assert surface_distances(predicted[:0], mask[:0], spacing=(1.0, 1.0))[0].shape == (0,)
