"""Private local training: DP-SGD on the adapter, patient by patient (Abadi et al. 2016).

Each step draws patients at random, takes each patient's mean gradient over its images, clips it as a whole,
adds the clipped gradients up, adds noise once, and divides by the number of patients that a step is expected
to have. A step that drew nobody is a step like any other.

What is drawn, how many, and how large gradients are never leaves this file except as the result's facts, which
are for the hospital's own ledger.

Legend: B samples (views of images) at a time, P adapter parameters, Q those of the tensors of which something trains,
Z coordinates of what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data import Item
from client.features import FeatureCache
from client.subspace_steps import Pull, SubspaceSteps
from client.trainer import encoded, trained_vector
from medfed.errors import PrivacyError
from medfed.models.adapted import AdaptedModel
from medfed.study import StudyConfig
from medfed.study_sections import TrainingConfig
from medfed.tasks import Task
from privacy.clipping import ClippedSum, PatientSum
from privacy.integer_clipping import IntegerClippedSum
from privacy.noise import add_gaussian
from privacy.per_sample.engine import Batch, Engine
from privacy.per_sample.self_check import choose_engine
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from privacy.sampling import draw_images, draw_patients
from privacy.skellam import add_skellam
from strategies.subspace import Subspace

Unit = Sequence[Item]
"""All training images of one patient, or one image where the unit is a record."""


@dataclass(frozen=True)
class PrivateTrainResult:
    """What private training made.

    Attributes:
        adapter_P: the local adapter, float32 on the CPU; private as the plan says.
        facts: clip fraction and signal-to-noise, for the hospital alone: they are not private.
    """

    adapter_P: Tensor
    facts: dict[str, float]


@dataclass(frozen=True)
class SharedNoiseResult:
    """A site's part of a sum that carries the noise of all sites (trust ``consortium``).

    Attributes:
        integers_Z: clipped sum of one step and this site's share of noise, int64, in units of C / D2. Not private
            by itself: it may leave the site under masks only.
        facts: as of :class:`PrivateTrainResult`, beside the site's own share of the noise.
    """

    integers_Z: NDArray[np.int64]
    facts: dict[str, float]


@dataclass(frozen=True)
class _Sample:
    """One view of one image of a drawn unit; ``weight`` is its share of the unit's mean."""

    item: Item
    unit: int
    weight: float


def units_of(items: Sequence[Item], unit: str) -> tuple[Unit, ...]:
    """The items by unit of privacy: all images of a patient together, or each image by itself."""
    if unit == "record":
        return tuple((item,) for item in items)
    ordered = sorted(items, key=lambda item: item.patient_id)
    return tuple(tuple(images) for _, images in groupby(ordered, key=lambda item: item.patient_id))


def train_privately(
    model: AdaptedModel,
    task: Task,
    units: Sequence[Unit],
    config: TrainingConfig,
    plan: PrivacyPlan,
    *,
    engine: Engine,
    trainable: Subspace,
    start_P: Tensor,
    declared_units: int,
    features: FeatureCache,
    stream: RandomStream,
    pull: Pull | None = None,
) -> PrivateTrainResult:
    """One round's steps on the units of a site, starting from ``start_P``.

    Guarantee: adding or removing one unit changes each step's sum by at most ``plan.clip_norm`` before noise of
    standard deviation ``plan.noise_std``; everything else is computed from the noised sums. A plan without noise
    (``trust = "none"``) guarantees nothing.

    Args:
        model: the adapter goes into it.
        task: its losses.
        units: from :func:`units_of`.
        config: optimiser, learning rate, augmentation, and how many images are computed at a time.
        plan: of the study; the caller has reserved its steps.
        engine: passed the self-check, on the tensors of which something trains.
        trainable: what trains; a patient's gradient is clipped, and noised, as one vector of its coordinates.
        start_P: the global adapter.
        declared_units: public number of units; the expected step size is the sampling rate times this.
        features: of the site.
        stream: where draws and noise come from.
        pull: added to each gradient after clipping and noise; must not look at a patient.

    Raises:
        AdapterMismatchError: if ``start_P`` does not fit.
        PrivacyError: if a gradient is not finite under a plan without noise; with noise that unit adds nothing, as a
            refusal would tell that it is there.
        DivergedError: if training ended with NaN or infinity.
    """
    model.load(start_P)
    model.train()
    steps = SubspaceSteps(model, trainable, config, pull)
    sums: list[PatientSum] = []
    for _ in range(plan.steps_per_round):
        samples = _drawn(units, plan, stream)
        clipped = _clipped_sum(samples, model, task, config, plan, engine, trainable, features, stream)
        sums.append(clipped)
        released_Z = clipped.sum_P
        if plan.is_private:
            released_Z = add_gaussian(released_Z, noise_std=plan.noise_std, stream=stream)
        steps.step_along((released_Z / (plan.sampling_rate * declared_units)).to(model.flat))
    facts = _facts(sums, plan, trainable.manifest.num_elements)
    return PrivateTrainResult(adapter_P=trained_vector(model), facts=facts)


def clipped_integers(
    model: AdaptedModel,
    task: Task,
    units: Sequence[Unit],
    config: TrainingConfig,
    plan: PrivacyPlan,
    *,
    engine: Engine,
    trainable: Subspace,
    start_P: Tensor,
    fitting: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    features: FeatureCache,
    stream: RandomStream,
) -> SharedNoiseResult:
    """One step's clipped sum at ``start_P``, in integers, with this site's share of Skellam noise.

    Guarantee: before noise, adding or removing one unit changes the integers by at most ``plan.l2_bound`` in L2
    norm, exactly; the noise has variance ``plan.share_variance`` on every element that trains. The adapter in the
    model is left as ``start_P``: the step is taken on the sum over sites.

    Args:
        model: the adapter goes into it.
        task: its losses.
        units: from :func:`units_of`.
        config: augmentation, and how many images are computed at a time.
        plan: of the study, with trust ``consortium``; the caller has reserved the step.
        engine: as for :func:`train_privately`.
        trainable: likewise.
        start_P: the global adapter.
        fitting: cuts a clipped sum to the range of the secure sum; must not move two sums further apart.
        features: of the site.
        stream: where draws, rounding and noise come from.

    Raises:
        AdapterMismatchError: if ``start_P`` does not fit.
    """
    model.load(start_P)
    model.train()
    samples = _drawn(units, plan, stream)
    clipped = _clipped_sum(samples, model, task, config, plan, engine, trainable, features, stream)
    fitted_Z = torch.from_numpy(fitting(clipped.sum_P.numpy()))
    integers_Z = add_skellam(fitted_Z, variance=plan.share_variance, stream=stream).numpy()
    return SharedNoiseResult(integers_Z, _facts([clipped], plan, trainable.manifest.num_elements))


def _drawn(units: Sequence[Unit], plan: PrivacyPlan, stream: RandomStream) -> list[_Sample]:
    """The samples of one step, unit after unit."""
    samples = []
    for index in draw_patients(len(units), plan.sampling_rate, stream).tolist():
        unit = units[index]
        images = draw_images(len(unit), plan.images_per_patient or len(unit), stream).tolist()
        share = 1.0 / (len(images) * plan.views)
        samples += [_Sample(unit[image], index, share) for image in images for _ in range(plan.views)]
    return samples


def _clipped_sum(
    samples: Sequence[_Sample],
    model: AdaptedModel,
    task: Task,
    config: TrainingConfig,
    plan: PrivacyPlan,
    engine: Engine,
    trainable: Subspace,
    features: FeatureCache,
    stream: RandomStream,
) -> PatientSum:
    total = _open_sum(model, plan, trainable, stream)
    # One generator for the step: views, and what the stream gives afterwards, do not depend on the micro-batches.
    generator = torch.Generator().manual_seed(int(stream.below(2**62, 1)[0]))
    for start in range(0, len(samples), config.batch_size):
        batch = samples[start : start + config.batch_size]
        items = [sample.item for sample in batch]
        inputs = encoded(items, model, config, features, generator)
        targets = task.stack([item.annotation for item in items], model.device)
        gradients_BQ, _ = engine.gradients((inputs, targets))
        gradients_BZ = trainable.coordinates_of_support(gradients_BQ)
        total.add(gradients_BZ, [sample.unit for sample in batch], [sample.weight for sample in batch])
    clipped = total.close()
    if clipped.num_unusable and not plan.is_private:
        raise PrivacyError(
            f"Expected finite gradients of each patient, got NaN or infinity in {clipped.unusable_in!r}; check the "
            "images, or lower the learning rate."
        )
    return clipped


def _open_sum(model: AdaptedModel, plan: PrivacyPlan, trainable: Subspace, stream: RandomStream) -> ClippedSum:
    """An empty sum, of integers if they are to be summed under masks."""
    names, num_coordinates = trainable.manifest.name_at, trainable.manifest.num_elements
    if plan.trust != "consortium":
        return ClippedSum(num_coordinates, clip_norm=plan.clip_norm, device=model.device, names=names)
    return IntegerClippedSum(
        num_coordinates,
        clip_norm=plan.clip_norm,
        l2_bound=plan.l2_bound,
        stream=stream,
        device=model.device,
        names=names,
    )


def _facts(sums: Sequence[PatientSum], plan: PrivacyPlan, num_parameters: int) -> dict[str, float]:
    """Fraction of drawn units that were clipped; norm of the clipped sum over the expected norm of the noise.

    And, where there are any, the fraction whose gradients were not finite. All to two digits: an exact fraction would
    tell how many units were drawn.
    """
    drawn = sum(clipped.num_patients for clipped in sums)
    facts = {}
    if drawn:
        facts["clip_fraction"] = round(sum(clipped.num_clipped for clipped in sums) / drawn, 2)
    if drawn and (unusable := sum(clipped.num_unusable for clipped in sums)):
        facts["unusable_fraction"] = round(unusable / drawn, 2)
    if plan.is_private:
        unit = plan.clip_norm / plan.l2_bound if plan.trust == "consortium" else 1.0  # of the integers of a sum
        noise_norm = plan.noise_std / unit * num_parameters**0.5
        facts["signal_to_noise"] = float(f"{sum(clipped.norm for clipped in sums) / len(sums) / noise_norm:.2g}")
    return facts


_engines: dict[tuple[AdaptedModel, str, tuple[str, ...]], Engine] = {}
_choosing = Lock()


def checked_engine(
    model: AdaptedModel,
    task: Task,
    study: StudyConfig,
    *,
    trainable: Subspace,
    example: Item,
    features: FeatureCache,
) -> Engine:
    """The engine for the tensors of which something trains; its self-check passed in this process.

    Args:
        model: of the study.
        task: its losses.
        study: resolved, with a privacy section.
        trainable: what trains.
        example: any image; its sizes are used and nothing else of it.
        features: of the site.

    Raises:
        EngineError: if no engine is right for this model; then nothing may train and nothing is spent.
    """
    assert study.privacy is not None
    parameters = {name: parameter for name, parameter in model.trainable.items() if name in trainable.parts}
    key = (model, study.digest, tuple(parameters))
    with _choosing:
        if key not in _engines:
            for other in [other for other in _engines if other[:2] != key[:2]]:
                del _engines[other]  # a process works for one study at a time
            sizes = encoded([example], model, study.training, features, torch.Generator()).shape[1:]

            def made_up(num_samples: int) -> Batch:
                generator = torch.Generator().manual_seed(0)
                inputs = torch.randn(num_samples, *sizes, generator=generator)
                targets = task.made_up(num_samples, example.annotation, generator)
                return inputs.to(model.device), {name: value.to(model.device) for name, value in targets.items()}

            def losses(batch: Batch) -> Tensor:
                inputs, targets = batch
                return task.stacked_losses(model, inputs, targets)

            in_place_P = model.read()
            model.load(model.initial_P)  # what an earlier round left in place, diverged perhaps, decides nothing
            try:
                _engines[key] = choose_engine(
                    study.privacy.engine,
                    model.module,
                    parameters,
                    losses,
                    batch_of=made_up,
                    clip_norm=study.privacy.clip_norm,
                )
            finally:
                model.load(in_place_P)
        return _engines[key]
