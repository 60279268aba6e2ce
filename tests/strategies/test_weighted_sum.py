"""Sums over sites: right, and the same in whatever order sites answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies.fedit import FedIT

from medfed.adapter_manifest import AdapterManifest
from strategies.strategy import Phase, Stat, everything
from strategies.weighted_sum import aggregate

MANIFEST = AdapterManifest.of({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, method="lora", rank=1)
SITES = ("north", "south", "west")
PHASE = FedIT().plan(1)


def uploads_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.randn(MANIFEST.num_elements, generator=generator) for site in SITES}


@settings(derandomize=True, max_examples=30)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 500), min_size=3, max_size=3))
def test_mean_agrees_with_the_obvious_loop(seed: int, counts: list[int]) -> None:
    uploads, weights = uploads_of(seed), dict(zip(SITES, map(float, counts), strict=True))
    fast = MANIFEST.flatten(aggregate(PHASE, MANIFEST, uploads, weights, SITES))
    slow = [
        sum(weights[s] * float(uploads[s][i]) for s in SITES) / sum(weights.values())
        for i in range(MANIFEST.num_elements)
    ]
    torch.testing.assert_close(fast, torch.tensor(slow))


def test_result_does_not_depend_on_the_order_of_answers() -> None:
    uploads, weights = uploads_of(1), {"north": 1.0, "south": 3.0, "west": 2.0}
    backwards = dict(reversed(uploads.items()))
    one = aggregate(PHASE, MANIFEST, uploads, weights, SITES)
    two = aggregate(PHASE, MANIFEST, backwards, weights, SITES)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_mean_is_over_the_sites_that_answered() -> None:
    uploads = {"north": torch.ones(7), "west": torch.full((7,), 4.0)}
    result = aggregate(PHASE, MANIFEST, uploads, {"north": 2.0, "south": 9.0, "west": 1.0}, SITES)
    assert MANIFEST.flatten(result).tolist() == [2.0] * 7


def test_sum_is_not_divided() -> None:
    phase = Phase(trainable=everything, stats=(Stat("total", lambda before, after: dict(after), reduce="sum"),))
    result = aggregate(phase, MANIFEST, uploads_of(3), dict.fromkeys(SITES, 2.0), SITES)
    expected = 2.0 * sum(uploads_of(3).values())
    torch.testing.assert_close(MANIFEST.flatten(result), expected)


def test_several_stats_keep_their_own_reduction_and_names() -> None:
    phase = Phase(
        trainable=everything,
        stats=(
            Stat("mean", lambda before, after: {"x": after["a"]}),
            Stat("total", lambda before, after: {"x": after["a"]}, reduce="sum"),
        ),
    )
    manifest = phase.upload_manifest(MANIFEST)
    assert [spec.name for spec in manifest.tensors] == ["mean:x", "total:x"]
    uploads = {site: torch.ones(6) for site in SITES}
    result = aggregate(phase, manifest, uploads, dict.fromkeys(SITES, 1.0), SITES)
    assert result["mean:x"].tolist() == [1.0] * 3
    assert result["total:x"].tolist() == [3.0] * 3


def test_fedit_moves_the_global_adapter_to_the_mean_of_the_sites() -> None:
    start, locals_ = torch.randn(7), uploads_of(5)
    uploads = {
        site: MANIFEST.flatten(PHASE.upload(MANIFEST.unflatten(start), MANIFEST.unflatten(local)))
        for site, local in locals_.items()
    }
    sums = aggregate(PHASE, MANIFEST, uploads, dict.fromkeys(SITES, 1.0), SITES)
    result = MANIFEST.flatten(dict(FedIT().post(1, MANIFEST.unflatten(start), sums)))
    torch.testing.assert_close(result, sum(locals_.values()) / 3)


def test_unknown_strategy_names_the_known_ones() -> None:
    from medfed.errors import StudyError
    from medfed.study_sections import StrategyConfig
    from strategies.registry import strategy_of

    with pytest.raises(StudyError, match="fedit"):
        strategy_of(StrategyConfig(name="fedmystery"))
