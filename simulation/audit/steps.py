"""What noised steps release, as an attacker who knows everything but one patient sees it.

Differential privacy is promised against whoever sees the noised sum of every step, so an audit may look at them: they
are read off the path that the adapter takes through :func:`client.private_trainer.train_privately`, or are the sums
that :func:`client.private_trainer.clipped_integers` gives for ``trust = "consortium"``. Nothing in the training code
knows that it is watched.

Legend: T noised steps, Z coordinates of what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.features import FeatureCache
from client.private_trainer import Unit, clipped_integers, train_privately
from medfed.models.adapted import AdaptedModel
from medfed.study_sections import TrainingConfig
from medfed.tasks import Task
from privacy.per_sample.engine import Engine
from privacy.plan import PrivacyPlan
from privacy.randomness import KEY_BYTES, RandomStream
from strategies.subspace import Subspace

Streams = Callable[[int], RandomStream]
"""Where draws and noise of a round come from, by its number."""


@dataclass(frozen=True, eq=False)
class SiteTraining:
    """A site's private training, ready to be run again.

    Attributes:
        model: of the study.
        task: its losses.
        plan: of the study.
        config: of training; the audit takes plain SGD, from whose path the sums can be read. What an optimiser makes
            of noised sums costs no privacy.
        trainable: what trains; the same in all rounds.
        start_P: the adapter that training begins at.
        declared_units: by which the sums are divided.
    """

    model: AdaptedModel
    task: Task
    plan: PrivacyPlan
    config: TrainingConfig
    trainable: Subspace
    start_P: Tensor
    declared_units: int

    def released(
        self,
        units: Sequence[Unit],
        *,
        engine: Engine,
        features: FeatureCache,
        streams: Streams,
        done: Callable[[], None] = lambda: None,
    ) -> NDArray[np.float64]:
        """The noised sum of each step in clip norms, (T, Z), of training on these units through all rounds.

        With trust ``consortium``: the sum over as many sites as are counted on, the others without patients.

        Args:
            units: who is in the training cohort.
            engine: gives the gradients of one sample after the other.
            features: of the units' images.
            streams: by round.
            done: called after each round.

        Raises:
            MedfedError: as training does.
        """
        rounds, at_P = [], self.start_P
        for number in range(1, self.plan.num_rounds + 1):
            stream = streams(number)
            if self.plan.trust == "consortium":
                rounds.append(self._shared(units, engine, features, stream, at_P)[None])
            else:
                path_TZ, at_P = self._path(units, engine, features, stream, at_P)
                rounds.append(path_TZ)
            done()
        return np.concatenate(rounds)

    def _path(
        self, units: Sequence[Unit], engine: Engine, features: FeatureCache, stream: RandomStream, at_P: Tensor
    ) -> tuple[NDArray[np.float64], Tensor]:
        seen: list[Tensor] = []

        def watch(offset_Z: Tensor) -> None:
            seen.append(offset_Z.to("cpu", torch.float64, copy=True))

        result = train_privately(
            self.model,
            self.task,
            units,
            self.config,
            self.plan,
            engine=engine,
            trainable=self.trainable,
            start_P=at_P,
            declared_units=self.declared_units,
            features=features,
            stream=stream,
            pull=watch,
        )
        before_Z, after_Z = (self.trainable.coordinates(vector_P).double() for vector_P in (at_P, result.adapter_P))
        steps_TZ = torch.diff(torch.stack([*seen, after_Z - before_Z]), dim=0)
        step = self.config.learning_rate * self.plan.clip_norm / (self.plan.sampling_rate * self.declared_units)
        return (-steps_TZ / step).numpy(), result.adapter_P

    def _shared(
        self, units: Sequence[Unit], engine: Engine, features: FeatureCache, stream: RandomStream, at_P: Tensor
    ) -> NDArray[np.float64]:
        assert self.plan.min_honest is not None
        total = np.zeros(self.trainable.manifest.num_elements, dtype=np.int64)
        for number in range(self.plan.min_honest):
            total += clipped_integers(
                self.model,
                self.task,
                units if number == 0 else (),
                self.config,
                self.plan,
                engine=engine,
                trainable=self.trainable,
                start_P=at_P,
                fitting=lambda integers: integers,  # no sum here is so large that it has to be cut
                features=features,
                # Of the others after the site itself, which so draws what it draws at home.
                stream=stream if number == 0 else RandomStream(stream.bytes(KEY_BYTES)),
            ).integers_Z
        return total / self.plan.l2_bound


def log_likelihood_ratio(
    seen_TM: NDArray[np.float64], *, sampling_rate: float, noise_multiplier: float
) -> NDArray[np.float64]:
    """How much likelier what was seen is with a canary than without, as a logarithm, (M,).

    Each step shows N(0, z^2) without, and (1 - q) N(0, z^2) + q N(1, z^2) with a canary, in clip norms; no test of the
    two is better (Neyman and Pearson). Without noise: the sum of what was seen.
    """
    if noise_multiplier == 0:
        summed: NDArray[np.float64] = seen_TM.sum(axis=0)
        return summed
    shifted_TM = (seen_TM - 0.5) / noise_multiplier**2
    with np.errstate(divide="ignore"):  # log(0) at q = 1
        ratios_TM = np.logaddexp(np.log1p(-sampling_rate), np.log(sampling_rate) + shifted_TM)
    total: NDArray[np.float64] = ratios_TM.sum(axis=0)
    return total
