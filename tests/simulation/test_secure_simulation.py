"""Whole studies with secure aggregation: the adapter is that of the plain sum, and nobody sees a site alone."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from numpy.typing import NDArray

import client.app
import client.secure_round
from client.site import site_of_partition
from medfed.errors import LostRoundError, RoundError
from medfed.messages import RECORD_KEY, RoundReply
from medfed.study import ALL_SITES, StudyConfig
from privacy.plan import PrivacyPlan
from privacy.skellam_accounting import SkellamMechanism
from server.checkpoint import Checkpoint, read_checkpoint
from server.privacy_statement import HELD_OUT, MASKED_ALONE
from simulation.grid import InProcessGrid
from simulation.harness import simulate
from simulation.run_folder import metrics_of, stored_study
from strategies.registry import strategy_of
from strategies.secure_channel import SecureChannel

MakeStudy = Callable[..., StudyConfig]
StudyFile = Callable[[StudyConfig], Path]

SITES = ("north", "south", "west", "east", "centre")


def checkpoint_of(folder: Path) -> Checkpoint:
    study = stored_study(folder)
    state = read_checkpoint(folder, study.resolved_manifest, study_digest=study.digest, scope="federated")
    assert state is not None
    return state


def without_masks(study: StudyConfig, **changes: Any) -> StudyConfig:
    sites = [site.model_copy(update={"declared_patients": None}) for site in study.sites]
    return study.replace(secure_aggregation=None, sites=sites, **changes)


def shared_noise(study: StudyConfig, **privacy: Any) -> StudyConfig:
    """The study with shared noise, c = 1; or with the whole noise of each site, if the trust says so."""
    given = {
        "trust": "consortium",
        "unit": "patient",
        "noise_multiplier": 1.0,
        "delta": 0.01,
        "clip_norm": 1.0,
        "sampling_rate": 0.5,
        "steps_per_round": 1,
        "images_per_patient": 2,
        "evaluation": "exact",
        **privacy,
    }
    secure = {"enabled": True, "max_colluding": 1}
    return study.replace(
        training={"batch_size": 2, "learning_rate": 0.01, "optimizer": "sgd"},
        secure_aggregation=secure if given["trust"] == "consortium" else {**secure, "update_clip_norm": 8.0},
        privacy={name: value for name, value in given.items() if value is not None},
    )


class Failing:
    """Makes sites fail at one action, as if their connection had been cut before the answer left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def at(self, action: str, *sites: str, rounds: Iterable[int] = (1,)) -> None:
        module = client.app.serve if action == "train" else client.secure_round
        original = getattr(module, action)
        rounds = tuple(rounds)

        def fails(instruction: Any, fields: Any, site: Any) -> Any:
            if site.name in sites and instruction.round in rounds and instruction.scope == "federated":
                raise ConnectionError
            return original(instruction, fields, site)

        self._monkeypatch.setattr(module, action, fails)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.uint32]]:
    """Every vector that a site masks, in the clear."""
    found: list[NDArray[np.uint32]] = []
    original = SecureChannel._with_metrics

    def record(self: SecureChannel, update_P: Any, metrics: Any) -> Any:
        found.append(original(self, update_P, metrics))
        return found[-1]

    monkeypatch.setattr(SecureChannel, "_with_metrics", record)
    return found


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Every message that passes a grid, either way."""
    found: list[Message] = []
    original = InProcessGrid.send_and_receive

    def record(self: InProcessGrid, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        came = original(self, sent, timeout=timeout)
        found.extend([*sent, *came])
        return came

    monkeypatch.setattr(InProcessGrid, "send_and_receive", record)
    return found


def test_adapter_is_that_of_the_plain_sum_to_the_quantisation_bound(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    secure = make_secure_study().replace(rounds={"num_rounds": 1})
    masked = simulate(study_file(secure), out=tmp_path / "masked", workers=0, baselines=False)
    plain = simulate(study_file(without_masks(secure)), out=tmp_path / "plain", workers=0, baselines=False)
    channel = _training_channel(stored_study(masked.folder))
    difference_P = checkpoint_of(masked.folder).adapter_P - checkpoint_of(plain.folder).adapter_P
    bound = channel.quantisation_bound(len(SITES))
    assert bound < 1e-6
    assert float(difference_P.abs().max()) <= bound + 2**-24  # and one rounding to float32
    assert masked.summary.sites.keys() == plain.summary.sites.keys()
    for site, metrics in plain.summary.sites.items():
        for name, columns in metrics.items():
            assert masked.summary.sites[site][name] == pytest.approx(columns, abs=1e-3)


def _training_channel(study: StudyConfig) -> SecureChannel:
    """Of the first round."""
    return SecureChannel.training(study, 1, strategy_of(study).plan(1))


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.process
def test_result_does_not_depend_on_the_number_of_workers(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    path = study_file(make_secure_study())
    here, forked = (simulate(path, out=tmp_path / f"{n}", workers=n, baselines=False) for n in (0, 2))
    assert torch.equal(checkpoint_of(here.folder).adapter_P, checkpoint_of(forked.folder).adapter_P)


@pytest.mark.usefixtures("without_pictures")
def test_no_update_example_count_or_metric_of_a_site_is_on_the_wire_in_clear(
    make_secure_study: MakeStudy,
    study_file: StudyFile,
    tmp_path: Path,
    vectors: list[NDArray[np.uint32]],
    replies: list[Message],
) -> None:
    run = simulate(study_file(make_secure_study()), out=tmp_path / "runs", workers=0, baselines=False)
    num_updates, num_scores = 2 * len(SITES), 2 * len(SITES)
    assert len(vectors) == num_updates + num_scores
    wire = [
        value if isinstance(value, bytes) else str(value).encode()
        for message in replies
        for value in message.content[RECORD_KEY].values()
    ]
    everything = b"".join(wire)
    for vector in vectors:
        # Metrics are pairs of integers that may stand anywhere by chance; eight bytes of an update do not.
        assert vector[: max(8, len(vector) // 4)].tobytes() not in everything
        assert vector[:16].tobytes() not in everything
    came = [message.content[RECORD_KEY] for message in replies if message.metadata.reply_to_message_id]
    assert len(came) > 30
    for fields in came:
        header = RoundReply.parse({"header": fields["header"]})
        assert header.metrics == {}
        assert header.num_examples in (0, 3, 15)  # declared, public sizes: of a site, and of the pooled upper bound
        assert fields["adapter"] == b""
    lines = metrics_of(run.folder)
    assert {line["site"] for line in lines} == {ALL_SITES}
    assert [line["event"] for line in lines] == ["evaluate", "train", "train", "evaluate"]
    assert all(0 < line["loss"] < 10 for line in lines if line["event"] == "train")


@pytest.mark.usefixtures("without_pictures")
def test_summed_scores_are_the_means_of_the_sites_scores(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_secure_study()), out=tmp_path / "runs", workers=0, baselines=False)
    inspected = [json.loads(line) for line in (run.folder / "inspection.jsonl").read_text().splitlines()]
    for line in (line for line in metrics_of(run.folder) if line["event"] == "evaluate"):
        single = [one["dice"] for one in inspected if one["round"] == line["round"]]
        assert len(single) == len(SITES)
        assert line["dice"] == pytest.approx(sum(single) / len(single), abs=1e-5)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("later", [None, "vote", "open_sum"])
def test_survivors_are_summed_exactly_when_sites_drop_out(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, failing: Failing, later: str | None
) -> None:
    """One site sends no vector; another sends one and is gone before it votes, or before it helps to open the sum."""
    study = make_secure_study()
    failing.at("train", "west")
    if later is not None:
        failing.at(later, "south")
    run = simulate(study_file(study), out=tmp_path / "masked", workers=0, baselines=False)
    lines = [line for line in metrics_of(run.folder) if line["event"] == "train"]
    assert [line["num_sites"] for line in lines] == [4, 5]  # and they are back in the next round
    plain = without_masks(study, rounds={"num_rounds": 2, "quorum": 3})
    beside = simulate(study_file(plain), out=tmp_path / "plain", workers=0, baselines=False)
    difference_P = checkpoint_of(run.folder).adapter_P - checkpoint_of(beside.folder).adapter_P
    assert float(difference_P.abs().max()) < 1e-5


@pytest.mark.usefixtures("without_pictures")
def test_site_that_drops_out_before_opening_is_in_the_sum(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, failing: Failing
) -> None:
    failing.at("open_sum", "west")
    study = make_secure_study().replace(rounds={"num_rounds": 1})
    run = simulate(study_file(study), out=tmp_path / "masked", workers=0, baselines=False)
    (line,) = [line for line in metrics_of(run.folder) if line["event"] == "train"]
    assert line["num_sites"] == 5


def beyond_tolerance(failing: Failing, action: str, rounds: Iterable[int]) -> None:
    """Three of five sites fail at an action; votes are asked for if a site sends no vector."""
    failing.at(action, "west", "east", "centre", rounds=rounds)
    if action == "vote":
        failing.at("train", "north", rounds=rounds)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("action", ["advertise", "setup", "accept", "train"])
def test_round_that_too_few_begin_is_given_up_and_the_run_can_be_resumed(
    make_secure_study: MakeStudy,
    study_file: StudyFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
) -> None:
    path = study_file(make_secure_study())
    undisturbed = simulate(path, out=tmp_path / "whole", workers=0, baselines=False)
    with monkeypatch.context() as patched:
        beyond_tolerance(Failing(patched), action, (2,) if action == "train" else (0, 1, 2))
        with pytest.raises(RoundError, match="Correct that and resume") as error:
            simulate(path, out=tmp_path / "stopped", workers=0, baselines=False)
    assert not isinstance(error.value, LostRoundError)
    (folder,) = (tmp_path / "stopped").iterdir()
    resumed = simulate(resume=folder, workers=0)
    assert torch.equal(checkpoint_of(resumed.folder).adapter_P, checkpoint_of(undisturbed.folder).adapter_P)


def training_of(folder: Path) -> list[tuple[str, int, str]]:
    lines = [line for line in metrics_of(folder) if line["event"] != "evaluate"]
    return [(line["event"], line["round"], line["site"]) for line in lines]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("action", ["vote", "open_sum"])
def test_round_that_too_few_help_to_open_is_lost_and_the_study_goes_on(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, failing: Failing, action: str
) -> None:
    """Sites that agreed to a set of survivors agree to no other one, so the adapter stays as it was."""
    study = make_secure_study()
    one_round = study.replace(rounds={"num_rounds": 1})
    shorter = simulate(study_file(one_round), out=tmp_path / "shorter", workers=0, baselines=False)
    beyond_tolerance(failing, action, (2,))
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    assert training_of(run.folder) == [("train", 1, ALL_SITES), ("lost", 2, ALL_SITES)]
    assert torch.equal(checkpoint_of(run.folder).adapter_P, checkpoint_of(shorter.folder).adapter_P)
    assert checkpoint_of(run.folder).round == 2


@pytest.mark.usefixtures("without_pictures")
def test_round_after_a_lost_one_trains(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, failing: Failing
) -> None:
    failing.at("open_sum", "west", "east", "centre", rounds=(1,))
    run = simulate(study_file(make_secure_study()), out=tmp_path / "runs", workers=0, baselines=False)
    assert training_of(run.folder) == [("lost", 1, ALL_SITES), ("train", 2, ALL_SITES)]


@pytest.mark.usefixtures("without_pictures")
def test_evaluation_that_is_lost_has_no_line_and_the_run_ends(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, failing: Failing
) -> None:
    failing.at("open_sum", "west", "east", "centre", rounds=(0,))
    run = simulate(study_file(make_secure_study()), out=tmp_path / "runs", workers=0, baselines=False)
    assert [(line["event"], line["round"]) for line in metrics_of(run.folder)] == [
        ("train", 1), ("train", 2), ("evaluate", 2),
    ]  # fmt: skip


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("action", ["vote", "open_sum"])
def test_two_lost_rounds_in_a_row_end_the_run(
    make_secure_study: MakeStudy,
    study_file: StudyFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
) -> None:
    path = study_file(make_secure_study().replace(rounds={"num_rounds": 3, "evaluate_every": 1}))
    with monkeypatch.context() as patched:
        beyond_tolerance(Failing(patched), action, (2, 3))
        with pytest.raises(LostRoundError, match="Round 3: Expected") as error:
            simulate(path, out=tmp_path / "stopped", workers=0, baselines=False)
        assert error.value.exit_code == 8
        (folder,) = (tmp_path / "stopped").iterdir()
        assert checkpoint_of(folder).round == 2
        simulate(resume=folder, workers=0)  # nothing is mended, and yet the run can go on
    assert [line[:2] for line in training_of(folder)] == [("train", 1), ("lost", 2), ("lost", 3)]


@pytest.mark.usefixtures("without_pictures")
def test_private_updates_are_charged_once_however_often_their_sum_is_tried(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, failing: Failing
) -> None:
    """With trust = 'site' an update is private by itself: the same one goes under new masks, at no new cost."""
    failing.at("open_sum", "west", "east", "centre", rounds=(2,))
    study = shared_noise(make_secure_study(), trust="site")
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    assert training_of(run.folder) == [("train", 1, ALL_SITES), ("lost", 2, ALL_SITES)]
    for index in range(len(SITES)):
        site = site_of_partition(index)
        assert [one.charge.round for one in site.ledger.charges("federated")] == [1, 2]


@pytest.mark.usefixtures("without_pictures")
def test_shared_noise_is_charged_before_a_vector_leaves_and_anew_for_another_try(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, failing: Failing
) -> None:
    """A vector that left may be opened by the others, so a round that this site saw fail has been spent."""
    failing.at("open_sum", "west", "east", "centre", rounds=(2,))
    run = simulate(study_file(shared_noise(make_secure_study())), out=tmp_path / "runs", workers=0, baselines=False)
    assert training_of(run.folder) == [("train", 1, ALL_SITES), ("lost", 2, ALL_SITES)]
    for index in range(len(SITES)):
        site = site_of_partition(index)
        assert [one.charge.round for one in site.ledger.charges("federated")] == [1, 2, 2]
    assert {site.rounds for site in run.summary.privacy.sites.values()} == {3}


def test_ledger_and_report_of_shared_noise_say_what_the_plan_says(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    study = shared_noise(make_secure_study(), noise_multiplier=None, epsilon=4.0)
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    plan = PrivacyPlan.of_study(stored_study(run.folder))
    assert plan.min_honest == 3
    for index, spent in enumerate(run.summary.privacy.sites.values()):
        mechanisms = [one.charge.mechanism for one in site_of_partition(index).ledger.charges("federated")]
        assert mechanisms == [plan.mechanism(1)] * 2
        assert all(isinstance(mechanism, SkellamMechanism) for mechanism in mechanisms)
        assert spent.epsilon == pytest.approx(plan.epsilon.value, abs=1e-6)
        assert 3.9 < spent.epsilon <= 4.0
    assert "at least 3 honest sites" in run.summary.privacy.promise
    assert "not formally verified or audited" in run.summary.privacy.confidentiality
    assert run.summary.privacy.warnings == (HELD_OUT,)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("scale", [1.0, 2 / 3, 3 / 2])
def test_noise_of_the_released_sum_is_the_plans_and_no_other(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """Nobody is drawn, so the sum is noise alone; a share of another size would be noticed."""
    study = shared_noise(make_secure_study(), sampling_rate=1e-6)
    study = study.replace(
        training={"batch_size": 2, "learning_rate": 1e-6, "optimizer": "sgd"}, rounds={"num_rounds": 1}
    )
    right = PrivacyPlan.share_variance
    if scale != 1.0:
        wrong = property(lambda plan: math.ceil(right.fget(plan) * scale**2))  # type: ignore[attr-defined]
        monkeypatch.setattr(PrivacyPlan, "share_variance", wrong)
    run = simulate(study_file(study), out=tmp_path / "runs", workers=0, baselines=False)
    monkeypatch.setattr(PrivacyPlan, "share_variance", right)
    resolved = stored_study(run.folder)
    plan, state = PrivacyPlan.of_study(resolved), checkpoint_of(run.folder)
    from medfed.models.adapted import adapted_model

    initial_P = adapted_model(resolved, torch.device("cpu")).initial_P
    per_integer = plan.clip_norm / plan.l2_bound / (3 * len(SITES))  # learning rate and sampling rate cancel
    integers_P = (state.adapter_P.double() - initial_P.double()) / -per_integer
    # All five sites were there; the plan accounts for min_honest of them.
    variance = float(integers_P.square().mean())
    expected = plan.share_variance * len(SITES)
    assert expected >= plan.mechanism(1).variance * len(SITES) / plan.min_honest  # type: ignore[union-attr, operator]
    deviations = (variance / expected - 1) / math.sqrt(2 / integers_P.numel())
    if scale == 1.0:
        assert abs(deviations) < 5
    else:
        assert abs(deviations) > 5


@pytest.mark.usefixtures("without_pictures")
def test_site_masks_for_nobody_but_the_federation_of_all_sites(
    make_secure_study: MakeStudy, study_file: StudyFile, tmp_path: Path
) -> None:
    run = simulate(study_file(make_secure_study()), out=tmp_path / "runs", workers=0)
    assert set(run.summary.mean) == {"zero_shot", "local_only", "federated", "pooled"}
    assert run.summary.privacy.warnings == (MASKED_ALONE,)
