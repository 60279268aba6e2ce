"""Sites that answer too late, or are away for a round and come back; real processes."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.usefixtures("undisturbed")]  # all sites are warm

OPERATIONS = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
LATE = {"num_rounds": 3, "quorum": 2, "deadline_s": 15}
MASKED = {"enabled": True, "max_colluding": 0, "min_sites": 2, "threshold": 2, "update_clip_norm": 8.0}


def test_a_late_reply_is_dropped_and_the_site_is_in_later_rounds_again(deployment, until: Callable) -> None:
    begun, few = len(deployment.audit_log("few")), deployment.sites["few"]
    run = deployment.begin(deployment.sign("late", rounds=LATE))
    until(lambda: deployment.in_work("few") == "train 1", what="round 1")
    time.sleep(0.2)  # it has made sure that the run goes on, and trains
    few.freeze()
    run.says("event=round_done scope=federated round=1")
    few.thaw()
    few.says("event=reply action=train round=1")
    run.finishes()
    assert run.trained() == {1: ["north", "east"], 2: ["north", "east", "few"], 3: ["north", "east", "few"]}
    left = [line.departure for line in deployment.audit_log("few")[begun:]]
    assert [one.round for one in left if (one.action, one.outcome) == ("train", "reply")] == [1, 2, 3]


def test_a_late_private_reply_was_charged_and_is_in_no_sum(deployment, until: Callable) -> None:
    few, name = deployment.sites["few"], "late-private"
    run = deployment.begin(deployment.sign_private(name, rounds=LATE))
    ledger = deployment.folders["few"].state / "ledger.pub"
    until(lambda: ledger.exists() and deployment.charges("few", name), what="a reservation", every=0.02)
    few.freeze()
    (charged,) = deployment.charges("few", name)
    run.says("event=round_done scope=federated round=1")
    few.thaw()
    run.finishes()
    assert (charged.round, charged.outcome) == (1, "unsettled")
    assert run.trained() == {1: ["north", "east"], 2: ["north", "east", "few"], 3: ["north", "east", "few"]}
    charges = deployment.charges("few", name)  # the SuperLink has the late reply: whoever operates it can read it
    assert [(one.round, one.outcome) for one in charges] == [(1, "sent"), (2, "sent"), (3, "sent")]
    assert run.status.sites["few"].epsilon == run.status.epsilon_planned


def test_a_site_that_is_away_for_a_round_of_secure_sums_comes_back(deployment, until: Callable) -> None:
    rounds = {"num_rounds": 4, "quorum": 2, "deadline_s": 8}
    run = deployment.begin(deployment.sign("masked-away", secure_aggregation=MASKED, sites=_declared(deployment),
                                           rounds=rounds))  # fmt: skip
    until(lambda: deployment.in_work("few") == "train 2", what="round 2")
    deployment.sites["few"].kill()
    run.says("event=round_done scope=federated round=2")
    run.freeze()  # so that it does not end before the site is there
    deployment.start_site("few").says("event=connected")
    run.thaw()
    run.finishes()
    sums = {line["round"]: line["num_sites"] for line in run.lines("train")}
    assert (sums[1], sums[2], sums[4]) == (3, 2, 3)
    assert run.lines("lost") == []


def test_secure_sums_with_too_few_sites_open_nothing_and_end_with_one_line(deployment, until: Callable) -> None:
    rounds = {"num_rounds": 2, "quorum": 2, "deadline_s": 8}
    run = deployment.begin(
        deployment.sign("masked-alone", secure_aggregation=MASKED, sites=_declared(deployment), rounds=rounds), tries=1
    )
    until(lambda: deployment.in_work("few") == "train 1" and deployment.in_work("north") == "train 1", what="round 1")
    for site in ("few", "north"):
        deployment.sites[site].freeze()
    reason = run.gives_up()
    assert "Expected vectors of at least 2 sites, got 1" in reason
    assert "north: no reply within 8 s; few: no reply within 8 s" in reason
    assert run.lines("train") == []


def _declared(deployment) -> list[dict[str, object]]:
    return [{"name": site, "declared_patients": 3} for site in deployment.sites]


def test_a_site_that_lost_its_disk_is_restored_from_what_the_guide_backs_up(deployment, tmp_path: Path) -> None:
    root = deployment.folders["few"].root
    deployment.begin(deployment.sign_private("before-the-loss")).finishes()
    deployment.sites["few"].stop()
    logged, backup = deployment.audit_log("few"), tmp_path / "backup"
    (backup / "state").mkdir(mode=0o700, parents=True)
    backup.chmod(0o700)
    for pattern in backed_up():
        for path in root.glob(pattern):
            kept = backup / path.relative_to(root)
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, kept)
    shutil.rmtree(root)
    shutil.copytree(backup, root)
    assert not (root / "state" / "journals").exists()
    deployment.start_site("few").says("event=connected")
    assert len(deployment.charges("few", "before-the-loss")) == 3
    run = deployment.begin(deployment.sign_private("after-the-loss"))
    run.finishes()
    assert run.trained() == {number: ["north", "east", "few"] for number in (1, 2, 3)}
    assert len(deployment.charges("few", "before-the-loss")) == 3
    assert [one.outcome for one in deployment.charges("few", "after-the-loss")] == ["sent"] * 3
    assert deployment.audit_log("few")[: len(logged)] == logged  # verified, and goes on


def backed_up() -> list[str]:
    """What of a site's folder the guide says to back up, as patterns."""
    table = OPERATIONS.split("## Backup")[1].split("**Never restore**")[0]
    names = [name for row in table.splitlines() if "SITE_DIR/" in row for name in re.findall(r"`([^`]+)`", row)]
    beside = [name if name.startswith("SITE_DIR/") else f"SITE_DIR/state/{name}" for name in names]
    return [name.removeprefix("SITE_DIR/") for name in beside]
