"""Shrinkage: closer to the truth where there is one, nothing where there is none; and the noise is what it says.

Legend: O rows, I columns, Z coordinates of what trains.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from client.features import FeatureCache
from client.private_trainer import train_privately
from medfed.models.adapted import adapted_model, resolve
from medfed.study import StudyConfig
from medfed.tasks import task_of
from privacy.noise import add_gaussian
from privacy.plan import PrivacyPlan
from privacy.randomness import RandomStream
from privacy.skellam import skellam_noise
from server.checkpoint import read_checkpoint
from simulation.harness import simulate
from simulation.run_folder import stored_study
from strategies.registry import strategy_of
from strategies.secure_channel import SecureChannel
from strategies.shrinkage import noise_std_of_mean, shrunk, shrunk_change
from strategies.subspace import Subspace
from strategies.weighted_sum import weighted_sum

CPU = torch.device("cpu")


def spiked(rows: int, columns: int, spikes: Sequence[float], noise_std: float, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, in units of the edge of the noise; and the same with noise."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, len(spikes), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, len(spikes), generator=generator, dtype=torch.float64))
    edge = noise_std * (math.sqrt(rows) + math.sqrt(columns))
    truth = (u * (torch.tensor(spikes, dtype=torch.float64) * edge)) @ v.T
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return truth.float(), (truth + noise_std * noise).float()


def error(guess: Tensor, truth: Tensor) -> float:
    return float((guess - truth).square().sum())


@pytest.mark.parametrize("shape", [(60, 60), (200, 4), (8, 150), (40, 90)])
@pytest.mark.parametrize("spikes", [[1.5], [3.0, 1.2], [0.9, 0.8]])
def test_shrunk_matrix_is_closer_to_the_truth_than_the_noisy_one(shape: tuple[int, int], spikes: list[float]) -> None:
    raw, ours, truncated = 0.0, 0.0, 0.0
    for seed in range(20):
        truth, noisy = spiked(*shape, spikes, 0.02, seed)
        raw += error(noisy, truth)
        ours += error(shrunk(noisy, 0.02), truth)
        u, values, v = torch.linalg.svd(noisy, full_matrices=False)
        truncated += error((u[:, : len(spikes)] * values[: len(spikes)]) @ v[: len(spikes)], truth)
    assert ours < raw
    assert ours < truncated  # even with the rank known, values need to shrink
    if min(shape) > 10:
        assert ours < 0.6 * raw


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_shrinkage_needs_the_right_noise(factor: float) -> None:
    right, wrong = 0.0, 0.0
    for seed in range(20):
        truth, noisy = spiked(60, 90, [1.3, 0.9], 0.1, seed)
        right += error(shrunk(noisy, 0.1), truth)
        wrong += error(shrunk(noisy, 0.1 * factor), truth)
    assert right < 0.9 * wrong


def test_pure_noise_goes_to_zero_as_matrices_grow() -> None:
    """The largest singular value leaves the edge by n^(-2/3) (Tracy and Widom); what is kept of the energy falls."""

    def kept(size: int) -> float:
        energies = []
        for seed in range(12):
            _, noise = spiked(size, 2 * size, [0.0], 0.3, seed)
            energies.append(float(shrunk(noise, 0.3).square().sum() / noise.square().sum()))
        return sum(energies) / len(energies)

    small, large = kept(10), kept(160)
    assert small < 0.05
    assert large < small / 16  # one value of at most about n^(1/3) sigma^2 beside an energy of 2 n^2 sigma^2
    assert large < 1e-3


def test_noise_of_zero_leaves_the_matrix_bit_for_bit() -> None:
    matrix = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shrunk(matrix, 0.0), matrix)


def test_noise_far_above_the_matrix_leaves_nothing() -> None:
    matrix = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shrunk(matrix, 100.0), torch.zeros(7, 3))
    assert torch.equal(shrunk(torch.zeros(7, 3), 1.0), torch.zeros(7, 3))


def test_vectors_stay_and_further_axes_count_as_columns() -> None:
    change = {
        "bias": torch.ones(4),
        "scalar": torch.tensor(1.0),
        "conv": torch.randn(6, 2, 3, 3),
        "b": torch.randn(5, 2),
    }
    made = shrunk_change(change, 0.3)
    assert torch.equal(made["bias"], change["bias"])
    assert torch.equal(made["scalar"], change["scalar"])
    assert torch.equal(made["conv"], shrunk(change["conv"].flatten(1), 0.3).view(6, 2, 3, 3))
    assert made["b"].dtype == torch.float32


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.01, 10), st.integers(0, 100))
def test_no_singular_value_grows_and_turning_changes_nothing(rows: int, columns: int, std: float, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made = shrunk(matrix, std)
    before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(made)
    assert (after <= before + 1e-9).all()
    torch.testing.assert_close(shrunk(matrix.T, std), made.T)
    torch.testing.assert_close(shrunk(3 * matrix, 3 * std), 3 * made)


def test_large_values_hardly_shrink() -> None:
    truth, noisy = spiked(30, 50, [1000.0], 0.01, 0)
    torch.testing.assert_close(shrunk(noisy, 0.01), truth, rtol=1e-2, atol=0.05)


SITES = ("north", "south", "west", "east", "centre")
DECLARED = {"north": 3, "south": 20, "west": 8, "east": 3, "centre": 50}


@pytest.fixture
def noised(make_study: Callable[..., StudyConfig]) -> Callable[..., StudyConfig]:
    """A resolved study of five sites of different sizes; keyword arguments replace keys of ``[privacy]``."""
    plain = make_study(SITES)

    def make(weighting: str = "examples", strategy: dict[str, Any] | None = None, **privacy: Any) -> StudyConfig:
        given = {
            "trust": "site",
            "unit": "patient",
            "noise_multiplier": 1.3,
            "delta": 0.01,
            "clip_norm": 0.7,
            "sampling_rate": 0.4,
            "steps_per_round": 3,
            "images_per_patient": 2,
            "evaluation": "exact",
            **privacy,
        }
        shared = given["trust"] == "consortium"
        study = plain.replace(
            training={"batch_size": 2, "learning_rate": 0.05, "optimizer": "sgd"},
            privacy=given,
            secure_aggregation={"enabled": True, "max_colluding": 1} if shared else None,
            strategy={"shrinkage": True, "weighting": weighting, **(strategy or {})},
            sites=[site.model_copy(update={"declared_patients": DECLARED[site.name]}) for site in plain.sites],
        )
        return resolve(study, CPU)

    return make


def assert_standard_deviation(noise_Z: Tensor, claimed: float) -> None:
    """Accepts the claim, and would have rejected 2/3 and 3/2 of it; two-sided at five standard errors."""
    ratio = float(noise_Z.double().square().mean().sqrt()) / claimed
    tolerance = 5 / math.sqrt(2 * noise_Z.numel())
    assert tolerance < 0.2  # there are enough elements to tell
    assert abs(ratio - 1) < tolerance
    for factor in (2 / 3, 3 / 2):
        assert abs(ratio / factor - 1) > tolerance


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("present", [SITES, ("south", "east"), ("north",)])
def test_noise_of_the_mean_is_that_of_real_steps_on_nobody(
    noised: Callable[..., StudyConfig], weighting: str, present: Sequence[str]
) -> None:
    """Sites that draw nobody: all that their steps do is noise."""
    study = noised(weighting)
    model, plan = adapted_model(study, CPU), PrivacyPlan.of_study(study)
    changes, weights = {}, {}
    for site in present:
        result = train_privately(
            model,
            task_of(study.task),
            (),
            study.training,
            plan,
            engine=None,  # type: ignore[arg-type]
            trainable=Subspace.everything(model.manifest),
            start_P=model.initial_P,
            declared_units=DECLARED[site],
            features=FeatureCache(),
            stream=RandomStream.for_simulation(0, site),
        )
        changes[site] = result.adapter_P - model.initial_P
        weights[site] = 1.0 if weighting == "uniform" else float(DECLARED[site])
    mean_Z = weighted_sum(changes, weights, SITES) / sum(weights.values())
    assert_standard_deviation(mean_Z, noise_std_of_mean(study, present))


@pytest.mark.parametrize("present", [SITES, SITES[:4]])
def test_noise_of_the_mean_is_that_of_an_opened_sum_of_shares(
    noised: Callable[..., StudyConfig], present: Sequence[str]
) -> None:
    study = noised(trust="consortium", steps_per_round=1, noise_multiplier=0.5)
    phase, plan = strategy_of(study).plan(1), PrivacyPlan.of_study(study)
    channel = SecureChannel.training(study, 1, phase)
    num, total = phase.upload_manifest.num_elements, np.zeros(channel.num_elements, dtype=np.uint32)
    for site in present:
        stream = RandomStream.for_simulation(0, site)
        total = total + channel.noised(skellam_noise(num, variance=plan.share_variance, stream=stream))
    opened = channel.opened(total, present)
    assert opened.update_P is not None
    statistics = phase.statistics(opened.update_P, opened.weight)
    mean_Z = torch.cat([tensor.reshape(-1) for tensor in statistics.values()])
    assert_standard_deviation(mean_Z, noise_std_of_mean(study, present))


def test_site_of_a_consortium_that_is_alone_adds_all_the_noise(noised: Callable[..., StudyConfig]) -> None:
    study = noised(trust="consortium", steps_per_round=1, noise_multiplier=0.5)
    alone = noise_std_of_mean(study, ("north",), "local-north")
    assert alone == pytest.approx(0.05 * 0.5 * 0.7 / (0.4 * 3))
    pooled = noise_std_of_mean(study, ("pooled",), "pooled")
    assert pooled == pytest.approx(0.05 * 0.5 * 0.7 / (0.4 * sum(DECLARED.values())))


def test_statistical_test_of_the_noise_has_power() -> None:
    noise_Z = add_gaussian(
        torch.zeros(2000, dtype=torch.float64), noise_std=2.0, stream=RandomStream.for_simulation(0, "x")
    )
    assert_standard_deviation(noise_Z, 2.0)
    for factor in (2 / 3, 3 / 2):
        with pytest.raises(AssertionError):
            assert_standard_deviation(noise_Z, 2.0 * factor)


def test_strategy_shrinks_the_mean_change_before_the_server_steps(noised: Callable[..., StudyConfig]) -> None:
    study = noised(strategy={"server": {"optimizer": "fedavgm", "learning_rate": 0.5, "momentum": 0.0}})
    strategy, manifest = strategy_of(study), study.resolved_manifest
    state = strategy.start(manifest.unflatten(adapted_model(study, CPU).initial_P))
    change = manifest.unflatten(torch.randn(manifest.num_elements, generator=torch.Generator().manual_seed(0)))
    after = strategy.post(1, state, change, 1.0, noise_std=0.2).adapter
    for name in change:
        torch.testing.assert_close(after[name], state.adapter[name] + 0.5 * shrunk(change[name], 0.2))
    plain = strategy.post(1, state, change, 1.0).adapter
    assert all(torch.equal(plain[name], state.adapter[name] + 0.5 * change[name]) for name in change)


@pytest.mark.usefixtures("without_pictures")
def test_run_with_noise_far_above_the_signal_learns_nothing_and_is_not_moved_by_it(
    noised: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path], tmp_path: Path
) -> None:
    ends = {}
    for shrinks in (True, False):
        study = noised(strategy={"shrinkage": shrinks}, noise_multiplier=50.0)
        study = study.replace(
            manifest=None,
            sites=[site.model_copy(update={"declared_patients": 3}) for site in study.sites],
            rounds={"num_rounds": 1},
        )
        result = simulate(study_file(study), out=tmp_path / f"shrinks-{shrinks}", workers=0, baselines=False)
        resolved = stored_study(result.folder)
        checkpoint = read_checkpoint(
            result.folder, resolved.resolved_manifest, study_digest=resolved.digest, scope="federated"
        )
        assert checkpoint is not None
        ends[shrinks] = checkpoint.adapter_P - adapted_model(resolved, CPU).initial_P
    assert float(ends[True].square().sum()) < 0.1 * float(ends[False].square().sum())
