from hypothesis import given
from hypothesis import strategies as st

from medfed.polling import SHORTEST_PAUSE_S, pause_s


@given(st.floats(0.0, 1e6), st.floats(SHORTEST_PAUSE_S, 10.0))
def test_looking_adds_a_twentieth_of_the_wait_or_the_shortest_pause(waited_s: float, longest_s: float) -> None:
    pause = pause_s(waited_s, longest_s)
    assert SHORTEST_PAUSE_S <= pause <= longest_s
    assert pause <= max(SHORTEST_PAUSE_S, 0.05 * waited_s)


def test_looks_are_few_in_a_long_wait() -> None:
    waited_s, looks = 0.0, 0
    while waited_s < 600.0:
        waited_s += pause_s(waited_s, 2.0)
        looks += 1
    assert looks < 400  # 12,000 at the shortest pause
