"""Black-box canaries: mislabelled images among a site's patients, found again by their loss on the adapter.

An image with another patient's annotation can be learnt only by heart. Whoever has the adapter that came out looks how
far each canary's loss fell (Steinke et al. 2023, section 6, "black-box"): no gradient, no step in between is seen. A
weak attack, as any is that does not look inside; it says what an adapter gives away to those who merely use it.

Legend: M canaries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from client.data import Item
from client.features import FeatureCache
from client.private_trainer import Unit, train_privately
from client.trainer import train_locally
from medfed.canonical import derive_seed
from medfed.models.adapted import AdaptedModel
from medfed.models.folding import ModelState
from medfed.study import StudyConfig
from medfed.tasks import Task
from privacy.per_sample.engine import Engine
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from simulation.audit.membership import losses_by_patient
from simulation.audit.steps import Streams
from strategies.subspace import Subspace


@dataclass(frozen=True, eq=False)
class ImageScores:
    """What the loss says of each canary of one run.

    Attributes:
        included_M: the coins.
        scores_M: how far the loss fell.
    """

    included_M: NDArray[np.bool_]
    scores_M: NDArray[np.float64]


def mislabelled(items: Sequence[Item], num_canaries: int, coins: RandomStream) -> tuple[Item, ...]:
    """Images with the annotation of another one, in pairs that are drawn without replacement.

    There are n (n - 1) pairs of n images; fewer canaries than asked for if that is less.
    """
    pairs = [(one, other) for one in range(len(items)) for other in range(len(items)) if one != other]
    order = np.argsort(coins.uint64(len(pairs)), kind="stable")[:num_canaries]
    return tuple(
        replace(items[pairs[place][0]], patient_id=f"canary-{number}", annotation=items[pairs[place][1]].annotation)
        for number, place in enumerate(order.tolist())
    )


@dataclass(frozen=True, eq=False)
class Training:
    """A site's training as the study has it, alone: rounds one after the other, with nobody to average with.

    Attributes:
        study: resolved.
        model: of the study.
        task: its losses.
        plan: what privacy the site's own steps have; None for a study without.
        engine: for private training.
        trainable: what trains.
        features: of the site.
        site: its name.
        declared_units: public number of its units, by which private steps are divided; None without a plan.
    """

    study: StudyConfig
    model: AdaptedModel
    task: Task
    plan: PrivacyPlan | None
    engine: Engine | None
    trainable: Subspace
    features: FeatureCache
    site: str
    declared_units: int | None

    def state(self, units: Sequence[Unit], streams: Streams, done: Callable[[], None], *, draw: int = 0) -> ModelState:
        """The model after all rounds of training on these patients.

        Args:
            units: all take part.
            streams: of private training.
            done: called after each round.
            draw: another one gives another order of images to training without privacy.
        """
        adapter_P = self.model.initial_P
        self.model.put(ModelState(adapter_P))  # whatever was folded into the base before
        for number in range(1, self.study.rounds.num_rounds + 1):
            if self.plan is None:
                seed = derive_seed(self.study.seed, "audit", self.site, number, draw)
                adapter_P = train_locally(
                    self.model,
                    self.task,
                    [item for unit in units for item in unit],
                    self.study.training,
                    start_P=adapter_P,
                    trainable=self.trainable,
                    features=self.features,
                    generator=torch.Generator().manual_seed(seed),
                ).adapter_P
            else:
                assert self.engine is not None
                assert self.declared_units is not None
                adapter_P = train_privately(
                    self.model,
                    self.task,
                    units,
                    self.study.training,
                    self.plan,
                    engine=self.engine,
                    trainable=self.trainable,
                    start_P=adapter_P,
                    declared_units=self.declared_units,
                    features=self.features,
                    stream=streams(number),
                ).adapter_P
            done()
        return ModelState(adapter_P)


def score_images(
    training: Training,
    *,
    patients: Sequence[Unit],
    canaries: Sequence[Item],
    streams: Streams,
    coins: RandomStream,
    done: Callable[[], None] = lambda: None,
) -> ImageScores:
    """Trains once on the site's patients and on those canaries whose coin says so, and scores all canaries.

    Args:
        training: of the site.
        patients: all take part.
        canaries: from :func:`mislabelled`, each a patient by itself.
        streams: of private training.
        coins: throws the coins.
        done: called after each round.
    """
    included_M = (coins.uint64(len(canaries)) & np.uint64(1)).astype(np.bool_)
    chosen = tuple((item,) for item, included in zip(canaries, included_M, strict=True) if included)
    state = training.state((*patients, *chosen), streams, done)

    def losses(of: ModelState) -> NDArray[np.float64]:
        found = losses_by_patient(training.model, training.task, canaries, state=of, features=training.features)
        return np.array([found[item.patient_id] for item in canaries])

    return ImageScores(included_M, losses(ModelState(training.model.initial_P)) - losses(state))
