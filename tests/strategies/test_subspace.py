"""What trains of an adapter: coordinates, and what is left alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import AdapterMismatchError
from strategies.lora import frame
from strategies.strategy import moved
from strategies.subspace import Core, Part, Slice, Subspace, Whole

SHAPES = {"a": (4, 6), "b": (9, 4), "c": (5,), "d": (3, 4)}
MANIFEST = AdapterManifest.of({name: torch.zeros(shape) for name, shape in SHAPES.items()}, method="lora", rank=4)
PARTS: dict[str, Part] = {"a": Slice(axis=0, start=1, stop=3), "b": Core(frame(9, 4, "b")), "d": Slice(1, 0, 2)}
SUBSPACE = Subspace(MANIFEST, PARTS)


def drawn(seed: int = 0) -> torch.Tensor:
    return torch.randn(MANIFEST.num_elements, generator=torch.Generator().manual_seed(seed))


def basis(subspace: Subspace) -> torch.Tensor:
    """The embedding as a matrix (P, Z), one coordinate at a time."""
    zeros_P, num = torch.zeros(MANIFEST.num_elements), subspace.manifest.num_elements
    return torch.stack([subspace.place(zeros_P, row) for row in torch.eye(num)], dim=1)


@pytest.mark.parametrize(
    "subspace",
    [SUBSPACE, Subspace.everything(MANIFEST), Subspace(MANIFEST, {"c": Whole(), "b": PARTS["b"]})],
    ids=["parts", "everything", "two"],
)
def test_coordinates_agree_with_a_matrix_of_orthonormal_columns(subspace: Subspace) -> None:
    basis_PZ, x_P = basis(subspace), drawn()
    torch.testing.assert_close(basis_PZ.T @ basis_PZ, torch.eye(basis_PZ.shape[1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(subspace.coordinates(x_P), basis_PZ.T @ x_P)


def test_manifest_names_the_coordinates_and_the_support_the_tensors() -> None:
    assert {spec.name: spec.shape for spec in SUBSPACE.manifest.tensors} == {"a": (2, 6), "b": (4, 4), "d": (3, 2)}
    assert {spec.name: spec.shape for spec in SUBSPACE.support.tensors} == {"a": (4, 6), "b": (9, 4), "d": (3, 4)}
    assert (SUBSPACE.manifest.rank, SUBSPACE.manifest.method) == (4, "lora")


def test_only_what_trains_changes() -> None:
    before = MANIFEST.unflatten(drawn())
    after = MANIFEST.unflatten(SUBSPACE.place(drawn(), torch.full((SUBSPACE.manifest.num_elements,), 9.0)))
    assert torch.equal(after["c"], before["c"])
    assert torch.equal(after["a"][[0, 3]], before["a"][[0, 3]])
    assert torch.equal(after["d"][:, 2:], before["d"][:, 2:])
    assert bool((after["a"][1:3] == 9).all())
    assert bool((after["d"][:, :2] == 9).all())


def test_placing_leaves_the_origin_as_it_was() -> None:
    origin_P = drawn()
    SUBSPACE.place(origin_P, torch.zeros(SUBSPACE.manifest.num_elements))
    assert torch.equal(origin_P, drawn())


def test_moving_agrees_with_placing() -> None:
    origin_P = drawn()
    delta_Z = torch.randn(SUBSPACE.manifest.num_elements, generator=torch.Generator().manual_seed(1))
    by_tensor = moved(SUBSPACE, MANIFEST.unflatten(origin_P), SUBSPACE.manifest.unflatten(delta_Z))
    placed_P = SUBSPACE.place(origin_P, SUBSPACE.coordinates(origin_P) + delta_Z)
    assert torch.equal(MANIFEST.flatten(by_tensor), placed_P)
    assert torch.equal(origin_P, drawn())


def test_moving_changes_only_the_tensors_that_are_named() -> None:
    adapter = MANIFEST.unflatten(drawn())
    after = moved(SUBSPACE, adapter, {"a": torch.ones(2, 6)})
    assert [name for name in adapter if not torch.equal(after[name], adapter[name])] == ["a"]


@given(batch=st.integers(0, 3), views=st.integers(1, 2), seed=st.integers(0, 1000))
def test_rows_are_projected_one_by_one(batch: int, views: int, seed: int) -> None:
    size = SUBSPACE.support.num_elements
    rows_BVQ = torch.randn(batch, views, size, generator=torch.Generator().manual_seed(seed))
    result_BVZ = SUBSPACE.coordinates_of_support(rows_BVQ)
    assert result_BVZ.shape == (batch, views, SUBSPACE.manifest.num_elements)
    for b in range(batch):
        for v in range(views):
            named = SUBSPACE.support.unflatten(rows_BVQ[b, v])
            x_P = MANIFEST.flatten({**MANIFEST.unflatten(torch.zeros(MANIFEST.num_elements)), **named})
            torch.testing.assert_close(result_BVZ[b, v], SUBSPACE.coordinates(x_P))


def test_where_everything_trains_coordinates_are_the_adapter_itself() -> None:
    everything, x_P = Subspace.everything(MANIFEST), drawn()
    assert everything.is_everything
    assert everything.coordinates(x_P) is x_P
    assert everything.coordinates_of_support(x_P) is x_P
    assert everything.manifest == MANIFEST
    assert not SUBSPACE.is_everything
    assert not Subspace(MANIFEST, {name: Whole() for name in "abc"}).is_everything


def test_core_keeps_only_what_lies_in_its_frame() -> None:
    core, b = Core(frame(9, 4, "b")), torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    projected = torch.zeros(9, 4)
    core.put(projected, core.coordinates(b))
    torch.testing.assert_close(core.coordinates(projected), core.coordinates(b))
    assert float(projected.norm()) < float(b.norm())


def test_subspace_in_which_nothing_trains_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="at least one trainable tensor"):
        Subspace.of(MANIFEST, lambda _spec: None)


def test_tensor_that_is_not_the_adapters_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match="'z'"):
        Subspace(MANIFEST, {"a": Whole(), "z": Whole()})
