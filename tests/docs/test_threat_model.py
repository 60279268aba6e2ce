"""The page about who can learn what says what the code does, its limits included."""

import json
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

from medfed.cli import main, root
from medfed.consortium import Quorum
from medfed.errors import LostRoundError
from medfed.study import StudyConfig
from privacy.secure_aggregation.encoding import Ring
from server.exchange import Exchange
from server.secure_sums import SecureSums, SummedRound
from simulation.harness import simulate
from strategies.secure_channel import SecureChannel

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/threat-model.md").read_text()
DECISION = (ROOT / "docs/decisions/0004-secure-sums-with-one-vote.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = "examples/brain-structures-consortium.toml"


def table_of(page: str, name: str) -> list[list[str]]:
    """Cells of the rows of a marked table, below its head."""
    (text,) = re.findall(rf"<!--{name}-->(.*?)<!--/", page, re.DOTALL)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.strip().splitlines()[2:]]


def test_parameters_are_those_that_the_code_computes() -> None:
    rows = [tuple(map(int, row)) for row in table_of(PAGE, "parameters")]
    assert [row[:3] for row in rows] == [(3, 1, 3), (5, 1, 4), (10, 3, 7), (30, 9, 20), (100, 33, 67)]
    for n, c, *others in rows:
        quorum = Quorum.of(num_sites=n, max_colluding=c)
        assert others == [quorum.threshold, quorum.min_sites, quorum.min_honest, n - quorum.min_sites]


def test_claim_is_the_one_that_may_be_made() -> None:
    words = " ".join(PAGE.replace("\n> ", "\n").split())
    assert (
        "The server plus up to c sites learn only the sum of at least k_min - c honest sites; design after Bonawitz "
        "et al. 2017; not formally verified or audited."
    ) in words
    assert "about **each sum that is opened**" in words


def test_every_row_of_the_table_has_every_configuration() -> None:
    rows = [row for row in PAGE.splitlines() if row.startswith(("| who |", "| the ", "| another", "| who "))]
    table = [row for row in rows if row.count("|") > 5]
    assert len(table) == 11
    assert {row.count("|") for row in table} == {7}


def commands() -> dict[str, set[str]]:
    """Commands of each group of the command line."""
    context = click.Context(root)
    found = {}
    for name in root.list_commands(context):
        command = root.get_command(context, name)
        assert command is not None
        found[name] = set(getattr(command, "commands", ()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_in_the_text_exists(page: Path) -> None:
    known = commands()
    for group, command in re.findall(r"`medfed ([a-z]+)(?: ([a-z][a-z-]*))?", page.read_text()):
        assert group in known, group
        if known[group] and command:
            assert command in known[group], (group, command)


def test_command_of_another_role_joins_the_group() -> None:
    assert commands()["study"] == {"validate", "digest", "plan", "sign"}
    names = {entry.name for entry in distribution("medfed").entry_points.select(group="medfed.commands")}
    assert "study.plan" in names
    assert "study.plan" not in commands()


def test_example_shares_noise_among_five_sites_of_whom_one_may_collude() -> None:
    study = StudyConfig.model_validate(tomllib.loads((ROOT / EXAMPLE).read_text()))
    assert study.privacy is not None
    assert (study.privacy.trust, study.privacy.epsilon, study.rounds.num_rounds) == ("consortium", 8.0, 16)
    assert study.secure_quorum == Quorum(num_sites=5, max_colluding=1, threshold=4, min_sites=4)
    assert [site.train_patients for site in study.sites] == [24] * 5
    assert f"medfed study plan {EXAMPLE}" in (ROOT / "README.md").read_text()


@pytest.mark.weights
@pytest.mark.slow
def test_numbers_of_the_example_are_those_that_the_planner_prints(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    main(["study", "plan", str(ROOT / EXAMPLE)])
    printed = {re.sub(r"\s\s+", " | ", line.strip()) for line in capfd.readouterr().out.splitlines()}
    for row in table_of((ROOT / "docs/privacy.md").read_text(), "results:consortium-plan"):
        assert " | ".join(row) in printed, row
    main(["study", "plan", str(ROOT / EXAMPLE), "--json"])
    planned = json.loads(capfd.readouterr().out)
    assert planned["recommended"] == "site"
    shared, alone = (mode["noise_multiplier"] for mode in planned["modes"])
    assert f"{shared:.4f} beside {alone:.4f}" in DECISION
    assert f"a factor of {shared / alone:.3f}" in DECISION


def test_price_of_renyi_accounting_is_what_the_command_prints(capfd: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r'python -c "(.*?)"\n', DECISION, re.DOTALL)
    exec(compile(code, "0004", "exec"), {})
    assert f"by a factor of {capfd.readouterr().out.strip()}, as this prints" in " ".join(DECISION.split())


def without(
    *left_out: str, sums: SecureSums, monkeypatch: pytest.MonkeyPatch, sum_up: Callable[[], SummedRound], at: str = ""
) -> SummedRound:
    """What ``sum_up`` returns while the server leaves sites out, at one action or at all."""
    ask = sums._ask

    def ask_others(action: Any, sites: Sequence[str], *rest: Any) -> Exchange:
        return ask(action, [site for site in sites if at not in (action, "") or site not in left_out], *rest)

    with monkeypatch.context() as patched:
        patched.setattr(sums, "_ask", ask_others)
        return sum_up()


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_second_sum_of_a_round_without_one_site_is_refused_as_the_page_says(
    make_secure_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over the same sites it is opened again and says the same: so the difference would be exact."""
    opened, refused = SecureSums.sum, []

    def more_than_once(self: SecureSums, action: Any, channel: SecureChannel, adapter: bytes) -> SummedRound:
        whole = opened(self, action, channel, adapter)
        assert len(whole.sites) == 5
        with pytest.raises(LostRoundError) as error:  # tried with the keys of the first sum, and with new ones
            without("west", sums=self, monkeypatch=monkeypatch, sum_up=lambda: opened(self, action, channel, adapter))
        again = opened(self, action, channel, adapter)
        assert (again.sites, again.sum.metrics) == (whole.sites, whole.sum.metrics)
        if action == "train":
            assert whole.sum.update_P is not None
            assert again.sum.update_P is not None
            assert torch.equal(again.sum.update_P, whole.sum.update_P)
        refused.append((action, channel.round, str(error.value)))
        return whole

    study = study_file(make_secure_study().replace(rounds={"num_rounds": 1}))
    plain = simulate(study, out=tmp_path / "plain", workers=0, baselines=False)
    monkeypatch.setattr(SecureSums, "sum", more_than_once)
    run = simulate(study, out=tmp_path / "attacked", workers=0, baselines=False)
    assert [where[:2] for where in refused] == [("evaluate", 0), ("train", 1), ("evaluate", 1)]
    assert all(f"{site}: SecureAggregationError" in why for *_, why in refused for site in ("north", "east"))
    assert (run.folder / "metrics.jsonl").read_text() == (plain.folder / "metrics.jsonl").read_text()


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_same_adapter_in_two_rounds_tells_one_sites_part_as_the_page_says(
    make_secure_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A limit, not a promise: should sites refuse it one day, the page has to be changed."""
    parts: list[Ring] = []
    weighted, opened = SecureChannel.weighted, SecureSums.sum
    pairs: dict[str, tuple[SecureChannel, SummedRound, SummedRound]] = {}

    def recorded(self: SecureChannel, update_P: Any, site: str, metrics: Mapping[str, float]) -> Any:
        vector = weighted(self, update_P, site, metrics)
        parts.extend([vector] if site == "west" else [])
        return vector

    def of_two_rounds(self: SecureSums, action: Any, channel: SecureChannel, adapter: bytes) -> SummedRound:
        whole = opened(self, action, channel, adapter)
        if action not in pairs:
            later = replace(channel, round=channel.round + 1)
            rest = without(
                "west", sums=self, monkeypatch=monkeypatch, sum_up=lambda: opened(self, action, later, adapter)
            )
            assert set(whole.sites) - set(rest.sites) == {"west"}
            pairs[action] = (channel, whole, rest)
        return whole

    monkeypatch.setattr(SecureChannel, "weighted", recorded)
    monkeypatch.setattr(SecureSums, "sum", of_two_rounds)
    study = make_secure_study()
    study = study.replace(training={**study.training.model_dump(), "order": "sequential"})
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)

    channel, whole, rest = pairs["train"]
    assert whole.sum.update_P is not None
    assert rest.sum.update_P is not None
    difference_P = (whole.sum.update_P - rest.sum.update_P).numpy() / channel._largest_weight
    assert np.any(difference_P)
    np.testing.assert_array_equal(channel._fixed_point.encode(difference_P), parts[0][: len(difference_P)])
    _, whole, rest = pairs["evaluate"]
    inspected = [json.loads(line) for line in (run.folder / "inspection.jsonl").read_text().splitlines()]
    (dice,) = [one["dice"] for one in inspected if (one["site"], one["round"]) == ("west", 0)]
    found = len(whole.sites) * whole.sum.metrics["dice"] - len(rest.sites) * rest.sum.metrics["dice"]
    assert found == pytest.approx(dice, abs=1e-5)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_lost_journal_forgets_which_sites_were_agreed_to_as_the_page_says(
    make_secure_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A limit, not a promise: with t = 3 of 5, one site is in both the three that open a sum and three others."""
    opened, sums = SecureSums.sum, []

    def with_a_loss(self: SecureSums, action: Any, channel: SecureChannel, adapter: bytes) -> SummedRound:
        def sum_up() -> SummedRound:
            return opened(self, action, channel, adapter)

        if action != "train":
            return sum_up()
        whole = without("east", "centre", sums=self, monkeypatch=monkeypatch, sum_up=sum_up, at="secure_open")
        with pytest.raises(LostRoundError):
            without("west", sums=self, monkeypatch=monkeypatch, sum_up=sum_up)
        (folder,) = (tmp_path / "runs").glob("*/journals/north")
        shutil.rmtree(folder)
        sums.append((whole.sites, without("west", sums=self, monkeypatch=monkeypatch, sum_up=sum_up).sites))
        return whole

    monkeypatch.setattr(SecureSums, "sum", with_a_loss)
    study = make_secure_study(rounds_per_epoch=2).replace(rounds={"num_rounds": 1})
    assert study.secure_quorum.threshold == 3
    simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    ((whole, rest),) = sums
    assert set(whole) - set(rest) == {"west"}


def test_costs_are_what_the_commands_printed() -> None:
    values: dict[str, float] = {}
    for row in json.loads((ROOT / "docs/results/secagg.json").read_text())["rows"]:
        assert row["holds"]
        values.setdefault(row["name"], row["value"])
    (table,) = re.findall(r"<!--results:secagg-->(.*?)<!--/results-->", PAGE, re.DOTALL)
    rows = {row.split("|")[1].strip(): row for row in table.strip().splitlines()}
    for sites in ("8", "32", "100"):
        for what, digits in (("client", 1), ("server opens", 0)):
            of = f"{sites} sites, 1 M: {what}"
            flower, ours = (f"{1000 * values[f'{of}, {which}']:.0f}" for which in ("flwr", "medfed"))
            assert f"{flower} -> {ours} ms ({values[f'{of}, flwr / medfed']:.{digits}f}x)" in rows[sites]
        assert f"{values[f'{sites} sites, 1 M: upload, medfed / flwr']:.3f}" in rows[sites]
    demo = json.loads((ROOT / "docs/results/secure-demo.json").read_text())
    assert demo["largest_difference"] <= demo["quantisation_bound"]
    for shown in (
        f"{demo['largest_difference']:.1e}",
        f"{demo['quantisation_bound']:.1e}",
        f"{demo['num_parameters']:,}",
    ):
        assert shown in PAGE
