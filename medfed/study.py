"""The study file: what a consortium agrees on, as one immutable object with one digest.

A study is read from TOML. Every section is a frozen pydantic model that refuses unknown keys, because a
misspelt key that is silently ignored is a study nobody approved. :attr:`StudyConfig.digest` is the SHA-256
of the canonical form; once resolved (:meth:`StudyConfig.with_manifest`) it also covers the names and shapes
of every tensor that may leave a site.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medfed.adapter_manifest import AdapterManifest
from medfed.canonical import canonical_bytes, sha256_hex
from medfed.consortium import Quorum
from medfed.errors import SecureAggregationError, StudyError

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
"""Lower-case letters, digits, hyphen and underscore: safe in file names, CSV columns and message headers."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, hexadecimal."""

FEDERATED = "federated"
"""Scope of the federation of all sites; simulations have others, of one virtual site each."""

ALL_SITES = "all-sites"
"""Stands for a sum over sites where a single site's number would stand."""

POOLED_SITE = "pooled"
"""Name of the virtual site that holds all data in simulations: the upper bound, illegal to build."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneConfig(_Section):
    """The frozen foundation model; identified by digest, never sent.

    Attributes:
        name: a registered backbone, for example ``lite-medsam`` or ``vit-s-focus``.
        sha256: digest of the weights file that every site must hold.
    """

    name: Name
    sha256: Digest


class LoraAdapterConfig(_Section):
    """Low-rank updates of linear layers (LoRA, Hu et al. 2021), and the backbone's fresh heads in full.

    Attributes:
        method: ``lora``; a study that names no method means this one.
        rank: LoRA rank r.
        alpha: LoRA alpha; the update is scaled by alpha / r.
        targets: a preset of the backbone (``decoder-attention``, ``last-quarter``, ...) or ``regex:`` and an
            expression that module names must match in full.
    """

    method: Literal["lora"]
    rank: Annotated[int, Field(ge=1, le=256)]
    alpha: Annotated[float, Field(gt=0)]
    targets: Annotated[str, Field(min_length=1)]

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
        return f"lora of rank {self.rank}, alpha {self.alpha:g}, on {self.targets}"


class HeadsAdapterConfig(_Section):
    """The backbone's fresh heads in full and nothing else: the cheapest baseline, a linear probe.

    Attributes:
        method: ``heads``.
    """

    method: Literal["heads"]

    @property
    def in_words(self) -> str:
        """One phrase for reports."""
        return "heads only"


AdapterConfig = Annotated[LoraAdapterConfig | HeadsAdapterConfig, Field(discriminator="method")]
"""The small part that is trained and travels."""


class SegmentationConfig(_Section):
    """Promptable segmentation: one box per structure, one mask per box.

    Attributes:
        classes: structure names; label value ``i + 1`` in a mask means ``classes[i]``, 0 is background.
    """

    kind: Literal["segmentation"]
    classes: Annotated[tuple[Name, ...], Field(min_length=1, max_length=254)]

    @field_validator("classes")
    @classmethod
    def _classes_are_distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(value, "class")


class ClassificationConfig(_Section):
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
            _distinct(classes, f"class of {target!r}")
        return value


TaskConfig = Annotated[SegmentationConfig | ClassificationConfig, Field(discriminator="kind")]


class TrainingConfig(_Section):
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


class PrivacyConfig(_Section):
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
            held-out patients are then not protected.
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
    evaluation: Literal["withheld", "exact"]

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
        if (self.unit == "patient") != (self.images_per_patient is not None):
            raise ValueError("images_per_patient belongs to unit = 'patient' and to no other; add or remove it")
        return self


class SecureAggregationConfig(_Section):
    """Of each round, sums over one set of sites are opened, and nothing else (:class:`medfed.consortium.Quorum`).

    Nothing that changes the guarantee has a default; ``threshold`` and ``min_sites`` are at their least if left out.

    Attributes:
        enabled: whether updates and metrics travel under masks.
        max_colluding: c, sites that may be corrupt and help the server.
        threshold: t, sites that must agree on who is in a sum before it can be opened.
        min_sites: k, sites in a sum at least; the others may drop out of a round.
        update_clip_norm: L2 bound on a site's weighted update, which is scaled down to it; sets how fine the integers
            are that are summed. Not for trust ``consortium``, where each patient is clipped.
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


class RoundsConfig(_Section):
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


class StrategyConfig(_Section):
    """Which tensors travel and how their sums become the next global adapter.

    Attributes:
        name: a registered strategy.
        weighting: ``examples`` weighs a site by its number of training images, ``uniform`` does not.
    """

    name: Name = "fedit"
    weighting: Literal["examples", "uniform"] = "examples"


class CohortConfig(_Section):
    """A simulated cohort, when the sites do not bring data of their own.

    Attributes:
        kind: ``brain-structures`` (segmentation) or ``brain-lesions`` (classification).
        images_per_patient: slices of each virtual patient.
    """

    kind: Literal["brain-structures", "brain-lesions"]
    images_per_patient: Annotated[int, Field(ge=1, le=16)] = 1


class SiteConfig(_Section):
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
    """

    name: Name
    data: Path | None = None
    scanner: Name | None = None
    train_patients: Annotated[int, Field(ge=1)] | None = None
    test_patients: Annotated[int, Field(ge=1)] | None = None
    lesion_prevalence: Annotated[float, Field(ge=0, le=1)] | None = None
    declared_patients: Annotated[int, Field(ge=1)] | None = None
    signing_key: Digest | None = None


class StudyConfig(_Section):
    """A whole study. Immutable; equal studies have equal digests.

    Attributes:
        name: names the run folder.
        seed: root of everything random in a simulation; noise, masks and keys never depend on it.
        manifest: the tensors that may travel; None until resolved against the real backbone.
    """

    name: Name
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    backbone: BackboneConfig
    adapter: AdapterConfig
    task: TaskConfig
    training: TrainingConfig
    privacy: PrivacyConfig | None = None
    secure_aggregation: SecureAggregationConfig | None = None
    rounds: RoundsConfig
    strategy: StrategyConfig = StrategyConfig()
    cohort: CohortConfig | None = None
    sites: Annotated[tuple[SiteConfig, ...], Field(min_length=1)]
    manifest: AdapterManifest | None = None

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter_is_lora_unless_named(cls, value: object) -> object:
        return {"method": "lora", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> StudyConfig:
        _distinct(self.site_names, "site")
        for reserved, why in ((POOLED_SITE, "the pooled upper bound"), (ALL_SITES, "sums over sites")):
            if reserved in self.site_names:
                raise ValueError(f"site name {reserved!r} is reserved for {why}; rename the site")
        quorum = self.rounds.quorum
        if quorum is not None and quorum > len(self.sites):
            raise ValueError(f"rounds.quorum is {quorum} but there are {len(self.sites)} sites; lower the quorum")
        if self.cohort is not None:
            expected = {"brain-structures": "segmentation", "brain-lesions": "classification"}[self.cohort.kind]
            if self.task.kind != expected:
                raise ValueError(f"cohort {self.cohort.kind!r} is a {expected} cohort, task.kind is {self.task.kind!r}")
        self._check_training()
        self._check_secure_aggregation()
        for site in self.sites:
            self._check_site(site)
        return self

    def _check_training(self) -> None:
        training, privacy = self.training, self.privacy
        if privacy is None:
            if training.local_epochs is None:
                raise ValueError("training.local_epochs is missing; a study without [privacy] needs it")
            return
        if training.local_epochs is not None:
            raise ValueError("training.local_epochs has no meaning with [privacy], which draws at random; remove it")
        if training.order != "shuffled":
            raise ValueError("training.order has no meaning with [privacy], which draws at random; remove it")
        if privacy.views > 1 and training.augmentation == "none":
            raise ValueError("privacy.views above 1 needs training.augmentation; without it all views are equal")

    def _check_secure_aggregation(self) -> None:
        secure, is_shared = self.secure_aggregation, self.privacy is not None and self.privacy.trust == "consortium"
        if secure is None or not secure.enabled:
            if is_shared:
                raise ValueError(
                    "trust = 'consortium' needs [secure_aggregation] with enabled = true: without it the server "
                    "would see each site's sum with a share of the noise; add it, or set trust = 'site'"
                )
            return
        try:
            quorum = secure.quorum(len(self.sites))
        except SecureAggregationError as error:
            raise ValueError(f"secure_aggregation: {error}") from None
        if self.rounds.quorum is not None and self.rounds.quorum < quorum.min_sites:
            raise ValueError(
                f"rounds.quorum is {self.rounds.quorum}, but no sum of fewer than {quorum.min_sites} sites can be "
                "opened; remove it or raise it"
            )
        if is_shared == (secure.update_clip_norm is not None):
            raise ValueError(
                "secure_aggregation.update_clip_norm has no meaning with trust = 'consortium', which clips each "
                "patient; remove it"
                if is_shared
                else "secure_aggregation.update_clip_norm is missing; it bounds a site's weighted update"
            )
        if is_shared and secure.max_colluding < 1:
            raise ValueError(
                "trust = 'consortium' needs secure_aggregation.max_colluding of at least 1, since every site knows "
                "its own share of the noise; set 1 or more"
            )
        if is_shared and self.training.optimizer != "sgd":
            raise ValueError(
                "trust = 'consortium' needs training.optimizer = 'sgd': the step is taken on the sum; change it"
            )

    def _check_site(self, site: SiteConfig) -> None:
        needs_size = self.privacy is not None or self.sums_securely
        if needs_size and site.data is not None and site.declared_patients is None:
            raise ValueError(
                f"site {site.name!r}: declared_patients is missing; "
                f"{'[privacy] divides' if self.privacy is not None else '[secure_aggregation] weighs'} by it"
            )
        if site.declared_patients is not None and (not needs_size or self.cohort is not None):
            raise ValueError(f"site {site.name!r}: declared_patients is for [privacy] and a site's own data; remove it")
        recipe: dict[str, object] = {
            "scanner": site.scanner,
            "train_patients": site.train_patients,
            "test_patients": site.test_patients,
        }
        lesions = self.cohort is not None and self.cohort.kind == "brain-lesions"
        if lesions:
            recipe["lesion_prevalence"] = site.lesion_prevalence
        elif site.lesion_prevalence is not None:
            raise ValueError(f"site {site.name!r}: lesion_prevalence belongs to cohort kind 'brain-lesions'; remove it")
        if self.cohort is None and any(value is not None for value in recipe.values()):
            raise ValueError(f"site {site.name!r}: {next(iter(recipe))!r} needs a [cohort] section; add one")
        if self.cohort is not None:
            if site.data is not None:
                raise ValueError(f"site {site.name!r}: has 'data' although [cohort] simulates it; remove one of them")
            if missing := [key for key, value in recipe.items() if value is None]:
                raise ValueError(f"site {site.name!r}: {missing[0]} is missing; a simulated site needs it")

    @cached_property
    def site_names(self) -> tuple[str, ...]:
        """Site names in the order of the study: the order of every sum."""
        return tuple(site.name for site in self.sites)

    def declared_units(self, site_name: str) -> int | None:
        """The public number of a site's training units (patients or records).

        By it an update is divided and weighed. None without [privacy] and [secure_aggregation]. The pooled upper
        bound of a simulation has the sum of all sites.
        """
        if self.privacy is None and not self.sums_securely:
            return None
        by_record = self.privacy is not None and self.privacy.unit == "record"
        per_patient = self.cohort.images_per_patient if self.cohort and by_record else 1
        declared = [
            site.declared_patients or (site.train_patients or 0) * per_patient
            for site in self.sites
            if site_name in (site.name, POOLED_SITE)
        ]
        return sum(declared)

    @property
    def withholds_evaluation(self) -> bool:
        """Whether metrics of held-out patients never leave a site."""
        return self.privacy is not None and self.privacy.evaluation == "withheld"

    @property
    def sums_securely(self) -> bool:
        """Whether updates and metrics of the federation travel under masks."""
        return self.secure_aggregation is not None and self.secure_aggregation.enabled

    def sums_securely_in(self, scope: str) -> bool:
        """Whether this federation's updates are masked: a virtual site alone has nobody to share masks with."""
        return self.sums_securely and scope == FEDERATED

    @property
    def secure_quorum(self) -> Quorum:
        """The numbers of secure aggregation.

        Raises:
            StudyError: if it is not enabled.
        """
        if self.secure_aggregation is None or not self.secure_aggregation.enabled:
            raise StudyError("Expected a study with [secure_aggregation] enabled, got one without.")
        return self.secure_aggregation.quorum(len(self.sites))

    @property
    def quorum(self) -> int:
        """Replies that a round needs."""
        return self.rounds.quorum or (self.secure_quorum.min_sites if self.sums_securely else len(self.sites))

    @cached_property
    def canonical(self) -> bytes:
        """Canonical bytes: what is signed, approved and sent."""
        return canonical_bytes(self.model_dump(mode="json"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of :attr:`canonical`, hexadecimal."""
        return sha256_hex(self.canonical)

    @cached_property
    def model_digest(self) -> str:
        """SHA-256 of what fixes the adapted model: backbone, adapter, task, seed; the same once resolved."""
        parts = self.model_dump(mode="json", include={"backbone", "adapter", "task", "seed"})
        return sha256_hex(canonical_bytes(parts))

    def with_manifest(self, manifest: AdapterManifest) -> StudyConfig:
        """The resolved study, whose digest covers every tensor that may travel."""
        return self.replace(manifest=manifest)

    def replace(self, **changes: object) -> StudyConfig:
        """A study with some fields replaced, validated anew; digests are never carried over."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return StudyConfig.model_validate({**fields, **changes})

    @property
    def resolved_manifest(self) -> AdapterManifest:
        """The manifest of a resolved study.

        Raises:
            StudyError: if the study has not been resolved.
        """
        if self.manifest is None:
            raise StudyError("Expected a resolved study, got one without an adapter manifest; resolve it first.")
        return self.manifest


def read_study(path: Path) -> StudyConfig:
    """Read and check a study file; paths in it become absolute.

    Raises:
        StudyError: one line that names the file, the key, and what to change.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyError(f"Expected a study file at {path}, got nothing; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"Expected a readable UTF-8 study file at {path}, got: {error}.") from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"Expected valid TOML in {path}, got: {error}.") from None
    study = _validate(data, str(path))
    if study.cohort is not None:
        return study
    for site in study.sites:
        if site.data is None:
            raise StudyError(f"{path}: site {site.name!r} has no data; add 'data = \"manifest.csv\"' or a [cohort].")
    absolute = [
        site.model_copy(update={"data": (path.parent / site.data).resolve()}) for site in study.sites if site.data
    ]
    for site in absolute:
        if not (site.data and site.data.is_file()):
            raise StudyError(f"{path}: site {site.name!r} expects a data manifest at {site.data}, got nothing there.")
    return study.replace(sites=tuple(absolute))


def parse_study(canonical: bytes, *, digest: str | None = None) -> StudyConfig:
    """The study of canonical bytes, as they travel.

    Raises:
        StudyError: if the bytes are no study, not canonical, or do not have the expected digest.
    """
    if digest is not None and sha256_hex(canonical) != digest:
        raise StudyError(
            f"Expected a study with digest {digest[:16]}, got {sha256_hex(canonical)[:16]}; ask for it again."
        )
    try:
        study = StudyConfig.model_validate_json(canonical)
    except ValidationError as error:
        raise StudyError(_first_problem(error, "study")) from None
    if study.canonical != canonical:
        raise StudyError("Expected a study in canonical form, got other bytes for the same content.")
    return study


def _validate(data: dict[str, Any], origin: str) -> StudyConfig:
    try:
        return StudyConfig.model_validate(data)
    except ValidationError as error:
        raise StudyError(_first_problem(error, origin)) from None


_UNION_TAGS = ("segmentation", "classification", "lora", "heads")
"""What pydantic puts into the path of a key inside a section of several kinds; no part of the file."""


def _first_problem(error: ValidationError, origin: str) -> str:
    """The first validation problem as one line: where, what, and the nearest right word."""
    problems = error.errors(include_url=False)
    # A misspelt key is both an unknown one and a missing one; the unknown one says more.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in first["loc"] if part not in _UNION_TAGS)
    rest = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        close = difflib.get_close_matches(key, _all_keys(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; remove it."
        return f"{origin}: unknown key {where!r}{hint}{rest}"
    message = str(first["msg"]).removeprefix("Value error, ")
    got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
    return f"{origin}: {where or 'study'}: {message}{got}{rest}"


def _all_keys() -> list[str]:
    sections = [value for value in globals().values() if isinstance(value, type) and issubclass(value, _Section)]
    return sorted({key for section in sections for key in section.model_fields})


def _distinct(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{what} {name!r} appears twice; names must be distinct")
    return names
