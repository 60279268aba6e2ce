"""Rules that look at single sites: each against its formula, and refused where nobody can see a site."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import IndividualsError, StudyError
from medfed.study import StudyConfig
from medfed.study_sections import StrategyConfig
from strategies.lora import LoraPair, lora_pairs, products
from strategies.registry import RULES, check_individuals, strategy_of
from strategies.rules.flora import initial_a
from strategies.rules.fresh import fold_name
from strategies.rules.lora_fair import LAMBDA
from strategies.strategy import IndividualRule, Setting, State, Tree

SITES = ("north", "south", "east", "west", "centre", "coast", "hills")
WEIGHTS = dict(zip(SITES, (3.0, 1.0, 2.0, 5.0, 1.0, 4.0, 2.0), strict=True))
RANK = 3
SHAPES = {
    "m.one.lora_A.weight": (RANK, 9),
    "m.one.lora_B.weight": (7, RANK),
    "m.two.lora_A.weight": (RANK, 40),
    "m.two.lora_B.weight": (30, RANK),
    "m.head.bias": (5,),
}
INDIVIDUAL = sorted(name for name, rule in RULES.items() if issubclass(rule, IndividualRule))
SUMS = sorted(RULES.keys() - set(INDIVIDUAL))
ROBUST = ["krum", "multi-krum", "bulyan", "median", "trimmed-mean"]


def manifest_of(shapes: dict[str, tuple[int, ...]], rank: int = RANK) -> AdapterManifest:
    return AdapterManifest.of({name: torch.zeros(shape) for name, shape in shapes.items()}, method="lora", rank=rank)


def rule_of(
    name: str, *, num_sites: int = len(SITES), shapes: dict[str, tuple[int, ...]] | None = None, rank: int = RANK
) -> IndividualRule:
    setting = Setting(StrategyConfig(name=name), manifest_of(shapes or SHAPES, rank), seed=2, num_sites=num_sites)
    rule = RULES[name](setting)
    assert isinstance(rule, IndividualRule)
    return rule


def drawn(seed: int, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (shapes or SHAPES).items()}


def start_and_deltas(
    sites: tuple[str, ...] = SITES, shapes: dict[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tree]]:
    return drawn(0, shapes), {site: drawn(1 + SITES.index(site), shapes) for site in sites}


def slow_mean(deltas: dict[str, Tree], of: Callable[[dict[str, Tensor]], Tensor], start: Tree) -> Tensor:
    """The weighted mean over sites of something of their adapters."""
    total = sum(WEIGHTS[site] for site in deltas)
    parts = [
        WEIGHTS[site] / total * of({name: start[name].double() + delta[name].double() for name in start})
        for site, delta in deltas.items()
    ]
    return torch.stack(parts).sum(dim=0)


def mean_product(deltas: dict[str, Tree], pair: LoraPair, start: Tree) -> Tensor:
    return slow_mean(deltas, lambda adapter: adapter[pair.b] @ adapter[pair.a], start)


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["fedex", "flora", "flexlora", "lora-fair"])
def test_what_is_no_pair_is_averaged(name: str) -> None:
    start, deltas = start_and_deltas()
    after = rule_of(name).merge(1, State(start), deltas, WEIGHTS)
    close(after.adapter["m.head.bias"], slow_mean(deltas, lambda adapter: adapter["m.head.bias"], start))


@pytest.mark.parametrize("sites", [SITES, SITES[2:4], SITES[:1]], ids=["all", "two", "one"])
def test_fedex_averages_and_folds_what_averaging_misses(sites: tuple[str, ...]) -> None:
    rule = rule_of("fedex")
    start, deltas = start_and_deltas(sites)
    after = rule.merge(1, State(start), deltas, WEIGHTS)
    (fold,) = rule.folds(after.broadcast)
    for pair in lora_pairs(rule.manifest):
        for factor in (pair.a, pair.b):
            close(after.adapter[factor], slow_mean(deltas, lambda adapter, name=factor: adapter[name], start))
        averaged = after.adapter[pair.b].double() @ after.adapter[pair.a].double()
        close(fold[pair.b] @ fold[pair.a], mean_product(deltas, pair, start) - averaged)


def test_flora_folds_the_mean_product_and_begins_anew() -> None:
    rule = rule_of("flora")
    start, deltas = start_and_deltas()
    after = rule.merge(4, State(start), deltas, WEIGHTS)
    for pair in lora_pairs(rule.manifest):
        fold_b, fold_a = (after.broadcast[fold_name(4, name)] for name in (pair.b, pair.a))
        close(fold_b @ fold_a, mean_product(deltas, pair, start))
        assert not after.adapter[pair.b].any()
        assert torch.equal(after.adapter[pair.a], initial_a(pair, 2, 4))
        assert not torch.equal(initial_a(pair, 2, 4), initial_a(pair, 2, 5))
        assert not torch.equal(initial_a(pair, 2, 4), initial_a(pair, 3, 4))


def test_flora_begins_as_peft_does() -> None:
    pair = LoraPair("m.big", 10, 64, 400)
    theirs = torch.nn.Linear(400, 64, bias=False)  # what PEFT makes A of, with its reset
    torch.nn.init.kaiming_uniform_(theirs.weight, a=5**0.5)
    ours = initial_a(pair, 1)
    assert float(ours.abs().max()) <= 1 / 20
    assert float(ours.std()) == pytest.approx(float(theirs.weight.detach().std()), rel=0.03)
    assert float(ours.mean()) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_rank_of_a_fold_is_what_a_layer_has_room_for(name: str) -> None:
    rule = rule_of(name)
    one, two = lora_pairs(rule.manifest)
    assert (rule.fold_rank(one), rule.fold_rank(two)) == (7, 21)  # type: ignore[attr-defined]
    for sites in (SITES, SITES[:2], SITES[:1]):
        start, deltas = start_and_deltas(sites)
        told = rule.merge(1, State(start), deltas, WEIGHTS).broadcast
        assert {name: tuple(tensor.shape) for name, tensor in told.items()} == {
            fold_name(1, "m.one.lora_A.weight"): (7, 9),
            fold_name(1, "m.one.lora_B.weight"): (7, 7),
            fold_name(1, "m.two.lora_A.weight"): (21, 40),
            fold_name(1, "m.two.lora_B.weight"): (30, 21),
        }


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_every_fold_is_kept_and_told_once_it_is_made(name: str) -> None:
    rule = rule_of(name)
    state = State(start_and_deltas()[0])
    assert rule.told_in(1) is None
    assert rule.told_after(0) is None
    for number in (1, 2, 3):
        earlier = dict(state.broadcast)
        state = rule.merge(number, state, start_and_deltas()[1], WEIGHTS)
        assert all(torch.equal(state.broadcast[told], tensor) for told, tensor in earlier.items())
        assert len(rule.folds(state.broadcast)) == number
        told_after, told_in = rule.told_after(number), rule.told_in(number + 1)
        assert told_after == told_in
        assert told_after is not None
        assert told_after.unflatten(told_after.flatten(state.broadcast)).keys() == state.broadcast.keys()


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_something_else_that_is_told_is_no_fold(name: str) -> None:
    rule = rule_of(name)
    start, deltas = start_and_deltas()
    state = rule.merge(1, State(start, {"other": torch.ones(3), "more": torch.ones(1)}), deltas, WEIGHTS)
    assert len(rule.folds(state.broadcast)) == 1
    assert torch.equal(state.broadcast["other"], torch.ones(3))


@pytest.mark.parametrize("name", ["fedex", "flora", "flexlora", "lora-fair", "median"])
def test_adapter_of_heads_alone_is_merged_too(name: str) -> None:
    rule = rule_of(name, shapes={"m.head.bias": (5,)})
    state = State({"m.head.bias": torch.zeros(5)})
    deltas: dict[str, Tree] = {site: {"m.head.bias": torch.ones(5)} for site in SITES}
    after = rule.merge(1, state, deltas, WEIGHTS)
    close(after.adapter["m.head.bias"], torch.ones(5))
    assert rule.told_after(3) is None
    assert rule.folds(after.broadcast) == []


@pytest.mark.parametrize("name", ["flexlora", "hlora"])
def test_flexlora_cuts_the_mean_product_to_the_rank(name: str) -> None:
    rule = rule_of(name)
    start, deltas = start_and_deltas()
    after = rule.merge(1, State(start), deltas, WEIGHTS)
    for pair in lora_pairs(rule.manifest):
        mean = mean_product(deltas, pair, start)
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        close(after.adapter[pair.b] @ after.adapter[pair.a], (u[:, :RANK] * s[:RANK]) @ v[:RANK], atol=1e-4)
        close(after.adapter[pair.a] @ after.adapter[pair.a].T, torch.eye(RANK))
        missed = (mean - products(after.adapter, (pair,))[pair.layer]).norm()
        assert float(missed) == pytest.approx(float(s[RANK:].square().sum().sqrt()), rel=1e-4)


@pytest.mark.parametrize(("d_out", "d_in"), [(2, 9), (9, 2), (2, 2)])
def test_flexlora_fills_a_layer_smaller_than_the_rank(d_out: int, d_in: int) -> None:
    shapes = {"m.x.lora_A.weight": (4, d_in), "m.x.lora_B.weight": (d_out, 4)}
    rule = rule_of("flexlora", shapes=shapes, rank=4)
    start, deltas = start_and_deltas(shapes=shapes)
    after = rule.merge(1, State(start), deltas, WEIGHTS)
    (pair,) = lora_pairs(rule.manifest)
    close(products(after.adapter, (pair,))[pair.layer], mean_product(deltas, pair, start))
    assert {name: tuple(tensor.shape) for name, tensor in after.adapter.items()} == shapes


def test_flexlora_can_go_on_learning_where_nothing_was_learnt() -> None:
    rule = rule_of("flexlora")
    nothing: dict[str, Tensor] = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    after = rule.merge(1, State(nothing), dict.fromkeys(SITES, nothing), WEIGHTS)
    for pair in lora_pairs(rule.manifest):
        assert not after.adapter[pair.b].any()
        close(after.adapter[pair.a] @ after.adapter[pair.a].T, torch.eye(RANK))


def test_lora_fair_is_where_the_regularised_objective_is_least() -> None:
    rule = rule_of("lora-fair")
    start, deltas = start_and_deltas()
    after = rule.merge(1, State(start), deltas, WEIGHTS)
    generator = torch.Generator().manual_seed(9)
    for pair in lora_pairs(rule.manifest):
        mean = mean_product(deltas, pair, start)
        mean_a = slow_mean(deltas, lambda adapter, name=pair.a: adapter[name], start)
        mean_b = slow_mean(deltas, lambda adapter, name=pair.b: adapter[name], start)
        close(after.adapter[pair.a], mean_a)

        def objective(correction: Tensor, mean: Tensor = mean, a: Tensor = mean_a, b: Tensor = mean_b) -> float:
            return float((mean - (b + correction) @ a).square().sum() + LAMBDA * correction.square().sum())

        found = after.adapter[pair.b].double() - mean_b
        least = objective(found)
        assert least < 0.95 * objective(torch.zeros_like(found))
        for scale in (1e-2, 1e-1, 1.0):
            assert objective(found + scale * torch.randn(found.shape, generator=generator).double()) > least

        # The slow way: descend on it.
        slow = torch.zeros_like(found)
        step = 1 / (2 * float(torch.linalg.matrix_norm(mean_a @ mean_a.T, 2)) + 2 * LAMBDA)
        for _ in range(500):
            slow -= step * (2 * ((mean_b + slow) @ mean_a - mean) @ mean_a.T + 2 * LAMBDA * slow)
        close(found, slow, atol=1e-4)


def test_lora_fair_comes_closer_than_averaging_and_no_closer_than_the_best_pair() -> None:
    start, deltas = start_and_deltas()
    fair, best = (rule_of(name).merge(1, State(start), deltas, WEIGHTS).adapter for name in ("lora-fair", "flexlora"))
    for pair in lora_pairs(manifest_of(SHAPES)):
        mean = mean_product(deltas, pair, start)
        averaged = slow_mean(deltas, lambda adapter, name=pair.b: adapter[name], start) @ slow_mean(
            deltas, lambda adapter, name=pair.a: adapter[name], start
        )
        errors = [float((mean - products(one, (pair,))[pair.layer]).norm()) for one in (best, fair)]
        assert errors[0] < errors[1] < float((mean - averaged).norm())


def flat_deltas(values: list[list[float]]) -> dict[str, Tree]:
    """Sites whose head bias changed by these, and nothing else."""
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return {site: {**zeros, "m.head.bias": torch.tensor(row)} for site, row in zip(SITES, values, strict=False)}


SEVEN = [[v, 0.0, 0.0, 0.0, 10 * v] for v in (0.0, 1.0, 2.0, 3.5, 5.0, 7.0, 100.0)]
"""Squared distances to the 7 - 2 - 2 = 3 closest, as Krum adds them up, in units of 1 + 10**2: 17.25 for the site at 0;
8.25 at 1; 7.25 at 2; 10.75 at 3.5; 15.25 at 5; 28.25 at 7."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("krum", 2.0),
        ("multi-krum", (2 + 1 + 3.5) / 3),  # 7 - 2 - 2 = 3 sites
        ("median", 3.5),
        ("trimmed-mean", (1 + 2 + 3.5 + 5 + 7) / 5),  # int(0.2 * 7) = 1 at each end
        # Of 7 sites one may be malicious. One after the other Krum picks five, 2, 3.5, 1, 5 and 0; the three that are
        # closest to their median 2 are averaged.
        ("bulyan", (2 + 1 + 3.5) / 3),
    ],
)
def test_robust_rules_agree_with_a_hand_computation(name: str, expected: float) -> None:
    state = State(drawn(0))
    after = rule_of(name).merge(1, state, flat_deltas(SEVEN), WEIGHTS)
    change = after.adapter["m.head.bias"] - state.adapter["m.head.bias"]
    close(change, torch.tensor([expected, 0, 0, 0, 10 * expected]))
    for untouched in SHAPES.keys() - {"m.head.bias"}:
        assert torch.equal(after.adapter[untouched], state.adapter[untouched])


@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
def test_robust_means_agree_with_sorting_every_element(name: str) -> None:
    start, deltas = start_and_deltas()
    after = rule_of(name).merge(1, State(start), deltas, WEIGHTS)
    for tensor in SHAPES:
        values = np.sort(np.stack([delta[tensor].numpy() for delta in deltas.values()]), axis=0)
        slow = values[3] if name == "median" else values[1:-1].mean(axis=0)
        close(after.adapter[tensor] - start[tensor], torch.from_numpy(slow))


@pytest.mark.parametrize("size", [1e3, 1e6, -1e6])
@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("liar", [0, 3, 6])
def test_one_malicious_site_stays_within_what_the_honest_sites_say(name: str, size: float, liar: int) -> None:
    start, honest = start_and_deltas()
    lies: Tree = {tensor: torch.full(shape, size) for tensor, shape in SHAPES.items()}
    deltas = {site: lies if index == liar else honest[site] for index, site in enumerate(SITES)}
    after = rule_of(name).merge(1, State(start), deltas, WEIGHTS)
    for tensor in SHAPES:
        said = torch.stack([delta[tensor] for site, delta in deltas.items() if SITES.index(site) != liar])
        change = after.adapter[tensor] - start[tensor]
        assert bool((change >= said.amin(dim=0) - 1e-5).all())
        assert bool((change <= said.amax(dim=0) + 1e-5).all())
    # Which is more than a mean can say.
    mean = slow_mean(deltas, lambda adapter: adapter["m.head.bias"], start) - start["m.head.bias"]
    assert float(mean.abs().min()) > 50


@pytest.mark.parametrize("name", ["krum", "median"])
def test_a_liar_does_not_choose_the_result(name: str) -> None:
    """Whatever is sent from afar, the honest sites' result is the same."""
    start, honest = start_and_deltas()
    results = []
    for size in (1e3, 1e5, 3e5):
        lies: Tree = {tensor: torch.full(shape, size) for tensor, shape in SHAPES.items()}
        results.append(rule_of(name).merge(1, State(start), {**honest, "coast": lies}, WEIGHTS).adapter)
    assert all(torch.equal(results[0][tensor], other[tensor]) for other in results[1:] for tensor in SHAPES)


@pytest.mark.parametrize("num_replies", range(1, 8))
@pytest.mark.parametrize("name", ROBUST)
def test_sites_that_agree_are_followed_however_many_reply(name: str, num_replies: int) -> None:
    start, change = drawn(0), drawn(1)
    deltas: dict[str, Tree] = dict.fromkeys(SITES[:num_replies], change)
    after = rule_of(name).merge(1, State(start), deltas, WEIGHTS)
    for tensor in SHAPES:
        close(after.adapter[tensor], start[tensor] + change[tensor])


@pytest.mark.parametrize(("name", "least"), [("krum", 5), ("multi-krum", 5), ("bulyan", 7), ("median", 3)])
def test_study_in_which_no_liar_is_withstood_is_refused(name: str, least: int) -> None:
    rule_of(name, num_sites=least)
    with pytest.raises(StudyError, match=f"at least {least} sites .*{name}.*got {least - 1}"):
        rule_of(name, num_sites=least - 1)


@pytest.mark.parametrize("name", INDIVIDUAL)
def test_rule_that_sees_single_sites_is_refused_by_its_type_under_secure_aggregation(
    name: str, make_secure_study: Callable[..., StudyConfig]
) -> None:
    study = make_secure_study().replace(strategy={"name": name}, manifest=manifest_of(SHAPES))
    for kind in (StudyError, TypeError, IndividualsError):
        with pytest.raises(kind, match=rf"takes sums .*'{name}'.*see each site's own.*use one of .*twin-fresh"):
            strategy_of(study)
    plain = study.replace(secure_aggregation=None, sites=[{**dict(s), "declared_patients": None} for s in study.sites])
    check_individuals(plain)


@pytest.mark.parametrize("name", SUMS)
def test_rule_that_takes_sums_is_welcome_under_secure_aggregation(
    name: str, make_secure_study: Callable[..., StudyConfig]
) -> None:
    study = make_secure_study().replace(strategy={"name": name}, manifest=manifest_of(SHAPES))
    check_individuals(study)


def test_refusal_tells_the_other_side_no_names() -> None:
    error: Any = IndividualsError
    assert error.exit_code == StudyError.exit_code
    assert "secure aggregation" in error.public
