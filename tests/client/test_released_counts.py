"""Counts of held-out patients: charged before anything is predicted, noised once, and nothing else leaves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import client.released_counts as released_counts
from client import serve
from client.case_scores import case_scores
from client.released_counts import noised_counts
from client.site import site_of_partition
from medfed.errors import BudgetError, PrivacyError, StudyError
from medfed.messages import Fields, RoundInstruction, RoundReply
from medfed.metrics.mergeable import CountLayout
from medfed.models.adapted import adapted_model, resolve
from medfed.models.folding import ModelState
from medfed.payload import encode_adapter
from medfed.study import StudyConfig, parse_study
from medfed.study_sections import SegmentationConfig
from privacy.accounting import epsilon_spent
from privacy.ledger import PrivacyLedger
from privacy.plan import PrivacyPlan, calibrated
from privacy.randomness import RandomStream

MakeStudy = Callable[..., StudyConfig]
OpenSites = Callable[..., Path]

NOISED = {"noise_multiplier": 5.0}


@pytest.fixture
def study(make_private_study: MakeStudy) -> StudyConfig:
    return resolve(make_private_study(("north",), evaluation=NOISED), torch.device("cpu"))


def with_privacy(study: StudyConfig, **changes: Any) -> StudyConfig:
    assert study.privacy is not None
    return study.replace(privacy={**study.privacy.model_dump(), **changes})


def evaluate(study: StudyConfig, number: int = 1, shift: float = 0.0) -> Fields:
    initial_P = adapted_model(study, torch.device("cpu")).initial_P
    adapter = encode_adapter(initial_P + shift, study.resolved_manifest)
    instruction = RoundInstruction(study_digest=study.digest, round=number)
    return serve.evaluate(
        instruction, instruction.to_fields(study=study.canonical, adapter=adapter), site_of_partition(0)
    )


def exact_metrics(study: StudyConfig) -> dict[str, float]:
    site, model = site_of_partition(0), adapted_model(study, torch.device("cpu"))
    scores = case_scores(
        model,
        study.task,
        site.cohort(study, model.pixels).test,
        state=ModelState(model.initial_P),
        features=site.features,
        batch_size=2,
    )
    layout = CountLayout(study.task)
    return layout.metrics(layout.contributions(scores).sum(axis=0))


def test_charge_is_durable_before_anything_is_predicted(
    study: StudyConfig, open_sites: OpenSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_sites(study)
    seen: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(PrivacyLedger, "reserve", noting("reserve", PrivacyLedger.reserve))
    monkeypatch.setattr(PrivacyLedger, "settle", noting("settle", PrivacyLedger.settle))
    monkeypatch.setattr(released_counts, "case_scores", noting("predict", case_scores))
    monkeypatch.setattr(released_counts, "noised_counts", noting("noise", noised_counts))
    evaluate(study)
    assert seen == ["reserve", "predict", "noise", "settle"]


def test_failure_after_the_charge_is_spent(
    study: StudyConfig, open_sites: OpenSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_sites(study)

    def fail(*_: Any, **__: Any) -> None:
        raise PrivacyError("out of memory")

    monkeypatch.setattr(released_counts, "case_scores", fail)
    with pytest.raises(PrivacyError, match="out of memory"):
        evaluate(study)
    (charge,) = site_of_partition(0).ledger.charges("federated")
    assert charge.settled is not None
    assert charge.settled.outcome == "failed"


def test_same_request_gets_the_same_counts_and_another_one_is_charged(
    study: StudyConfig, open_sites: OpenSites
) -> None:
    open_sites(study)
    first, again = evaluate(study), evaluate(study)
    assert first == again
    ledger = site_of_partition(0).ledger
    assert len(ledger.charges("federated")) == 1
    # A server that asks in more ways than the study has evaluations pays for each.
    evaluate(study, number=2)
    evaluate(study, shift=0.01)
    assert len(ledger.charges("federated")) == 3
    charged = [spending.charge for spending in ledger.charges("federated")]
    assert {charge.clip_norm for charge in charged} == {CountLayout(study.task).l2_bound}
    plan = PrivacyPlan.of_study(study)
    assert {charge.mechanism for charge in charged} == {plan.evaluation_mechanism}


def test_curious_server_is_stopped_by_the_budget(study: StudyConfig, open_sites: OpenSites) -> None:
    plan = PrivacyPlan.of_study(study)
    two = epsilon_spent([plan.evaluation_mechanism] * 2, plan.delta).value
    open_sites(study, epsilon=two + 1e-6)
    evaluate(study, 1)
    evaluate(study, 2)
    for shift in (0.01, 0.02):  # other adapters, as an attacker would make them up
        with pytest.raises(BudgetError):
            evaluate(study, 2, shift)
    assert len(site_of_partition(0).ledger.charges("federated")) == 2


def test_only_what_noised_counts_mean_leaves(study: StudyConfig, open_sites: OpenSites) -> None:
    open_sites(study)
    reply = RoundReply.parse(evaluate(study))
    assert reply.num_examples == 0  # the number of held-out images is not public
    assert set(reply.metrics) <= CountLayout(study.task).names
    exact = exact_metrics(study)
    assert exact["dice"] > 0
    assert not set(exact.values()) & {value for value in reply.metrics.values() if 0 < value < 1}


def test_release_depends_on_the_patients_through_noised_counts_alone(
    study: StudyConfig, open_sites: OpenSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_sites(study, noise_seed=3)
    size = CountLayout(study.task).num_elements
    fixed_D = np.linspace(1.0, 9.0, size)
    monkeypatch.setattr(released_counts, "noised_counts", lambda *_, **__: fixed_D)
    assert RoundReply.parse(evaluate(study)).metrics == CountLayout(study.task).metrics(fixed_D)


def scale_fits(noise: np.ndarray, noise_std: float) -> bool:
    """Whether a chi-square test of the sum of squares accepts a scale, two-sided at 1e-3."""
    total, n = float((noise**2).sum()) / noise_std**2, len(noise)
    return bool(min(stats.chi2.cdf(total, n), stats.chi2.sf(total, n)) > 5e-4)


def test_noise_has_the_scale_that_is_charged_and_no_other() -> None:
    layout = CountLayout(SegmentationConfig(kind="segmentation", classes=("near", "far")))
    stream = RandomStream.for_simulation(7, "counts")
    noise = np.concatenate(
        [noised_counts(np.zeros(50), noise_multiplier=2.0, l2_bound=layout.l2_bound, stream=stream) for _ in range(100)]
    )
    expected = 2.0 * layout.l2_bound
    assert scale_fits(noise, expected)
    assert not scale_fits(noise, expected * 2 / 3)
    assert not scale_fits(noise, expected * 3 / 2)
    assert stats.kstest(noise / expected, "norm").pvalue > 1e-3


def test_noise_of_training_and_of_evaluation_is_never_the_same(
    study: StudyConfig, open_sites: OpenSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_sites(study, noise_seed=3)
    scopes: list[str] = []
    site = site_of_partition(0)
    stream_of = site.random_stream

    def noting(scope: str, number: int) -> RandomStream:
        scopes.append(scope)
        return stream_of(scope, number)

    monkeypatch.setattr(site, "random_stream", noting)
    evaluate(study)
    (scope,) = scopes
    assert scope != "federated"
    assert stream_of(scope, 1).bytes(16) != stream_of("federated", 1).bytes(16)


def test_no_way_to_ask_for_no_noise() -> None:
    for multiplier in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PrivacyError):
            noised_counts(np.zeros(3), noise_multiplier=multiplier, l2_bound=1.0, stream=RandomStream.from_system())


def test_epsilon_of_a_study_includes_its_evaluations(make_private_study: MakeStudy) -> None:
    noised = make_private_study(evaluation=NOISED)
    withheld = with_privacy(noised, evaluation="withheld")
    assert noised.num_evaluations == 2  # before the first round and after the last
    plan = PrivacyPlan.of_study(noised)
    assert plan.epsilon.value > PrivacyPlan.of_study(withheld).epsilon.value
    both = [plan.mechanism(plan.num_rounds), plan.evaluation_mechanism, plan.evaluation_mechanism]
    assert plan.epsilon.value == epsilon_spent(both, plan.delta).value


def test_noise_of_training_is_calibrated_beside_what_evaluations_cost(make_private_study: MakeStudy) -> None:
    study = make_private_study(evaluation="withheld", noise_multiplier=None, epsilon=4.0)
    alone, beside = calibrated(study), calibrated(with_privacy(study, evaluation=NOISED))
    assert alone.privacy is not None
    assert beside.privacy is not None
    assert beside.privacy.noise_multiplier > alone.privacy.noise_multiplier
    assert PrivacyPlan.of_study(beside).epsilon.value <= 4.0
    with pytest.raises(PrivacyError, match="to reach epsilon"):
        calibrated(with_privacy(study, evaluation={"noise_multiplier": 0.3}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"evaluation": "noised"}, "noise_multiplier = 4.0"),
        ({"evaluation": {}}, "noise_multiplier"),
        ({"evaluation": {"noise_multiplier": 0.0}}, "greater than 0"),
        ({"evaluation": NOISED, "trust": "none", "noise_multiplier": None}, "trust = 'site' or 'consortium'"),
        ({"evaluation": NOISED, "unit": "record", "images_per_patient": None}, "unit = 'patient'"),
    ],
)
def test_noise_of_evaluations_has_no_default_and_no_other_trust(
    make_private_study: MakeStudy, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        make_private_study(**changes)


def test_how_evaluations_are_noised_is_part_of_the_digest_and_of_nothing_else(make_private_study: MakeStudy) -> None:
    study = make_private_study(evaluation=NOISED)
    assert parse_study(study.canonical, digest=study.digest) == study
    assert study.digest != with_privacy(study, evaluation={"noise_multiplier": 6.0}).digest
    exact = with_privacy(study, evaluation="exact")
    assert b'"evaluation":"exact"' in exact.canonical
    with pytest.raises(StudyError):
        parse_study(study.canonical, digest=exact.digest)


def test_held_out_cohort_too_small_for_delta_is_refused_before_it_costs(
    make_private_study: MakeStudy, open_sites: OpenSites
) -> None:
    study = resolve(make_private_study(("north",), evaluation=NOISED, delta=0.6), torch.device("cpu"))
    open_sites(study)
    with pytest.raises(PrivacyError, match="delta below"):
        evaluate(study)
    assert site_of_partition(0).ledger.charges("federated") == ()
