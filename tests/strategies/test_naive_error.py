"""The probe: one number a layer tells how far naive averaging is from the mean of updates."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import StudyError
from medfed.study import StudyConfig
from simulation.harness import simulate
from simulation.run_folder import metrics_of
from strategies.lora import lora_pairs, products
from strategies.naive_error import naive_error, naive_error_stat
from strategies.strategy import LocalResult

LAYERS, RANK = 200, 2
MANIFEST = AdapterManifest.of(
    {
        name: tensor
        for layer in range(LAYERS)
        for name, tensor in (
            (f"base_model.model.l{layer}.lora_A.weight", torch.zeros(RANK, 5)),
            (f"base_model.model.l{layer}.lora_B.weight", torch.zeros(7, RANK)),
        )
    },
    method="lora",
    rank=RANK,
)


def told_by(start_P: torch.Tensor, locals_KP: torch.Tensor, seed: int, number: int) -> dict[str, torch.Tensor]:
    stat = naive_error_stat(MANIFEST, seed, number)
    told = [stat.fn(LocalResult(MANIFEST, start_P, local_P, 1, 0.1)) for local_P in locals_KP]
    return {layer: torch.stack([one[layer] for one in told]).mean(0) for layer in told[0]}


def true_error(start_P: torch.Tensor, locals_KP: torch.Tensor) -> float:
    pairs = lora_pairs(MANIFEST)
    sites = [products(MANIFEST.unflatten(local_P), pairs) for local_P in locals_KP]
    before = products(MANIFEST.unflatten(start_P), pairs)
    naive = products(MANIFEST.unflatten(locals_KP.mean(0)), pairs)
    error = change = 0.0
    for layer in before:
        mean = torch.stack([site[layer] for site in sites]).mean(0)
        error += float((naive[layer] - mean).square().sum())
        change += float((mean - before[layer]).square().sum())
    return (error / change) ** 0.5


@settings(derandomize=True, max_examples=6)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.05, 3.0))
def test_estimate_over_many_layers_is_near_the_error_of_the_products(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    start_P = torch.randn(MANIFEST.num_elements, generator=generator)
    common_P = torch.randn(MANIFEST.num_elements, generator=generator)
    locals_KP = start_P + common_P + spread * torch.randn(4, MANIFEST.num_elements, generator=generator)
    told = told_by(start_P, locals_KP, seed, 3)
    after = MANIFEST.unflatten(locals_KP.mean(0))
    estimate = naive_error(MANIFEST.unflatten(start_P), after, told, seed, 3)
    assert estimate == pytest.approx(true_error(start_P, locals_KP), rel=0.45)


def test_sites_that_agree_make_no_error_and_sites_that_stand_still_none_either() -> None:
    start_P = torch.randn(MANIFEST.num_elements)
    same_KP = (start_P + 1).expand(3, -1)
    told = told_by(start_P, same_KP, 1, 1)
    assert naive_error(MANIFEST.unflatten(start_P), MANIFEST.unflatten(start_P + 1), told, 1, 1) < 1e-6
    still = told_by(start_P, start_P.expand(3, -1), 1, 1)
    assert naive_error(MANIFEST.unflatten(start_P), MANIFEST.unflatten(start_P), still, 1, 1) == 0.0


def test_every_round_is_seen_from_another_side() -> None:
    start_P = torch.randn(MANIFEST.num_elements)
    one, two = (told_by(start_P, (start_P + 1)[None], 1, number) for number in (1, 2))
    assert all(float(one[layer]) != float(two[layer]) for layer in one)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("masked", [False, True])
def test_run_with_a_probe_writes_it_down_and_ends_as_without(
    make_secure_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    masked: bool,
) -> None:
    study = make_secure_study(update_clip_norm=100.0)
    if not masked:
        sites = [site.model_copy(update={"declared_patients": None}) for site in study.sites]
        study = study.replace(secure_aggregation=None, sites=sites)
    runs = [
        simulate(study_file(study.replace(strategy={"name": "fedit", "probe": probe})), out=tmp_path, workers=0)
        for probe in (True, False)
    ]
    lines = [[line for line in metrics_of(run.folder) if line["event"] == "probe"] for run in runs]
    assert [line["round"] for line in lines[0]] == [1, 2]
    assert all(0 <= line["naive_error"] < 1 for line in lines[0])
    assert lines[1] == []
    assert runs[0].summary.mean["federated"] == pytest.approx(runs[1].summary.mean["federated"], abs=1e-4)


def test_probe_of_a_rule_that_makes_no_such_error_is_refused(
    make_study: Callable[..., StudyConfig], study_file: Callable[[StudyConfig], Path], tmp_path: Path
) -> None:
    study = make_study(strategy={"name": "ffa-lora", "probe": True})
    with pytest.raises(StudyError, match=r"strategy\.probe"):
        simulate(study_file(study), out=tmp_path, workers=0)
