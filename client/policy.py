"""The hospital's own rules: what may train on its patients, whatever a study says.

A policy is a TOML file that the hospital writes and nobody sends. What it does not allow is refused before
anything trains; what it leaves out does not exist: a policy without ``approved_studies`` has none, one without
``[budget]`` none either, all other keys are required, and an unknown key is an error. A hospital in a consortium
approves studies with ``medfed site approve``, which adds to ``approved_studies`` (:mod:`client.open_site`).

::

    approved_studies = ["3f1c...64 hexadecimal digits"]   # digests that the hospital has read and approved
    minimum_patients = 20                                  # training patients, for any study
    allow_unprotected = false                              # may a study without privacy train here?

    [budget]                                               # for this cohort, over all studies together
    epsilon = 10.0
    delta = 1e-5
    unit = "patient"
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfed.errors import PolicyError, SiteError
from medfed.study import StudyConfig
from medfed.study_sections import Digest
from medfed.toml_file import parse_toml
from privacy.ledger_entry import Cap


class Budget(BaseModel):
    """What all studies together may spend on the site's cohort.

    Attributes:
        epsilon: of everything composed, add/remove adjacency.
        delta: for which it is computed.
        unit: what it protects.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["patient", "record"]

    @property
    def cap(self) -> Cap:
        """As the ledger holds charges against it."""
        return Cap(epsilon=self.epsilon, delta=self.delta, unit=self.unit)


class SitePolicy(BaseModel):
    """What may train on this site's patients.

    Attributes:
        approved_studies: digests of resolved studies; no other study trains or is evaluated.
        minimum_patients: training patients below which nothing trains: too few hide nobody.
        allow_unprotected: whether a study without noise may train.
        budget: None lets no private study train.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    approved_studies: tuple[Digest, ...] = ()
    minimum_patients: Annotated[int, Field(ge=1)]
    allow_unprotected: bool
    budget: Budget | None = None

    def check_study(self, study: StudyConfig) -> None:
        """Refuse a study that the hospital has not approved as it is.

        Raises:
            PolicyError: says which rule, with the numbers.
        """
        if study.digest not in self.approved_studies:
            raise PolicyError(
                f"Expected one of {len(self.approved_studies)} approved studies, got {study.name!r} with digest "
                f"{study.digest}; read it, and if it may train here run 'medfed site approve', or add the digest to "
                "approved_studies."
            )
        privacy = study.privacy
        if privacy is None or privacy.trust == "none":
            if not self.allow_unprotected:
                raise PolicyError(
                    f"Expected a study with noise, got {study.name!r}, which protects nobody; ask its coordinator for "
                    "a [privacy] section with trust = 'site', or set allow_unprotected = true."
                )
            return
        if self.budget is None:
            raise PolicyError(
                f"Expected a [budget] for {study.name!r}, which spends privacy, got none; decide what all studies "
                "together may spend."
            )
        if privacy.unit != self.budget.unit:
            raise PolicyError(
                f"Expected protection of each {self.budget.unit}, got {study.name!r}, which protects each "
                f"{privacy.unit}; ask its coordinator for unit = {self.budget.unit!r}."
            )

    def check_cohort(self, *, num_patients: int, num_units: int, declared: int | None) -> None:
        """Refuse a cohort that is too small for the policy or for what the study says of it.

        Args:
            num_patients: training patients.
            num_units: units of the study's privacy: patients or records.
            declared: public number of units; None for studies without privacy.

        Raises:
            PolicyError: says which rule, with the numbers.
        """
        if num_patients < self.minimum_patients:
            raise PolicyError(
                f"Expected at least {self.minimum_patients} training patients, got {num_patients}; add patients, or "
                "lower minimum_patients."
            )
        if declared is not None and declared > num_units:
            raise PolicyError(
                f"Expected declared_patients of at most {num_units}, the true number of units, got {declared}; ask "
                "the coordinator to correct the study."
            )


def read_policy(path: Path) -> SitePolicy:
    """The policy in a TOML file.

    Raises:
        SiteError: one line that names the file and the key.
    """
    try:
        return SitePolicy.model_validate(parse_toml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SiteError(
            f"Expected a readable policy in TOML at {path}, got: {error}; nothing trains without."
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SiteError(f"{path}: {where}: {first['msg']}; correct the policy, nothing trains without.") from None
