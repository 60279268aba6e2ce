"""The sections of a study file, each an immutable pydantic model that refuses unknown keys.

What must hold between sections is checked by :class:`medfed.study.StudyConfig`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from medfed.consortium import Quorum
from medfed.section import Name as Name
from medfed.section import Section as Section
from medfed.shift_profile import QuantityShift, ShiftProfile

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, hexadecimal."""


def _is_none(value: object) -> bool:
    return value is None


_MAX_PATH_BYTES, _MAX_PART_BYTES = 4096, 255
"""Of Linux: what is longer is no file's name there."""


def _can_be_a_file(path: Path) -> Path:
    encoded = str(path).encode(errors="surrogateescape")
    if b"\0" in encoded or len(encoded) > _MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > _MAX_PART_BYTES:
        raise ValueError("expected a path that a file can have, got one that is too long or holds a NUL")
    return path


FilePath = Annotated[Path, AfterValidator(_can_be_a_file)]
"""A path that the operating system takes."""


class BackboneConfig(Section):
    """The frozen foundation model; identified by digest, never sent.

    Attributes:
        name: a registered backbone, for example ``lite-medsam`` or ``vit-s-focus``.
        sha256: digest of the weights file that every site must hold.
    """

    name: Name
    sha256: Digest


class LoraAdapterConfig(Section):
    """Low-rank updates of linear layers (LoRA, Hu et al. 2021), and the backbone's fresh heads in full.

    Attributes:
        method: ``lora``; a study that names no method means this one.
        rank: LoRA rank r.
        alpha: LoRA alpha; the update is scaled by alpha / r.
        targets: a preset of the backbone (``decoder-attention``, ``last-quarter``, ...) or ``regex:`` and an
            expression that module names must match in full.
        train_norms: whether LayerNorms train too, from the first stage on that holds an update; what comes before
            stays frozen and cached.
    """

    method: Literal["lora"]
    rank: Annotated[int, Field(ge=1, le=256)]
    alpha: Annotated[float, Field(gt=0)]
    targets: Annotated[str, Field(min_length=1)]
    train_norms: bool = False

    @field_validator("targets")
    @classmethod
    def _expression_compiles(cls, value: str) -> str:
        if value.startswith("regex:"):
            try:
                re.compile(value.removeprefix("regex:"))
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value

    @property
    def in_words(self) -> str:
        """One phrase for reports."""
        norms = ", with LayerNorms" if self.train_norms else ""
        return f"lora of rank {self.rank}, alpha {self.alpha:g}, on {self.targets}{norms}"


class HeadsAdapterConfig(Section):
    """The backbone's fresh heads in full and nothing else: the cheapest baseline, a linear probe.

    Attributes:
        method: ``heads``.
    """

    method: Literal["heads"]

    @property
    def in_words(self) -> str:
        """One phrase for reports."""
        return "heads only"


class FullAdapterConfig(Section):
    """Linear layers in full, and the backbone's fresh heads: the reference that low-rank adapters are measured by.

    Attributes:
        method: ``full``.
        targets: as for LoRA.
    """

    method: Literal["full"]
    targets: Annotated[str, Field(min_length=1)]

    @property
    def in_words(self) -> str:
        """One phrase for reports."""
        return f"full fine-tuning of {self.targets}"


AdapterConfig = Annotated[LoraAdapterConfig | HeadsAdapterConfig | FullAdapterConfig, Field(discriminator="method")]
"""The small part that is trained and travels."""


class SegmentationConfig(Section):
    """Promptable segmentation: one box per structure, one mask per box.

    Attributes:
        classes: structure names; label value ``i + 1`` in a mask means ``classes[i]``, 0 is background.
    """

    kind: Literal["segmentation"]
    classes: Annotated[tuple[Name, ...], Field(min_length=1, max_length=254)]

    @field_validator("classes")
    @classmethod
    def _classes_aredistinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return distinct(value, "class")


class ClassificationConfig(Section):
    """Image classification with one or more targets, each with its own head.

    Attributes:
        targets: target name -> names of its classes; the manifest's column holds the class index.
    """

    kind: Literal["classification"]
    targets: Annotated[dict[Name, tuple[Name, ...]], Field(min_length=1)]

    @field_validator("targets")
    @classmethod
    def _targets_have_classes(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for target, classes in value.items():
            if len(classes) < 2:
                raise ValueError(f"target {target!r} needs at least two classes")
            distinct(classes, f"class of {target!r}")
        return value


TaskConfig = Annotated[SegmentationConfig | ClassificationConfig, Field(discriminator="kind")]


class TrainingConfig(Section):
    """Local training at a site, per round.

    Attributes:
        local_epochs: passes over the site's training images; not for studies with [privacy], which count steps.
        batch_size: images per step; with [privacy], images that are computed at a time: what a step means
            does not depend on it.
        learning_rate: constant within a round.
        optimizer: ``sgd`` (plain) or ``adamw``; its state starts afresh every round.
        weight_decay: decoupled, for ``adamw`` only.
        augmentation: ``none``, or ``intensity`` (random scale, shift and noise); random images have no
            cached features.
        order: ``shuffled`` by a generator seeded from study, round and site, or ``sequential``.
    """

    local_epochs: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    optimizer: Literal["sgd", "adamw"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    augmentation: Literal["none", "intensity"] = "none"
    order: Literal["shuffled", "sequential"] = "shuffled"

    @model_validator(mode="after")
    def _decay_has_an_optimizer(self) -> TrainingConfig:
        if self.weight_decay and self.optimizer == "sgd":
            raise ValueError("weight_decay needs optimizer = 'adamw'; remove it or change the optimizer")
        return self


class NoisedEvaluation(Section):
    """Counts over held-out patients leave a site with noise, which the site adds alone and its ledger is charged for.

    Attributes:
        noise_multiplier: standard deviation of the noise over the largest length that one patient adds to the counts
            (:class:`medfed.metrics.mergeable.CountLayout`). Every evaluation is one such release.
    """

    noise_multiplier: Annotated[float, Field(gt=0)]


class PrivacyConfig(Section):
    """Differential privacy of a site's training patients: DP-SGD on the adapter, add/remove adjacency.

    Nothing that changes the guarantee has a default. One of ``epsilon`` and ``noise_multiplier`` is given and
    fixes the noise; a resolved study holds both.

    Attributes:
        trust: ``site``: each site adds the whole noise itself and trusts nobody. ``consortium``: each site adds
            a share, and only the securely aggregated sum, which carries all shares, is ever seen; one step a
            round. ``none``: draws and clips the same, adds no noise, protects nothing; for comparison in
            simulations only.
        unit: what one unit of privacy is: ``patient`` (all images of a patient together) or ``record`` (one
            image; a patient with several images is protected less).
        epsilon: target for a site over the whole study, at ``delta``.
        noise_multiplier: standard deviation of the noise over ``clip_norm``; of the noise of a site, or with
            trust ``consortium`` of the least honest noise that a sum carries.
        delta: probability outside the guarantee; below one over the number of training patients.
        clip_norm: L2 bound C of what one unit contributes to a step.
        sampling_rate: probability q with which each unit takes part in a step, independently of all others.
        steps_per_round: noised steps of a site in each round.
        images_per_patient: at most this many images of a drawn patient, chosen at random; for ``patient``.
        views: augmented views of each image, averaged before clipping; more than one needs augmentation.
        engine: how per-sample gradients are computed; ``auto`` takes the fastest that passes the self-check.
        evaluation: ``withheld``: held-out metrics never leave the site. ``exact``: they do, without noise;
            held-out patients are then not protected. ``{ noise_multiplier = z }``: noised counts do; the promise
            then covers held-out patients too, and ``epsilon`` includes what they cost. Each site noises its counts
            alone, also with trust ``consortium``. With unit ``patient``.
    """

    trust: Literal["site", "consortium", "none"]
    unit: Literal["patient", "record"]
    epsilon: Annotated[float, Field(gt=0)] | None = None
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)]
    clip_norm: Annotated[float, Field(gt=0)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps_per_round: Annotated[int, Field(ge=1)]
    images_per_patient: Annotated[int, Field(ge=1)] | None = None
    views: Annotated[int, Field(ge=1, le=64)] = 1
    engine: Literal["auto", "lora-exact", "vmap", "loop"] = "auto"
    evaluation: Literal["withheld", "exact"] | NoisedEvaluation

    @field_validator("evaluation", mode="before")
    @classmethod
    def _evaluation_is_decided(cls, value: object) -> object:
        if isinstance(value, (dict, NoisedEvaluation)) or value in ("withheld", "exact"):
            return value
        raise ValueError(
            f"expected 'withheld', 'exact' or noised counts as {{ noise_multiplier = 4.0 }}, got {value!r}; decide "
            "what leaves of held-out patients"
        )

    @model_validator(mode="after")
    def _guarantee_is_whole(self) -> PrivacyConfig:
        noise = self.epsilon is not None or self.noise_multiplier is not None
        if self.trust == "none" and noise:
            raise ValueError("trust = 'none' adds no noise; remove epsilon and noise_multiplier, or set trust = 'site'")
        if self.trust != "none" and not noise:
            raise ValueError(f"trust = {self.trust!r} needs epsilon or noise_multiplier; add one of them")
        if self.trust == "consortium" and self.steps_per_round != 1:
            raise ValueError(
                "trust = 'consortium' needs steps_per_round = 1, as only sums of one clipped gradient share their "
                "noise; set 1 and more rounds, or trust = 'site'"
            )
        if isinstance(self.evaluation, NoisedEvaluation) and (self.trust == "none" or self.unit != "patient"):
            raise ValueError(
                "evaluation with noise_multiplier needs unit = 'patient', as what is counted are patients, and trust = "
                "'site' or 'consortium'; change them, or set evaluation = 'withheld'"
            )
        if (self.unit == "patient") != (self.images_per_patient is not None):
            raise ValueError("images_per_patient belongs to unit = 'patient' and to no other; add or remove it")
        return self


class SecureAggregationConfig(Section):
    """Of each round, sums over one set of sites are opened, and nothing else (:class:`medfed.consortium.Quorum`).

    Nothing that changes the guarantee has a default; ``threshold`` and ``min_sites`` are at their least if left out.

    Attributes:
        enabled: whether updates and metrics travel under masks.
        max_colluding: c, sites that may be corrupt and help the server.
        threshold: t, sites that must agree on who is in a sum before it can be opened.
        min_sites: k, sites in a sum at least; the others may drop out of a round.
        update_clip_norm: L2 bound on a site's weighted update, which is scaled down to it; sets how fine the integers
            are that are summed. A site that also sends other statistics than its change refuses the round instead. Not
            for trust ``consortium``, where each patient is clipped.
        rounds_per_epoch: sums that one exchange of keys serves.
    """

    enabled: bool
    max_colluding: Annotated[int, Field(ge=0)]
    threshold: Annotated[int, Field(ge=1)] | None = None
    min_sites: Annotated[int, Field(ge=1)] | None = None
    update_clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = None
    rounds_per_epoch: Annotated[int, Field(ge=1, le=1024)] = 32

    def quorum(self, num_sites: int) -> Quorum:
        """The numbers for a study of this many sites.

        Raises:
            SecureAggregationError: if they contradict each other.
        """
        return Quorum.of(
            num_sites=num_sites,
            max_colluding=self.max_colluding,
            threshold=self.threshold,
            min_sites=self.min_sites,
        )


class RoundsConfig(Section):
    """The round loop.

    Attributes:
        num_rounds: rounds in the study.
        quorum: replies without which a round is not aggregated; None means every site, or with
            [secure_aggregation] its ``min_sites``.
        deadline_s: seconds after which replies no longer count. In a simulation all sites share it, as they
            share the machine: allow for all of them.
        evaluate_every: rounds between evaluations on held-out patients; None means after the last only. The
            state before the first round is always evaluated.
    """

    num_rounds: Annotated[int, Field(ge=1)]
    quorum: Annotated[int, Field(ge=1)] | None = None
    deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    evaluate_every: Annotated[int, Field(ge=1)] | None = None


class ProximalLocalConfig(Section):
    """FedProx (Li et al. 2020): sites are pulled back to where the round began.

    Attributes:
        method: ``fedprox``.
        mu: strength of the pull, per step; 0 is plain training.
    """

    method: Literal["fedprox"]
    mu: Annotated[float, Field(ge=0)]


class PlainLocalConfig(Section):
    """A local method without numbers of its own.

    Attributes:
        method: ``scaffold`` (Karimireddy et al. 2020) corrects each site's drift; ``fednova`` (Wang et al. 2020) makes
            sites count alike that take different numbers of steps.
    """

    method: Literal["scaffold", "fednova"]


class DynamicLocalConfig(Section):
    """FedDyn (Acar et al. 2021): each site's objective is regularised so that its optimum is the federation's.

    Attributes:
        method: ``feddyn``.
        alpha: strength of the regulariser.
    """

    method: Literal["feddyn"]
    alpha: Annotated[float, Field(gt=0)]


class FairLocalConfig(Section):
    """q-FedAvg (Li et al. 2020): sites with a higher loss count more.

    Attributes:
        method: ``q-fedavg``.
        q: how much more; 0 is plain averaging.
    """

    method: Literal["q-fedavg"]
    q: Annotated[float, Field(ge=0)]


LocalConfig = Annotated[
    ProximalLocalConfig | PlainLocalConfig | DynamicLocalConfig | FairLocalConfig, Field(discriminator="method")
]
"""How sites train locally, where it is not plain training."""


class PlainPersonalConfig(Section):
    """A personalisation without numbers of its own.

    Attributes:
        method: ``fedbn`` (Li et al. 2021): layers of normalisation stay at their site. ``fedrep`` (Collins et al.
            2021): heads stay, and train before the rest does. ``site-adapter``: each site adds an adapter of its own
            to the shared one.
    """

    method: Literal["fedbn", "fedrep", "site-adapter"]


class DittoPersonalConfig(Section):
    """Ditto (Li et al. 2021): each site also trains a model of its own, pulled towards the shared one.

    Attributes:
        method: ``ditto``.
        proximal: strength of the pull, lambda in the paper; 0 is training alone.
    """

    method: Literal["ditto"]
    proximal: Annotated[float, Field(ge=0)]


PersonalConfig = Annotated[PlainPersonalConfig | DittoPersonalConfig, Field(discriminator="method")]
"""What sites keep for themselves."""


class MomentumServerConfig(Section):
    """FedAvgM (Hsu et al. 2019).

    Attributes:
        optimizer: ``fedavgm``.
        learning_rate: of the server; 1 makes a change as large as the sites' mean change.
        momentum: how much of the step before is added to each.
    """

    optimizer: Literal["fedavgm"]
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class AdaptiveServerConfig(Section):
    """FedAdagrad, FedYogi or FedAdam (Reddi et al. 2021, Algorithm 2); defaults as the paper recommends.

    Attributes:
        optimizer: which of them.
        learning_rate: of the server, eta.
        beta_1: of the first moment; 0 for ``fedadagrad`` if left out, else 0.9.
        beta_2: of the second moment; 0.99 if left out. Not for ``fedadagrad``, which adds up.
        tau: adaptivity; added to the root of the second moment.
    """

    optimizer: Literal["fedadagrad", "fedyogi", "fedadam"]
    learning_rate: Annotated[float, Field(gt=0)]
    beta_1: Annotated[float, Field(ge=0, lt=1)] | None = None
    beta_2: Annotated[float, Field(ge=0, lt=1)] | None = None
    tau: Annotated[float, Field(gt=0)] = 1e-3

    @model_validator(mode="after")
    def _adagrad_adds_up(self) -> AdaptiveServerConfig:
        if self.optimizer == "fedadagrad" and self.beta_2 is not None:
            raise ValueError("beta_2 has no meaning for 'fedadagrad', which adds squares up; remove it")
        return self


ServerConfig = Annotated[MomentumServerConfig | AdaptiveServerConfig, Field(discriminator="optimizer")]
"""How the server steps along the mean change."""


class StrategyConfig(Section):
    """Which tensors travel and how their sums become the next global adapter.

    Attributes:
        name: a registered strategy.
        weighting: ``examples`` weighs a site by its number of training images, ``uniform`` does not.
        hold_frames: rounds for which frames stay, for ``ffa-fresh`` and ``twin-fresh``; one if left out.
        local: how sites train; plain training if left out.
        personal: what sites keep for themselves; nothing if left out.
        server: how the server steps; by the mean change itself if left out.
        probe: whether the error of averaging A and B apart is estimated every round, for ``fedit``; one number a layer.
        shrinkage: whether singular values of the mean change that its noise explains are taken out; needs [privacy].
    """

    name: Name = "fedit"
    weighting: Literal["examples", "uniform"] = "examples"
    hold_frames: Annotated[int, Field(ge=1)] | None = None
    local: LocalConfig | None = None
    personal: PersonalConfig | None = None
    server: ServerConfig | None = None
    probe: bool = False
    shrinkage: bool = False


class CohortConfig(Section):
    """A simulated cohort, when the sites do not bring data of their own.

    Attributes:
        kind: ``brain-structures`` (segmentation) or ``brain-lesions`` (classification).
        images_per_patient: slices of each virtual patient.
        quantity: how training patients are spread over the sites that do not say how many they have.
    """

    kind: Literal["brain-structures", "brain-lesions"]
    images_per_patient: Annotated[int, Field(ge=1, le=16)] = 1
    quantity: QuantityShift | None = Field(default=None, exclude_if=_is_none)


class SiteConfig(Section):
    """One hospital of the study.

    Attributes:
        name: unique in the study.
        data: manifest of a real cohort, relative to the study file (simulation on one's own data).
        scanner: scanner profile of a simulated site.
        train_patients: number of training patients of a simulated site.
        test_patients: number of held-out patients of a simulated site.
        lesion_prevalence: fraction of patients with a lesion, for ``brain-lesions``.
        declared_patients: with [privacy] or [secure_aggregation]: a public number of training units (patients, or
            images if the unit of privacy is a record), agreed beforehand and not above the true one. Updates are
            divided and weighted by it, since the true number is itself private. A simulated site declares what it
            is made of.
        signing_key: Ed25519 public key of the site, 64 hexadecimal digits; for [secure_aggregation]. A simulation
            makes keys where there are none.
        rank: for adapter.method = ``lora``: this site trains only the first so many of the adapter's ranks; all of
            them if left out. For sites with less memory, or whose noise should fall on fewer numbers.
        shift: how a simulated hospital differs from the others.
    """

    name: Name
    data: FilePath | None = None
    scanner: Name | None = None
    train_patients: Annotated[int, Field(ge=1)] | None = None
    test_patients: Annotated[int, Field(ge=1)] | None = None
    lesion_prevalence: Annotated[float, Field(ge=0, le=1)] | None = None
    declared_patients: Annotated[int, Field(ge=1)] | None = None
    signing_key: Digest | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    shift: ShiftProfile | None = Field(default=None, exclude_if=_is_none)  # absent: the digest is that of before it


def distinct(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The names, if none is there twice.

    Raises:
        ValueError: if one is.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} appears twice; names must be distinct")
    return names
