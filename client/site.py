"""Who this site is and what it holds: the hospital's side of a study, decided at the hospital.

Nothing here is taken from a message. A hospital's site lies in one folder, named by the environment variable
``MEDFED_SITE``. A simulation describes its virtual sites in one JSON file, named by ``MEDFED_SITES``, so that the same
client app finds its site in whatever process it runs: a hospital's, this one, a forked worker, or a Ray actor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.data import Cohort, load_cohort
from client.features import FeatureCache, cache_key
from client.few_patients import FewPatients, training_on
from client.manifest import read_manifest
from client.policy import SitePolicy
from client.reply_store import ReplyStore
from client.site_memory import SiteMemory
from medfed.device import DeviceChoice, choose_device, prepare_cpu
from medfed.errors import PolicyError, SiteError, StudyError
from medfed.models.pixels import PixelSpec
from medfed.signing import read_key
from medfed.study import FEDERATED, StudyConfig
from medfed.study_sections import Name
from privacy.accounting import epsilon_spent
from privacy.ledger import PrivacyLedger
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from privacy.secure_aggregation.client import SecureClient
from privacy.secure_aggregation.identity import read_identity
from privacy.secure_aggregation.plan import SecureAggregationPlan

SITE_VARIABLE = "MEDFED_SITE"
"""Environment variable with the folder of a hospital's site."""

SITES_VARIABLE = "MEDFED_SITES"
"""Environment variable with the path of a :class:`VirtualSites` file."""


class LaterData(BaseModel):
    """What takes the place of a virtual site's data when its scanner is replaced.

    Attributes:
        from_round: first round with it.
        manifests: the data from then on; the same patients.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    from_round: int = Field(ge=1)
    manifests: tuple[Path, ...] = Field(min_length=1)


class VirtualSite(BaseModel):
    """One virtual site.

    Attributes:
        name: as in the study, or ``pooled``.
        manifests: its data; more than one only for the pooled upper bound.
        later: what takes its place in later rounds, in the order of rounds; for virtual sites alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    manifests: tuple[Path, ...] = Field(min_length=1)
    later: tuple[LaterData, ...] = ()

    def manifests_in(self, round_number: int) -> tuple[Path, ...]:
        """The data in a round."""
        manifests = self.manifests
        for later in self.later:
            if round_number >= later.from_round:
                manifests = later.manifests
        return manifests


class VirtualSites(BaseModel):
    """The virtual sites of a simulation, by partition id.

    Attributes:
        device: where they train.
        num_threads: threads of a process that serves them.
        feature_cache: folder of the encrypted feature cache; None keeps features in memory only.
        feature_key: file of its key.
        policy: what may train; the same for all of them.
        cohorts: scope -> name under which the site's ledger charges it. The arms of a simulation are different
            worlds with the same patients; each has a budget of its own. A scope that is not here is refused.
        ledgers: folder with one privacy ledger for each site.
        ledger_key: file of the key that signs them.
        identities: folder with each site's identity for secure aggregation, ``<site>.identity``.
        journals: folder with a folder for each site, where it notes what it answered; in no backup.
        memories: folder with a folder for each site, for what it remembers between rounds.
        noise_seed: draws and noise follow from it, which protects nobody: for patients who are made up. None
            draws from the operating system.
        few_patients: scope -> training patients of each site that it gets; one that is not here gets all.
        few_patients_seed: fixes which those are.
        sites: site of partition 0, 1, ...
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: DeviceChoice = "auto"
    num_threads: int = Field(ge=1, default=1)
    feature_cache: Path | None = None
    feature_key: Path | None = None
    policy: SitePolicy
    cohorts: dict[Name, Name]
    ledgers: Path
    ledger_key: Path
    identities: Path
    journals: Path
    memories: Path
    noise_seed: int | None
    few_patients: dict[Name, Annotated[int, Field(ge=1)]] = {}
    few_patients_seed: int = 0
    sites: tuple[VirtualSite, ...] = Field(min_length=1)

    @property
    def few(self) -> dict[str, FewPatients]:
        """The training patients of each scope that does not get all."""
        return {scope: FewPatients(count, self.few_patients_seed) for scope, count in self.few_patients.items()}


class Site:
    """A site, ready to serve.

    Attributes:
        name: as in the study.
        manifests: its data.
        device: where it computes.
        features: its feature cache.
        cohorts: scope -> name of the cohort that pays for it; decided here, since a scope that the server may
            choose would come with a new budget each time.

    Args:
        name: as above, like all that is named there.
        manifests: as above.
        device: as above.
        features: as above.
        policy: asked anew whenever it counts, so that a hospital may change its mind while a site runs.
        cohorts: as above.
        ledger: the privacy ledger's file; made when the first private round comes.
        ledger_key: file of the key that signs it.
        identity: file of the keys by which other sites know this one; needed for secure aggregation.
        journal: folder of what it answered in secure aggregation; in no backup.
        memory: folder of what it remembers between rounds.
        noise_seed: None draws from the operating system, as it must be wherever a patient is real.
        replies: what it answered, for questions that come again; None answers every question anew, as a simulation may.
        virtual: the description of a virtual site whose data changes with the round.
        few: scope -> the training patients that it gets; all of them where nothing is said, as at a hospital.
    """

    def __init__(
        self,
        name: str,
        manifests: tuple[Path, ...],
        *,
        device: torch.device,
        features: FeatureCache,
        policy: Callable[[], SitePolicy],
        cohorts: Mapping[str, str],
        ledger: Path,
        ledger_key: Path,
        identity: Path,
        journal: Path,
        memory: Path,
        noise_seed: int | None,
        replies: ReplyStore | None = None,
        virtual: VirtualSite | None = None,
        few: Mapping[str, FewPatients] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.replies = replies
        self.manifests = manifests
        self.device = device
        self.features = features
        self._policy = policy
        self.cohorts = cohorts
        self._ledger_path = ledger
        self._ledger_key = ledger_key
        self._identity = identity
        self._journal = journal
        self._memory = memory
        self._secure_clients: dict[bytes, SecureClient] = {}
        self._noise_seed = noise_seed
        self._virtual = virtual
        self._few_of = few
        self._few: FewPatients | None = None
        self._cohorts: dict[tuple[str, str, tuple[Path, ...], FewPatients | None], Cohort] = {}

    @property
    def policy(self) -> SitePolicy:
        """What may train here, now.

        Raises:
            SiteError: if the policy cannot be read; then nothing trains.
        """
        return self._policy()

    @cached_property
    def ledger(self) -> PrivacyLedger:
        """The site's privacy ledger; verified when it is opened.

        Raises:
            LedgerError: if it is not as it was signed.
            SiteError: if its key or its files are not for the owner alone.
        """
        return PrivacyLedger.open(self._ledger_path, read_key(self._ledger_key))

    def secure_client(self, plan: SecureAggregationPlan) -> SecureClient:
        """This site's side of secure aggregation in a plan that follows from an approved study.

        Raises:
            SiteError: if the site has no identity.
            SecureAggregationError: if the study names other keys for this site.
        """
        if plan.digest not in self._secure_clients:
            folder = self._journal / plan.digest.hex()
            client = SecureClient(self.name, read_identity(self._identity), plan, folder)
            self._secure_clients = {plan.digest: client}  # a site works for one study at a time
        return self._secure_clients[plan.digest]

    def memory(self, study: StudyConfig, scope: str) -> SiteMemory:
        """What this site remembers between the rounds of a federation."""
        return SiteMemory(self._memory / study.digest / scope)

    def cohort_name(self, scope: str) -> str:
        """The cohort that pays for a federation's training.

        Raises:
            PolicyError: for a scope that this site does not serve.
        """
        if scope not in self.cohorts:
            raise PolicyError(f"Expected a scope of {', '.join(self.cohorts)}, got {scope!r}; it has no cohort to pay.")
        return self.cohorts[scope]

    def spent_on(self, study: StudyConfig, scope: str) -> float | None:
        """Epsilon that one study spent on this site's patients so far; None if it spends nothing.

        At the study's own delta. What other studies spent is the hospital's business, and is not in it.
        """
        if study.privacy is None or not (plan := PrivacyPlan.of_study(study)).is_private:
            return None
        charges = [spending.charge for spending in self.ledger.charges(self.cohort_name(scope))]
        own = [charge.mechanism for charge in charges if (charge.study_digest, charge.scope) == (study.digest, scope)]
        return epsilon_spent(own, plan.delta).value

    def spent_in_all(self, scope: str) -> float:
        """Epsilon that all studies together spent on the cohort that pays for a federation.

        Raises:
            PolicyError: if the hospital has no budget.
        """
        budget = self.policy.budget
        if budget is None:
            raise PolicyError("Expected a [budget] at a site that spends privacy, got none; decide on one.")
        return self.ledger.spent(self.cohort_name(scope), budget.delta).value

    def random_stream(self, scope: str, round_number: int) -> RandomStream:
        """Where draws and noise of one round come from."""
        if self._noise_seed is None:
            return RandomStream.from_system()
        return RandomStream.for_simulation(self._noise_seed, self.name, scope, round_number)

    def turn_to(self, round_number: int, scope: str = FEDERATED) -> None:
        """Let a virtual site hold what it holds in a round of a federation; others hold the same in every one."""
        if self._virtual is not None:
            self.manifests = self._virtual.manifests_in(round_number)
        self._few = self._few_of.get(scope)

    def cohort(self, study: StudyConfig, pixels: PixelSpec) -> Cohort:
        """The site's cohort for a study, as of what it was turned to; read and checked at the first call.

        Raises:
            DataError: if it breaks a rule.
        """
        whole = (study.model_digest, pixels.digest, self.manifests, None)
        if whole not in self._cohorts:
            self._cohorts[whole] = load_cohort(self.name, self.manifests, study.task, pixels)
        if self._few is None:
            return self._cohorts[whole]
        key = (*whole[:3], self._few)
        if key not in self._cohorts:
            self._cohorts[key] = training_on(self._cohorts[whole], self._few_of_each(self._few, study))
        return self._cohorts[key]

    def _few_of_each(self, few: FewPatients, study: StudyConfig) -> frozenset[str]:
        """The chosen patients of every manifest: the pooled site holds several sites' patients."""
        rows = (read_manifest(manifest, study.task) for manifest in self.manifests)
        return frozenset().union(*(few.of(row.patient_id for row in of_one if row.split == "train") for of_one in rows))


def site_of(node_config: Mapping[str, object]) -> Site:
    """The site that this process is, or the virtual one of a simulation that it is asked to be.

    Args:
        node_config: of the Flower node; its ``partition-id`` counts in simulations only.

    Raises:
        SiteError: if a hospital's folder is not as it must be, or the process is told that it is both.
        StudyError: as :func:`site_of_partition`.
    """
    folder = os.environ.get(SITE_VARIABLE)
    if not folder:
        return site_of_partition(int(str(node_config["partition-id"])))
    if os.environ.get(SITES_VARIABLE):
        raise SiteError(
            f"Expected {SITE_VARIABLE} or {SITES_VARIABLE}, got both: a hospital simulates nobody; unset one."
        )
    return _open_site(folder)


@lru_cache(maxsize=1)
def _open_site(folder: str) -> Site:
    from client.open_site import open_site  # it builds on this module

    return open_site(Path(folder))


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
    """Close what :func:`site_of` opened: files may have changed, and caches take memory."""
    _open_sites.cache_clear()
    _open_site.cache_clear()


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
    return tuple(
        Site(
            site.name,
            site.manifests,
            device=device,
            features=features,
            policy=lambda: virtual.policy,
            cohorts=virtual.cohorts,
            ledger=virtual.ledgers / f"{site.name}.sqlite",
            ledger_key=virtual.ledger_key,
            identity=virtual.identities / f"{site.name}.identity",
            journal=virtual.journals / site.name,
            memory=virtual.memories / site.name,
            noise_seed=virtual.noise_seed,
            virtual=site if site.later else None,
            few=virtual.few,
        )
        for site in virtual.sites
    )
