"""What is summed under masks is what is meant, for any sites, weights and metrics."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medfed.errors import PrivacyError, SecureAggregationError
from medfed.models.adapted import resolve
from medfed.study import StudyConfig
from privacy.plan import PrivacyPlan
from strategies.registry import strategy_of
from strategies.secure_channel import METRIC_BOUND, SecureChannel

SHARED = {
    "trust": "consortium",
    "unit": "patient",
    "noise_multiplier": 1.0,
    "delta": 0.01,
    "clip_norm": 0.5,
    "sampling_rate": 0.5,
    "steps_per_round": 1,
    "images_per_patient": 2,
    "evaluation": "exact",
}


@pytest.fixture
def study(make_secure_study: Callable[..., StudyConfig]) -> StudyConfig:
    plain = make_secure_study()
    sizes = (3, 5, 8, 13, 21)
    sites = [site.model_copy(update={"declared_patients": size}) for site, size in zip(plain.sites, sizes, strict=True)]
    return resolve(plain.replace(sites=sites), torch.device("cpu"))


@pytest.fixture
def shared(study: StudyConfig) -> StudyConfig:
    return study.replace(
        training={"batch_size": 2, "learning_rate": 0.1, "optimizer": "sgd"},
        privacy=SHARED,
        secure_aggregation={"enabled": True, "max_colluding": 1},
    )


def training(study: StudyConfig, round_number: int = 1) -> SecureChannel:
    return SecureChannel.training(study, round_number, strategy_of(study).plan(round_number))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sum_of_vectors_is_the_weighted_sum_of_updates_and_the_mean_of_metrics(
    study: StudyConfig, data: st.DataObject
) -> None:
    channel = training(study)
    num_sites = data.draw(st.integers(1, 5))
    sites = study.site_names[:num_sites]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    losses = {site: data.draw(st.none() | st.floats(-20, 20, width=32)) for site in sites}
    total_P, expected_P = np.zeros(channel.num_elements, np.uint32), torch.zeros(channel.num_elements - 2).double()
    for site in sites:
        update_P = torch.randn(channel.num_elements - 2, generator=generator)
        update_P *= 0.9 * 8.0 / float(update_P.norm())
        assert not channel.scales_down(update_P, site)
        loss = losses[site]
        total_P += channel.weighted(update_P, site, {} if loss is None else {"loss": loss})
        expected_P += update_P.double() * channel.weight(site)
    opened = channel.opened(total_P, sites)
    assert opened.update_P is not None
    assert opened.weight == sum((3.0, 5.0, 8.0, 13.0, 21.0)[:num_sites])
    bound = channel.quantisation_bound(num_sites) * num_sites * 21
    assert float((opened.update_P - expected_P).abs().max()) <= bound * (1 + 1e-9)
    cut = [min(max(loss, -METRIC_BOUND), METRIC_BOUND) for loss in losses.values() if loss is not None]
    assert opened.metrics == ({"loss": pytest.approx(sum(cut) / len(cut), abs=1e-5)} if cut else {})


def test_long_update_is_scaled_down_and_told(study: StudyConfig) -> None:
    channel = training(study)
    update_P = torch.full((channel.num_elements - 2,), 1.0)
    assert channel.scales_down(update_P, "centre")
    opened = channel.opened(channel.weighted(update_P, "centre", {}), ["centre"])
    assert opened.update_P is not None
    assert float(opened.update_P.norm()) / 21 == pytest.approx(8.0, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_no_number_is_refused_with_the_name_of_its_tensor(study: StudyConfig, value: float) -> None:
    channel = training(study)
    update_P = torch.zeros(channel.num_elements - 2)
    update_P[0] = value
    with pytest.raises(SecureAggregationError, match="lora_A"):
        channel.weighted(update_P, "north", {})


def test_digest_binds_study_purpose_round_tensors_and_metrics(study: StudyConfig, shared: StudyConfig) -> None:
    channels = [
        training(study),
        training(study, 2),
        SecureChannel.evaluation(study, 1),
        SecureChannel.evaluation(study, 2),
        training(shared),
        training(study.replace(seed=6)),
    ]
    assert len({channel.digest for channel in channels}) == len(channels)
    assert training(study).digest == training(study).digest


def test_noised_integers_become_one_step_of_plain_sgd_on_the_mean_gradient(shared: StudyConfig) -> None:
    channel, plan = training(shared), PrivacyPlan.of_study(shared)
    generator = np.random.default_rng(0)
    sums = {site: generator.integers(-100_000, 100_000, channel.num_elements) for site in shared.site_names}
    total_P = sum(channel.noised(integers_P) for integers_P in sums.values())
    opened = channel.opened(np.asarray(total_P, dtype=np.uint32), shared.site_names)
    assert opened.update_P is not None
    gradients_P = sum(sums.values()) * plan.clip_norm / plan.l2_bound
    mean_gradient_P = gradients_P / (plan.sampling_rate * 50)  # 3 + 5 + 8 + 13 + 21 declared patients
    np.testing.assert_allclose(opened.update_P.numpy() / opened.weight, -0.1 * mean_gradient_P, rtol=1e-12)
    assert channel.metric_names == ()


def test_sum_that_would_wrap_is_cut_off_before_noise_and_moves_no_further_apart(shared: StudyConfig) -> None:
    channel = training(shared)
    assert channel.room > PrivacyPlan.of_study(shared).l2_bound
    near, far = np.array([5, -7, channel.room], dtype=np.int64), np.array([0, 2**40, -(2**40)], dtype=np.int64)
    fitted = channel.fitting(near), channel.fitting(far)
    assert fitted[0].tolist() == near.tolist()
    assert fitted[1].tolist() == [0, channel.room, -channel.room]
    assert np.all(np.abs(fitted[0] - fitted[1]) <= np.abs(near - far))
    noise = math.ceil(14 * math.sqrt(PrivacyPlan.of_study(shared).share_variance))
    assert 5 * (channel.room + noise) < 2**31 <= 5 * (channel.room + noise + 2)  # five sites, and no bit wasted


def test_noise_that_leaves_no_room_for_a_patient_is_refused(shared: StudyConfig) -> None:
    coarse: dict[str, Any] = {**SHARED, "noise_multiplier": 1.5e-4}
    with pytest.raises(PrivacyError, match="use fewer sites, or a larger noise_multiplier"):
        _ = training(shared.replace(privacy=coarse)).room


def test_sum_larger_than_the_sites_can_make_it_is_refused(study: StudyConfig) -> None:
    channel = training(study)
    left = np.full(channel.num_elements, 2**30, dtype=np.uint32)
    with pytest.raises(SecureAggregationError):
        channel.opened(left, study.site_names[:3])
