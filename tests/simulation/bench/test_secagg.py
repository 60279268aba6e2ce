"""Secure aggregation stays cheap beside Flower's, both arms compute the right mean, and the exit code says so."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import simulation.bench.secagg as secagg
from simulation.bench.rows import Row
from simulation.bench.secagg import FULL, GATE, Case, Scale, measure
from simulation.bench.secagg_steps import Workload
from simulation.bench_command import app
from simulation.progress import Reporter, Silent

SMALL = Workload(num_sites=4, num_parameters=1000, repeats=2)


@pytest.mark.exhaustive
@pytest.mark.process
def test_round_costs_a_fraction_of_flowers() -> None:
    rows = measure(GATE, Silent())
    assert [row.facts for row in rows if not row.holds] == []
    assert {row.target for row in rows if row.unit == "CPU ratio"} == {3.0, 5.0, None}


@pytest.mark.exhaustive
@pytest.mark.process
def test_every_part_of_both_arms_is_measured() -> None:
    rows = {(row.name, row.unit): row for row in measure((Case(SMALL, client=1e-9, server=1e-9),), Silent())}
    named = {name.removeprefix("4 sites, 0.001 M: "): row for (name, unit), row in rows.items() if unit != "CPU s"}
    assert named.pop("upload, medfed / flwr").value > 0.0  # at this size the setup is more than the vector
    assert [row.facts for row in named.values() if not row.holds] == []
    assert (named["client messages, flwr"].value, named["client messages, medfed"].value) == (4, 2)
    # Both sums are opened for real: the mean is the update, to within each quantiser.
    assert 0.0 < named["largest error of the mean, medfed"].value <= 2.0**-24
    assert 0.0 < named["largest error of the mean, flwr"].value <= 16.0 / 2**22
    for part in ("client", "server adds", "server opens"):
        assert named[f"{part}, flwr / medfed"].value > 0.0
        for arm in ("flwr", "medfed"):
            assert rows[f"4 sites, 0.001 M: {part}, {arm}", "CPU s"].value > 0.0


@pytest.mark.process
def test_our_client_is_measured_alone_where_flower_is_left_out() -> None:
    work = Workload(num_sites=4, num_parameters=2_000_000, repeats=1, ours_alone=True)
    (row,) = measure((Case(work, client_s=0.5),), Silent())
    assert (row.name, row.target) == ("4 sites, 2 M: client, medfed", 0.5)
    assert row.value > 0.0


def test_full_run_has_the_targets_that_were_promised() -> None:
    promised = {case.work.num_sites: (case.client, case.server) for case in FULL if not case.work.ours_alone}
    assert promised == {8: (None, None), 32: (10.0, 50.0), 100: (None, None)}
    (alone,) = [case for case in FULL if case.work.ours_alone]
    assert (alone.work.num_sites, alone.work.num_parameters, alone.client_s) == (32, 10_000_000, 0.6)
    assert secagg.BYTES_TARGET == 0.51


@pytest.mark.parametrize(("value", "exit_code"), [(10.5, 0), (9.5, 1)])
def test_exit_code_says_whether_every_target_holds(
    monkeypatch: pytest.MonkeyPatch, value: float, exit_code: int
) -> None:
    scales = []

    def measured(scale: Scale, _reporter: Reporter) -> list[Row]:
        scales.append(scale)
        return [Row("client", value, "CPU ratio", 10.0, at_least=True), Row("beside", 0.1, "CPU ratio")]

    monkeypatch.setattr(secagg, "measure", measured)
    done = CliRunner().invoke(app, ["secagg", "--json"])
    assert done.exit_code == exit_code
    (first, _) = json.loads(done.stdout)["rows"]
    assert first == {"name": "client", "value": value, "unit": "CPU ratio", "target": 10.0, "holds": exit_code == 0}
    for_people = CliRunner().invoke(app, ["secagg", "--gate"])
    assert for_people.exit_code == exit_code
    assert ("MISSED" in for_people.stdout) is (exit_code == 1)
    assert scales == [FULL, GATE]


def test_ratio_is_the_median_of_ratios_within_repeats() -> None:
    # The machine is ten times slower in the last repeat, which changes no ratio.
    measured = secagg._Measured(
        {("flwr", "client"): [10.0, 12.0, 110.0], ("medfed", "client"): [1.0, 1.0, 10.0]}, facts={}
    )
    assert measured.ratio("client") == pytest.approx(11.0)
    assert measured.median_s("medfed", "client") == 1.0


def test_update_is_within_the_clip_norm() -> None:
    from simulation.bench.secagg_steps import CLIP_NORM, _update

    assert 0.1 < np.linalg.norm(_update(1000).astype(np.float64)) < CLIP_NORM
