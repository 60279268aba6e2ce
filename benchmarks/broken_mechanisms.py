"""Private training broken on purpose, and what the audit says of it.

    python benchmarks/broken_mechanisms.py [RUNS] > docs/results/audit-broken.json

Each way to break it replaces one name in :mod:`client.private_trainer`, the real training code, while the audit plays
its game; nothing of this is part of the product. Prints a JSON list: for each mechanism what is claimed, what
each attack finds, and which of them refute the claim. RUNS is 1000 if left out; less than a minute on one core. Draws
come from the operating system, so numbers differ a little each time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from client import private_trainer
from client.data import Item
from client.features import FeatureCache
from medfed.models.adapted import adapted_model, resolve
from medfed.study import StudyConfig
from medfed.study_sections import PrivacyConfig
from medfed.tasks import task_of
from privacy.clipping import ClippedSum, PatientSum
from privacy.noise import add_gaussian, hardened_normal
from privacy.per_sample.engine import Engine
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from simulation.audit.findings import Finding, game_findings
from simulation.audit.steps import SiteTraining
from simulation.audit.whitebox import play
from strategies.subspace import Subspace

CONFIDENCE = 0.997
"""Of each of the three attacks: together at least 0.99."""

SEED = 5  # of the study: what seeded noise would be drawn from


def scaled_noise(scale: float) -> Callable[..., Tensor]:
    return lambda sum_P, *, noise_std, stream: add_gaussian(sum_P, noise_std=scale * noise_std, stream=stream)


def no_noise(sum_P: Tensor, *, noise_std: float, stream: RandomStream) -> Tensor:
    return sum_P


class ReusedNoise:
    """One draw of noise for all steps of a round."""

    def __init__(self) -> None:
        self._stream: RandomStream | None = None
        self._noise_P: Tensor | None = None

    def __call__(self, sum_P: Tensor, *, noise_std: float, stream: RandomStream) -> Tensor:
        if stream is not self._stream:
            self._stream = stream
            self._noise_P = torch.from_numpy(noise_std * hardened_normal(sum_P.numel(), stream))
        assert self._noise_P is not None
        return sum_P + self._noise_P


class ClippedByMicroBatch(ClippedSum):
    """Clips whatever a micro-batch holds of a patient, not the patient."""

    def add(self, gradients_BP: Tensor, patient_B: Sequence[int], weight_B: Sequence[float]) -> None:
        super().add(gradients_BP, patient_B, weight_B)
        self._complete_patient()
        self._complete.clear()
        self._patient = None


class NotClipped(ClippedSum):
    """Adds patients as they are."""

    def close(self) -> PatientSum:
        self._clip_norm = 1e30
        return super().close()

    def _complete_patient(self) -> None:
        self._clip_norm = 1e30
        super()._complete_patient()


class OnceAnEpoch:
    """Everybody takes part once in every 1 / q steps, in the order of a shuffled loader."""

    def __init__(self) -> None:
        self._step = 0
        self._order: np.ndarray[Any, Any] | None = None

    def __call__(self, num_patients: int, sampling_rate: float, stream: RandomStream) -> np.ndarray[Any, Any]:
        steps = round(1 / sampling_rate)
        if self._step % steps == 0 or self._order is None:
            self._order = stream.below(steps, num_patients)
        drawn = np.flatnonzero(self._order == self._step % steps)
        self._step += 1
        return drawn


def everybody(num_patients: int, sampling_rate: float, stream: RandomStream) -> np.ndarray[Any, Any]:
    return np.arange(num_patients)


@contextmanager
def replaced(name: str, make: Callable[[], Any]) -> Iterator[None]:
    with patch.object(private_trainer, name, make()):
        yield


Streams = Callable[[int], RandomStream]


def of_system(_round: int) -> RandomStream:
    return RandomStream.from_system()


def of_seed(round_number: int) -> RandomStream:
    return RandomStream.for_simulation(SEED, "north", "federated", round_number)


@dataclass(frozen=True)
class Mechanism:
    """One mechanism, right or broken.

    Attributes:
        name: in words.
        replaces: the name in the training code that is replaced; None for none.
        make: what it is replaced by, made anew for each audit.
        caught_by: the attack that must refute the claim; None if none may.
        streams: where noise is drawn from; None for a source that nobody else knows.
        privacy: keys of the study's ``[privacy]`` in which the fault shows.
    """

    name: str
    replaces: str | None = None
    make: Callable[[], Any] = object
    caught_by: str | None = None
    streams: Streams | None = None
    privacy: dict[str, Any] = field(default_factory=dict)


EVERYBODY = {"noise_multiplier": 0.5, "sampling_rate": 1.0, "steps_per_round": 1}
"""Two thirds of the noise are told from all of it with the fewest runs where sqrt(steps) / z is about 2."""

MECHANISMS = (
    Mechanism("as it is"),
    Mechanism(
        "as it is, everybody in each step, four images",
        privacy={**EVERYBODY, "images_per_patient": 4},
    ),
    Mechanism(
        "noise x 2/3",
        "add_gaussian",
        lambda: scaled_noise(2 / 3),
        "likelihood",
        privacy=EVERYBODY,
    ),
    Mechanism("noise off", "add_gaussian", lambda: no_noise, "likelihood", privacy=EVERYBODY),
    Mechanism(
        "clipped by micro-batch",
        "ClippedSum",
        lambda: ClippedByMicroBatch,
        "likelihood",
        privacy={**EVERYBODY, "noise_multiplier": 1.0, "images_per_patient": 4},
    ),
    Mechanism("not clipped", "ClippedSum", lambda: NotClipped, "likelihood", privacy=EVERYBODY),
    Mechanism("everybody takes part", "draw_patients", lambda: everybody, "likelihood"),
    Mechanism(
        "shuffled, not Poisson",
        "draw_patients",
        OnceAnEpoch,
        "likelihood",
        privacy={"noise_multiplier": 0.4, "sampling_rate": 0.25},
    ),
    Mechanism("noise used again", "add_gaussian", ReusedNoise, "repeats"),
    Mechanism("noise from the study's seed", caught_by="replay", streams=of_seed, privacy=EVERYBODY),
)


PRIVACY: dict[str, Any] = {
    "trust": "site",
    "unit": "patient",
    "noise_multiplier": 1.5,
    "delta": 0.01,
    "clip_norm": 0.5,
    "sampling_rate": 0.5,
    "steps_per_round": 4,
    "images_per_patient": 1,
    "evaluation": "withheld",
}


@cache
def site_training() -> tuple[SiteTraining, Engine, Item]:
    """A site of the smallest study, its engine, and an image: a linear head on a random stand-in, 130 parameters."""
    study = StudyConfig.model_validate(
        {
            "name": "broken",
            "seed": SEED,
            "backbone": {"name": "stand-in-classifier", "sha256": "0" * 64},
            "adapter": {"method": "heads"},
            "task": {"kind": "classification", "targets": {"side": ["left", "right"]}},
            "training": {"batch_size": 2, "learning_rate": 0.1, "optimizer": "sgd"},
            "privacy": PRIVACY,
            "rounds": {"num_rounds": 1},
            "sites": [{"name": "north", "data": "nowhere.csv", "declared_patients": 10}],
        }
    )
    device = torch.device("cpu")
    study = resolve(study, device)
    model, task = adapted_model(study, device), task_of(study.task)
    trainable = Subspace.everything(model.manifest)
    like = Item("nobody", "north", torch.zeros(3, 28, 28), {"side": 0}, "0" * 64, "0" * 64)
    engine = private_trainer.checked_engine(
        model, task, study, trainable=trainable, example=like, features=FeatureCache()
    )
    plan = PrivacyPlan.of_study(study)
    return SiteTraining(model, task, plan, study.training, trainable, model.initial_P, 10), engine, like


def audit(mechanism: Mechanism, *, runs: int, coins: RandomStream, noise: Streams = of_system) -> list[Finding]:
    """The findings of all attackers of many runs; ``noise`` is for mechanisms without streams of their own."""
    training, engine, like = site_training()
    config = PrivacyConfig.model_validate({**PRIVACY, **mechanism.privacy})
    training, streams = replace(training, plan=PrivacyPlan.of(config, 1)), mechanism.streams or noise

    def findings() -> list[Finding]:
        scores = play(training, engine, like=like, num_runs=runs, streams=streams, guessed=of_seed, coins=coins)
        return game_findings(scores, training.plan, confidence=CONFIDENCE)

    if mechanism.replaces is None:
        return findings()
    with replaced(mechanism.replaces, mechanism.make):
        return findings()


def main(runs: int) -> None:
    """Audits each mechanism and prints what was found."""
    rows = []
    for mechanism in MECHANISMS:
        findings = audit(mechanism, runs=runs, coins=RandomStream.from_system())
        rows.append(
            {
                "mechanism": mechanism.name,
                "claimed": round(findings[0].claimed, 2),
                "delta": findings[0].delta,
                "bounds": {finding.attack: round(finding.epsilon, 2) for finding in findings},
                "refuted_by": [finding.attack for finding in findings if finding.exceeds],
            }
        )
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
