"""What the report says of an evaluation, in words: no more than its intervals allow."""

import pytest

from medfed.errors import CheckpointError
from server.evaluation import EVALUATION, Evaluation, Measured, OverSites, SiteEvaluation, read_evaluation
from server.report_evaluation import view_of

LABELS = {"zero_shot": "zero-shot", "local_only": "local-only", "federated": "federated", "pooled": "pooled"}
BETTER, WORSE = Measured(value=0.05, low=0.01, high=0.09), Measured(value=-0.05, low=-0.09, high=-0.01)
UNCLEAR, ALONE = Measured(value=0.02, low=-0.02, high=0.05), Measured(value=0.3)


def evaluation(joining: dict[str, Measured], **changes) -> Evaluation:
    measured = {"federated": Measured(value=0.8, low=0.7, high=0.9), "local_only": Measured(value=0.75)}
    sites = {
        name: SiteEvaluation(
            patients=changes.get("patients", 20),
            images=20,
            distance_unit="mm",
            metrics={"dice": measured},
            differences={"joining": difference},
            calibration={},
            flips=None,
        )
        for name, difference in joining.items()
    }
    over = {column: OverSites(mean=0.8, worst=0.7, worst_site="a", gap=0.1) for column in measured}
    return Evaluation(
        resamples=2000,
        sites=sites,
        over_sites={"dice": over},
        groups=(),
        embedding=None,
        saliency=None,
        seconds=1.0,
    )


def answer(**joining: Measured) -> str:
    (shown,) = view_of(evaluation(joining), LABELS, "Dice").comparisons
    assert shown.heading == "Was joining worth it?"
    return shown.sentence


def test_only_what_the_interval_tells_from_zero_counts() -> None:
    assert answer(a=UNCLEAR, b=ALONE) == "At no site is the difference told from chance."
    assert answer(a=BETTER, b=BETTER) == (
        "Federated beats training alone at a and b, by more than resampling the patients explains."
    )
    assert answer(a=WORSE) == "It falls behind training alone at a."


def test_sites_that_win_lose_and_cannot_tell_are_all_told() -> None:
    assert answer(a=BETTER, b=WORSE, c=UNCLEAR) == (
        "Federated beats training alone at a, by more than resampling the patients explains; it falls behind training "
        "alone at b; at the other sites the difference is not told from chance (1 of 3)."
    )


def test_sites_with_few_patients_are_named_for_it() -> None:
    assert view_of(evaluation({"a": BETTER}, patients=3), LABELS, "Dice").few_patients == ("a",)
    assert view_of(evaluation({"a": BETTER}, patients=10), LABELS, "Dice").few_patients == ()


def test_evaluation_that_is_none_is_refused_and_none_is_none(tmp_path) -> None:
    assert read_evaluation(tmp_path) is None
    written = evaluation({"a": BETTER})
    (tmp_path / EVALUATION).write_text(written.model_dump_json())
    assert read_evaluation(tmp_path) == written
    (tmp_path / EVALUATION).write_text(written.model_dump_json().replace('"resamples"', '"samples"'))
    with pytest.raises(CheckpointError, match="remove the file"):
        read_evaluation(tmp_path)
