"""A run, opened so that one site's training can be run again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.data import Cohort
from client.site import SITES_VARIABLE, Site, forget_sites, site_of_partition
from medfed.device import choose_device
from medfed.errors import CheckpointError, StudyError
from medfed.models.adapted import AdaptedModel, adapted_model
from medfed.models.folding import ModelState
from medfed.study import FEDERATED, StudyConfig
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from simulation.audit.steps import Streams
from simulation.run_folder import stored_options, stored_study
from strategies.narrowed import trainable_of
from strategies.registry import strategy_of
from strategies.subspace import Subspace


@dataclass(frozen=True, eq=False)
class Scene:
    """A run, opened at one of its sites.

    Attributes:
        folder: of the run.
        study: what is audited; resolved.
        model: of the study; without folds, the adapter as before training.
        sites: all of the study, in order.
        site: whose training is run again.
        cohort: its data.
        plan: of its privacy; None for a study without.
        trainable: what trains in the first round, taken for all rounds.
    """

    folder: Path
    study: StudyConfig
    model: AdaptedModel
    sites: Sequence[Site]
    site: Site
    cohort: Cohort
    plan: PrivacyPlan | None
    trainable: Subspace

    @classmethod
    def of(cls, folder: Path, name: str | None, *, study: StudyConfig | None = None) -> Scene:
        """Opens the sites of a run.

        Args:
            folder: of a run of ``medfed simulate``.
            name: of the site; the first of the study by default.
            study: to audit in place of the run's own, for example with another epsilon; resolved.

        Raises:
            CheckpointError: if the folder is no such run, or its data has changed.
            StudyError: if the study has no such site.
        """
        stored, options = stored_study(folder), stored_options(folder)
        study = study or stored
        if options is None or not (folder / "sites.json").is_file():
            raise CheckpointError(f"Expected a run of medfed simulate at {folder}, got no sites; check the path.")
        if name is not None and name not in study.site_names:
            raise StudyError(f"Expected a site of {', '.join(study.site_names)}, got {name!r}.")
        os.environ[SITES_VARIABLE] = str(folder / "sites.json")
        forget_sites()
        sites = [site_of_partition(index) for index in range(len(study.site_names))]
        site = next(one for one in sites if one.name == (name or study.site_names[0]))
        model = adapted_model(study, choose_device(options.device))
        cohort = site.cohort(study, model.pixels)
        if options.cohorts.get(site.name) not in (None, cohort.digest):
            raise CheckpointError(f"Expected the data that the run was made on, got other data at {site.name!r}.")
        strategy = strategy_of(study)
        plan = None if study.privacy is None else PrivacyPlan.of_study(study)
        trainable = trainable_of(strategy.rule, strategy.plan(1), site.name)
        model.put(ModelState(model.initial_P))
        return cls(folder, study, model, sites, site, cohort, plan, trainable)

    @property
    def is_made_up(self) -> bool:
        """Whether nobody is real, and the run drew from the study's seed."""
        return self.study.cohort is not None

    @property
    def streams(self) -> Streams:
        """Where the audited training draws from: at a hospital what the site has, else the operating system."""
        if self.is_made_up:
            return lambda _round: RandomStream.from_system()
        return lambda number: self.site.random_stream(FEDERATED, number)

    def guessed(self, number: int) -> RandomStream:
        """Where the training would draw from if its noise followed from the study."""
        return RandomStream.for_simulation(self.study.seed, self.site.name, FEDERATED, number)
