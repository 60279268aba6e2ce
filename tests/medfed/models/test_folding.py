"""Updates in the base weights: the right ones, in the right order, with the same bits however they came there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from medfed.errors import StudyError
from medfed.models.folding import Fold, FoldableBase, compressed, lora_layers, stacked

SHAPES = {"m.one": (5, 7), "m.two": (4, 4)}  # (d_out, d_in)
SCALES = {"m.one": 2.0, "m.two": 0.5}


class Layer(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base


def layers() -> dict[str, tuple[nn.Module, float]]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, tuple[nn.Module, float]] = {}
    for name, (d_out, d_in) in SHAPES.items():
        linear = nn.Linear(d_in, d_out)
        linear.weight.data.copy_(torch.randn(d_out, d_in, generator=generator))
        made[name] = (Layer(linear), SCALES[name])
    return made


def weights(of: dict[str, tuple[nn.Module, float]]) -> dict[str, Tensor]:
    return {name: layer.base_layer.weight.data.clone() for name, (layer, _) in of.items()}  # type: ignore[union-attr, operator]


def pairs(seed: int, rank: int = 3, names: tuple[str, ...] = ("m.one", "m.two")) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in names:
        d_out, d_in = SHAPES[name]
        made[f"{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
        made[f"{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    return made


def product(of: dict[str, Tensor], name: str) -> Tensor:
    return of[f"{name}.lora_B.weight"].double() @ of[f"{name}.lora_A.weight"].double()


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_folds_add_their_scaled_products_to_the_base() -> None:
    made = layers()
    before = weights(made)
    folds = [pairs(1), pairs(2, rank=1), pairs(3, rank=6)]
    FoldableBase(made).fold([Fold.of(one) for one in folds])
    for name, weight in weights(made).items():
        slow = before[name].double() + SCALES[name] * sum(product(one, name) for one in folds)
        torch.testing.assert_close(weight.double(), slow, rtol=0, atol=1e-5)


def test_layer_that_a_fold_does_not_name_stays_as_it_is() -> None:
    made = layers()
    before = weights(made)
    FoldableBase(made).fold([Fold.of(pairs(1, names=("m.two",)))])
    after = weights(made)
    assert torch.equal(after["m.one"], before["m.one"])
    assert not torch.equal(after["m.two"], before["m.two"])


@given(steps=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=5))
def test_bits_do_not_depend_on_what_was_in_place_before(steps: list[list[int]]) -> None:
    walked = layers()
    base = FoldableBase(walked)
    for step in steps:
        base.fold([Fold.of(pairs(seed)) for seed in step])
    at_once = layers()
    FoldableBase(at_once).fold([Fold.of(pairs(seed)) for seed in steps[-1]])
    assert equal(weights(walked), weights(at_once))


def test_folds_can_be_taken_away_again() -> None:
    made = layers()
    before, base = weights(made), FoldableBase(made)
    base.fold([Fold.of(pairs(1)), Fold.of(pairs(2))])
    base.fold([])
    assert equal(weights(made), before)


def test_folds_that_are_in_place_are_not_added_again() -> None:
    made = layers()
    base = FoldableBase(made)
    base.fold([Fold.of(pairs(1))])
    once = weights(made)
    base.fold([Fold.of(pairs(1))])
    assert equal(weights(made), once)
    base.fold([Fold.of(pairs(1)), Fold.of(pairs(1))])  # the same fold twice is two folds
    assert not equal(weights(made), once)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"m.other.lora_A.weight": torch.zeros(2, 7), "m.other.lora_B.weight": torch.zeros(5, 2)}, "'m.other'"),
        ({"m.one.lora_A.weight": torch.zeros(2, 7), "m.one.lora_B.weight": torch.zeros(5, 3)}, r"\[5, 7\] for m.one"),
        ({"m.one.lora_A.weight": torch.zeros(2, 6), "m.one.lora_B.weight": torch.zeros(5, 2)}, r"\[5, 7\] for m.one"),
        ({"m.one.lora_A.weight": torch.zeros(2, 7), "m.one.lora_B.weight": torch.zeros(4, 2)}, r"\[5, 7\] for m.one"),
    ],
    ids=["unknown", "ranks", "columns", "rows"],
)
def test_fold_that_does_not_fit_is_refused_and_leaves_no_trace(wrong: dict[str, Tensor], message: str) -> None:
    made = layers()
    base = FoldableBase(made)
    with pytest.raises(StudyError, match=message):
        base.fold([Fold.of(pairs(1)), Fold.of({**pairs(2, names=("m.two",)), **wrong})])
    assert equal(weights(made), weights(layers()))
    base.fold([Fold.of(pairs(3))])
    fresh = layers()
    FoldableBase(fresh).fold([Fold.of(pairs(3))])
    assert equal(weights(made), weights(fresh))


def test_layer_that_is_not_linear_is_refused() -> None:
    base = FoldableBase({"m.one": (Layer(nn.Conv2d(1, 1, 1)), 1.0)})
    with pytest.raises(StudyError, match=r"linear layer at m\.one.*Conv2d"):
        base.fold([Fold.of(pairs(1, names=("m.one",)))])


def test_fold_is_known_by_names_shapes_and_values() -> None:
    one = pairs(1)
    assert Fold.of(one).digest == Fold.of({name: one[name].clone() for name in reversed(one)}).digest
    assert Fold.of(one).digest != Fold.of({**one, "m.one.lora_A.weight": -one["m.one.lora_A.weight"]}).digest
    assert Fold.of(one).layers == ["m.one", "m.two"]
    flat = {"x": torch.zeros(2, 3)}
    assert Fold.of(flat).digest != Fold.of({"x": torch.zeros(3, 2)}).digest


def test_layers_of_a_module_without_lora_are_none() -> None:
    assert lora_layers(nn.Linear(2, 2)) == {}


@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_stack_is_the_sum_and_no_longer_than_a_layer_allows(ranks: list[int], seed: int) -> None:
    folds = [pairs(seed + number, rank) for number, rank in enumerate(ranks)]
    for name, (b, a) in stacked(folds).items():
        assert b.shape[1] == a.shape[0] == min(sum(ranks), *SHAPES[name])
        torch.testing.assert_close(b @ a, torch.stack([product(one, name) for one in folds]).sum(dim=0))


def test_stack_holds_what_only_some_folds_name() -> None:
    folds = [pairs(1, names=("m.one",)), pairs(2, names=("m.one", "m.two"))]
    both = stacked(folds)
    torch.testing.assert_close(both["m.two"][0] @ both["m.two"][1], product(folds[1], "m.two"))
    assert stacked([]) == {}


@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    inner=st.integers(1, 12),
    rank=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_compressed_is_the_best_of_its_rank_and_loses_what_is_dropped(
    d_out: int, d_in: int, inner: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(d_out, inner, generator=generator), torch.randn(inner, d_in, generator=generator)
    whole = b.double() @ a.double()
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    short_b, short_a = compressed(b, a, rank)
    length = min(rank, d_out, d_in, inner)
    assert (short_b.shape, short_a.shape) == ((d_out, length), (length, d_in))
    torch.testing.assert_close(short_b @ short_a, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=0, atol=1e-9)
    lost = float(s[rank:].square().sum().sqrt())
    assert float((whole - short_b @ short_a).norm()) == pytest.approx(lost, abs=1e-9)
    # Shared out evenly: column by column B is as long as A.
    torch.testing.assert_close(short_b.norm(dim=0), short_a.norm(dim=1))


def test_compressing_nothing_gives_nothing() -> None:
    b, a = compressed(torch.zeros(5, 3), torch.zeros(3, 6), 2)
    assert not (b @ a).any()
