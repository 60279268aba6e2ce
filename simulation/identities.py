"""Identities of virtual hospitals, whose public keys the study has to name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from medfed.canonical import derive_seed
from medfed.durable_file import make_private_folder, replace_durably
from medfed.errors import StudyError
from medfed.study import StudyConfig
from privacy.secure_aggregation.identity import SECRET_BYTES, Identity


def with_identities(study: StudyConfig) -> tuple[StudyConfig, dict[str, bytes]]:
    """The study with the public keys of its virtual sites, and their secrets by site; none if nothing is masked.

    Where the cohort is made up, the keys follow from the seed, so that a study has one digest however often it is
    run; the masks do not rest on them alone. Otherwise they come from the operating system.

    Raises:
        StudyError: if the study names keys already: they are real hospitals', and not to be had here.
    """
    if not study.sums_securely:
        return study, {}
    if named := [site.name for site in study.sites if site.signing_key is not None]:
        raise StudyError(
            f"Expected a study without keys, since virtual sites get their own, got keys of {named[0]!r}; remove "
            "signing_key to simulate it."
        )
    secrets = {site: _secret(study, site) for site in study.site_names}
    sites = []
    for site in study.sites:
        signing_key = Identity(secrets[site.name]).signing_key
        sites.append(site.model_copy(update={"signing_key": signing_key.hex()}))
    return study.replace(sites=tuple(sites)), secrets


def store_identities(folder: Path, secrets: Mapping[str, bytes]) -> None:
    """Write each site's identity to ``<site>.identity``, for its owner alone."""
    make_private_folder(folder)
    for site, secret in secrets.items():
        replace_durably(folder / f"{site}.identity", secret, mode=0o600)


def _secret(study: StudyConfig, site: str) -> bytes:
    if study.cohort is None:
        return os.urandom(SECRET_BYTES)
    parts = [derive_seed(study.seed, "identity", site, part) for part in range(SECRET_BYTES // 8)]
    return b"".join(part.to_bytes(8, "big") for part in parts)
