"""Who this site is and what it holds: the hospital's side of a study, decided at the hospital.

Nothing here is taken from a message. A simulation describes its virtual sites in one JSON file, named by the
environment variable ``MEDFED_SITES``, so that the same client app finds its site in whatever process it
runs: this one, a forked worker, or a Ray actor.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.data import Cohort, load_cohort
from client.features import FeatureCache, cache_key
from medfed.device import DeviceChoice, choose_device, prepare_cpu
from medfed.errors import StudyError
from medfed.models.pixels import PixelSpec
from medfed.study import Name, StudyConfig

SITES_VARIABLE = "MEDFED_SITES"
"""Environment variable with the path of a :class:`VirtualSites` file."""


class VirtualSite(BaseModel):
    """One virtual site.

    Attributes:
        name: as in the study, or ``pooled``.
        manifests: its data; more than one only for the pooled upper bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    manifests: tuple[Path, ...] = Field(min_length=1)


class VirtualSites(BaseModel):
    """The virtual sites of a simulation, by partition id.

    Attributes:
        device: where they train.
        num_threads: threads of a process that serves them.
        feature_cache: folder of the encrypted feature cache; None keeps features in memory only.
        feature_key: file of its key.
        sites: site of partition 0, 1, ...
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: DeviceChoice = "auto"
    num_threads: int = Field(ge=1, default=1)
    feature_cache: Path | None = None
    feature_key: Path | None = None
    sites: tuple[VirtualSite, ...] = Field(min_length=1)


class Site:
    """A site, ready to serve.

    Attributes:
        name: as in the study.
        manifests: its data.
        device: where it computes.
        features: its feature cache.
    """

    def __init__(self, name: str, manifests: tuple[Path, ...], device: torch.device, features: FeatureCache) -> None:
        self.name = name
        self.manifests = manifests
        self.device = device
        self.features = features
        self._cohorts: dict[str, Cohort] = {}

    def cohort(self, study: StudyConfig, pixels: PixelSpec) -> Cohort:
        """The site's cohort for a study; read and checked at the first call.

        Raises:
            DataError: if it breaks a rule.
        """
        key = f"{study.model_digest}:{pixels.digest}"
        if key not in self._cohorts:
            self._cohorts[key] = load_cohort(self.name, self.manifests, study.task, pixels)
        return self._cohorts[key]


def site_of_partition(partition_id: int) -> Site:
    """The virtual site with this partition id; the same object at every call in a process.

    Raises:
        StudyError: if the process was not told about virtual sites, or has no such partition.
    """
    path = os.environ.get(SITES_VARIABLE)
    if not path:
        raise StudyError(f"Expected {SITES_VARIABLE} to name a sites file, got nothing; start with 'medfed simulate'.")
    sites = _open_sites(path)
    if not 0 <= partition_id < len(sites):
        raise StudyError(f"Expected a partition in 0..{len(sites) - 1}, got {partition_id}.")
    return sites[partition_id]


def forget_sites() -> None:
    """Close what :func:`site_of_partition` opened: files may have changed, and caches take memory."""
    _open_sites.cache_clear()


@lru_cache(maxsize=1)
def _open_sites(path: str) -> tuple[Site, ...]:
    try:
        virtual = VirtualSites.model_validate_json(Path(path).read_bytes())
    except (OSError, ValidationError) as error:
        raise StudyError(f"Expected a sites file at {path}, got: {error}.") from None
    prepare_cpu(virtual.num_threads)
    device = choose_device(virtual.device)
    if virtual.feature_cache is None or virtual.feature_key is None:
        features = FeatureCache()
    else:
        features = FeatureCache(virtual.feature_cache, cache_key(virtual.feature_key))
    return tuple(Site(site.name, site.manifests, device, features) for site in virtual.sites)
