"""Shadow adapters: a site's training again and again, each time on half of the patients, to attack one by the others.

What a loss says of a patient depends on how hard that patient is for everybody. Adapters that were trained with and
without that patient tell (LiRA, Carlini et al. 2022, see :mod:`privacy.audit.likelihood_ratio`). Two are attacked: the
adapter that the run released, and each shadow by means of the others. Members of a shadow are a random half, so the
second attack has as many non-members as members, and nothing but training that distinguishes them.

Legend: K shadows, N patients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from client.data import Item
from client.private_trainer import units_of
from medfed.models.folding import ModelState
from privacy.audit.likelihood_ratio import at_the_shadows_level, each_in_turn, log_likelihood_ratios, scaled
from privacy.randomness import RandomStream
from server.audit_result import Membership, ShadowAttack
from simulation.audit.blackbox import Training
from simulation.audit.membership import losses_by_patient, membership, membership_in_turn

FEWEST = 8
"""Shadows below which a patient too often has none, or one, on one side."""


@dataclass(frozen=True, eq=False)
class Population:
    """Patients of one site, whose shadows are trained.

    Attributes:
        members: images of its training patients, who trained the released adapter.
        others: images of patients who did not: held out, and made for the attack.
        num_newcomers: how many were made.
    """

    members: Sequence[Item]
    others: Sequence[Item]
    num_newcomers: int

    @property
    def items(self) -> tuple[Item, ...]:
        """All images, those of members first."""
        return (*self.members, *self.others)

    @property
    def num_members(self) -> int:
        """Patients among the members."""
        return len({item.patient_id for item in self.members})


@dataclass(frozen=True, eq=False)
class Shadows:
    """What shadows make of each patient.

    Attributes:
        scores_KN: scaled loss of each patient; higher is better.
        included_KN: who trained which.
        num_trained: patients of each.
    """

    scores_KN: NDArray[np.float64]
    included_KN: NDArray[np.bool_]
    num_trained: int


def halves(num_shadows: int, num_patients: int, coins: RandomStream) -> NDArray[np.bool_]:
    """Who trains each shadow, (K, N): a half drawn at random, rounded down, independently of all other halves."""
    chosen_KN = np.zeros((num_shadows, num_patients), dtype=np.bool_)
    for chosen_N in chosen_KN:
        chosen_N[np.argsort(coins.uint64(num_patients), kind="stable")[: num_patients // 2]] = True
    return chosen_KN


def train_shadows(
    training: Training,
    population: Population,
    *,
    num_shadows: int,
    coins: RandomStream,
    noise: Callable[[], RandomStream] = RandomStream.from_system,
    done: Callable[[], None] = lambda: None,
) -> Shadows:
    """Trains K adapters as the site would, each on half of the patients, and has each tell the loss of all.

    Args:
        training: of the site.
        population: its N patients. Where half of them are fewer than train at the site, private steps are divided by
            as much less.
        num_shadows: K.
        coins: draws the halves.
        noise: a new stream for each round of private training.
        done: called after each round of each.
    """
    items = population.items
    patients = list(dict.fromkeys(item.patient_id for item in items))
    included_KN = halves(num_shadows, len(patients), coins)
    num_trained = len(patients) // 2
    if training.declared_units is not None:
        declared = max(1, round(training.declared_units * num_trained / population.num_members))
        training = replace(training, declared_units=declared)
    unit = "patient" if training.plan is None else training.plan.unit
    scores = []
    for number, included_N in enumerate(included_KN):
        chosen = {patient for patient, included in zip(patients, included_N, strict=True) if included}
        units = units_of([item for item in items if item.patient_id in chosen], unit)
        state = training.state(units, lambda _round: noise(), done, draw=1 + number)
        scores.append(scores_of(training, items, state))
    return Shadows(np.stack(scores), included_KN, num_trained)


def scores_of(training: Training, items: Sequence[Item], state: ModelState) -> NDArray[np.float64]:
    """Scaled loss of each patient, in order of first appearance."""
    losses = losses_by_patient(training.model, training.task, items, state=state, features=training.features)
    return scaled(np.array(list(losses.values())))


def shadow_attack(
    shadows: Shadows, population: Population, *, released_N: NDArray[np.float64], generator: np.random.Generator
) -> ShadowAttack:
    """Attacks with shadows of a population.

    Args:
        shadows: of its patients, members first.
        population: the patients.
        released_N: scaled loss of each patient on the adapter that the run released.
        generator: draws the bootstrap.
    """
    members = population.num_members
    scores_N = at_the_shadows_level(released_N, shadows.scores_KN)
    ratios_N = log_likelihood_ratios(scores_N, shadows.scores_KN, shadows.included_KN)
    return ShadowAttack(
        num_shadows=len(shadows.scores_KN),
        num_patients=len(scores_N),
        num_newcomers=population.num_newcomers,
        num_trained=shadows.num_trained,
        released=tuple(
            membership(attack, found_N[:members], found_N[members:], generator=generator)
            for attack, found_N in (("loss", scores_N), ("likelihood-ratio", ratios_N))
        ),
        alone=attacks_in_turn(shadows, generator),
    )


def attacks_in_turn(shadows: Shadows, generator: np.random.Generator) -> tuple[Membership, ...]:
    """Each shadow attacked: by the loss alone, and by what the others say of it."""
    ratios_KN = each_in_turn(shadows.scores_KN, shadows.included_KN)
    return tuple(
        membership_in_turn(attack, found_KN, shadows.included_KN, generator=generator)
        for attack, found_KN in (("loss", shadows.scores_KN), ("likelihood-ratio", ratios_KN))
    )
