"""Private studies from file to report: what was spent is what was promised, and the report says what is not private."""

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

import client.private_round as private_round
import server.rounds
import simulation.harness
from client.site import site_of_partition
from medfed.cli import main
from medfed.errors import DivergedError, RoundError
from medfed.study import StudyConfig
from privacy.accounting import epsilon_spent
from privacy.plan import PrivacyPlan
from server.checkpoint import Checkpoint, read_checkpoint
from server.evaluation import NotMeasured
from server.privacy_statement import HELD_OUT, NO_NOISE, NO_PRIVACY
from simulation.grid import InProcessGrid
from simulation.harness import Run, simulate
from simulation.privacy_summary import SEEDED
from simulation.run_folder import metrics_of, stored_study

# A run without any score has nothing to draw, and server/report_figures.py draws it; see the last test.

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]


def checkpoint_of(folder: Path) -> Checkpoint:
    study = stored_study(folder)
    state = read_checkpoint(folder, study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert state is not None
    return state


def plan_of(run: Run) -> PrivacyPlan:
    study = stored_study(run.folder)
    assert study.privacy is not None
    return PrivacyPlan.of_study(study)


def outcomes(site: int = 0, scope: str = "federated") -> list[tuple[int, str | None]]:
    """Round and outcome of every charge at a site of the run that was opened last."""
    opened = site_of_partition(site)
    charges = opened.ledger.charges(opened.cohort_name(scope))
    return [(one.charge.round, one.settled.outcome if one.settled else None) for one in charges]


def text_of(run: Run) -> str:
    """The report without pictures, drawings, styles and tags."""
    html = (run.folder / "report.html").read_text()
    for hidden in (r"<style>.*?</style>", r"<svg.*?</svg>", r'src="data:[^"]*"'):
        html = re.sub(hidden, " ", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def red_sentences(run: Run) -> list[str]:
    html = (run.folder / "report.html").read_text()
    assert ".privacy { color: var(--red)" in html
    return [unescape(found).strip() for found in re.findall(r'<p class="privacy"[^>]*>(.*?)</p>', html, re.DOTALL)]


@pytest.fixture
def seeded(
    make_private_study: MakeStudy, make_cohort: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., StudyConfig]:
    """A private study of made-up patients, whose draws follow from the seed; its cohort is a small one of the tests."""
    made: dict[str, Path] = {}

    def write(recipe: Any, *_: object, **__: object) -> dict[str, Path]:
        for site in recipe.sites:
            if site.name not in made:
                made[site.name] = make_cohort(f"{site.name}-made-up")
        return made

    monkeypatch.setattr(simulation.harness, "write_cohort", write)
    no_recipe = NotMeasured(why="these patients follow from no recipe")
    monkeypatch.setattr(simulation.harness, "untrained_outlines", lambda *_: no_recipe)

    def make(**privacy: Any) -> StudyConfig:
        study = make_private_study(("west", "east"), **privacy)
        recipe = {"scanner": "reference-3t", "train_patients": 3, "test_patients": 2}
        return study.replace(
            task={"kind": "segmentation", "classes": ["thalamus", "putamen"]},
            cohort={"kind": "brain-structures"},
            sites=[{"name": name, **recipe} for name in study.site_names],
        )

    return make


@pytest.mark.usefixtures("without_pictures")
def test_epsilon_composed_over_rounds_is_that_of_one_shot(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_private_study(noise_multiplier=None, epsilon=4.0, steps_per_round=3).replace(rounds={"num_rounds": 4})
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    plan = plan_of(run)
    assert plan.total_steps == 12
    one_shot = epsilon_spent([plan.mechanism(4)], 0.01).value
    other_accountant = PLDAccountant().compose(plan.event).get_epsilon(0.01)
    assert set(run.summary.privacy.sites) == {"north", "south"}
    for index, spent in enumerate(run.summary.privacy.sites.values()):
        ledger = site_of_partition(index).ledger
        mechanisms = [one.charge.mechanism for one in ledger.charges(site_of_partition(index).cohort_name("federated"))]
        assert [mechanism.steps for mechanism in mechanisms] == [3, 3, 3, 3]
        assert spent.epsilon == pytest.approx(one_shot, abs=1e-9)
        assert spent.epsilon == epsilon_spent(mechanisms, 0.01).value
        assert spent.epsilon == pytest.approx(other_accountant, abs=0.02)
        assert 3.98 < spent.epsilon <= 4.0
        assert (spent.steps, spent.rounds, spent.declared_units, spent.delta) == (12, 4, 3, 0.01)
        assert (spent.noise_multiplier, spent.sampling_rate, spent.clip_norm) == (plan.noise_multiplier, 0.5, 1.0)
        assert spent.noise_to_signal_expected == plan.noise_to_signal(
            3, stored_study(run.folder).resolved_manifest.num_elements
        )
    assert json.loads((run.folder / "summary.json").read_text())["privacy"] == run.summary.privacy.model_dump(
        mode="json"
    )


@pytest.mark.usefixtures("without_pictures")
def test_own_patients_get_noise_of_the_system_and_two_runs_differ(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    path = study_file(make_private_study())
    runs = [simulate(path, out=tmp_path / name, workers=0, baselines=False) for name in ("a", "b")]
    first, second = (checkpoint_of(run.folder).adapter_P for run in runs)
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.process
def test_result_on_made_up_patients_does_not_depend_on_the_number_of_workers(
    seeded: Callable[..., StudyConfig], study_file: StudyFile, tmp_path: Path
) -> None:
    path = study_file(seeded())
    here, forked = (simulate(path, out=tmp_path / f"{n}", workers=n) for n in (0, 2))
    assert torch.equal(checkpoint_of(here.folder).adapter_P, checkpoint_of(forked.folder).adapter_P)
    assert here.summary.privacy == forked.summary.privacy
    assert here.summary.sites == forked.summary.sites
    assert outcomes() == outcomes(1) == [(1, "sent"), (2, "sent")]
    # Every arm has a budget of its own, and what it spent stands there.
    assert outcomes(0, "local-west") == outcomes(2, "pooled") == [(1, "sent"), (2, "sent")]
    assert not torch.equal(torch.tensor([0.0]), checkpoint_of(here.folder).adapter_P), (
        "an adapter of nothing would be equal too"
    )


def test_round_that_sites_have_answered_is_neither_trained_nor_charged_again_on_resume(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies with all replies of the last round in hand, before its checkpoint."""
    sent: list[bytes] = []
    write = server.rounds.write_checkpoint

    def die(folder: Path, state: Checkpoint) -> None:
        if state.round == 2:
            sent.append(state.adapter_P.numpy().tobytes())
            raise KeyboardInterrupt
        write(folder, state)

    with monkeypatch.context() as patched:
        patched.setattr(server.rounds, "write_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            simulate(study_file(make_private_study()), out=tmp_path / "runs", workers=0, baselines=False)
    (folder,) = (tmp_path / "runs").iterdir()
    assert checkpoint_of(folder).round == 1
    assert outcomes() == outcomes(1) == [(1, "sent"), (2, "sent")]

    with monkeypatch.context() as patched:
        patched.delattr(private_round, "train_privately")
        resumed = simulate(resume=folder, workers=0)
    assert outcomes() == outcomes(1) == [(1, "sent"), (2, "sent")]
    assert [checkpoint_of(folder).adapter_P.numpy().tobytes()] == sent
    assert resumed.summary.privacy.sites["north"].rounds == 2


def test_round_that_was_cut_off_after_its_charge_is_charged_again_and_the_report_says_so(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual hospital allows each round once more; what was spent on the lost one stays spent."""
    train, calls = private_round.train_privately, []

    def diverge(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # round 2, second site
            raise DivergedError("NaN")
        return train(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(private_round, "train_privately", diverge)
        with pytest.raises(RoundError, match="south: DivergedError"):
            simulate(study_file(make_private_study()), out=tmp_path / "runs", workers=0, baselines=False)
    (folder,) = (tmp_path / "runs").iterdir()
    run = simulate(resume=folder, workers=0)
    assert outcomes() == [(1, "sent"), (2, "sent")]
    assert outcomes(1) == [(1, "sent"), (2, "failed"), (2, "sent")]
    north, south = (run.summary.privacy.sites[name] for name in ("north", "south"))
    assert (north.rounds, south.rounds) == (2, 3)
    assert south.epsilon > north.epsilon
    assert f"epsilon {south.epsilon_shown}" in run.summary.privacy.promise


def test_withheld_evaluation_leaves_no_metric_of_a_held_out_patient_anywhere(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers: list[dict[str, Any]] = []
    kinds: set[str] = set()
    send = InProcessGrid.send_and_receive

    def record(self: InProcessGrid, messages: Any, *, timeout: float | None = None) -> Any:
        outgoing = list(messages)
        replies = send(self, outgoing, timeout=timeout)
        kinds.update(message.metadata.message_type for message in outgoing)
        headers.extend(json.loads(str(reply.content["medfed"]["header"])) for reply in replies)
        return replies

    monkeypatch.setattr(InProcessGrid, "send_and_receive", record)
    run = simulate(study_file(make_private_study(evaluation="withheld")), out=tmp_path / "runs", workers=0)
    assert kinds == {"query.describe", "train"}
    assert all(header["metrics"] == {} for header in headers)
    folders = [run.folder, *(run.folder / "arms").iterdir()]
    assert len(folders) == 4
    for folder in folders:
        lines = metrics_of(folder)
        assert lines
        assert {line["event"] for line in lines} == {"train"}
        assert {key for line in lines for key in line} == {"event", "scope", "round", "site"}
    assert all(values == {} for values in run.summary.sites.values())
    assert (run.summary.mean, run.summary.worst_site) == ({}, {})
    assert "was not evaluated" in text_of(run)
    assert not re.search(r"\bDice\b[^.]*\b0\.\d", text_of(run))
    assert HELD_OUT not in run.summary.privacy.warnings


def test_report_states_what_each_site_promises_and_spent(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_private_study(noise_multiplier=0.8, sampling_rate=0.75, clip_norm=0.002, evaluation="withheld")
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    text = text_of(run)
    worst = max(run.summary.privacy.sites.values(), key=lambda spent: spent.epsilon)
    promise = "Differential privacy for each training patient, with all images: epsilon"
    assert f"{promise} {worst.epsilon_shown} at delta 0.01" in text
    assert "adding or removing one patient" in text
    assert "Unit: patient; adjacency: add or remove one patient." in text
    columns = "site epsilon delta noise multiplier sampling rate steps rounds clip norm clip fraction signal to noise"
    assert columns in text
    for site, spent in run.summary.privacy.sites.items():
        assert spent.clip_fraction is not None
        assert spent.signal_to_noise is not None
        assert 0 <= spent.clip_fraction <= 1
        assert 0 < spent.signal_to_noise < 10
        row = (
            f"{site} {spent.epsilon_shown} 0.01 0.8 0.75 4 2 0.002 {100 * spent.clip_fraction:.0f} % "
            f"{spent.signal_to_noise:.3g}"
        )
        assert row in text
    assert red_sentences(run) == []


def test_record_level_study_says_that_it_protects_images(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_private_study(unit="record", images_per_patient=None)
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    assert "Differential privacy for each training image:" in text_of(run)
    assert "adding or removing one record" in text_of(run)
    assert "Unit: record; adjacency: add or remove one record." in text_of(run)


@pytest.mark.parametrize("case", ["no section", "no noise", "held-out metrics", "seeded", "all private"])
def test_report_says_in_red_what_is_not_private(
    make_study: MakeStudy,
    make_private_study: MakeStudy,
    seeded: Callable[..., StudyConfig],
    study_file: StudyFile,
    tmp_path: Path,
    case: str,
) -> None:
    make = {
        "no section": make_study,
        "no noise": lambda: make_private_study(trust="none", noise_multiplier=None),
        "held-out metrics": make_private_study,
        "seeded": lambda: seeded(evaluation="withheld"),
        "all private": lambda: make_private_study(evaluation="withheld"),
    }[case]
    run = simulate(study_file(make()), out=tmp_path / "runs", workers=0, baselines=False)
    expected = {
        "no section": [NO_PRIVACY],
        "no noise": [NO_NOISE],
        "held-out metrics": [HELD_OUT],
        "seeded": [SEEDED],
        "all private": [],
    }[case]
    assert red_sentences(run) == expected == list(run.summary.privacy.warnings)
    promises = "Differential privacy for" in text_of(run)
    assert promises == (case not in ("no section", "no noise"))
    assert bool(run.summary.privacy.sites) == promises
    if not promises:
        assert "Nothing here is private" in text_of(run)
        assert not list((run.folder / "ledgers").glob("*.sqlite"))


@pytest.mark.usefixtures("without_pictures")
def test_ledger_command_shows_and_verifies_what_a_run_spent(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = simulate(study_file(make_private_study()), out=tmp_path / "runs", workers=0)
    capfd.readouterr()
    main(["site", "ledger", str(run.folder), "--json"])
    shown = json.loads(capfd.readouterr().out)
    assert shown["verified"] is True
    spent = {cohort["cohort"]: cohort["epsilon"] for ledger in shown["ledgers"] for cohort in ledger["cohorts"]}
    assert spent == dict.fromkeys(
        ("federated", "local-north", "local-south", "pooled"),
        run.summary.privacy.sites["north"].epsilon,
    )
    main(["site", "ledger", str(run.folder)])
    assert capfd.readouterr().out.count(" verified, ends with ") == 3

    path = run.folder / "ledgers" / "north.sqlite"
    whole = path.read_bytes()
    assert whole.count(b'"round":2') >= 2
    path.write_bytes(whole.replace(b'"round":2', b'"round":1', 1))
    with pytest.raises(SystemExit) as ended:
        main(["site", "ledger", str(run.folder)])
    assert ended.value.code == 14
    assert re.search(r"north\.sqlite: Expected .*entry \d", capfd.readouterr().err)


def test_pictures_show_no_metric_of_a_held_out_patient_where_it_is_withheld(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = make_private_study(evaluation="withheld")
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    assert not (run.folder / "figures").exists()


def test_report_of_a_run_without_scores_draws_no_empty_chart(
    make_private_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    simulate(study_file(make_private_study(evaluation="withheld")), out=tmp_path / "runs", workers=0, baselines=False)
