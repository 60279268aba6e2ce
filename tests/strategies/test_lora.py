"""LoRA pairs, frames, and factorisations of the same product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import StudyError
from medfed.study_sections import StrategyConfig
from strategies.lora import frame, is_a, is_b, lora_pairs, products, with_orthonormal_a, with_orthonormal_b
from strategies.rules.head_only import HeadOnly
from strategies.rules.twin import Twin
from strategies.strategy import Setting

TENSORS = {
    "m.one.lora_A.weight": torch.zeros(2, 5),
    "m.one.lora_B.weight": torch.zeros(4, 2),
    "m.two.lora_A.weight": torch.zeros(2, 3),
    "m.two.lora_B.weight": torch.zeros(6, 2),
    "m.head.weight": torch.zeros(3, 3),
}
MANIFEST = AdapterManifest.of(TENSORS, method="lora", rank=2)


def test_pairs_are_found_and_heads_are_in_none() -> None:
    pairs = lora_pairs(MANIFEST)
    assert [(pair.layer, pair.d_out, pair.rank, pair.d_in) for pair in pairs] == [
        ("m.one", 4, 2, 5),
        ("m.two", 6, 2, 3),
    ]
    assert {name for pair in pairs for name in (pair.a, pair.b)} == {name for name in TENSORS if "lora" in name}
    assert [name for name in TENSORS if not (is_a(name) or is_b(name))] == ["m.head.weight"]


def test_adapter_without_pairs_has_none() -> None:
    assert lora_pairs(MANIFEST.subset(lambda name: "head" in name)) == ()


def test_products_agree_with_the_obvious_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in TENSORS.items()}
    for pair in lora_pairs(MANIFEST):
        a, b = drawn[pair.a], drawn[pair.b]
        slow = [
            [sum(float(b[i, k]) * float(a[k, j]) for k in range(pair.rank)) for j in range(pair.d_in)]
            for i in range(pair.d_out)
        ]
        torch.testing.assert_close(products(drawn, lora_pairs(MANIFEST))[pair.layer], torch.tensor(slow).double())


@given(rows=st.integers(1, 40), fewer=st.integers(0, 39), fact=st.integers(0, 10**6))
def test_frame_has_orthonormal_columns(rows: int, fewer: int, fact: int) -> None:
    columns = max(1, rows - fewer)
    drawn = frame(rows, columns, fact)
    assert (drawn.shape, drawn.dtype) == ((rows, columns), torch.float32)
    torch.testing.assert_close(drawn.T @ drawn, torch.eye(columns), rtol=0, atol=1e-6)


def test_frame_is_fixed_by_its_facts() -> None:
    assert torch.equal(frame(9, 3, "study", 1), frame(9, 3, "study", 1))
    assert not torch.equal(frame(9, 3, "study", 1), frame(9, 3, "study", 2))
    assert not torch.equal(frame(9, 3, 1, 23), frame(9, 3, 12, 3))


def test_frame_is_uniform_among_frames() -> None:
    """Every element of a uniform frame has mean 0 and variance 1 / rows; QR alone leaves signs that are not random."""
    num, rows = 2000, 6
    drawn = torch.stack([frame(rows, 2, number) for number in range(num)])
    tolerance = 5 / (rows * num) ** 0.5  # five standard errors
    assert float(drawn.mean(dim=0).abs().max()) < tolerance
    assert float((drawn.square().mean(dim=0) - 1 / rows).abs().max()) < tolerance


def test_draw_leaves_other_random_numbers_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    frame(9, 3, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


@given(d_out=st.integers(1, 12), d_in=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_refactoring_keeps_the_product_and_makes_one_factor_orthonormal(
    d_out: int, d_in: int, rank: int, seed: int
) -> None:
    rank = min(rank, d_out, d_in)
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    for refactored in (with_orthonormal_a, with_orthonormal_b):
        new_b, new_a = refactored(b, a)
        assert (new_b.shape, new_a.shape) == (b.shape, a.shape)
        torch.testing.assert_close(new_b @ new_a, b @ a, rtol=0, atol=1e-5)
    a_of_a, b_of_b = with_orthonormal_a(b, a)[1], with_orthonormal_b(b, a)[0]
    torch.testing.assert_close(a_of_a @ a_of_a.T, torch.eye(rank), rtol=0, atol=1e-6)
    torch.testing.assert_close(b_of_b.T @ b_of_b, torch.eye(rank), rtol=0, atol=1e-6)


def test_zero_factor_stays_zero_and_the_other_becomes_orthonormal() -> None:
    b, a = with_orthonormal_a(torch.zeros(4, 2), torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    assert not b.any()
    torch.testing.assert_close(a @ a.T, torch.eye(2), rtol=0, atol=1e-6)


def setting(manifest: AdapterManifest) -> Setting:
    return Setting(StrategyConfig(), manifest, seed=1, num_sites=2)


def test_twin_refuses_an_odd_rank_and_a_rank_that_a_layer_has_no_room_for() -> None:
    odd = {name: t[:, :1] if is_b(name) else t[:1] if is_a(name) else t for name, t in TENSORS.items()}
    with pytest.raises(StudyError, match=r"even adapter.rank .*twin.*got 1; use 2"):
        Twin(setting(AdapterManifest.of(odd, method="lora", rank=1)))
    wide = {"m.x.lora_A.weight": torch.zeros(8, 3), "m.x.lora_B.weight": torch.zeros(9, 8)}
    with pytest.raises(StudyError, match="at most 6, got 8"):
        Twin(setting(AdapterManifest.of(wide, method="lora", rank=8)))


def test_head_only_refuses_an_adapter_without_heads() -> None:
    with pytest.raises(StudyError, match="fresh heads"):
        HeadOnly(setting(MANIFEST.subset(lambda name: "lora" in name)))
