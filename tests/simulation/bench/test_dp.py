"""Private steps stay cheap, the engines they run stay right, and the command says so by its exit code."""

import json

import pytest
from typer.testing import CliRunner

import simulation.bench.dp as dp
from simulation.bench.dp import GATE, Scale, measure
from simulation.bench.rows import Row
from simulation.bench_command import app
from simulation.progress import Reporter, Silent


@pytest.mark.exhaustive
@pytest.mark.process
def test_private_step_costs_at_most_a_quarter_more() -> None:
    rows = measure(GATE, Silent())
    assert [row.facts for row in rows if not row.holds] == []
    assert any(row.target == 1.25 for row in rows)


@pytest.mark.exhaustive
@pytest.mark.process
@pytest.mark.timeout(900)  # forty seconds by itself, minutes beside other work
def test_every_arm_runs_and_is_measured() -> None:
    rows = {row.name: row for row in measure(Scale(batch_size=2, num_blocks=12, repeats=1), Silent())}
    targets = {name: row.target for name, row in rows.items() if row.unit in ("wall ratio", "ratio")}
    assert targets == {
        "lora-exact step / non-private": 1.10,
        "vmap step / non-private": 1.30,
        "opacus-hooks step / non-private": None,
        "opacus-ghost step / non-private": None,
        "lora-exact step / cached: prefix cached, LoRA in the last quarter": 4.0,
        "lora-exact (peak memory - 4 B P) / non-private": 1.05,
        "vmap (peak memory - 4 B P) / non-private": None,
        "opacus-hooks (peak memory - 4 B P) / non-private": None,
        "opacus-ghost (peak memory - 4 B P) / non-private": None,
    }
    assert all(row.value > 0 for row in rows.values())


@pytest.mark.parametrize(("value", "exit_code"), [(1.05, 0), (1.2, 1)])
def test_exit_code_says_whether_every_target_holds(
    monkeypatch: pytest.MonkeyPatch, value: float, exit_code: int
) -> None:
    def measured(_scale: Scale, _reporter: Reporter) -> list[Row]:
        return [Row("step", value, "wall ratio", 1.1), Row("beside", 9.0, "wall ratio")]

    monkeypatch.setattr(dp, "measure", measured)
    done = CliRunner().invoke(app, ["dp", "--json"])
    assert done.exit_code == exit_code
    (first, _) = json.loads(done.stdout)["rows"]
    assert first == {"name": "step", "value": value, "unit": "wall ratio", "target": 1.1, "holds": exit_code == 0}
    for_people = CliRunner().invoke(app, ["dp"])
    assert for_people.exit_code == exit_code
    assert ("MISSED" in for_people.stdout) is (exit_code == 1)


def test_ratio_is_the_median_of_ratios_within_repeats() -> None:
    # The machine is ten times slower in the last repeat, which changes no ratio.
    seconds = {"non-private": [1.0, 1.0, 10.0], "lora-exact": [1.1, 1.3, 12.0]}
    wall, cpu = dp._Steps(seconds, seconds).ratio("lora-exact", wall_target=1.1)
    assert (wall.value, cpu.value) == (pytest.approx(1.2), pytest.approx(1.2))
    assert (wall.target, cpu.target) == (1.1, None)


def test_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="nothing-of-ours"):
        list(dp._answers(GATE, "memory", "nothing-of-ours"))
