"""What is summed under masks in one round: a site's vector of integers, and what the sum of them means.

Site and server derive the same channel from the study, so that nothing about it is believed from a message. The
vector is the site's update, or its clipped and noised integers, followed by its metrics: losses and scores are
summed like everything else and never seen one by one.

::

    [ update, P elements ][ value of each metric, M ][ 1 where the site has the metric, M ][ counts, D ]

An evaluation also sums counts (:mod:`medfed.metrics.mergeable`), from which the areas and errors over all sites'
patients together follow.

Legend: P elements of the update, M metrics, D counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.canonical import canonical_bytes, sha256_hex
from medfed.errors import PrivacyError
from medfed.metrics.mergeable import CountLayout
from medfed.study import StudyConfig
from medfed.tasks import task_of
from privacy.plan import PrivacyPlan
from privacy.secure_aggregation.encoding import FixedPoint, Ring, from_ring, integer_ring
from strategies.strategy import Phase

METRIC_BOUND = 16.0
"""Values of metrics are cut off at plus and minus this: scores lie within 0..1, and losses beyond it say enough."""

NOISE_DEVIATIONS = 14
"""No Skellam noise is larger than this many of its standard deviations, as it is drawn."""

COUNT_UNITS = 2**10
"""Units of a count of 1: patients with several images count in fractions, and noise is not whole either."""

_RING_BITS = 32


@dataclass(frozen=True)
class SecureSum:
    """What a sum under masks tells.

    Attributes:
        update_P: the sum of the sites' weighted updates, float64; None if the round has none.
        weight: sum of the public weights of the sites in it.
        metrics: mean of each metric over the sites that have it; absent if none has.
        count_D: sum of the sites' counts of held-out patients, float64; empty where none are told.
    """

    update_P: Tensor | None
    weight: float
    metrics: dict[str, float]
    count_D: NDArray[np.float64]


@dataclass(frozen=True)
class SecureChannel:
    """The vectors of one round.

    Attributes:
        study: resolved, with secure aggregation.
        purpose: ``train`` or ``evaluate``.
        round: of the study.
        manifest: of the update; None if there is none.
        metric_names: in the order of the vector.
        counts: what is counted; None in training.
    """

    study: StudyConfig
    purpose: str
    round: int
    manifest: AdapterManifest | None
    metric_names: tuple[str, ...]
    counts: CountLayout | None = None

    @classmethod
    def training(cls, study: StudyConfig, round_number: int, phase: Phase) -> SecureChannel:
        """The channel of a training round. Losses are summed along only where nothing is private."""
        names = ("loss",) if study.privacy is None else ()
        return cls(study, "train", round_number, phase.upload_manifest, names)

    @classmethod
    def evaluation(cls, study: StudyConfig, round_number: int) -> SecureChannel:
        """The channel of an evaluation: metrics and counts alone."""
        names = tuple(sorted(task_of(study.task).metric_names))
        return cls(study, "evaluate", round_number, None, names, CountLayout(study.task))

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all that is agreed about the vectors; bound into every mask."""
        fields = {
            "study": self.study.digest,  # covers weights, encodings and noise
            "purpose": self.purpose,
            "round": self.round,
            "update": None if self.manifest is None else self.manifest.fingerprint.hex(),
            "metrics": self.metric_names,
            "counts": self._num_counts,
        }
        return bytes.fromhex(sha256_hex(canonical_bytes(fields)))

    @property
    def num_elements(self) -> int:
        """Length of a vector."""
        return self._num_update + 2 * len(self.metric_names) + self._num_counts

    def weighted(self, update_P: Tensor, site: str, metrics: Mapping[str, float]) -> Ring:
        """A site's vector from its update: times its public weight, scaled down to the update clip norm, rounded.

        Raises:
            SecureAggregationError: if a value is NaN or infinite; the message names its tensor.
        """
        assert self.manifest is not None
        share = self.weight(site) / self._largest_weight
        encoded_P = self._fixed_point.encode(update_P.double() * share, names=self.manifest.name_at)
        return self._with_metrics(encoded_P, metrics)

    def scales_down(self, update_P: Tensor, site: str) -> bool:
        """Whether :meth:`weighted` scales a site's update down, as it is longer than the update clip norm."""
        share = self.weight(site) / self._largest_weight
        return float(torch.linalg.vector_norm(update_P.double() * share)) > self._fixed_point.clip_norm

    def noised(self, integers_P: NDArray[np.int64]) -> Ring:
        """A site's vector from a clipped sum of integers that carries its share of noise.

        Raises:
            SecureAggregationError: if it does not fit, which :meth:`fitting` and the bound of the noise exclude.
        """
        return self._with_metrics(integer_ring(integers_P, limit=self._integer_limit), {})

    def fitting(self, clipped_P: NDArray[np.int64]) -> NDArray[np.int64]:
        """A clipped sum of integers, before noise, with every element cut off where a sum over all sites could wrap.

        Costs no privacy: two sums that differ by a vector of some norm differ by no more after it.
        """
        return np.clip(clipped_P, -self.room, self.room)

    @cached_property
    def room(self) -> int:
        """Largest integer of a site's clipped sum beside which its share of the noise fits.

        Raises:
            PrivacyError: if not even one patient's gradient fits.
        """
        room = self._integer_limit - math.ceil(NOISE_DEVIATIONS * math.sqrt(self._plan.share_variance))
        if room < self._plan.l2_bound:
            raise PrivacyError(
                f"Expected room for a patient's {self._plan.l2_bound} units beside the noise of "
                f"{len(self.study.sites)} sites in {_RING_BITS} bits, got {room}; use fewer sites, or a larger "
                "noise_multiplier, which makes the units coarser."
            )
        return room

    def scores(self, metrics: Mapping[str, float], count_D: NDArray[np.float64]) -> Ring:
        """A site's vector of metrics and counts alone; counts are rounded, and cut off where a sum could wrap."""
        integers_D = np.rint(np.clip(count_D * COUNT_UNITS, -self._integer_limit, self._integer_limit))
        counted_D = integer_ring(integers_D.astype(np.int64), limit=self._integer_limit)
        vector: Ring = np.concatenate([self._with_metrics(np.empty(0, dtype=np.uint32), metrics), counted_D])
        return vector

    def opened(self, sum_P: Ring, sites: Sequence[str]) -> SecureSum:
        """What the sum of these sites' vectors means.

        Raises:
            SecureAggregationError: if it is larger than so many vectors can make it.
        """
        num_update, num_metrics = self._num_update, len(self.metric_names)
        update_P = None
        if self.manifest is not None:
            update_P = torch.from_numpy(self._update(sum_P[:num_update], len(sites)))
        values_M = self._metric_point.decode(sum_P[num_update : num_update + num_metrics], num_summands=len(sites))
        sum_P, summed_D = sum_P[: num_update + 2 * num_metrics], sum_P[num_update + 2 * num_metrics :]
        counts_M = from_ring(sum_P[num_update + num_metrics :], limit=len(sites))
        count_D = from_ring(summed_D, limit=len(sites) * self._integer_limit).astype(np.float64) / COUNT_UNITS
        metrics = {
            name: float(value / count)
            for name, value, count in zip(self.metric_names, values_M, counts_M, strict=True)
            if count > 0
        }
        return SecureSum(update_P, sum(self.weight(site) for site in sites), metrics, count_D)

    def quantisation_bound(self, num_sites: int) -> float:
        """Largest error that fixed point adds to an element of the weighted mean update over so many sites.

        For equal weights; not for integers under trust ``consortium``, which are summed exactly.
        """
        return self._fixed_point.quantisation_bound(num_sites) / num_sites

    def weight(self, site: str) -> float:
        """The public weight of a site's update."""
        declared = self.study.declared_units(site)
        assert declared is not None
        return 1.0 if self.study.strategy.weighting == "uniform" and not self._is_noised else float(declared)

    def _update(self, sum_P: Ring, num_sites: int) -> NDArray[np.float64]:
        if not self._is_noised:
            return self._fixed_point.decode(sum_P, num_summands=num_sites) * self._largest_weight
        plan, training = self._plan, self.study.training
        integers_P = from_ring(sum_P, limit=num_sites * self._integer_limit)
        # One step of plain SGD on the mean gradient; the mean divides by the sites' declared units.
        per_integer = -training.learning_rate * plan.clip_norm / plan.l2_bound / plan.sampling_rate
        return integers_P.astype(np.float64) * per_integer

    def _with_metrics(self, update_P: Ring, metrics: Mapping[str, float]) -> Ring:
        values_M = np.array([metrics.get(name, 0.0) for name in self.metric_names], dtype=np.float64)
        present_M = np.array([name in metrics for name in self.metric_names], dtype=np.uint32)
        encoded_M = self._metric_point.encode(np.clip(values_M, -METRIC_BOUND, METRIC_BOUND))
        vector: Ring = np.concatenate([update_P, encoded_M, present_M])
        return vector

    @property
    def _num_counts(self) -> int:
        return 0 if self.counts is None else self.counts.num_elements

    @property
    def _num_update(self) -> int:
        return 0 if self.manifest is None else self.manifest.num_elements

    @cached_property
    def _is_noised(self) -> bool:
        return self.study.privacy is not None and self.study.privacy.trust == "consortium"

    @cached_property
    def _plan(self) -> PrivacyPlan:
        return PrivacyPlan.of_study(self.study)

    @cached_property
    def _largest_weight(self) -> float:
        return max(self.weight(site) for site in self.study.site_names)

    @cached_property
    def _fixed_point(self) -> FixedPoint:
        secure = self.study.secure_aggregation
        assert secure is not None
        assert secure.update_clip_norm is not None
        return FixedPoint(secure.update_clip_norm, len(self.study.sites))

    @cached_property
    def _metric_point(self) -> FixedPoint:
        """As fine as the ring allows: 5e-7 for eight sites."""
        num_sites = len(self.study.sites)
        norm = METRIC_BOUND * math.sqrt(max(1, len(self.metric_names)))
        return FixedPoint(norm, num_sites, value_bits=_RING_BITS - 1 - num_sites.bit_length())

    @cached_property
    def _integer_limit(self) -> int:
        """Largest integer of a site, such that the sum over all sites does not wrap."""
        return int((2 ** (_RING_BITS - 1) - 1) // len(self.study.sites))
