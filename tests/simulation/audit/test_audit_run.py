"""``medfed audit`` on finished runs of small studies: what is written, printed and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from client import private_trainer
from medfed.errors import CheckpointError, StudyError
from medfed.study import StudyConfig
from server.audit_fragment import audit_fragment
from server.audit_result import AuditResult, read_audit
from simulation.audit.run import Effort, audit_run
from simulation.audit_command import app

MakeRun = Callable[[StudyConfig], Path]
LITTLE = Effort(runs=60, canaries=12)


def test_private_run_is_audited_from_end_to_end(
    make_private_study: Callable[..., StudyConfig], make_run: MakeRun
) -> None:
    folder = make_run(make_private_study())
    printed = CliRunner().invoke(app, [str(folder), "--runs", "60", "--canaries", "12", "--json"])
    assert printed.exit_code == 0, printed.output
    result = AuditResult.model_validate_json(printed.stdout)
    assert result == read_audit(folder)
    assert [bound.attack for bound in result.bounds] == [
        "likelihood", "repeats", "replay", "one-run-gradients", "one-run-images",
    ]  # fmt: skip
    assert result.claimed is not None
    assert not result.refuted
    assert all(bound.claimed is not None and bound.epsilon <= bound.claimed for bound in result.bounds)
    assert {one.attack for one in result.membership} == {"loss", "calibrated"}
    assert (result.membership[0].num_members, result.membership[0].num_others) == (6, 4)
    by = {one.protection: one for one in result.inversion}
    assert by["off"].ssim > 0.99
    assert by["clipped"].ssim > 0.99
    assert by["clipped and noised"].ssim < 0.2
    assert by["masked"].ssim < 0.2
    for name in ("audit-bounds.svg", "audit-inversion.svg"):
        assert (folder / "figures" / name).read_text().startswith("<svg")
    page = audit_fragment(folder)
    assert result.sentence.split(";")[0] in page
    assert page.count("<svg") == 2


def test_shadows_and_searches_are_made_if_asked_for(
    make_private_study: Callable[..., StudyConfig], make_run: MakeRun
) -> None:
    folder = make_run(make_private_study())
    asked = ["--shadows", "8", "--inversion-steps", "2"]
    shown = CliRunner().invoke(app, [str(folder), "--runs", "20", "--canaries", "10", *asked])
    assert shown.exit_code == 0, shown.output
    assert "8 shadows on the released adapter: 3 training and 2 other patients of site north" in shown.stdout
    assert "inversion of the adapter's own update, 2 steps" in shown.stdout
    result = read_audit(folder)
    assert result is not None
    assert result.shadows is not None
    assert (result.shadows.num_patients, result.shadows.num_trained, result.shadows.num_newcomers) == (5, 2, 0)
    assert [one.attack for one in result.shadows.alone] == ["loss", "likelihood-ratio"]
    assert [one.attack for one in result.shadows.released] == ["loss", "likelihood-ratio"]
    searched = result.adapter_inversion
    assert searched is not None
    assert (searched.steps, searched.num_images, searched.num_pixels) == (2, 3, 64 * 64)
    assert [one.protection for one in searched.searches] == [
        "off", "off", "clipped", "clipped and noised", "masked",
    ]  # fmt: skip
    page = audit_fragment(folder)
    assert page.count("<svg") == 3
    assert "The 8 shadow adapters of site north alone" in page
    assert page.count('scope="rowgroup"') == 3
    assert "study's own adapter, 2 steps" in page

    audit_run(folder, effort=LITTLE)
    again = read_audit(folder)
    assert again is not None
    assert (again.shadows, again.adapter_inversion) == (None, None)
    assert audit_fragment(folder).count("<svg") == 2


def test_shadows_that_cannot_be_are_refused_in_one_line(
    make_private_study: Callable[..., StudyConfig], make_run: MakeRun
) -> None:
    with pytest.raises(StudyError, match="at least 8, got 3"):
        Effort(shadows=3)
    folder = make_run(make_private_study(evaluation="withheld"))
    with pytest.raises(StudyError, match="withholds its held-out patients"):
        audit_run(folder, effort=Effort(runs=20, canaries=10, shadows=8))


def test_run_whose_noise_is_too_small_ends_with_exit_code_one(
    make_private_study: Callable[..., StudyConfig], make_run: MakeRun
) -> None:
    folder = make_run(make_private_study(steps_per_round=1, noise_multiplier=2.0, sampling_rate=1.0))
    with patch.object(private_trainer, "add_gaussian", lambda sum_P, **_: sum_P):
        shown = CliRunner().invoke(app, [str(folder), "--runs", "60", "--canaries", "12"])
    assert shown.exit_code == 1, shown.output
    assert "does not hold" in shown.stdout
    result = read_audit(folder)
    assert result is not None
    assert result.refuted
    assert 'role="alert"' in audit_fragment(folder)


def test_run_without_privacy_has_attacks_and_no_claim(
    make_study: Callable[..., StudyConfig], make_run: MakeRun
) -> None:
    result = audit_run(make_run(make_study()), effort=Effort(runs=60, canaries=12, shadows=8, inversion_steps=1))
    assert result.shadows is not None
    assert result.shadows.released[1].attack == "likelihood-ratio"
    assert result.adapter_inversion is not None
    assert [(bound.attack, bound.claimed) for bound in result.bounds] == [("one-run-images", None)]
    assert result.claimed is None
    assert not result.refuted
    assert "Nothing is promised" in result.sentence


@pytest.mark.parametrize("broken", [{}, {"noise": 1}])
def test_damaged_audit_is_refused(tmp_path: Path, broken: dict[str, Any]) -> None:
    assert read_audit(tmp_path) is None
    assert audit_fragment(tmp_path) == ""
    (tmp_path / "audit.json").write_text(json.dumps(broken))
    with pytest.raises(CheckpointError, match="run medfed audit again"):
        read_audit(tmp_path)


def test_folder_that_is_no_run_and_site_that_is_not_there_are_refused(
    tmp_path: Path, make_private_study: Callable[..., StudyConfig], make_run: MakeRun
) -> None:
    with pytest.raises(CheckpointError, match="study.json"):
        audit_run(tmp_path)
    folder = make_run(make_private_study())
    with pytest.raises(StudyError, match="north, south"):
        audit_run(folder, site="nowhere", effort=LITTLE)
