"""What a site remembers: the last two rounds, durably, for the owner alone; damage is an error."""

import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.site_memory import SiteMemory
from medfed.errors import SiteError


def note(value: float) -> dict[str, torch.Tensor]:
    return {"own:head": torch.full((2, 3), value), "ditto:model": torch.tensor([value])}


def value_of(memory: dict[str, torch.Tensor]) -> float | None:
    return float(memory["ditto:model"]) if memory else None


@pytest.fixture
def memory(tmp_path: Path) -> SiteMemory:
    return SiteMemory(tmp_path / "study" / "federated")


def test_nothing_was_remembered_before_the_first_round(memory: SiteMemory, tmp_path: Path) -> None:
    assert memory.before(1) == {}
    assert memory.after(5) == {}
    assert not list(tmp_path.iterdir())


def test_tensors_come_back_bit_for_bit(memory: SiteMemory) -> None:
    tensors = {"a:b": torch.randn(3, 2).T, "scalar": torch.tensor(0.1), "empty name": torch.randn(1)}
    memory.remember(1, tensors)
    back = memory.after(1)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_round_that_is_asked_again_finds_what_was_before_it(memory: SiteMemory) -> None:
    for number in (1, 2, 3):
        memory.remember(number, note(number))
    assert value_of(memory.before(3)) == 2
    memory.remember(3, note(30))
    assert value_of(memory.before(3)) == 2
    assert value_of(memory.after(3)) == 30


def test_only_two_rounds_are_kept(memory: SiteMemory, tmp_path: Path) -> None:
    for number in range(1, 6):
        memory.remember(number, note(number))
    assert [path.name for path in sorted(tmp_path.rglob("*.memory"))] == [
        "round-000004.memory",
        "round-000005.memory",
    ]
    with pytest.raises(SiteError, match="set back too far"):
        memory.before(4)
    assert memory.before(1) == {}  # the study began anew


def test_site_that_came_late_finds_nothing_before_its_first_round(memory: SiteMemory) -> None:
    memory.remember(5, note(5))
    assert memory.before(5) == {}


def test_flipped_byte_is_noticed(memory: SiteMemory, tmp_path: Path) -> None:
    memory.remember(1, note(1))
    (path,) = tmp_path.rglob("*.memory")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SiteError, match="other bytes"):
        memory.after(1)


def test_run_that_is_set_back_forgets_what_came_later(memory: SiteMemory) -> None:
    for number in (1, 2, 3):
        memory.remember(number, note(number))
    memory.remember(2, note(20))
    assert value_of(memory.after(9)) == 20


def test_site_that_missed_rounds_finds_the_last_it_took_part_in(memory: SiteMemory) -> None:
    memory.remember(2, note(2))
    assert value_of(memory.before(7)) == 2


def test_files_and_folders_are_for_the_owner_alone(memory: SiteMemory, tmp_path: Path) -> None:
    memory.remember(1, note(1))
    (path,) = tmp_path.rglob("*.memory")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_damage_is_an_error_that_names_the_file(memory: SiteMemory, tmp_path: Path, damage: bytes | None) -> None:
    memory.remember(1, note(1))
    (path,) = tmp_path.rglob("*.memory")
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    with pytest.raises(SiteError, match=f"{path.name}.*restore the file"):
        memory.before(2)


def test_other_files_in_the_folder_are_left_alone(memory: SiteMemory, tmp_path: Path) -> None:
    memory.remember(1, note(1))
    other = tmp_path / "study" / "federated" / "round-1.memory"
    other.write_bytes(b"")
    memory.remember(2, note(2))
    memory.remember(3, note(3))
    assert other.exists()
    assert value_of(memory.after(3)) == 3


@given(st.lists(st.integers(1, 6), max_size=12))
def test_memory_is_that_of_the_last_try_of_the_latest_round_before(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int]
) -> None:
    """Oracle: a dictionary; going back to a round forgets the later ones."""
    memory, model = SiteMemory(tmp_path_factory.mktemp("memory") / "x"), {}
    for attempt, number in enumerate(numbers):
        memory.remember(number, note(attempt))
        model = {known: value for known, value in model.items() if known < number} | {number: attempt}
        model = dict(sorted(model.items())[-2:])
    for number in range(1, 8):
        earlier = [known for known in model if known < number]
        if not earlier and number > 1 and len(model) == 2:  # what came before may be forgotten
            with pytest.raises(SiteError):
                memory.before(number)
            continue
        assert value_of(memory.before(number)) == (model[max(earlier)] if earlier else None)
