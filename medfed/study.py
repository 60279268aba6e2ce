"""The study file: what a consortium agrees on, as one immutable object with one digest.

A study is read from TOML. Every section is a frozen pydantic model that refuses unknown keys, because a
misspelt key that is silently ignored is a study nobody approved. :attr:`StudyConfig.digest` is the SHA-256
of the canonical form; once resolved (:meth:`StudyConfig.with_manifest`) it also covers the names and shapes
of every tensor that may leave a site.
"""

from __future__ import annotations

import difflib
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from medfed import shift_profile, study_sections
from medfed.adapter_manifest import AdapterManifest
from medfed.canonical import canonical_bytes, sha256_hex
from medfed.consortium import Quorum
from medfed.errors import SecureAggregationError, StudyError
from medfed.quantity import with_quantities
from medfed.study_sections import (
    AdapterConfig,
    BackboneConfig,
    CohortConfig,
    LoraAdapterConfig,
    Name,
    NoisedEvaluation,
    PrivacyConfig,
    RoundsConfig,
    Section,
    SecureAggregationConfig,
    SiteConfig,
    StrategyConfig,
    TaskConfig,
    TrainingConfig,
    distinct,
)
from medfed.toml_file import parse_toml

FEDERATED = "federated"
"""Scope of the federation of all sites; simulations have others, of one virtual site each."""

FEW_SHOT = "few-shot"
"""Begins the scopes of a simulation's repetitions of the federation with a few training patients of each site."""

ALL_SITES = "all-sites"
"""Stands for a sum over sites where a single site's number would stand."""

POOLED_SITE = "pooled"
"""Name of the virtual site that holds all data in simulations: the upper bound, illegal to build."""


def is_of_all_sites(scope: str) -> bool:
    """Whether a federation is that of all sites of a study, or a repetition of it with fewer patients."""
    beginning, _, patients = scope.rpartition("-")
    return scope == FEDERATED or (beginning == FEW_SHOT and patients.isdigit())


def _is_none(value: object) -> bool:
    return value is None


class StudyConfig(Section):
    """A whole study. Immutable; equal studies have equal digests.

    Attributes:
        name: names the run folder.
        seed: root of everything random in a simulation; noise, masks and keys never depend on it.
        tracking: where the server also writes the metrics of every round; an extra of that name must be installed.
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
    tracking: Literal["tensorboard", "mlflow"] | None = Field(default=None, exclude_if=_is_none)
    manifest: AdapterManifest | None = None

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter_is_lora_unless_named(cls, value: object) -> object:
        return {"method": "lora", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> StudyConfig:
        distinct(self.site_names, "site")
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
        self._check_strategy()
        for site in self.sites:
            self._check_site(site)
            self._check_rank(site)
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

    def _check_strategy(self) -> None:
        """What needs the sections alone; whether parts of a strategy go together is for those who know them."""
        if not self.strategy.shrinkage:
            return
        if self.privacy is None or self.privacy.trust == "none":
            raise ValueError(
                "strategy.shrinkage needs [privacy] with noise: it takes out what noise of a known size explains; "
                "remove it"
            )
        if self.training.optimizer != "sgd":
            raise ValueError(
                f"strategy.shrinkage needs training.optimizer = 'sgd', got {self.training.optimizer!r}, after which "
                "the size of the noise is no longer known; change it"
            )
        if self.strategy.local is not None:
            raise ValueError(
                f"strategy.shrinkage needs plain local training, got strategy.local.method = "
                f"{self.strategy.local.method!r}, after which the size of the noise is no longer known; remove one"
            )

    def _check_site(self, site: SiteConfig) -> None:
        needs_size = self.privacy is not None or self.sums_securely
        if needs_size and self.cohort is None and site.declared_patients is None:
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
            # A shift may take the prevalence from the table; whether it does is known when presets are resolved.
            if site.lesion_prevalence is not None or site.shift is None:
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

    def _check_rank(self, site: SiteConfig) -> None:
        if site.rank is None:
            return
        most = self.adapter.rank if isinstance(self.adapter, LoraAdapterConfig) else None
        if most is None:
            raise ValueError(f"site {site.name!r}: rank belongs to adapter.method = 'lora'; remove it")
        if site.rank > most:
            raise ValueError(f"site {site.name!r}: rank is {site.rank}, above adapter.rank = {most}; lower it")
        if self.privacy is not None and self.privacy.trust == "consortium":
            raise ValueError(
                f"site {site.name!r}: rank has no meaning with trust = 'consortium', where one step is taken on the "
                "sum, noised everywhere; remove it, or set trust = 'site'"
            )

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
    def is_for_hospitals(self) -> bool:
        """Whether it names no data: each hospital knows its own."""
        return self.cohort is None and all(site.data is None for site in self.sites)

    @property
    def withholds_evaluation(self) -> bool:
        """Whether metrics of held-out patients never leave a site."""
        return self.privacy is not None and self.privacy.evaluation == "withheld"

    @property
    def noises_evaluation(self) -> NoisedEvaluation | None:
        """How held-out counts are noised before they leave a site; None if they do not leave, or leave as they are."""
        evaluation = None if self.privacy is None else self.privacy.evaluation
        return evaluation if isinstance(evaluation, NoisedEvaluation) else None

    @property
    def shows_held_out(self) -> bool:
        """Whether exact numbers and pictures of held-out patients may be shown, even to whoever simulates."""
        return self.privacy is None or self.privacy.evaluation == "exact"

    @property
    def num_evaluations(self) -> int:
        """Evaluations of the federated arm over the whole study, the one before the first round included."""
        if self.withholds_evaluation:
            return 0
        return 1 + self.evaluations_before(self.rounds.num_rounds)  # and the one after the last round

    def evaluations_before(self, number: int) -> int:
        """Evaluations of the federated arm before a round from 1 on trains, unless they are withheld."""
        every = self.rounds.evaluate_every
        return 1 + ((number - 1) // every if every else 0)

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

    Without a [cohort], either every site names its data or none does: then the study is for real hospitals.

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
        data = parse_toml(text)
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"Expected valid TOML in {path}, got: {error}.") from None
    study = _validate(with_quantities(data), str(path))
    if study.cohort is not None or study.is_for_hospitals:
        return study
    for site in study.sites:
        if site.data is None:
            raise StudyError(
                f"{path}: site {site.name!r} has no data and others do; add 'data = \"manifest.csv\"', or remove all."
            )
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


_UNION_TAGS = (
    *("segmentation", "classification", "lora", "heads", "full"),
    *("fedprox", "scaffold", "fednova", "feddyn", "q-fedavg", "fedbn", "fedrep", "site-adapter", "ditto"),
    *("fedavgm", "fedadagrad", "fedyogi", "fedadam"),
)
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
        hint = f"; did you mean {close[0]!r}?" if close and close[0] != key else "; remove it."
        return f"{origin}: unknown key {where!r}{hint}{rest}"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        context = first["ctx"]
        key, got = context["discriminator"].strip("'"), context.get("tag")
        expected = context.get("expected_tags")
        return (
            f"{origin}: {where}.{key}: {f'expected one of {expected}, got {got!r}' if expected else 'is missing'}{rest}"
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
    return f"{origin}: {where or 'study'}: {message}{got}{rest}"


def _all_keys() -> list[str]:
    found = (*vars(study_sections).values(), *vars(shift_profile).values(), StudyConfig)
    sections = [value for value in found if isinstance(value, type) and issubclass(value, Section)]
    return sorted({key for section in sections for key in section.model_fields})
