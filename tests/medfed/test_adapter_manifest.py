"""Only named tensors may travel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from medfed.errors import AdapterMismatchError

TENSORS = {"b.lora_B": torch.ones(2, 3), "a.lora_A": torch.zeros(4), "c": torch.tensor(2.0)}
MANIFEST = AdapterManifest.of(TENSORS, method="lora", rank=3)


def test_vector_is_cut_in_name_order() -> None:
    vector_P = MANIFEST.flatten(TENSORS)
    assert vector_P.tolist() == [0.0] * 4 + [1.0] * 6 + [2.0]
    assert MANIFEST.num_elements == 11
    assert [MANIFEST.name_at(i) for i in (0, 3, 4, 9, 10)] == ["a.lora_A"] * 2 + ["b.lora_B"] * 2 + ["c"]


def test_unflatten_inverts_flatten() -> None:
    tree = MANIFEST.unflatten(MANIFEST.flatten(TENSORS))
    assert {name: t.shape for name, t in tree.items()} == {name: t.shape for name, t in TENSORS.items()}
    assert all(torch.equal(tree[name], TENSORS[name]) for name in TENSORS)


def test_unknown_tensor_is_refused_by_name() -> None:
    with pytest.raises(AdapterMismatchError, match=r"image_encoder\.weight"):
        MANIFEST.flatten({**TENSORS, "image_encoder.weight": torch.zeros(1)})


def test_missing_tensor_is_refused_by_name() -> None:
    with pytest.raises(AdapterMismatchError, match="'c'"):
        MANIFEST.flatten({name: t for name, t in TENSORS.items() if name != "c"})


def test_wrong_shape_is_refused_by_name_even_with_equal_size() -> None:
    with pytest.raises(AdapterMismatchError, match=r"'b.lora_B' with shape \[2, 3\], got \[3, 2\]"):
        MANIFEST.flatten({**TENSORS, "b.lora_B": torch.ones(3, 2)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_wrong_dtype_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(AdapterMismatchError, match="'a.lora_A' as float32"):
        MANIFEST.flatten({**TENSORS, "a.lora_A": torch.zeros(4, dtype=dtype)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_value_is_refused_by_name(bad: float) -> None:
    with pytest.raises(AdapterMismatchError, match="'a.lora_A'"):
        MANIFEST.flatten({**TENSORS, "a.lora_A": torch.tensor([0.0, bad, 0.0, 0.0])})


def test_fingerprint_changes_with_every_part() -> None:
    renamed = AdapterManifest.of({"x": TENSORS["c"], **TENSORS}, method="lora", rank=3)
    reshaped = AdapterManifest.of({**TENSORS, "b.lora_B": torch.ones(3, 2)}, method="lora", rank=3)
    reranked = AdapterManifest.of(TENSORS, method="lora", rank=4)
    assert len({m.fingerprint for m in (MANIFEST, renamed, reshaped, reranked)}) == 4


def test_subset_has_its_own_length_and_fingerprint() -> None:
    _ = MANIFEST.fingerprint, MANIFEST.num_elements  # cached values must not be carried over
    part = MANIFEST.subset(lambda name: name.endswith("lora_B"))
    assert (part.num_elements, [s.name for s in part.tensors]) == (6, ["b.lora_B"])
    assert part.fingerprint != MANIFEST.fingerprint
    with pytest.raises(AdapterMismatchError, match="at least one"):
        MANIFEST.subset(lambda _: False)


def test_tensors_out_of_order_or_twice_are_refused() -> None:
    specs = [TensorSpec(name="b", shape=(1,)), TensorSpec(name="a", shape=(1,))]
    for tensors in (specs, specs[:1] * 2):
        with pytest.raises(ValidationError, match="sorted"):
            AdapterManifest(method="lora", tensors=tuple(tensors))


@settings(derandomize=True, max_examples=50)
@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5))
def test_any_tree_survives_the_vector(shapes: dict[str, list[int]]) -> None:
    tree = {name: torch.randn(shape) for name, shape in shapes.items()}
    manifest = AdapterManifest.of(tree, method="lora", rank=None)
    back = manifest.unflatten(manifest.flatten(tree))
    assert all(torch.equal(back[name], tensor) for name, tensor in tree.items())
    assert AdapterManifest.model_validate_json(manifest.model_dump_json()) == manifest
