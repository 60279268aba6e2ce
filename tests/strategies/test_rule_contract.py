"""Every registered rule keeps the same promises, through a channel that shows the server sums only.

Legend: P adapter elements, Z coordinates of what trains, Q elements of the tensors of which something trains.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from medfed.study_sections import StrategyConfig
from privacy.clipping import ClippedSum
from server.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from strategies.federation import Strategy
from strategies.local_method import LocalMethod
from strategies.lora import is_b, lora_pairs, products
from strategies.narrowed import trainable_of
from strategies.personal import Personalisation
from strategies.registry import RULES
from strategies.server_optimizer import ServerOptimizer
from strategies.strategy import LocalResult, Setting, State, Tree
from strategies.weighted_sum import weighted_sum

SITES = ("north", "south", "east", "west", "centre", "coast", "hills")
WEIGHTS = dict(zip(SITES, (3.0, 1.0, 2.0, 5.0, 1.0, 4.0, 2.0), strict=True))
RANK, ROUNDS = 4, 5
SHAPES = {
    "base_model.model.layer1.lora_A.weight": (RANK, 10),
    "base_model.model.layer1.lora_B.weight": (7, RANK),
    "base_model.model.layer2.lora_A.weight": (RANK, 6),
    "base_model.model.layer2.lora_B.weight": (12, RANK),
    "base_model.model.head.weight": (3, 5),
}
MANIFEST = AdapterManifest.of({name: torch.zeros(shape) for name, shape in SHAPES.items()}, method="lora", rank=RANK)
PAIRS = lora_pairs(MANIFEST)
NAMES = sorted(RULES)
EXACT = [name for name in NAMES if RULES[name].exact]
TAKES_RANKS = [name for name in NAMES if RULES[name].takes_ranks]
RANK_OF = {"north": 2, "west": 2, "coast": 4}


def strategy(name: str, **settings_: Any) -> Strategy:
    setting = Setting(StrategyConfig(name=name, hold_frames=2), MANIFEST, seed=7, num_sites=len(SITES), **settings_)
    return Strategy(RULES[name](setting), LocalMethod(), Personalisation(), ServerOptimizer())


def initial_adapter() -> dict[str, Tensor]:
    """As PEFT makes it: A random, B zero, a head of its own."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in sorted(SHAPES.items())}
    return {name: torch.zeros_like(tensor) if is_b(name) else tensor for name, tensor in drawn.items()}


def learnt(made: Strategy, adapter: Tree, broadcast: Tree) -> dict[str, Tensor]:
    """What the model computes with beside its original weights: folds and product of each layer, and the head."""
    update = products(adapter, PAIRS)
    for fold in made.rule.folds(broadcast):
        for layer, product in products(fold, PAIRS).items():
            update[layer] = update[layer] + product
    rest = {name: tensor.double() for name, tensor in adapter.items() if "lora" not in name}
    return {**update, **rest}


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@dataclass(frozen=True)
class Played:
    """One round: how it began, what each site made of it, what came of it."""

    gauged: State
    local: dict[str, dict[str, Tensor]]
    following: State


def play(made: Strategy, number: int, state: State, *, sites: tuple[str, ...] = SITES) -> Played:
    """A round in which sites move at random within what trains."""
    gauged, phase = made.gauge(number, state), made.plan(number)
    shared = phase.shared
    before_P = MANIFEST.flatten(gauged.adapter)
    generator = torch.Generator().manual_seed(100 + number)
    local, uploads = {}, {}
    for site in sites:
        trainable = trainable_of(made.rule, phase, site)
        before_Z = trainable.coordinates(before_P)
        after_P = trainable.place(before_P, before_Z + 0.3 * torch.randn(before_Z.shape, generator=generator))
        result = LocalResult(
            shared.manifest,
            shared.coordinates(before_P),
            shared.coordinates(after_P),
            num_steps=2,
            learning_rate=0.1,
            broadcast=gauged.broadcast,
        )
        local[site], uploads[site] = MANIFEST.unflatten(after_P), phase.upload_vector(result)
    weight = sum(WEIGHTS[site] for site in sites)
    if made.needs_individuals:
        deltas = {site: phase.upload_manifest.unflatten(upload) for site, upload in uploads.items()}
        following = made.merge(number, gauged, deltas, {site: WEIGHTS[site] for site in sites})
    else:
        statistics = phase.statistics(weighted_sum(uploads, WEIGHTS, SITES), weight)
        following = made.post(number, gauged, statistics, weight / sum(WEIGHTS.values()))
    return Played(gauged, local, following)


def all_rounds(made: Strategy, *, sites: tuple[str, ...] = SITES) -> list[Played]:
    state, played = made.start(initial_adapter()), []
    for number in range(1, ROUNDS + 1):
        played.append(play(made, number, state, sites=sites))
        state = played[-1].following
    return played


def exactness_error(made: Strategy, one: Played) -> float:
    """How far the new model is from the mean of the sites' models."""
    weight = sum(WEIGHTS[site] for site in one.local)
    mean: dict[str, Tensor] = {}
    for site, adapter in one.local.items():
        for name, value in learnt(made, adapter, one.gauged.broadcast).items():
            mean[name] = mean.get(name, torch.zeros_like(value)) + WEIGHTS[site] / weight * value
    return distance(learnt(made, one.following.adapter, one.following.broadcast), mean)


def same_bits(ours: State, theirs: State) -> bool:
    pairs = ((ours.adapter, theirs.adapter), (ours.broadcast, theirs.broadcast), (ours.memory, theirs.memory))
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def copied(state: State) -> State:
    copies = [{name: t.clone() for name, t in tree.items()} for tree in (state.adapter, state.broadcast, state.memory)]
    return State(*copies)


def shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tree.items()}


def told(manifest: AdapterManifest | None) -> dict[str, tuple[int, ...]]:
    return {} if manifest is None else {spec.name: spec.shape for spec in manifest.tensors}


@pytest.mark.parametrize("name", NAMES)
def test_start_and_gauge_leave_what_the_model_computes(name: str) -> None:
    made, adapter = strategy(name), initial_adapter()
    state = made.start(adapter)
    assert distance(learnt(made, state.adapter, state.broadcast), learnt(made, adapter, {})) < 1e-5
    for number, one in enumerate(all_rounds(made), 1):
        again = made.gauge(number + 1, one.following)
        before = learnt(made, one.following.adapter, one.following.broadcast)
        assert distance(learnt(made, again.adapter, again.broadcast), before) < 1e-5


@pytest.mark.parametrize("sites", [SITES, SITES[1:5], SITES[:1]], ids=["all", "some", "one"])
@pytest.mark.parametrize("name", EXACT)
def test_exact_rule_gives_the_mean_of_the_sites_models_in_every_round(name: str, sites: tuple[str, ...]) -> None:
    made = strategy(name)
    errors = [exactness_error(made, one) for one in all_rounds(made, sites=sites)]
    assert max(errors) < 1e-5


def test_the_check_of_exactness_rejects_a_naive_average() -> None:
    made = strategy("fedit")
    assert min(exactness_error(made, one) for one in all_rounds(made)) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_learning_reaches_the_model(name: str) -> None:
    made = strategy(name)
    one = play(made, 1, made.start(initial_adapter()))
    after = learnt(made, one.following.adapter, one.following.broadcast)
    assert distance(after, learnt(made, one.gauged.adapter, one.gauged.broadcast)) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_train_stays_bit_for_bit(name: str) -> None:
    made = strategy(name)
    for number, one in enumerate(all_rounds(made), 1):
        shared = made.plan(number).shared
        nothing_Z = torch.zeros(shared.manifest.num_elements)
        before_P, after_P = MANIFEST.flatten(one.gauged.adapter), MANIFEST.flatten(one.following.adapter)
        assert torch.equal(shared.place(before_P, nothing_Z), shared.place(after_P, nothing_Z))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_coordinates_are_an_orthonormal_map(name: str, number: int) -> None:
    subspace = strategy(name).plan(number).trainable
    generator = torch.Generator().manual_seed(3)
    x_P = torch.randn(MANIFEST.num_elements, generator=generator)
    z = torch.randn(subspace.manifest.num_elements, generator=generator)
    embedded_P = subspace.place(torch.zeros_like(x_P), z)
    torch.testing.assert_close(subspace.coordinates(embedded_P), z)
    torch.testing.assert_close(subspace.coordinates(subspace.place(x_P, z)), z)
    torch.testing.assert_close(embedded_P.norm(), z.norm())
    torch.testing.assert_close(subspace.coordinates(x_P) @ z, x_P @ embedded_P, rtol=1e-4, atol=1e-5)
    assert float(subspace.coordinates(x_P).norm()) <= float(x_P.norm()) * (1 + 1e-6)
    support_Q = torch.cat([MANIFEST.unflatten(x_P)[spec.name].flatten() for spec in subspace.support.tensors])
    rows_BQ = torch.stack([support_Q, -2 * support_Q])
    torch.testing.assert_close(subspace.coordinates_of_support(rows_BQ)[1], -2 * subspace.coordinates(x_P))


@pytest.mark.parametrize("name", NAMES)
def test_adapter_of_a_round_is_where_its_coordinates_say(name: str) -> None:
    made = strategy(name)
    for number, one in enumerate(all_rounds(made), 1):
        subspace, adapter_P = made.plan(number).trainable, MANIFEST.flatten(one.gauged.adapter)
        back_P = subspace.place(adapter_P, subspace.coordinates(adapter_P))
        torch.testing.assert_close(back_P, adapter_P, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_both_ends_derive_what_travels(name: str) -> None:
    server, site = strategy(name), strategy(name)
    before = server.start(initial_adapter())
    assert shapes(before.broadcast) == told(site.told_after(0))
    for number, one in enumerate(all_rounds(server), 1):
        ours, theirs = server.plan(number), site.plan(number)
        assert ours.upload_manifest == theirs.upload_manifest
        assert ours.broadcast == theirs.broadcast
        assert shapes(one.gauged.broadcast) == told(theirs.broadcast)
        assert shapes(one.following.broadcast) == told(site.told_after(number))
        assert shapes(one.following.adapter) == SHAPES


@pytest.mark.parametrize("sites", [SITES[1:4], SITES[:1]], ids=["some", "one"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_told_does_not_depend_on_who_replied(name: str, sites: tuple[str, ...]) -> None:
    made = strategy(name)
    for number, one in enumerate(all_rounds(made, sites=sites), 1):
        assert shapes(one.following.broadcast) == told(made.told_after(number))


@pytest.mark.parametrize("name", NAMES)
def test_same_inputs_give_the_same_bits_and_stay_as_they_are(name: str) -> None:
    made, other = strategy(name), strategy(name)
    state = made.start(initial_adapter())
    for number in range(1, ROUNDS + 1):
        kept = copied(state)
        one, again = play(made, number, state), play(other, number, kept)
        assert same_bits(state, kept)
        assert same_bits(one.gauged, again.gauged)
        assert same_bits(one.following, again.following)
        assert same_bits(made.gauge(number, state), one.gauged)  # which playing the round did not change
        state = one.following


@pytest.mark.parametrize("name", NAMES)
def test_run_that_stopped_after_any_round_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    made = strategy(name)
    state = resumed = made.start(initial_adapter())
    for number in range(1, ROUNDS + 1):
        adapter_P = MANIFEST.flatten(resumed.adapter)
        empty = Checkpoint("d" * 64, "federated", number, adapter_P, (), WEIGHTS)
        write_checkpoint(tmp_path, replace(empty, broadcast=dict(resumed.broadcast), memory=dict(resumed.memory)))
        read = read_checkpoint(tmp_path, MANIFEST, study_digest="d" * 64, scope="federated")
        assert read is not None
        resumed = State(MANIFEST.unflatten(read.adapter_P), read.broadcast, read.memory)
        resumed = play(strategy(name), number, resumed).following
        state = play(made, number, state).following
        assert same_bits(state, resumed)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_stay_at_a_site_are_in_no_upload(name: str) -> None:
    made = strategy(name)
    for number in (1, 2, 3):
        phase = made.plan(number)
        travels = {spec.name.split(":")[-1] for spec in phase.upload_manifest.tensors}
        assert not travels & phase.stays
        assert travels <= phase.trainable.parts.keys()


def test_fedsa_keeps_every_b_at_its_site() -> None:
    made = strategy("fedsa")
    assert made.plan(1).stays == {name for name in SHAPES if is_b(name)}
    for one in all_rounds(made):
        for pair in PAIRS:
            assert torch.equal(one.following.adapter[pair.b], one.gauged.adapter[pair.b])
            assert not torch.equal(one.following.adapter[pair.a], one.gauged.adapter[pair.a])


def test_names_that_stand_for_another_rule_are_that_rule() -> None:
    others = {name: rule.name for name, rule in RULES.items() if rule.name != name}
    assert others == {"fedavg": "fedit", "fedsvd": "ffa-lora", "hlora": "flexlora"}


def clipped(name: str, gradients_NQ: Tensor, patients: list[int], clip_norm: float) -> Tensor:
    subspace = strategy(name).plan(1).trainable
    total = ClippedSum(subspace.manifest.num_elements, clip_norm=clip_norm, device="cpu")
    weights = [1 / patients.count(patient) for patient in patients]
    total.add(subspace.coordinates_of_support(gradients_NQ), patients, weights)
    return total.close().sum_P


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e4]), clip_norm=st.sampled_from([0.5, 2.0]))
def test_one_patient_moves_the_sum_of_all_that_trains_by_at_most_the_clip_norm(
    name: str, seed: int, scale: float, clip_norm: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    subspace = strategy(name).plan(1).trainable
    gradients_NQ = scale * torch.randn(8, subspace.support.num_elements, generator=generator)
    patients = [0, 0, 1, 2, 2, 2, 3, 4]
    gone = int(torch.randint(5, (1,), generator=generator))
    left = [index for index, patient in enumerate(patients) if patient != gone]
    moved_Z = clipped(name, gradients_NQ, patients, clip_norm) - clipped(
        name, gradients_NQ[left], [patients[index] for index in left], clip_norm
    )
    assert 0 < float(moved_Z.norm()) <= clip_norm * (1 + 1e-9)
    # The same holds of what it does to the adapter: coordinates are orthonormal.
    moved_P = subspace.place(torch.zeros(MANIFEST.num_elements), moved_Z.float())
    assert float(moved_P.norm()) <= clip_norm * (1 + 1e-5)


def test_fedsvd_is_ffa_lora_with_an_orthonormal_a() -> None:
    """FedSVD (Lee et al. 2025) itself: average B, then take B = U S and A = V^T from the SVD of B A."""
    made = strategy("fedsvd")
    generator = torch.Generator().manual_seed(1)
    data = {
        site: {
            pair.layer: (
                torch.randn(pair.d_in, 20, generator=generator).double(),
                torch.randn(pair.d_out, 20, generator=generator).double(),
            )
            for pair in PAIRS
        }
        for site in SITES
    }

    def trained_b(site: str, layer: str, b: Tensor, a: Tensor) -> Tensor:
        x, y = data[site][layer]
        for _ in range(3):
            b = b - 0.002 * (b @ a @ x - y) @ x.T @ a.T
        return b

    state = made.start(initial_adapter())
    svd = {pair.layer: (state.adapter[pair.b].double(), state.adapter[pair.a].double()) for pair in PAIRS}
    total = sum(WEIGHTS.values())
    for number in range(1, 9):
        delta = {"base_model.model.head.weight": torch.zeros(3, 5)}
        for pair in PAIRS:
            b, a = state.adapter[pair.b].double(), state.adapter[pair.a].double()
            trained = {site: trained_b(site, pair.layer, b, a) for site in SITES}
            delta[pair.b] = sum((WEIGHTS[s] / total * (trained[s] - b) for s in SITES), torch.zeros_like(b)).float()
            b, a = svd[pair.layer]
            mean_b = sum((WEIGHTS[s] / total * trained_b(s, pair.layer, b, a) for s in SITES), torch.zeros_like(b))
            u, s, v = torch.linalg.svd(mean_b @ a, full_matrices=False)
            svd[pair.layer] = (u[:, :RANK] * s[:RANK], v[:RANK])
        state = made.post(number, state, delta, 1.0)
        theirs = {layer: b @ a for layer, (b, a) in svd.items()}
        ours = products(state.adapter, PAIRS)
        assert min(float(product.norm()) for product in ours.values()) > 0.01
        assert distance(ours, theirs) < 1e-6


@pytest.mark.parametrize("name", TAKES_RANKS)
def test_sites_of_smaller_rank_leave_the_mean_exact(name: str) -> None:
    made = strategy(name, rank_of=RANK_OF)
    assert made.rule.exact
    assert max(exactness_error(made, one) for one in all_rounds(made)) < 1e-5


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", TAKES_RANKS)
def test_site_of_smaller_rank_trains_a_smaller_subspace_by_an_orthonormal_map(name: str, number: int) -> None:
    made = strategy(name, rank_of=RANK_OF)
    phase = made.plan(number)
    narrow = trainable_of(made.rule, phase, "north")
    assert trainable_of(made.rule, phase, "south") is phase.trainable
    assert trainable_of(made.rule, phase, "coast") is phase.trainable  # of the adapter's own rank
    for spec, whole in zip(narrow.manifest.tensors, phase.trainable.manifest.tensors, strict=True):
        half = 1 if "head" in spec.name else 2
        assert spec.num_elements * half == whole.num_elements
    generator = torch.Generator().manual_seed(3)
    x_P = torch.randn(MANIFEST.num_elements, generator=generator)
    z = torch.randn(narrow.manifest.num_elements, generator=generator)
    embedded_P = narrow.place(torch.zeros_like(x_P), z)
    torch.testing.assert_close(narrow.coordinates(embedded_P), z)
    torch.testing.assert_close(embedded_P.norm(), z.norm())
    torch.testing.assert_close(narrow.coordinates(x_P) @ z, x_P @ embedded_P, rtol=1e-4, atol=1e-5)
    # It lies in the subspace of all: what is in it and not in the other is nothing.
    common = phase.trainable
    back_P = common.place(torch.zeros_like(x_P), common.coordinates(embedded_P))
    torch.testing.assert_close(back_P, embedded_P, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TAKES_RANKS)
def test_upload_of_a_smaller_rank_has_everybodys_manifest_and_is_zero_elsewhere(name: str) -> None:
    made, plain = strategy(name, rank_of=RANK_OF), strategy(name)
    state = made.start(initial_adapter())
    for number in range(1, ROUNDS + 1):
        one, phase = play(made, number, state), made.plan(number)
        assert phase.upload_manifest == plain.plan(number).upload_manifest
        before_P, after_P = MANIFEST.flatten(one.gauged.adapter), MANIFEST.flatten(one.local["north"])
        shared, narrow = phase.shared, trainable_of(made.rule, phase, "north")
        upload_Z = shared.coordinates(after_P) - shared.coordinates(before_P)
        assert int(upload_Z.count_nonzero()) <= narrow.manifest.num_elements < upload_Z.numel()
        nothing_Z = torch.zeros(narrow.manifest.num_elements)
        assert torch.equal(narrow.place(before_P, nothing_Z), narrow.place(after_P, nothing_Z))
        state = one.following
