"""Which patients take part in a step, and which of their images.

The amplification that the accountant computes holds for one sampler only: each patient takes part
independently of all others, with the same probability q, afresh in every step (Poisson sampling). A shuffled
loader with batches of fixed size is not that, and its epsilon would be wrong (Chua et al. 2024,
https://arxiv.org/abs/2403.17673).

What is drawn here never leaves the site, not even as a number: amplification assumes that nobody else knows
who took part. Never log it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medfed.errors import PrivacyError
from privacy.randomness import RandomStream

NUM_OUTCOMES = 2**64  # of one uniform integer


def draw_patients(num_patients: int, sampling_rate: float, stream: RandomStream) -> NDArray[np.int64]:
    """The patients of one step, in ascending order: each takes part independently with probability <= q.

    The probability is floor(q * 2**64) / 2**64 exactly: never above q and less than 2**-64 = 5.5e-20 below,
    so the epsilon accounted for q holds. Unit: one patient; adjacency: add or remove one.

    ==================  =======================================
    case                result
    ==================  =======================================
    no patient          empty
    nobody was drawn    empty; an ordinary step (it still adds noise and counts)
    q = 1               everyone, always
    q < 2**-64          nobody, ever
    ==================  =======================================

    Args:
        num_patients: size of the cohort, >= 0. Secret under add/remove adjacency, like the draw.
        sampling_rate: q, 0 < q <= 1.
        stream: eight bytes of it are used per patient, whatever q is.

    Returns:
        Indices into the cohort, int64, of random length.

    Raises:
        PrivacyError: if q is not in (0, 1], NaN included.
        ValueError: if ``num_patients`` is negative.
    """
    if not 0.0 < sampling_rate <= 1.0:
        raise PrivacyError(
            f"Expected 0 < sampling_rate <= 1, got {sampling_rate}; set the probability of one patient in one step."
        )
    # Scaling by a power of two is exact, so int() is the floor of the true product.
    threshold = int(float(sampling_rate) * NUM_OUTCOMES)
    return np.flatnonzero(stream.uint64(num_patients) < threshold).astype(np.int64)


def draw_images(count: int, limit: int, stream: RandomStream) -> NDArray[np.int64]:
    """At most ``limit`` of a patient's ``count`` images: uniform without replacement, in ascending order.

    Every subset of size min(count, limit) is equally likely. A patient with no more than ``limit`` images
    gives all of them and uses nothing of the stream. The limit bounds work, not sensitivity: that is
    bounded by clipping the patient as a whole.

    Args:
        count: images that the patient has, >= 0.
        limit: K, images per patient and step, >= 1.
        stream: source of the choice.

    Returns:
        Distinct indices in [0, count), int64; empty when the patient has no image.

    Raises:
        PrivacyError: if ``limit`` is less than 1.
        ValueError: if ``count`` is negative.
    """
    if limit < 1:
        raise PrivacyError(f"Expected a limit of at least 1 image per patient, got {limit}.")
    if count < 0:
        raise ValueError(f"Expected a count of images >= 0, got {count}.")
    images = np.arange(count, dtype=np.int64)
    if count <= limit:
        return images
    # Fisher and Yates, stopped after `limit` exchanges: place i gets one of the images from i on.
    for i in range(limit):
        chosen = i + int(stream.below(count - i, 1)[0])
        images[[i, chosen]] = images[[chosen, i]]
    return np.sort(images[:limit])
