"""The model card of a run's adapter: what it is, whose it is, what it is for and what it is not for.

After Mitchell et al. 2019 (https://arxiv.org/abs/1810.03993), as far as the files of a run can say.
"""

from __future__ import annotations

from medfed.errors import StudyError, WeightsError
from medfed.models.registry import backbone_of
from medfed.study import StudyConfig
from server.results import Results


def model_card(study: StudyConfig, results: Results) -> list[tuple[str, str]]:
    """Term and description, in the order in which they are read."""
    return [
        ("Model", _model(study)),
        ("Licence", _licence(study)),
        ("Trained on", _data(study, results)),
        ("Intended use", _intended(study)),
        (
            "Not for",
            "Diagnosis, triage or treatment. It is no medical device; nobody has tested what it does for a patient.",
        ),
        ("Limits", _limits(study)),
    ]


def _model(study: StudyConfig) -> str:
    return (
        f"{study.backbone.name}, frozen, with {study.adapter.in_words} of "
        f"{study.resolved_manifest.num_elements:,} parameters; in adapter/ of the run folder, for PEFT"
    )


def _licence(study: StudyConfig) -> str:
    try:
        weights = backbone_of(study.backbone).weights
    except (StudyError, WeightsError):
        return "Backbone: not stated, as this installation does not know these weights; ask who distributes them."
    if weights is None:
        return "Backbone: random weights made from the study's seed, of no use beyond trying a set-up."
    source = f" (package {weights.distribution})" if weights.distribution else ""
    return (
        f"Backbone: {weights.licence}, as stated by its distribution{source}. Adapter: whatever the sites agree on; "
        "medfed claims nothing."
    )


def _data(study: StudyConfig, results: Results) -> str:
    sites = len(study.sites)
    if study.cohort is None:
        return f"{results.cohort} {sites} site{'s' if sites != 1 else ''}; ask them for provenance and consent."
    patients = sum(site.train_patients or 0 for site in study.sites)
    return f"{patients} virtual training patients at {sites} site{'s' if sites != 1 else ''}. {results.cohort}"


def _intended(study: StudyConfig) -> str:
    if study.cohort is not None:
        return "Research into federated adaptation. Patients are made up: it shows how a study goes, and no more."
    return "Research by the sites of the study, on images like those that they trained on."


def _limits(study: StudyConfig) -> str:
    if study.task.kind == "segmentation":
        return (
            "It outlines what somebody has pointed at with a box, slice by slice; it does not say whether a structure "
            "is there."
        )
    return (
        "It chooses among the classes of the study for any image, also for one that shows none of them; how far its "
        "probabilities can be believed was measured, if at all, on images like these alone."
    )
