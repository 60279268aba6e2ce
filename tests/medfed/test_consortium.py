"""The inequalities of secure aggregation: what keeps them, and what is said to whoever does not."""

import itertools

import pytest

from medfed.consortium import MAX_SITES, Quorum
from medfed.errors import SecureAggregationError


def test_least_numbers_are_those_of_the_inequalities() -> None:
    """Against a search through all numbers."""
    for n, c in itertools.product(range(3, 20), range(18)):
        valid = [
            (t, k) for t, k in itertools.product(range(1, n + 1), repeat=2) if 2 * t > n + c and k >= max(t, c + 2)
        ]
        if not valid:
            with pytest.raises(SecureAggregationError, match="c \\+ 2 <= n"):
                Quorum.of(num_sites=n, max_colluding=c)
            continue
        quorum = Quorum.of(num_sites=n, max_colluding=c)
        assert (quorum.threshold, quorum.min_sites) == min(valid)
        assert quorum.min_honest == quorum.min_sites - c >= 2
        for t, k in valid:
            Quorum.of(num_sites=n, max_colluding=c, threshold=t, min_sites=k)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_sites": 2, "max_colluding": 0}, "Expected 3 to 128 sites, got 2"),
        ({"num_sites": MAX_SITES + 1, "max_colluding": 0}, "Expected 3 to 128 sites, got 129"),
        ({"num_sites": 5, "max_colluding": -1}, "Expected max_colluding >= 0, got -1"),
        ({"num_sites": 5, "max_colluding": 4}, r"c \+ 2 <= n = 5 sites, got 4; set max_colluding to at most 3"),
        (
            {"num_sites": 10, "max_colluding": 3, "threshold": 6},
            r"2 t > n \+ c = 10 \+ 3, got 6: .* set threshold to at least 7, or max_colluding to at most 1",
        ),
        ({"num_sites": 10, "max_colluding": 3, "threshold": 2}, "set threshold to at least 7[.]"),
        ({"num_sites": 10, "max_colluding": 3, "threshold": 11}, "threshold t <= n = 10 .* set threshold to 7..10"),
        ({"num_sites": 10, "max_colluding": 3, "min_sites": 6}, r"max\(7, 5\), got 6; set min_sites to at least 7"),
        ({"num_sites": 5, "max_colluding": 3, "min_sites": 4}, r"max\(5, 5\), got 4; set min_sites to at least 5"),
        ({"num_sites": 10, "max_colluding": 3, "min_sites": 11}, "min_sites <= n = 10 .* set min_sites to 7..10"),
    ],
)
def test_impossible_numbers_are_refused_with_the_inequality_and_the_nearest_valid(
    numbers: dict[str, int], message: str
) -> None:
    with pytest.raises(SecureAggregationError, match=message):
        Quorum.of(**numbers)
