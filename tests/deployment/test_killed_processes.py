"""Kill -9 of real processes: the study ends with the adapter of an undisturbed one, and nothing is spent twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow]

SLOWLY = {"local_epochs": 100, "batch_size": 2, "learning_rate": 0.01}
"""So that a process can be killed in the middle of it."""


def test_server_killed_in_a_round_is_resumed_to_the_same_adapter(
    deployment, undisturbed: bytes, until: Callable
) -> None:
    run = deployment.begin(deployment.sign("server-killed"))
    until(lambda: deployment.in_work("few") == "train 2", what="round 2")
    run.kill()
    assert run.status.phase == "running"
    assert run.resumed().finishes() == undisturbed


def test_superlink_killed_in_a_round_and_started_again_changes_nothing(
    deployment, undisturbed: bytes, until: Callable
) -> None:
    run = deployment.begin(deployment.sign("superlink-killed"))
    until(lambda: deployment.in_work("few") == "train 2", what="round 2")
    deployment.superlink.kill()
    deployment.start_superlink()
    assert run.finishes() == undisturbed


def test_site_killed_while_training_answers_the_same_message_when_it_is_back(
    deployment, undisturbed: bytes, until: Callable
) -> None:
    run = deployment.begin(deployment.sign("site-killed"))
    until(lambda: deployment.in_work("east") == "train 2", what="round 2")
    deployment.sites["east"].kill()
    assert deployment.in_work("east") == "train 2"
    again = deployment.start_site("east")
    assert run.finishes() == undisturbed
    assert "event=taken_up_again tries=2" in again.said
    assert "action=train round=2" in again.said


def test_site_killed_between_the_stored_reply_and_sending_sends_what_it_stored(
    deployment, undisturbed: bytes, until: Callable
) -> None:
    run, east = deployment.begin(deployment.sign("reply-stored")), deployment.sites["east"]
    stored = lambda: max((path.stat().st_mtime_ns for path in replies.glob("*.reply")), default=0)  # noqa: E731
    replies = deployment.folders["east"].replies
    for number in (1, 2, 3):
        until(lambda number=number: deployment.in_work("east") == f"train {number}", what=f"round {number}")
        before = stored()
        time.sleep(0.2)  # it has made sure that the run goes on, and trains
        deployment.superlink.freeze()  # from now on nothing can be sent
        with contextlib.suppress(AssertionError):
            until(lambda before=before: stored() > before, seconds=8)
        if stored() > before and deployment.in_work("east") == f"train {number}":
            break
        deployment.superlink.thaw()  # too late, or too early: another round
    east.kill()
    deployment.superlink.thaw()
    again = deployment.start_site("east")
    assert run.finishes() == undisturbed
    assert f"event=answered_again round={number}" in again.said
    assert f"event=trained round={number}" not in again.said
    outcomes = [line.departure.outcome for line in deployment.audit_log("east")]
    assert set(outcomes) == {"reply"}


def test_private_site_killed_while_training_is_charged_once_for_each_round(deployment, until: Callable) -> None:
    run = deployment.begin(deployment.sign_private("private-killed"))
    open_charges = lambda: [one for one in deployment.charges("east", "private-killed") if one.outcome == "unsettled"]  # noqa: E731
    until(
        lambda: (deployment.folders["east"].state / "ledger.pub").exists() and open_charges(),
        what="a reservation",
        every=0.02,
    )
    deployment.sites["east"].freeze()
    assert deployment.in_work("east").startswith("train")
    deployment.sites["east"].kill()
    killed_in = [one.round for one in open_charges()]
    deployment.start_site("east")
    run.finishes()
    for site in deployment.sites:
        charges = deployment.charges(site, "private-killed")
        assert [(one.round, one.outcome) for one in charges] == [(1, "sent"), (2, "sent"), (3, "sent")], (
            site,
            killed_in,
        )
        deployment.audit_log(site)
    told = {status.epsilon for status in run.status.sites.values()}
    assert told == {run.status.epsilon_planned}  # no epsilon lost, none spent twice


def test_private_server_killed_in_a_round_spends_nothing_twice(deployment, until: Callable) -> None:
    run = deployment.begin(deployment.sign_private("private-server-killed"))
    until(lambda: deployment.in_work("few") == "train 2", what="round 2")
    run.kill()
    resumed = run.resumed()
    resumed.finishes()
    for site in deployment.sites:
        charges = deployment.charges(site, "private-server-killed")
        assert [(one.round, one.outcome) for one in charges] == [(1, "sent"), (2, "sent"), (3, "sent")]
    assert {status.epsilon for status in resumed.status.sites.values()} == {resumed.status.epsilon_planned}


def test_site_killed_after_its_masked_upload_is_in_the_sum_all_the_same(deployment, until: Callable) -> None:
    secure = {"enabled": True, "max_colluding": 0, "min_sites": 2, "threshold": 2, "update_clip_norm": 8.0}
    sites = [{"name": site, "declared_patients": 3} for site in deployment.sites]
    sections = {
        "secure_aggregation": secure,
        "sites": sites,
        "rounds": {"num_rounds": 2, "deadline_s": 12},
        "training": {**SLOWLY, "local_epochs": 20},
    }
    calm = deployment.begin(deployment.sign("masked", **sections)).finishes()
    run = deployment.begin(deployment.sign("masked-killed", **sections))
    until(lambda: deployment.in_work("few") == "train 1", what="round 1")
    deployment.sites["few"].freeze()  # the others upload, and wait for this one
    until(lambda: not deployment.in_work("east") and deployment.status_of(run, "east").last_action == "train",
          what="the masked upload", every=0.05)  # fmt: skip
    deployment.sites["east"].kill()
    deployment.sites["few"].thaw()
    run.says("event=round_done scope=federated round=1")
    deployment.start_site("east")
    assert run.finishes() == calm
    line = next(line for line in run.lines("train") if line["round"] == 1)
    assert line["num_sites"] == 3


@pytest.mark.usefixtures("undisturbed")
def test_private_superlink_killed_in_a_round_is_charged_once_for_each_round(deployment, until: Callable) -> None:
    run = deployment.begin(deployment.sign_private("private-superlink-killed"))
    until(lambda: deployment.in_work("few") == "train 2", what="round 2")
    deployment.superlink.kill()
    deployment.start_superlink()
    run.finishes()
    for site in deployment.sites:
        charges = deployment.charges(site, "private-superlink-killed")
        assert [(one.round, one.outcome) for one in charges] == [(1, "sent"), (2, "sent"), (3, "sent")], site
    assert {status.epsilon for status in run.status.sites.values()} == {run.status.epsilon_planned}


@pytest.mark.usefixtures("undisturbed")  # all sites are warm
def test_server_killed_in_a_round_with_shared_noise_asks_the_same_again_and_nobody_is_charged_twice(
    deployment, until: Callable
) -> None:
    name, few = "shared-server-killed", deployment.sites["few"]
    run = deployment.begin(
        deployment.sign_private(
            name,
            privacy={
                "trust": "consortium", "unit": "patient", "noise_multiplier": 1.0, "delta": 0.01, "clip_norm": 1.0,
                "sampling_rate": 0.5, "steps_per_round": 1, "images_per_patient": 2, "evaluation": "exact",
            },
            secure_aggregation={"enabled": True, "max_colluding": 1},
            training={"batch_size": 2, "learning_rate": 0.01, "optimizer": "sgd"},
        )
    )  # fmt: skip
    until(lambda: deployment.in_work("few").startswith("train"), what="a round")
    few.freeze()
    number = int(deployment.in_work("few").split()[1])
    sent = lambda site: (number, "sent") in [(one.round, one.outcome) for one in deployment.charges(site, name)]  # noqa: E731
    for site in ("north", "east"):  # their vectors have left, and wait for the third
        until(lambda site=site: deployment.folders[site].ledger.exists() and sent(site), what="a vector", every=0.05)
    run.kill()
    few.thaw()
    resumed = run.resumed()
    resumed.finishes()
    assert f"event=asked_again round={number} named=False" in resumed.said
    assert "event=asked_anew" not in resumed.said
    for site in deployment.sites:
        charges = deployment.charges(site, name)
        assert [(one.round, one.outcome) for one in charges] == [(1, "sent"), (2, "sent"), (3, "sent")], site
    assert {line["num_sites"] for line in resumed.lines("train")} == {3}
    assert {status.epsilon for status in resumed.status.sites.values()} == {resumed.status.epsilon_planned}
