"""Sums over sites: right, and the same in whatever order sites answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import AdapterMismatchError, StudyError
from medfed.study_sections import StrategyConfig
from strategies.registry import check_name
from strategies.strategy import DELTA, LocalResult, Phase, Stat
from strategies.subspace import Subspace
from strategies.weighted_sum import weighted_sum

MANIFEST = AdapterManifest.of({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, method="lora", rank=1)
SITES = ("north", "south", "west")
EVERYTHING = Subspace.everything(MANIFEST)


def uploads_of(seed: int, size: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.randn(size, generator=generator) for site in SITES}


def result_of(before_Z: torch.Tensor, after_Z: torch.Tensor) -> LocalResult:
    return LocalResult(MANIFEST, before_Z, after_Z, num_steps=1, learning_rate=0.1)


@settings(derandomize=True, max_examples=30)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 500), min_size=3, max_size=3))
def test_mean_agrees_with_the_obvious_loop(seed: int, counts: list[int]) -> None:
    uploads, weights = uploads_of(seed), dict(zip(SITES, map(float, counts), strict=True))
    total_P = weighted_sum(uploads, weights, SITES)
    fast = MANIFEST.flatten(Phase(EVERYTHING).statistics(total_P, sum(weights.values())))
    slow = [sum(weights[s] * float(uploads[s][i]) for s in SITES) / sum(weights.values()) for i in range(7)]
    torch.testing.assert_close(fast, torch.tensor(slow))


def test_result_does_not_depend_on_the_order_of_answers() -> None:
    uploads, weights = uploads_of(1), {"north": 1.0, "south": 3.0, "west": 2.0}
    backwards = dict(reversed(uploads.items()))
    assert torch.equal(weighted_sum(uploads, weights, SITES), weighted_sum(backwards, weights, SITES))


def test_sum_is_over_the_sites_that_answered() -> None:
    uploads = {"north": torch.ones(7), "west": torch.full((7,), 4.0)}
    weights = {"north": 2.0, "south": 9.0, "west": 1.0}
    assert weighted_sum(uploads, weights, SITES).tolist() == [6.0] * 7


def test_sum_is_not_divided_and_a_mean_is() -> None:
    phase = Phase(
        EVERYTHING,
        stats=(
            Stat("mean", lambda result: {"x": result.after_Z[:3]}),
            Stat("total", lambda result: {"x": result.after_Z[:3]}, reduce="sum"),
        ),
    )
    assert [spec.name for spec in phase.upload_manifest.tensors] == ["mean:x", "total:x"]
    uploads = {site: torch.ones(6) for site in SITES}
    result = phase.statistics(weighted_sum(uploads, dict.fromkeys(SITES, 2.0), SITES), 6.0)
    assert result["mean:x"].tolist() == [1.0] * 3
    assert result["total:x"].tolist() == [6.0] * 3


def test_change_travels_under_the_names_of_its_tensors_beside_other_statistics() -> None:
    phase = Phase(EVERYTHING, stats=(DELTA, Stat("extra", lambda result: {"n": torch.tensor([1.0])})))
    upload = phase.upload(result_of(torch.zeros(7), torch.arange(7.0)))
    assert sorted(upload) == ["a", "b", "extra:n"]
    assert phase.upload_vector(result_of(torch.zeros(7), torch.arange(7.0))).tolist() == [*range(7), 1.0]


def test_vector_of_another_length_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="7 elements"):
        Phase(EVERYTHING).upload_vector(result_of(torch.zeros(6), torch.zeros(6)))


def test_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(StudyError, match="fedit"):
        check_name(StrategyConfig(name="fedmystery"))
