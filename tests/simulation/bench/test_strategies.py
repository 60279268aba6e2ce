"""The strategies benchmark measures what ships: its fast local steps are checked, and the rest is the product's."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

import simulation.bench.strategies as bench
from medfed.errors import StudyError
from privacy.accounting import calibrate_noise
from privacy.randomness import RandomStream
from privacy.sampling import draw_patients
from simulation.bench.digits import NUM_SITES, activations
from simulation.bench.rows import Row
from simulation.bench.strategies import EXACT, FULL, GATE, Measured, Scale, measure, printed_arms
from simulation.bench.strategy_bytes import Traffic
from simulation.bench.strategy_network import (
    Directions,
    adapter_manifest,
    base_layers,
    clipped_sum,
    first_adapter,
    layers_with,
    record_gradients,
)
from simulation.bench.strategy_rounds import (
    SAMPLING_RATE,
    TARGET_DELTA,
    Arm,
    DivergedError,
    Rounds,
    Scores,
    Training,
    cached_federation,
    calibration_error,
    padded,
    strategy_for,
)
from simulation.bench.strategy_settings import ARMS, CHOSEN, EPSILONS, TEST_SEEDS, TUNING_SEEDS, _climb
from simulation.bench_command import app
from simulation.progress import Silent
from strategies.lora import lora_pairs
from strategies.strategy import LocalResult
from strategies.subspace import Subspace
from strategies.weighted_sum import weighted_sum

QUIET = Training(epsilon=math.inf, learning_rate=1.0, clip_norm_l2=1.0, local_steps=2)
PRIVATE = replace(QUIET, epsilon=8.0)
SUM_ONLY = [arm for arm in ARMS if not strategy_for(arm, adapter_manifest(arm.rank), 0).needs_individuals]
FEDERATED = [arm for arm in ARMS if not (arm.alone or arm.pooled)]


def arm_of(name: str) -> Arm:
    (found,) = [arm for arm in ARMS if arm.name == name]
    return found


def slow_gradients(x_BI: Tensor, y_B: Tensor, base: list[Tensor], adapter: dict[str, Tensor]) -> Tensor:
    """Gradients of the adapter, (B, P), by autograd, record by record."""
    rows = []
    for record in range(len(y_B)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
        logits = activations(x_BI[record : record + 1], layers_with(base, leaves))[-1]
        loss = functional.cross_entropy(logits, y_B[record : record + 1])
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows)


def slow_clipped_sum(gradients_BP: Tensor, subspace: Subspace, clip_norm_l2: float) -> Tensor:
    sizes = [spec.num_elements for spec in subspace.adapter.tensors]
    pieces = dict(zip([spec.name for spec in subspace.adapter.tensors], gradients_BP.split(sizes, 1), strict=True))
    rows_BQ = torch.cat([pieces[spec.name] for spec in subspace.support.tensors], 1)
    total = 0.0
    for row in subspace.coordinates_of_support(rows_BQ):
        total = total + row * min(1.0, clip_norm_l2 / float(row.norm()))
    assert isinstance(total, Tensor)
    return total


def jittered(arm: Arm, seed: int) -> dict[str, Tensor]:
    """An adapter at which no gradient vanishes, as the rule would carry it."""
    manifest, generator = adapter_manifest(arm.rank), torch.Generator().manual_seed(seed)
    strategy = strategy_for(arm, manifest, seed)
    state = strategy.start(first_adapter(manifest, cached_federation(seed).start, seed))
    flat_P = manifest.flatten(state.adapter)
    subspace = strategy.plan(1).trainable
    z_Z = subspace.coordinates(flat_P)
    return manifest.unflatten(subspace.place(flat_P, z_Z + 0.1 * torch.randn(z_Z.shape, generator=generator)))


@pytest.mark.parametrize("arm", FEDERATED, ids=lambda arm: arm.name)
@pytest.mark.parametrize("clip_norm_l2", [0.3, math.inf])
def test_clipped_sums_agree_with_autograd_record_by_record(arm: Arm, clip_norm_l2: float) -> None:
    seeds, num_records = (0, 1), 5
    data = [cached_federation(seed) for seed in seeds]
    subspaces = [strategy_for(arm, adapter_manifest(arm.rank), seed).plan(1).trainable for seed in seeds]
    adapters = [jittered(arm, seed) for seed in seeds]
    together = {name: torch.stack([adapter[name] for adapter in adapters])[:, None] for name in adapters[0]}
    together = {name: tensor.repeat(1, 2, 1, 1) for name, tensor in together.items()}
    x_SKBI = torch.stack([one.x_KNI[:2, :num_records] for one in data])
    y_SKB = torch.stack([one.y_KN[:2, :num_records] for one in data])
    base = [torch.stack(layers)[:, None] for layers in zip(*(one.start for one in data), strict=True)]
    factors = Directions(subspaces).factors(record_gradients(x_SKBI, y_SKB, base, together))
    fast_SKZ = clipped_sum(factors, torch.ones(2, 2, num_records), clip_norm_l2)
    for index, one in enumerate(data):
        for site in range(2):
            slow_BP = slow_gradients(x_SKBI[index, site], y_SKB[index, site], list(one.start), adapters[index])
            slow_Z = slow_clipped_sum(slow_BP, subspaces[index], clip_norm_l2)
            torch.testing.assert_close(fast_SKZ[index, site], slow_Z, rtol=1e-4, atol=1e-5)


def plain_rounds(arm: Arm, training: Training, seed: int, num_rounds: int) -> dict[str, Tensor]:
    """The same training as in the benchmark, written with the Strategy's own interface, site by site."""
    data, manifest = cached_federation(seed), adapter_manifest(arm.rank)
    strategy = strategy_for(arm, manifest, seed)
    state = strategy.start(first_adapter(manifest, data.start, seed))
    draws = [RandomStream.for_simulation(seed, "draws", site) for site in range(NUM_SITES)]
    noise, sites = np.random.default_rng([seed, 7]), [f"site-{site + 1}" for site in range(NUM_SITES)]
    kept: list[Tensor | None] = [None] * NUM_SITES
    for number in range(1, num_rounds + 1):
        state = strategy.gauge(number, state)
        phase, before_P = strategy.plan(number), manifest.flatten(state.adapter)
        base = base_layers(data.start, lora_pairs(manifest), strategy.rule.folds(state.broadcast))
        base = [layer.float() for layer in base]
        starts = []
        for site in range(NUM_SITES):
            start_Z = phase.trainable.coordinates(before_P)
            mine = kept[site]
            if phase.shared_elements is not None and mine is not None:
                start_Z = torch.where(phase.shared_elements, start_Z, mine)
            starts.append(start_Z)
        ends_KZ = torch.stack(starts)
        for _ in range(training.local_steps):
            noise_KZ = training.noise_std(num_rounds) * torch.from_numpy(
                noise.standard_normal(tuple(ends_KZ.shape), dtype=np.float32)
                if training.noise_std(num_rounds)
                else np.zeros(tuple(ends_KZ.shape), dtype=np.float32)
            )
            for site in range(NUM_SITES):
                drawn = draw_patients(data.x_KNI.shape[1], SAMPLING_RATE, draws[site])
                adapter = manifest.unflatten(phase.trainable.place(before_P, ends_KZ[site]))
                gradients_BP = slow_gradients(data.x_KNI[site, drawn], data.y_KN[site, drawn], base, dict(adapter))
                total_Z = slow_clipped_sum(gradients_BP, phase.trainable, training.clip_norm_l2) + noise_KZ[site]
                ends_KZ[site] -= training.learning_rate / (SAMPLING_RATE * data.x_KNI.shape[1]) * total_Z
        kept = list(ends_KZ.clone())
        mask_Z = phase.shared_elements
        results = [
            LocalResult(
                shared=phase.shared.manifest,
                before_Z=start_Z if mask_Z is None else start_Z[mask_Z],
                after_Z=end_Z if mask_Z is None else end_Z[mask_Z],
                num_steps=training.local_steps,
                learning_rate=training.learning_rate,
            )
            for start_Z, end_Z in zip(starts, ends_KZ, strict=True)
        ]
        uploads = {site: phase.upload_vector(result) for site, result in zip(sites, results, strict=True)}
        total_P = weighted_sum(uploads, dict.fromkeys(sites, 1.0), sites)
        state = strategy.post(number, state, phase.statistics(total_P, float(NUM_SITES)), 1.0)
    return dict(state.adapter)


@pytest.mark.parametrize("name", ["fedit", "twin-fresh", "fed-sb", "fedsa", "alt-gauge"])
def test_benchmark_is_the_same_as_the_strategies_own_interface(name: str) -> None:
    training = replace(PRIVATE, local_steps=1)
    rounds = Rounds(arm_of(name), training, (1, 0), num_rounds=2)
    rounds.run()
    slow = plain_rounds(arm_of(name), training, seed=0, num_rounds=2)
    fast = rounds.seeds[1].state.adapter
    assert fast.keys() == slow.keys()
    for tensor in fast:
        torch.testing.assert_close(fast[tensor], slow[tensor], rtol=1e-3, atol=1e-4)


def test_seeds_do_not_touch_each_other() -> None:
    together = Rounds(arm_of("twin-fresh"), PRIVATE, (0, 1), num_rounds=2).run()
    apart = [Rounds(arm_of("twin-fresh"), PRIVATE, (seed,), num_rounds=2).run()[0] for seed in (0, 1)]
    assert [score.overall for score in together] == pytest.approx([score.overall for score in apart], abs=0.2)


@pytest.mark.parametrize(("scale", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_noise_of_a_step_is_what_the_accountants_ask_for(scale: float, accepted: bool) -> None:
    arm, training = arm_of("fedit"), replace(PRIVATE, local_steps=1, clip_norm_l2=0.5)
    noised, plain = (
        Rounds(arm, setting, (0,), num_rounds=1) for setting in (training, replace(training, epsilon=math.inf))
    )
    noised.round(1)
    plain.round(1)
    manifest = adapter_manifest(arm.rank)
    move_P = manifest.flatten(noised.seeds[0].state.adapter) - manifest.flatten(plain.seeds[0].state.adapter)
    multiplier = calibrate_noise(epsilon=8.0, delta=TARGET_DELTA, sampling_rate=SAMPLING_RATE, steps=1)
    expected = scale * 0.5 * multiplier / (SAMPLING_RATE * 1000) / math.sqrt(NUM_SITES)  # of the mean over sites
    # Chi-square with P degrees of freedom: within five deviations.
    statistic = float((move_P.double() / expected).square().sum())
    assert (abs(statistic - len(move_P)) < 5 * math.sqrt(2 * len(move_P))) is accepted


def test_zero_gradients_stay_zero_and_padding_counts_for_nothing() -> None:
    u, v = torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3, 4)
    u[0, 0, 0] = 0.0
    weight = torch.tensor([[[1.0, 1.0, 0.0]]])
    found = clipped_sum({"a": (u, v)}, weight, 1e-3)
    assert bool(torch.isfinite(found).all())
    assert float(found.norm()) == pytest.approx(1e-3)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
def test_padded_draws_keep_every_index_once(sizes: list[int]) -> None:
    indices, weights = padded([np.arange(10, 10 + size) for size in sizes])
    for row, size in enumerate(sizes):
        assert indices[row][weights[row] > 0].tolist() == list(range(10, 10 + size))
        assert float(weights[row].sum()) == size


def test_training_that_leaves_the_finite_numbers_stops() -> None:
    wild = replace(QUIET, learning_rate=1e38, clip_norm_l2=1e6)
    with pytest.raises(DivergedError, match="lower learning_rate"):
        Rounds(arm_of("fedit"), wild, (0,), num_rounds=3).run()


def test_sites_alone_never_learn_from_each_other() -> None:
    rounds = Rounds(arm_of("local only"), QUIET, (0,), num_rounds=2)
    state = rounds.seeds[0].state
    (score,) = rounds.run()
    assert rounds.seeds[0].state is not None
    assert all(torch.equal(rounds.seeds[0].state.adapter[name], state.adapter[name]) for name in state.adapter)
    assert score.own > score.overall
    assert math.isnan(score.inexact)


def test_calibration_error_of_a_network_that_is_sure_and_wrong_is_one() -> None:
    data = cached_federation(0)
    logits = activations(data.test_x_KNI, [layer.double() for layer in data.start])[-1]
    sure = [layer.double() for layer in data.start]
    sure[-1] = sure[-1] * 1e6
    error = 1.0 - float((logits.argmax(-1) == data.test_y_N).double().mean())
    assert calibration_error(sure, data) == pytest.approx(error, abs=1e-3)


def test_uploads_are_those_of_the_manifests() -> None:
    # 12 blocks, queries and values, 768 in and out, rank 8, four bytes.
    assert Traffic.of(arm_of("fedit")) == Traffic(*[12 * 2 * 2 * 768 * 8 * 4 / 1e6] * 3)
    twin_fresh = Traffic.of(arm_of("twin-fresh"))
    assert twin_fresh is not None
    assert twin_fresh.up == pytest.approx(12 * 2 * 2 * 768 * 8 * 4 / 1e6)
    # Twice the rank comes down, and one fold more in each round.
    assert twin_fresh.last_down == pytest.approx((2 + 24) * twin_fresh.up)
    assert Traffic.of(arm_of("centralised")) is None


def test_settings_were_tuned_on_other_seeds_and_none_is_missing() -> None:
    assert not set(TEST_SEEDS) & set(TUNING_SEEDS)
    assert {arm.name for arm in ARMS} <= {name for name, _ in CHOSEN}
    assert set(EPSILONS) == set(FULL.epsilons)
    for arm in ARMS:
        for epsilon in EPSILONS:
            assert CHOSEN[arm.name, epsilon].epsilon == epsilon


@given(st.integers(-8, 8), st.integers(-8, 8))
def test_climb_finds_the_one_summit(start: int, summit: int) -> None:
    assert _climb(start, lambda value: -abs(value - summit), range(-10, 11)) == summit


def test_noise_without_a_bound_is_refused_by_the_accountants() -> None:
    with pytest.raises(Exception, match="epsilon"):
        replace(PRIVATE, epsilon=0.0).noise_std(1)


def test_rank_that_twin_cannot_halve_is_refused() -> None:
    with pytest.raises(StudyError, match="even"):
        strategy_for(Arm("twin", "twin", 3), adapter_manifest(3), 0)


@pytest.mark.slow
def test_gate_holds() -> None:
    rows, arms = measure(GATE, Silent())
    assert [row.facts for row in rows if not row.holds] == []
    assert {one.arm.name for one in arms} == {arm.name for arm in ARMS}


def test_rows_promise_exactness_where_rules_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ARMS", tuple(arm_of(name) for name in ("fedit", "twin-fresh", "fedsa")))
    rows, arms = measure(Scale(seeds=(0, 1), epsilons=(8.0,), num_rounds=2, gain=0.0), Silent())
    exactness = {row.name: row for row in rows if "distance" in row.name}
    assert exactness["twin-fresh, epsilon 8: distance from the mean of products"].target == EXACT
    assert exactness["fedit, epsilon 8: distance from the mean of products"].at_least
    assert len(exactness) == 2  # of fedsa each site has its own product
    assert all(row.holds for row in exactness.values())
    facts = printed_arms(arms)
    assert facts[0]["difference"]["fedit"] == {"mean": 0.0, "half_interval": 0.0}
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize(("value", "exit_code"), [(2.0, 0), (0.5, 1)])
def test_exit_code_says_whether_every_target_holds(
    monkeypatch: pytest.MonkeyPatch, value: float, exit_code: int
) -> None:
    scales = []
    scores = tuple(Scores(60.0 + seed, 50.0, 55.0, 3.0, 0.1, 0.1) for seed in range(2))

    def measured(scale: Scale, _reporter: Silent) -> tuple[list[Row], list[Measured]]:
        scales.append(scale)
        found = [Measured(arm, replace(QUIET, epsilon=8.0), scores) for arm in ARMS]
        return [Row("gained", value, "points", 1.0, at_least=True)], found

    monkeypatch.setattr(bench, "measure", measured)
    done = CliRunner().invoke(app, ["strategies", "--json"])
    assert done.exit_code == exit_code
    printed = json.loads(done.stdout)
    assert printed["rows"][0]["holds"] is (exit_code == 0)
    assert [arm["name"] for arm in printed["arms"]] == [arm.name for arm in ARMS]
    for_people = CliRunner().invoke(app, ["strategies", "--gate"])
    assert for_people.exit_code == exit_code
    assert ("MISSED" in for_people.stdout) is (exit_code == 1)
    assert scales == [FULL, GATE]


def test_tuning_prints_the_lines_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    import simulation.bench.strategy_settings as settings

    found = Training(epsilon=8.0, learning_rate=2.83, clip_norm_l2=1.0, local_steps=8)
    others = []

    def tuned(_arm: Arm, epsilon: float, *, beside: list[Training]) -> tuple[Training, float, int]:
        others.append(len(beside))
        return found, 67.1, 12

    monkeypatch.setattr(settings, "tuned", tuned)
    lines: list[str] = []
    settings.print_tuned(lines.append, [arm_of("fedit")])
    assert lines[0] == '    _chosen("fedit", 1.0, 2.83, 1.0, 8),  # 67.1 of 12'
    assert lines[-1] == '    _chosen("fedit", math.inf, 2.83, 1.0, 8),  # 67.1 of 12'
    assert others == [0, 0, 0, 0, 4]
