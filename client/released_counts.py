"""What leaves a site of its held-out patients: counts that add up, and the metrics that they mean.

With noise, in the only order that is safe: the ledger is charged, durably; the patients are predicted; noise is added
to the finished counts, once; the ledger keeps what may leave; it leaves. Everything behind the noise (metrics, rounding
for a secure sum) is computed from the noised counts and from nothing else of the patients.

Legend: D elements of the counts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.case_scores import CaseScores, case_scores
from client.private_round import charged
from client.site import Site
from medfed.canonical import canonical_bytes, sha256_hex
from medfed.messages import Fields, RoundInstruction, bytes_field, model_digest
from medfed.metrics.mergeable import CountLayout
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.study import StudyConfig
from medfed.tasks import task_of
from privacy.noise import add_gaussian
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream

_log = logging.getLogger("medfed.client.released_counts")


@dataclass(frozen=True)
class ReleasedCounts:
    """Counts that may leave the site.

    Attributes:
        count_D: summed over held-out patients, noised or not, float64.
        metrics: what they mean at this site.
    """

    count_D: NDArray[np.float64]
    metrics: dict[str, float]


def exact_counts(study: StudyConfig, model: AdaptedModel, site: Site, state: ModelState) -> ReleasedCounts:
    """Counts without noise, for studies whose held-out patients are not protected, and the metrics of the cases."""
    scores = _scores(study, model, site, state)
    metrics = {name: float(value_R[0]) for name, value_R in scores.metrics(np.ones((1, scores.num_patients))).items()}
    names = task_of(study.task).metric_names
    return ReleasedCounts(
        CountLayout(study.task).contributions(scores).sum(axis=0),
        {name: value for name, value in metrics.items() if name in names},
    )


def noised_counts(
    count_D: NDArray[np.float64], *, noise_multiplier: float, l2_bound: float, stream: RandomStream
) -> NDArray[np.float64]:
    """Counts plus Gaussian noise of standard deviation ``noise_multiplier * l2_bound`` on every element.

    Guarantee: the Gaussian mechanism of that noise multiplier, adjacency add/remove one patient, if no patient adds
    more than ``l2_bound`` to the counts; hardened as told in :mod:`privacy.noise`. Once per call.

    Raises:
        PrivacyError: for no noise, or counts that are not finite.
    """
    noised_D = add_gaussian(torch.from_numpy(count_D), noise_std=noise_multiplier * l2_bound, stream=stream)
    return np.asarray(noised_D.numpy(), dtype=np.float64)


def release_noised(
    instruction: RoundInstruction,
    fields: Fields,
    study: StudyConfig,
    model: AdaptedModel,
    site: Site,
    state: ModelState,
    *,
    masked: tuple[bytes, Callable[[ReleasedCounts], bytes]] | None = None,
) -> ReleasedCounts | bytes:
    """Counts of this site's held-out patients with noise, charged before anything is predicted.

    A request that was answered before gets the same counts again, at no cost. Under masks it does not: a masked vector
    leaves once, and another round is another release with its own charge.

    Args:
        instruction: what was asked.
        fields: of the instruction; the adapter in it is part of what was asked.
        study: resolved and approved, with a noised evaluation.
        model: of the study.
        site: whose ledger pays.
        state: the model to evaluate.
        masked: identity of a masked round, and what puts the counts under its masks.

    Returns:
        The counts, or the reply under masks.

    Raises:
        PrivacyError: if delta would allow one held-out patient to be given away whole; nothing was spent.
        BudgetError: if the cohort's budget does not allow it; nothing was spent or predicted.
        LedgerError: if the ledger cannot be trusted or written; nothing was predicted.
    """
    plan, layout = PrivacyPlan.of_study(study), CountLayout(study.task)
    mechanism = plan.evaluation_mechanism
    plan.check_cohort(len({item.patient_id for item in site.cohort(study, model.pixels).test}))
    asked = masked[0] if masked else model_digest(bytes_field(fields, "adapter"), bytes_field(fields, "broadcast"))
    request = sha256_hex(canonical_bytes(["evaluate", study.digest, instruction.scope, instruction.round, asked.hex()]))
    stored = site.ledger.stored_reply(site.cohort_name(instruction.scope), request)
    if stored is not None and masked is None:
        _log.info("event=sent_again round=%d", instruction.round)
        return _released(np.array(json.loads(stored), dtype=np.float64), layout)
    with charged(instruction, study, plan, mechanism, layout.l2_bound, request, site) as kept:
        count_D = noised_counts(
            layout.contributions(_scores(study, model, site, state)).sum(axis=0),
            noise_multiplier=mechanism.noise_multiplier,
            l2_bound=layout.l2_bound,
            # Not the stream of the round's training: noise must never be used twice.
            stream=site.random_stream(f"{instruction.scope}/evaluation", instruction.round),
        )
        released = _released(count_D, layout)
        if masked is None:
            kept(canonical_bytes(count_D.tolist()), {})
            return released
        reply = masked[1](released)
        kept(sha256_hex(reply).encode(), {})  # a receipt: the vector itself is never sent twice
        return reply


def _released(count_D: NDArray[np.float64], layout: CountLayout) -> ReleasedCounts:
    return ReleasedCounts(count_D, layout.metrics(count_D))


def _scores(study: StudyConfig, model: AdaptedModel, site: Site, state: ModelState) -> CaseScores:
    return case_scores(
        model,
        study.task,
        site.cohort(study, model.pixels).test,
        state=state,
        features=site.features,
        batch_size=study.training.batch_size,
        with_distances=False,
    )
