import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.canonical import canonical_bytes, derive_seed, sha256_hex

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(derandomize=True)
@given(st.dictionaries(st.text(), JSON, max_size=6))
def test_bytes_do_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    backwards = dict(reversed(value.items()))
    assert canonical_bytes(value) == canonical_bytes(backwards)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_cannot_carry_are_refused(number: float) -> None:
    with pytest.raises(ValueError):
        canonical_bytes([number])


def test_golden_bytes_and_digest() -> None:
    assert canonical_bytes({"b": [1, 0.5, "ü"], "a": None}) == '{"a":null,"b":[1,0.5,"ü"]}'.encode()
    assert sha256_hex(b"medfed") == "18c18218c7447c940035f6c73b2202d34a67d99109da0378f3b24dad41a40c4f"


def test_seeds_differ_by_label_and_are_fixed() -> None:
    seeds = {derive_seed(7, "train", site, number) for site in ("a", "b") for number in range(50)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(7, "a", 12) != derive_seed(7, "a1", 2)
    assert derive_seed(1, "golden") == 7095461871856026223
