"""White-box audits of a site's private training: many short runs with one canary, and one run with many.

Legend: N runs, M canaries, T noised steps, Z coordinates of what trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from client.data import Item
from client.features import FeatureCache
from client.private_trainer import Unit
from medfed.study_sections import TrainingConfig
from privacy.per_sample.engine import Engine
from privacy.randomness import RandomStream
from simulation.audit.canaries import (
    LENGTH,
    CanaryEngine,
    CanaryFeatures,
    basis_directions,
    canary_units,
    gradients_of,
)
from simulation.audit.steps import SiteTraining, Streams, log_likelihood_ratio


@dataclass(frozen=True, eq=False)
class GameScores:
    """What three attackers made of each of N runs; all higher with the canary.

    Attributes:
        included_N: the coins.
        likelihood_N: log likelihood ratio of the sums along the canary's direction; 0 decides.
        repeats_N: how far these sums differ between steps: noise that is used twice leaves nothing but the canary.
        replay_N: how far the run is from one without the canary and with noise that can be recomputed from the study.
    """

    included_N: NDArray[np.bool_]
    likelihood_N: NDArray[np.float64]
    repeats_N: NDArray[np.float64]
    replay_N: NDArray[np.float64]


def play(
    training: SiteTraining,
    engine: Engine,
    *,
    like: Item,
    num_runs: int,
    streams: Streams,
    guessed: Streams,
    coins: RandomStream,
    done: Callable[[], None] = lambda: None,
) -> GameScores:
    """Trains N times on a cohort that is empty but for one canary, if its coin says so.

    The canary has a new direction in each run, in all coordinates, and as many images as a patient may have.

    Args:
        training: of the site.
        engine: of the model; computes nothing here, as nobody is real.
        like: any image; its sizes are used.
        num_runs: N.
        streams: of the site: what is audited.
        guessed: what an attacker believes the streams to be.
        coins: throws the coins and draws directions; nothing of it reaches the training.
        done: called after each run.
    """
    # Steps of one clip norm: the sums are read off the adapter, which no gradient here depends on.
    plan = training.plan
    rate = plan.sampling_rate * training.declared_units / plan.clip_norm
    training = replace(
        training, start_P=torch.zeros_like(training.start_P), config=_plain(training.config, learning_rate=rate)
    )
    (canary,) = canary_units(1, plan.images_per_patient or 1, like)
    features = CanaryFeatures(FeatureCache(), (1,))
    num_coordinates = training.trainable.manifest.num_elements

    def run(direction_Z: NDArray[np.float64], units: tuple[Unit, ...], drawn_from: Streams) -> NDArray[np.float64]:
        direction_1Z = torch.from_numpy(direction_Z).float()[None]
        table = gradients_of(direction_1Z, training.trainable, norm=LENGTH * plan.clip_norm)
        return training.released(units, engine=CanaryEngine(engine, table), features=features, streams=drawn_from)

    silent_TZ = run(np.zeros(num_coordinates), (), guessed)
    included_N = (coins.uint64(num_runs) & np.uint64(1)).astype(np.bool_)
    likelihood, repeats, replay = [], [], []
    for included in included_N:
        direction_Z = coins.normal(num_coordinates)
        direction_Z /= np.linalg.norm(direction_Z)
        seen_TZ = run(direction_Z, (canary,) if included else (), streams)
        along_T = seen_TZ @ direction_Z
        ratio = log_likelihood_ratio(
            along_T[:, None], sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier
        )
        likelihood.append(float(ratio[0]))
        repeats.append(float(np.ptp(along_T)))
        replay.append(float(np.linalg.norm(seen_TZ - silent_TZ)))
        done()
    return GameScores(included_N, np.array(likelihood), np.array(repeats), np.array(replay))


@dataclass(frozen=True, eq=False)
class OneRunScores:
    """What an attacker made of one run.

    Attributes:
        included_M: the coins.
        scores_M: log likelihood ratio of each canary.
    """

    included_M: NDArray[np.bool_]
    scores_M: NDArray[np.float64]


def run_once(
    training: SiteTraining,
    engine: Engine,
    *,
    patients: tuple[Unit, ...],
    features: FeatureCache,
    num_canaries: int,
    streams: Streams,
    coins: RandomStream,
    done: Callable[[], None] = lambda: None,
) -> OneRunScores:
    """Trains once on the site's patients and on those of M canaries whose coin says so.

    Each canary has one coordinate of the adapter to itself, chosen at random.

    Args:
        training: of the site.
        engine: passed the self-check on the site's model.
        patients: the site's training patients; all take part.
        features: of the site.
        num_canaries: M, at most as many as there are coordinates.
        streams: of the site.
        coins: throws the coins and chooses coordinates.
        done: called after each round.
    """
    plan, like = training.plan, patients[0][0]
    num_coordinates = training.trainable.manifest.num_elements
    places = np.argsort(coins.uint64(num_coordinates), kind="stable")[:num_canaries].tolist()
    table = gradients_of(basis_directions(places, num_coordinates), training.trainable, norm=LENGTH * plan.clip_norm)
    sizes = features.features_of(like, training.model).shape
    canaries = canary_units(num_canaries, plan.images_per_patient or 1, like)
    included_M = (coins.uint64(num_canaries) & np.uint64(1)).astype(np.bool_)
    training = replace(training, config=_plain(training.config, learning_rate=training.config.learning_rate))
    seen_TZ = training.released(
        (*patients, *(unit for unit, included in zip(canaries, included_M, strict=True) if included)),
        engine=CanaryEngine(engine, table),
        features=CanaryFeatures(features, sizes),
        streams=streams,
        done=done,
    )
    scores_M = log_likelihood_ratio(
        seen_TZ[:, places], sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier
    )
    return OneRunScores(included_M, scores_M)


def _plain(config: TrainingConfig, *, learning_rate: float) -> TrainingConfig:
    """Plain SGD, whose path shows the sums, on images as they are: canaries have none to augment."""
    return config.model_copy(
        update={"optimizer": "sgd", "weight_decay": 0.0, "learning_rate": learning_rate, "augmentation": "none"}
    )
