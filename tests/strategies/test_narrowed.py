"""Sites of a smaller rank: what they train, in real rounds too, and with what they are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client import serve
from client.site import site_of_partition
from medfed.adapter_manifest import AdapterManifest
from medfed.errors import StudyError
from medfed.messages import RoundInstruction
from medfed.models.adapted import adapted_model, resolve
from medfed.payload import decode_adapter, encode_adapter
from medfed.study import StudyConfig
from strategies.lora import frame, is_a, is_b, lora_pairs
from strategies.narrowed import FirstColumns, narrowed
from strategies.registry import RULES, strategy_of
from strategies.subspace import Core, Slice, Subspace, Whole

CPU = torch.device("cpu")
MakeStudy = Callable[..., StudyConfig]
MANIFEST = AdapterManifest.of(
    {"m.x.lora_A.weight": torch.zeros(4, 6), "m.x.lora_B.weight": torch.zeros(5, 4), "m.head.bias": torch.zeros(3)},
    method="lora",
    rank=4,
)
REFUSING = sorted(name for name, rule in RULES.items() if not rule.takes_ranks)


def ranked(study: StudyConfig, **ranks: int) -> StudyConfig:
    """The study with these ranks of sites."""
    return study.replace(sites=[site.model_copy(update={"rank": ranks.get(site.name)}) for site in study.sites])


def test_narrowing_keeps_the_first_ranks_and_whole_heads() -> None:
    everything = Subspace.everything(MANIFEST)
    assert narrowed(everything, 3).parts == {
        "m.x.lora_A.weight": Slice(0, 0, 3),
        "m.x.lora_B.weight": Slice(1, 0, 3),
        "m.head.bias": Whole(),
    }
    assert narrowed(everything, 4) is everything
    assert narrowed(everything, 9) is everything


def test_slice_is_narrowed_in_proportion_or_refused() -> None:
    halves = Subspace(MANIFEST, {"m.x.lora_A.weight": Slice(0, 2, 4), "m.x.lora_B.weight": Slice(1, 0, 2)})
    assert narrowed(halves, 2).parts == {"m.x.lora_A.weight": Slice(0, 2, 3), "m.x.lora_B.weight": Slice(1, 0, 1)}
    for rank in (1, 3):
        with pytest.raises(StudyError, match=f"2 / 4 is a whole number.*got {rank}; use an even one"):
            narrowed(halves, rank)


def test_slice_along_the_other_axis_is_refused() -> None:
    rows = Subspace(MANIFEST, {"m.x.lora_B.weight": Slice(0, 0, 2)})
    with pytest.raises(StudyError, match="can be narrowed to rank 2"):
        narrowed(rows, 2)


def test_core_is_narrowed_to_its_first_columns() -> None:
    core = Core(frame(5, 4, "x"))
    part = FirstColumns(core, 2)
    spec = MANIFEST.tensors[2]
    assert part.shape(spec) == (4, 2)
    b_OR = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part.coordinates(b_OR), core.frame_OR.T @ b_OR[:, :2])
    after_OR = b_OR.clone()
    part.put(after_OR, torch.ones(4, 2))
    assert torch.equal(after_OR[:, 2:], b_OR[:, 2:])
    torch.testing.assert_close(after_OR[:, :2], core.frame_OR @ torch.ones(4, 2))
    batch_BOR = torch.stack([b_OR, 2 * b_OR])
    torch.testing.assert_close(part.coordinates(batch_BOR)[1], 2 * part.coordinates(b_OR))


def trained(study: StudyConfig, open_sites: Callable[..., Path]) -> tuple[dict[str, Tensor], list[int]]:
    """What the first site's real round of training uploads, by tensor, and the ranks that its change touches."""
    open_sites(study)
    strategy, manifest = strategy_of(study), study.resolved_manifest
    state = strategy.gauge(1, strategy.start(manifest.unflatten(adapted_model(study, CPU).initial_P)))
    instruction = RoundInstruction(study_digest=study.digest, round=1)
    adapter = encode_adapter(manifest.flatten(state.adapter), manifest)
    fields = instruction.to_fields(study=study.canonical, adapter=adapter)
    payload = serve.train(instruction, fields, site_of_partition(0))["adapter"]
    assert isinstance(payload, bytes)
    phase = strategy.plan(1)
    upload = phase.upload_manifest.unflatten(decode_adapter(payload, phase.upload_manifest))
    touched = set()
    for name, tensor in upload.items():
        if is_a(name) or is_b(name):
            by_rank = tensor.abs().sum(dim=1 if is_a(name) else 0)
            touched |= {index for index, change in enumerate(by_rank.tolist()) if change > 0}
    return upload, sorted(touched)


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize(("name", "touched"), [("ffa-lora", [0, 1]), ("twin-fresh", [0]), ("fed-sb", [0, 1])])
def test_site_of_smaller_rank_changes_nothing_else_in_a_real_round(
    name: str,
    touched: list[int],
    private: bool,
    make_study: MakeStudy,
    make_private_study: MakeStudy,
    open_sites: Callable[..., Path],
) -> None:
    plain = (make_private_study if private else make_study)()
    adapter = {"rank": 4, "alpha": 4.0, "targets": "decoder-qv"}
    training = plain.training.model_copy(update={"optimizer": "sgd"})
    whole = resolve(plain.replace(adapter=adapter, strategy={"name": name}, training=training), CPU)
    narrow = ranked(whole, north=2)
    wide_upload, wide_touched = trained(whole, open_sites)
    upload, narrow_touched = trained(narrow, open_sites)
    assert {key: value.shape for key, value in upload.items()} == {k: v.shape for k, v in wide_upload.items()}
    assert narrow_touched == touched
    assert len(wide_touched) == 2 * len(touched)


def test_rank_is_part_of_what_a_site_approves(make_study: MakeStudy) -> None:
    study = make_study()
    assert ranked(study, north=1).digest != study.digest
    assert ranked(study, north=1).model_digest == study.model_digest


@pytest.mark.parametrize("name", REFUSING)
def test_rule_that_would_not_be_exact_refuses_a_site_of_smaller_rank(name: str, make_study: MakeStudy) -> None:
    sites = ("north", "south", "east", "west", "centre", "coast", "hills")  # as many as every rule wants
    # Heads, so that every rule finds something to train.
    study = ranked(make_study(sites).replace(strategy={"name": name}), north=1)
    shapes = {"m.x.lora_A.weight": (2, 6), "m.x.lora_B.weight": (5, 2), "m.head.bias": (3,)}
    manifest = AdapterManifest.of({n: torch.zeros(s) for n, s in shapes.items()}, method="lora", rank=2)
    assert lora_pairs(manifest)
    with pytest.raises(StudyError, match=rf"one rank for strategy '{RULES[name].name}'.*remove it"):
        strategy_of(study.with_manifest(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": {"method": "fedprox", "mu": 1.0}}, "one rank for 'fedprox'"),
        ({"name": "twin", "local": None}, "whole number.*got 1"),
    ],
    ids=["pulled", "half-a-column"],
)
def test_study_whose_parts_do_not_go_with_a_smaller_rank_is_refused(
    changes: dict[str, Any], message: str, make_study: MakeStudy
) -> None:
    study = ranked(make_study().replace(strategy={"name": "ffa-lora", **changes}), north=1)
    with pytest.raises(StudyError, match=message):
        strategy_of(resolve(study, CPU))


def test_shrinkage_is_refused_with_a_smaller_rank(make_private_study: MakeStudy) -> None:
    plain = make_private_study()
    training = plain.training.model_copy(update={"optimizer": "sgd"})
    study = plain.replace(training=training, strategy={"name": "ffa-lora", "shrinkage": True})
    with pytest.raises(StudyError, match=r"one rank for strategy\.shrinkage"):
        strategy_of(resolve(ranked(study, south=1), CPU))


def test_rank_that_the_adapter_does_not_have_is_refused(make_study: MakeStudy) -> None:
    with pytest.raises(ValueError, match="'north': rank is 3, above adapter.rank = 2"):
        ranked(make_study(), north=3)


def test_rank_without_lora_is_refused(make_study: MakeStudy) -> None:
    with pytest.raises(ValueError, match="'north': rank belongs to adapter.method = 'lora'"):
        ranked(make_study().replace(adapter={"method": "heads"}), north=1)


def test_rank_is_refused_where_one_step_is_taken_on_the_sum(make_secure_study: MakeStudy) -> None:
    study = make_secure_study().replace(
        secure_aggregation={"enabled": True, "max_colluding": 1},
        training={"batch_size": 2, "learning_rate": 0.01, "optimizer": "sgd"},
        privacy={
            "trust": "consortium",
            "unit": "record",
            "noise_multiplier": 1.0,
            "delta": 0.01,
            "clip_norm": 1.0,
            "sampling_rate": 0.5,
            "steps_per_round": 1,
            "evaluation": "exact",
        },
    )
    with pytest.raises(ValueError, match="rank has no meaning with trust = 'consortium'"):
        ranked(study, north=1)
