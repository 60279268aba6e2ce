"""Fresh frames: everybody who hears the replay list has the same base weights, bit for bit."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medfed.adapter_manifest import AdapterManifest
from medfed.models.folding import Fold, FoldableBase
from medfed.study_sections import StrategyConfig
from strategies.lora import is_b
from strategies.registry import RULES
from strategies.rules.fresh import FfaFresh, fold_name
from strategies.strategy import Setting, State, Tree

RANK, SCALE = 8, 1.5
LAYERS = {"base_model.model.first": (192, 256), "base_model.model.second": (96, 192)}  # (d_out, d_in)
MANIFEST = AdapterManifest.of(
    {f"{layer}.lora_A.weight": torch.zeros(RANK, d_in) for layer, (_, d_in) in LAYERS.items()}
    | {f"{layer}.lora_B.weight": torch.zeros(d_out, RANK) for layer, (d_out, _) in LAYERS.items()}
    | {"base_model.model.head.bias": torch.zeros(3)},
    method="lora",
    rank=RANK,
)
FRESH = ["ffa-fresh", "twin-fresh"]


class Layer(nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self, d_out: int, d_in: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = nn.Linear(d_in, d_out, bias=False)
        self.base_layer.weight.data.copy_(torch.randn(d_out, d_in, generator=generator))


class Base:
    """Base weights of a small model, and the digest of what they have become."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        self.layers = {name: Layer(*shape, generator) for name, shape in LAYERS.items()}
        self._foldable = FoldableBase({name: (layer, SCALE) for name, layer in self.layers.items()})

    def fold(self, pairs: Sequence[Tree]) -> str:
        self._foldable.fold([Fold.of(one) for one in pairs])
        return self.digest

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"".join(w.numpy().tobytes() for w in self.weights.values())).hexdigest()

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: layer.base_layer.weight.data.clone() for name, layer in self.layers.items()}


def rule_of(name: str, *, hold_frames: int | None = 1, seed: int = 3) -> FfaFresh:
    rule = RULES[name](Setting(StrategyConfig(name=name, hold_frames=hold_frames), MANIFEST, seed=seed, num_sites=3))
    assert isinstance(rule, FfaFresh)
    return rule


def after_rounds(rule: FfaFresh, rounds: int) -> State:
    """The state with which the round after these would begin."""
    specs = MANIFEST.tensors
    state = rule.start({spec.name: torch.zeros(spec.shape) for spec in specs})
    for number in range(1, rounds + 1):
        state, learns = rule.gauge(number, state), rule.trainable(number).manifest
        generator = torch.Generator().manual_seed(number)
        delta = {spec.name: 0.1 * torch.randn(spec.shape, generator=generator) for spec in learns.tensors}
        state = rule.post(number, state, delta)
    return rule.gauge(rounds + 1, state)


@pytest.mark.process
@pytest.mark.parametrize("name", FRESH)
def test_replay_list_gives_the_same_base_in_another_process_with_other_threads(name: str, tmp_path: Path) -> None:
    rule = rule_of(name)
    state = after_rounds(rule, 6)
    here = Base().fold(rule.folds(state.broadcast))
    save_file(dict(state.broadcast), tmp_path / "told.safetensors")
    for threads in (1, 2, 3):
        script = f"""
import importlib.util, os
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "{threads}"
import torch
from safetensors.torch import load_file
torch.set_num_threads({threads})
assert torch.get_num_threads() == {threads}
spec = importlib.util.spec_from_file_location("bench", {str(Path(__file__))!r})
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
print(bench.Base().fold(bench.rule_of({name!r}).folds(load_file({str(tmp_path / "told.safetensors")!r}))))
"""
        there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert there.stdout.split()[-1] == here


@pytest.mark.parametrize("name", FRESH)
def test_folds_one_by_one_give_the_same_bits_as_all_at_once(name: str) -> None:
    rule = rule_of(name)
    folds = rule.folds(after_rounds(rule, 6).broadcast)
    assert len(folds) == 6
    step_by_step = Base()
    for count in range(1, len(folds) + 1):
        step_by_step.fold(folds[:count])
    assert step_by_step.digest == Base().fold(folds)


@pytest.mark.parametrize("name", FRESH)
def test_folds_of_another_study_leave_no_trace(name: str) -> None:
    rule, other = rule_of(name), rule_of(name, seed=4)
    folds = rule.folds(after_rounds(rule, 4).broadcast)
    theirs = other.folds(after_rounds(other, 3).broadcast)
    base = Base()
    plain = base.digest
    base.fold(theirs)
    assert base.fold(folds) == Base().fold(folds)
    assert base.fold([*folds[:2], *theirs]) == Base().fold([*folds[:2], *theirs])
    assert base.fold([]) == plain


@pytest.mark.parametrize("name", FRESH)
def test_base_is_the_backbone_and_the_sum_of_what_was_learnt(name: str) -> None:
    rule = rule_of(name)
    folds = rule.folds(after_rounds(rule, 5).broadcast)
    base, plain = Base(), Base().weights
    base.fold(folds)
    for layer, weight in base.weights.items():
        slow = plain[layer].double()
        for pairs in folds:
            slow = slow + SCALE * pairs[f"{layer}.lora_B.weight"].double() @ pairs[f"{layer}.lora_A.weight"].double()
        assert not torch.allclose(weight, plain[layer], atol=1e-2)
        torch.testing.assert_close(weight.double(), slow, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("hold_frames", "folds"),
    [(None, [0, 1, 2, 3, 4, 5]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 0, 1, 1, 2, 2]), (4, [0, 0, 0, 0, 1, 1])],
)
@pytest.mark.parametrize("name", FRESH)
def test_frames_are_held_for_as_many_rounds_as_the_study_says(
    name: str, hold_frames: int | None, folds: list[int]
) -> None:
    rule = rule_of(name, hold_frames=hold_frames)
    assert [rule.num_folds(number) for number in range(1, 7)] == folds
    for number, count in enumerate(folds, 1):
        told = rule.told_in(number)
        assert len(rule.folds(after_rounds(rule, number - 1).broadcast)) == count
        assert (told is None) == (count == 0)
    assert rule.told_after(0) is None


@pytest.mark.parametrize("name", FRESH)
def test_new_frames_are_others_and_begin_with_nothing_learnt(name: str) -> None:
    rule = rule_of(name)
    before, after = after_rounds(rule, 1), after_rounds(rule, 2)
    for layer in LAYERS:
        assert not torch.equal(before.adapter[f"{layer}.lora_A.weight"], after.adapter[f"{layer}.lora_A.weight"])
        product = after.adapter[f"{layer}.lora_B.weight"] @ after.adapter[f"{layer}.lora_A.weight"]
        assert not product.any()
    assert after.adapter["base_model.model.head.bias"].any()  # heads are in no pair and stay


def test_replay_list_tells_coordinates_and_no_frames() -> None:
    ffa, twin = after_rounds(rule_of("ffa-fresh"), 2).broadcast, after_rounds(rule_of("twin-fresh"), 2).broadcast
    assert set(ffa) == {fold_name(fold, f"{layer}.lora_B.weight") for fold in (1, 2) for layer in LAYERS}
    layer, (d_out, d_in) = next(iter(LAYERS.items()))
    assert ffa[fold_name(1, f"{layer}.lora_B.weight")].shape == (d_out, RANK)
    assert twin[fold_name(1, f"{layer}.lora_B.weight")].shape == (d_out, RANK // 2)
    assert twin[fold_name(1, f"{layer}.lora_A.weight")].shape == (RANK // 2, d_in)
    assert not any(is_b(name) and tensor.shape[0] == RANK for name, tensor in twin.items())


def test_folds_are_in_their_order_beyond_nine() -> None:
    names = [fold_name(number, "x") for number in range(1, 120)]
    assert names == sorted(names)
