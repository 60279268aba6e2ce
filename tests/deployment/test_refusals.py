"""What a site refuses: with a quorum of others the study goes on, without one it stops with the reason in one line."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from client.approvals import remove_approval
from medfed.models.weights import LITE_MEDSAM, locate
from medfed.signing import read_key
from privacy.ledger import PrivacyLedger
from privacy.ledger_entry import Cap, Charge
from privacy.plan import PrivacyPlan

pytestmark = [pytest.mark.process, pytest.mark.slow]

PRIVATE = {
    "trust": "site", "unit": "patient", "noise_multiplier": 1.0, "delta": 0.01, "clip_norm": 1.0, "sampling_rate": 0.5,
    "steps_per_round": 2, "images_per_patient": 2, "evaluation": "exact",
}  # fmt: skip
TWO_OF_THREE = {"num_rounds": 2, "quorum": 2, "deadline_s": 30}


def test_study_without_enough_approvals_stops_and_says_who_refused(deployment) -> None:
    run = deployment.begin(deployment.sign("unapproved", approved_by=("east",), rounds=TWO_OF_THREE), tries=1)
    reason = run.gives_up()
    for site in ("north", "few"):
        assert f"{site}: PolicyError: the site's policy does not allow it" in reason
    assert "east" not in reason


def test_study_goes_on_without_the_site_that_has_not_approved_it(deployment) -> None:
    run = deployment.begin(deployment.sign("two-approved", approved_by=("east", "few"), rounds=TWO_OF_THREE))
    run.finishes()
    assert run.trained() == {1: ["east", "few"], 2: ["east", "few"]}
    assert run.status.sites["north"].last_refusal.startswith("PolicyError")


def test_approval_withdrawn_in_a_run_counts_from_the_next_round_on(deployment) -> None:
    study = deployment.sign("withdrawn", rounds={**TWO_OF_THREE, "num_rounds": 3})
    run = deployment.begin(study)
    run.says("event=round_done scope=federated round=1")
    digest = run.status.study_digest
    remove_approval(deployment.folders["north"], digest)
    run.finishes()
    trained = run.trained()
    assert trained[1] == ["north", "east", "few"]
    assert trained[3] == ["east", "few"]


def test_wrong_labels_nan_images_and_no_patients_are_refused_with_their_kind(deployment) -> None:
    manifests = {site: folder.settings().data for site, folder in deployment.folders.items()}
    kept = {path: path.read_bytes() for data in manifests.values() for path in data.parent.iterdir()}
    label = np.full((64, 64), 7, dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), manifests["north"].parent / "label0.nii.gz")
    image = np.full((64, 64), np.nan, dtype=np.float32)
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), manifests["east"].parent / "image0.nii.gz")
    manifests["few"].write_text("image,label,patient_id,split\n")
    try:
        # another seed is another model: a site has not read its images for it yet
        reason = deployment.begin(deployment.sign("bad-data", seed=6, rounds=TWO_OF_THREE), tries=1).gives_up()
        for site in deployment.sites:
            assert f"{site}: DataError: the site's cohort failed validation" in reason
    finally:
        for path, data in kept.items():
            path.write_bytes(data)


def test_site_whose_budget_is_used_up_drops_out_and_is_charged_nothing_more(deployment) -> None:
    run = deployment.begin(deployment.sign_private("no-budget", rounds={**TWO_OF_THREE, "num_rounds": 3}))
    run.says("event=round_done scope=federated round=1")
    policy = deployment.folders["north"].policy_file
    policy.write_text(policy.read_text().replace("epsilon = 1e4", "epsilon = 0.01"))
    run.finishes()
    rounds = [one.round for one in deployment.charges("north", "no-budget")]
    assert rounds in ([1], [1, 2])  # the next round may have begun when the policy was changed
    assert [one.round for one in deployment.charges("east", "no-budget")] == [1, 2, 3]
    assert run.trained()[3] == ["east", "few"]
    assert run.status.sites["north"].last_refusal.startswith("BudgetError")


def test_disk_full_at_the_ledger_trains_nothing_and_the_site_is_back_when_there_is_room(
    deployment, until: Callable
) -> None:
    folder, pid = deployment.folders["north"], deployment.sites["north"].pid
    signed = deployment.coordinator.signed_study(deployment.sign_private("fills", privacy=PRIVATE)).study
    ledger = PrivacyLedger.open(folder.ledger, read_key(folder.ledger_key))
    plan = PrivacyPlan.of_study(signed)
    for number in range(80):  # other patients' charges, so that no other file of the site is as long as the ledger
        charge = Charge(
            cohort="others", study="fills", study_digest=signed.digest, scope="federated", round=number + 1,
            mechanism=plan.mechanism(1), clip_norm=plan.clip_norm, delta=plan.delta, unit=plan.unit,
            adjacency=plan.adjacency, request_digest=f"{number:064x}",
        )  # fmt: skip
        ledger.reserve(charge, Cap(epsilon=1e9, delta=0.01, unit="patient"))
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    full = folder.ledger.stat().st_size - 4096  # the page that is written next is beyond it
    assert full > folder.audit_log.stat().st_size + 16384
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (full, unlimited[1]))
    try:
        run = deployment.begin(
            deployment.sign_private("disk-full", privacy=PRIVATE, rounds={**TWO_OF_THREE, "num_rounds": 8})
        )
        until(lambda: deployment.status_of(run, "north").last_refusal.startswith("LedgerError"), what="a refusal")
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    run.finishes()
    assert deployment.sites["north"].pid == pid
    assert deployment.sites["north"].is_alive
    charged = [one.round for one in deployment.charges("north", "disk-full")]
    trained = [number for number, sites in run.trained().items() if "north" in sites]
    assert charged == trained
    assert len(charged) < 8
    assert charged[-1] == 8
    deployment.audit_log("north")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Flower matches names with
def test_code_in_a_run_is_executed_by_no_site(deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.cli.build import build_fab_from_files

    from server import flower_link
    from server.service import superlink_of
    from server.study_run import node_keys

    trap = tmp_path / "executed"
    bait = f"from pathlib import Path\nPath({str(trap)!r}).touch()\n".encode()
    files = {
        **flower_link._CODELESS_FAB,
        "medfed/__init__.py": bait,
        "client/__init__.py": bait,
        "client/app.py": bait,
        "server/app.py": bait,
    }
    pyproject = files["pyproject.toml"].replace(b'fab-include = ["LICENSE"]\n', b"")
    files["pyproject.toml"] = pyproject
    fab = build_fab_from_files(dict(files))[0]
    assert b"client/__init__.py" in fab
    exec(bait)
    trap.unlink()
    monkeypatch.setattr(flower_link, "_CODELESS_FAB", files)
    signed = deployment.coordinator.signed_study(deployment.sign("evil")).study
    superlink = superlink_of(deployment.coordinator)
    nodes = flower_link.register_sites(superlink, node_keys(signed, deployment.coordinator.roster()))
    with flower_link.StudyRun(superlink) as run:
        content = RecordDict({"nothing": ConfigRecord({"x": 1})})
        messages = [Message(content, node.node_id, "query.describe", ttl=30.0) for node in nodes.values()]
        replies = run.grid.send_and_receive(messages, timeout=30)
    assert [reply.error.reason for reply in replies] == ["RuntimeError"] * 3  # answered by the installed app
    assert not trap.exists()
    assert not list(deployment.root.rglob("*.fab"))


@pytest.mark.weights
def test_site_with_another_weights_file_is_refused_there_and_the_others_go_on(deployment, tmp_path: Path) -> None:
    tampered = tmp_path / LITE_MEDSAM.package / LITE_MEDSAM.resource
    tampered.parent.mkdir(parents=True)
    (tmp_path / LITE_MEDSAM.package / "__init__.py").touch()
    weights = bytearray(locate(LITE_MEDSAM).read_bytes())
    weights[len(weights) // 2] ^= 1
    tampered.write_bytes(weights)
    deployment.sites["east"].stop()
    east = deployment.start_site("east", {"PYTHONPATH": str(tmp_path)})
    east.says("event=connected")
    study = deployment.sign(
        "weights",
        backbone={"name": "lite-medsam", "sha256": LITE_MEDSAM.sha256},
        training={"local_epochs": 1, "batch_size": 2, "learning_rate": 0.01},
        rounds={"num_rounds": 1, "quorum": 2, "deadline_s": 120},
    )
    run = deployment.begin(study)
    run.finishes()
    east.stop()
    assert run.trained() == {1: ["north", "few"]}
    refused = "WeightsError: the site does not hold the backbone weights that the study names"
    assert run.status.sites["east"].last_refusal == refused
    assert "event=refused round=0 kind=WeightsError" in east.said
    assert "Traceback" not in east.said
