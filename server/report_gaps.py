"""What a reader of a report might take for granted and the run does not show."""

from __future__ import annotations

from medfed.study import StudyConfig
from server.evaluation import Evaluation, NotMeasured
from server.few_shot import FewShot


def not_measured(
    study: StudyConfig, evaluation: Evaluation | None, few_shot: FewShot | None, *, is_audited: bool
) -> list[str]:
    """One sentence for each gap; what was evaluated is none.

    Args:
        study: that was run.
        evaluation: what was measured after training; None if nothing was.
        few_shot: scores by the number of training patients; None if that was not asked for.
        is_audited: whether attacks were tried on the run.
    """
    gaps = [*_of_the_task(study, evaluation), *_forgetting(evaluation)]
    if evaluation is None:
        gaps.append(
            "Confidence intervals and significance: one seed and the few held-out patients above; "
            "small differences may be chance."
        )
    else:
        gaps.append("Chance in training: one seed; intervals are over patients, not over repetitions of the study.")
    if not is_audited:
        gaps.append(
            "Privacy against an attacker: no attack was tried on the updates"
            + (", and no privacy budget was spent or accounted for." if study.privacy is None else ".")
        )
    if not study.is_for_hospitals:
        gaps.append("A real network: delays, drop-outs and sites on other hardware.")
    if evaluation is None or not evaluation.difference("being_in"):
        gaps.append("Sites outside of the study: nobody was left out to be tried on (--leave-one-out does).")
    if few_shot is None and study.privacy is None and not study.sums_securely and not study.is_for_hospitals:
        gaps.append("How many training patients a site needs: all of them were used (--few-shot 1,2,4 tries fewer).")
    if evaluation is None or not evaluation.groups:
        gaps.append("Fairness between groups of patients: the data names none (columns attribute_... of a manifest).")
    gaps.append("Benefit to any patient.")
    if study.cohort is not None:
        gaps.append("Real hospitals: scanners are modelled and patients are synthetic.")
    return gaps


def _forgetting(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return ["Forgetting: whether the backbone lost skill on what the study does not train."]
    if isinstance(evaluation.forgetting, NotMeasured):
        return [f"Forgetting of what the study does not train: {evaluation.forgetting.why}."]
    return []


def _of_the_task(study: StudyConfig, evaluation: Evaluation | None) -> list[str]:
    if study.task.kind == "segmentation":
        distance = (
            ["Surface distance (Hausdorff, average surface distance): Dice alone hides where an outline is wrong."]
            if evaluation is None
            else []
        )
        return [
            *distance,
            "Volume error, and surfaces in three dimensions: every slice is judged by itself.",
            "Finding a structure: the box prompt is drawn around the reference mask.",
            "Calibration of the predicted masks.",
        ]
    if evaluation is None:
        return [
            "Calibration, and sensitivity at a chosen specificity: balanced accuracy takes the likeliest class.",
            "Area under the ROC curve.",
        ]
    return ["A threshold fixed beforehand: the one behind the sensitivity shown was chosen on the same patients."]
