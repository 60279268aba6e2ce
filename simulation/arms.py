"""The federations that a simulation compares, all run by the same server and client apps.

==================  =====================  ==================  ===========================================
arm                 trains                 evaluated on        answers
==================  =====================  ==================  ===========================================
``federated``       every site             every site          what the consortium gets
``local-<site>``    that site alone        that site           was joining worth it?
``pooled``          all data in one place  every site          the upper bound, which nobody may build
``without-<site>``  all the other sites    that site           does it help a hospital that was not there?
``few-shot-<k>...`` as one of the first    as that one         how good is it with k training patients of each
                    three                                      site?
==================  =====================  ==================  ===========================================

The last two kinds run only if they are asked for. Every arm makes the same number of passes over each image that it
trains on. "Zero-shot" is the federated arm before round 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medfed.study import FEW_SHOT, POOLED_SITE, StudyConfig


@dataclass(frozen=True)
class Arm:
    """One federation of a simulation.

    Attributes:
        scope: its name in messages, metrics and folders.
        train_sites: sites that train.
        evaluate_sites: sites on whose held-out patients it is evaluated.
        evaluate_initial: whether the untrained adapter is evaluated too.
        patients: training patients that it gets of each site; None for all.
    """

    scope: str
    train_sites: tuple[str, ...]
    evaluate_sites: tuple[str, ...]
    evaluate_initial: bool
    patients: int | None = None

    def folder(self, run_dir: Path) -> Path:
        """Where its checkpoint and metrics live."""
        return run_dir if self.scope == "federated" else run_dir / "arms" / self.scope

    def run_config(self, study: StudyConfig, run_dir: Path) -> dict[str, bool | float | int | str]:
        """The run configuration of the server app."""
        return {
            "study": study.canonical.decode("utf-8"),
            "run-dir": str(self.folder(run_dir)),
            "scope": self.scope,
            "train-sites": ",".join(self.train_sites),
            "evaluate-sites": ",".join(self.evaluate_sites),
            "evaluate-initial": self.evaluate_initial,
        }


def without(site: str) -> str:
    """The scope of the federation of all other sites."""
    return f"without-{site}"


def few_shot_scope(scope: str, patients: int) -> str:
    """The scope of the same federation with this many training patients of each site."""
    return f"{FEW_SHOT}-{patients}" if scope == "federated" else f"{FEW_SHOT}-{patients}-{scope}"


def arms_of(
    study: StudyConfig, *, baselines: bool, leave_one_out: bool = False, shots: Sequence[int] = ()
) -> list[Arm]:
    """The arms of a simulation, those that take longest first.

    Args:
        study: resolved or not.
        baselines: whether the pooled and the local-only arms run.
        leave_one_out: whether a federation without each of the sites runs.
        shots: numbers of training patients of each site with which the other arms run once more.
    """
    sites = study.site_names
    federated = Arm("federated", sites, sites, evaluate_initial=True)
    pooled: list[Arm] = []
    local: list[Arm] = []
    others: list[Arm] = []
    if len(sites) > 1:
        if baselines:
            pooled = [Arm("pooled", (POOLED_SITE,), sites, evaluate_initial=False)]
            local = [Arm(f"local-{site}", (site,), (site,), evaluate_initial=False) for site in sites]
        if leave_one_out:
            others = [
                Arm(without(site), tuple(other for other in sites if other != site), (site,), evaluate_initial=False)
                for site in sites
            ]
    few = [
        replace(arm, scope=few_shot_scope(arm.scope, patients), evaluate_initial=False, patients=patients)
        for patients in sorted(shots, reverse=True)
        for arm in (*pooled, federated, *local)
    ]
    return [*pooled, federated, *others, *local, *few]
