"""The report: made from files alone, self-contained, honest, and safe to open."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import server.report
from medfed.adapter_manifest import AdapterManifest, TensorSpec
from medfed.errors import CheckpointError, StudyError
from medfed.study import StudyConfig
from server.report import write_report
from server.report_command import app
from server.results import column_labels, read_results, result_sentence, rows_of

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000" "1f15c4890000000d49444154789c6360000002000001e5"
    "27de7c0000000049454e44ae426082"
)  # fmt: skip
PRIVACY = "Nothing here is private: updates are neither clipped, noised nor masked."
COLUMNS = ("zero_shot", "local_only", "federated", "pooled")

SEGMENTATION = {
    "north": {"dice": (0.801, 0.842, 0.861, 0.868), "dice/thalamus": (0.82, 0.85, 0.87, 0.87),
              "dice/putamen": (0.782, 0.834, 0.852, 0.866)},
    "south": {"dice": (0.702, 0.811, 0.803, 0.83), "dice/thalamus": (0.71, 0.82, 0.81, 0.84),
              "dice/putamen": (0.694, 0.802, 0.796, 0.82)},
    "east": {"dice": (0.61, 0.69, 0.745, 0.752), "dice/thalamus": (0.64, 0.70, 0.76, 0.76),
             "dice/putamen": (0.58, 0.68, 0.73, 0.744)},
}  # fmt: skip


def make_study(sites=("north", "south", "east"), *, task=None) -> StudyConfig:
    classification = task == "classification"
    return StudyConfig.model_validate(
        {
            "name": "brain-structures",
            "seed": 7,
            "backbone": {"name": "vit-s-focus" if classification else "lite-medsam", "sha256": "ab" * 32},
            "adapter": {"rank": 4, "alpha": 8, "targets": "decoder-qv"},
            "task": {"kind": "classification", "targets": {"lesion_present": ["no", "yes"]}}
            if classification
            else {"kind": "segmentation", "classes": ["thalamus", "putamen"]},
            "training": {"local_epochs": 1, "batch_size": 4, "learning_rate": 1e-3},
            "rounds": {"num_rounds": 3},
            "cohort": {"kind": "brain-lesions" if classification else "brain-structures"},
            "sites": [
                {"name": name, "scanner": "bias-3t", "train_patients": 12, "test_patients": 6}
                | ({"lesion_prevalence": 0.5} if classification else {})
                for name in sites
            ],
            "manifest": AdapterManifest(
                method="lora",
                rank=4,
                tensors=(TensorSpec(name="a", shape=(4, 256)), TensorSpec(name="b", shape=(256, 4))),
            ),
        }
    )


def make_summary(scores=SEGMENTATION, *, primary="dice", columns=COLUMNS, **changes) -> dict:
    sites = {
        site: {
            metric: {c: v for c, v in zip(COLUMNS, values, strict=True) if c in columns}
            for metric, values in metrics.items()
        }
        for site, metrics in scores.items()
    }
    by_column = {c: [metrics[primary][c] for metrics in sites.values()] for c in columns}
    return {
        "run_dir": "/somewhere/else",
        "study": "brain-structures",
        "rounds": 3,
        "wall_s": 48.2,
        "primary": primary,
        "sites": sites,
        "mean": {c: sum(v) / len(v) for c, v in by_column.items()},
        "worst_site": {c: min(v) for c, v in by_column.items()},
        "privacy": {"promise": "", "warnings": [PRIVACY]},
        "cohort": "anatomy from 1 real brain (MNI152 average), patients are synthetic warps",
        **changes,
    }


def make_run(folder: Path, study=None, summary=None, *, captions=(), pooled=True) -> Path:
    study = study or make_study()
    summary = summary or make_summary()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_bytes(study.canonical)
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"event": "evaluate", "scope": "federated", "round": 0, "site": site, "num_examples": 6, "dice": 0.5}
        for site in study.site_names
    ]
    lines += [
        {"event": "train", "scope": "federated", "round": r, "site": site, "loss": (0.5 + 0.07 * i) * 0.8**r}
        for r in range(1, 4)
        for i, site in enumerate(study.site_names)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if pooled:
        (folder / "arms/pooled").mkdir(parents=True, exist_ok=True)
        (folder / "arms/pooled/metrics.jsonl").write_text(
            "".join(
                json.dumps({"event": "train", "scope": "pooled", "round": r, "site": "pooled", "loss": 0.5 * 0.75**r})
                + "\n"
                for r in range(1, 4)
            )
        )
    if captions:
        (folder / "figures").mkdir(exist_ok=True)
        (folder / "figures/one.png").write_bytes(PNG)
        (folder / "figures/captions.json").write_text(json.dumps(list(captions)))
    return folder


def render(folder: Path) -> str:
    return write_report(folder).read_text("utf-8")


def text_of(html: str) -> str:
    body = re.sub(r"<(style|svg)\b.*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", captions=[{"file": "one.png", "title": "North", "caption": "A brain."}])


def test_report_needs_nothing_outside_of_itself(run_dir: Path) -> None:
    html = render(run_dir)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", html)
    assert not re.search(r"url\(\s*['\"]?(?!#)", html)
    assert "<script" not in html
    assert "@import" not in html
    assert "<link" not in html
    references = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)


def test_inline_drawings_share_no_ids(run_dir: Path) -> None:
    ids = re.findall(r'\bid="([^"]*)"', render(run_dir))
    assert len(ids) == len(set(ids))
    html = render(run_dir)
    assert set(re.findall(r'href="#([^"]*)"', html)) | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_the_same_folder_gives_the_same_bytes(run_dir: Path) -> None:
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_privacy_sentence_is_there_and_red(run_dir: Path) -> None:
    html = render(run_dir)
    assert f'<p class="privacy" role="note">{PRIVACY}</p>' in html
    assert re.search(r"\.privacy \{ color: var\(--red\)", html)
    reds = re.findall(r"--red: #(\w{2})(\w{2})(\w{2})", html)
    assert len(reds) == 2  # light and dark
    assert all(int(r, 16) > 1.3 * max(int(g, 16), int(b, 16)) for r, g, b in reds)


def test_numbers_of_the_table_are_those_of_the_summary(run_dir: Path) -> None:
    table = render(run_dir).split("<table>")[1].split("</table>")[0]
    shown = [
        [float(cell) for cell in re.findall(r'<td class="number[^"]*">([\d.]+)', row)]
        for row in table.split("</tr>")
        if "<td" in row
    ]
    summary = make_summary()
    expected = []
    for metrics in summary["sites"].values():
        expected += [metrics["dice/thalamus"], metrics["dice/putamen"], metrics["dice"]]
    expected += [summary["mean"], summary["worst_site"]]
    assert shown == [[round(row[c], 3) for c in COLUMNS] for row in expected]


def test_best_trained_column_is_marked_and_zero_shot_never(tmp_path: Path) -> None:
    scores = {"a": {"dice": (0.99, 0.5, 0.7, 0.6)}, "b": {"dice": (0.1, 0.7001, 0.7003, 0.6)}}
    results = read_results(make_run(tmp_path / "r", make_study(("a", "b")), make_summary(scores)))
    assert [row.best for row in rows_of(results)][:2] == [{"federated"}, {"local_only", "federated"}]


@pytest.mark.parametrize(
    ("before", "after", "verb"), [(0.5, 0.6, "rises"), (0.6, 0.5, "falls"), (0.6001, 0.6003, "stays")]
)
def test_result_sentence_says_which_way_it_went(tmp_path: Path, before: float, after: float, verb: str) -> None:
    scores = {"a": {"dice": (before, 0.4, after, 0.7)}, "b": {"dice": (before, 0.3, after, 0.7)}}
    results = read_results(make_run(tmp_path / "r", make_study(("a", "b")), make_summary(scores)))
    sentence = result_sentence(results, column_labels("segmentation"))
    assert f" {verb}" in sentence
    assert f"{before:.3f} (zero-shot) to {after:.3f}" in sentence
    assert f"worst site reaches 0.300 training alone and {after:.3f} federated" in sentence
    assert f"gives 0.700, {0.7 - round(after, 3):.3f} above federated" in sentence


def test_sites_that_do_better_alone_are_named(run_dir: Path) -> None:
    assert "Training alone beats federated: south (0.811 against 0.803)." in text_of(render(run_dir))


def test_loss_in_the_mean_is_named(tmp_path: Path) -> None:
    scores = {"a": {"dice": (0.1, 0.9, 0.5, 0.9)}, "b": {"dice": (0.1, 0.5, 0.5, 0.9)}}
    text = text_of(render(make_run(tmp_path / "r", make_study(("a", "b")), make_summary(scores))))
    assert "Training alone beats federated: a (0.900 against 0.500), mean of sites (0.700 against 0.500)." in text


def test_sites_that_federation_harms_are_named(tmp_path: Path) -> None:
    scores = {"a": {"dice": (0.9, 0.9, 0.8, 0.95)}}
    text = text_of(render(make_run(tmp_path / "r", make_study(("a",)), make_summary(scores))))
    assert "Federated is below zero-shot: a (0.900 against 0.800)." in text


def test_report_without_baselines_leaves_their_columns_out(tmp_path: Path) -> None:
    summary = make_summary(columns=("zero_shot", "federated"))
    html = render(make_run(tmp_path / "r", summary=summary, pooled=False))
    text = text_of(html)
    assert "local-only" not in text
    assert "pooled" not in text
    assert 'class="number best"' not in html


def test_report_of_one_site_has_no_rows_over_sites(tmp_path: Path) -> None:
    summary = make_summary({"north": SEGMENTATION["north"]}, columns=("zero_shot", "federated"))
    text = text_of(render(make_run(tmp_path / "r", make_study(("north",)), summary, pooled=False)))
    assert "Dice on held-out patients at north rises from 0.801" in text
    assert "worst site" not in text


def test_classification_does_not_claim_zero_shot(tmp_path: Path) -> None:
    scores = {
        "north": {
            "balanced-accuracy": (0.5, 0.7, 0.8, 0.82),
            "balanced-accuracy/lesion_present": (0.5, 0.7, 0.8, 0.82),
        }
    }
    summary = make_summary(scores, primary="balanced-accuracy")
    text = text_of(render(make_run(tmp_path / "r", make_study(("north",), task="classification"), summary)))
    assert "zero-shot" not in text
    assert "before training" in text
    assert "Balanced accuracy on held-out patients at north rises" in text


def test_hostile_text_is_shown_not_run(tmp_path: Path) -> None:
    hostile = "<script>alert('&\"')</script>"
    scores = {hostile: {"dice": (0.1, 0.2, 0.3, 0.4), f"dice/{hostile}": (0.1, 0.2, 0.3, 0.4)}}
    summary = make_summary(scores, study=hostile, privacy={"promise": hostile, "warnings": [hostile]}, cohort=hostile)
    captions = [{"file": "one.png", "title": f'"><img src=x onerror=y>{hostile}', "caption": hostile}]
    html = render(make_run(tmp_path / "r", summary=summary, captions=captions))
    assert "<script" not in html
    assert "<img src=x" not in html
    assert html.count("&lt;script&gt;") >= 7


def test_study_facts_are_those_of_the_study(run_dir: Path) -> None:
    study, text = make_study(), text_of(render(run_dir))
    assert "lora of rank 4, alpha 8, on decoder-qv: 2,048 parameters in 2 tensors" in text
    assert f"{2048 * 4 + 64:,} bytes" in text
    assert f"SHA-256 {study.backbone.sha256[:16]}" in text
    assert study.digest in text
    assert "bias-3t 12 6 6" in text


def test_paths_to_data_are_not_in_the_report(tmp_path: Path) -> None:
    study = make_study(("north",)).replace(cohort=None, sites=[{"name": "north", "data": "/secret/place/manifest.csv"}])
    summary = make_summary({"north": SEGMENTATION["north"]})
    html = render(make_run(tmp_path / "r", study, summary))
    assert "/secret/place" not in html
    assert "/somewhere/else" not in html
    assert "keep it where they are kept" in html


@pytest.mark.parametrize("name", ["../study.json", "missing.png", "captions.json", "/etc/hostname"])
def test_pictures_come_from_the_figures_folder_alone(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "r", captions=[{"file": name, "title": "t", "caption": "c"}])
    with pytest.raises(CheckpointError, match="PNG, JPEG or SVG"):
        write_report(run)


def test_folder_that_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Expected a run folder with study\.json"):
        write_report(tmp_path)


def test_unfinished_run_is_refused_with_the_way_to_finish_it(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="medfed simulate --resume"):
        write_report(run_dir)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("summary.json", "{}", CheckpointError),
        ("summary.json", json.dumps(make_summary(wall_s=float("nan"))), CheckpointError),
        ("metrics.jsonl", "{", CheckpointError),
        ("figures/captions.json", "{}", CheckpointError),
        ("study.json", "{}", StudyError),
    ],
)
def test_damaged_file_is_one_line_that_names_it(run_dir: Path, name: str, content: str, error: type) -> None:
    (run_dir / name).write_text(content)
    with pytest.raises(error) as caught:
        write_report(run_dir)
    assert "\n" not in str(caught.value)


def test_command_prints_the_path(run_dir: Path) -> None:
    plain = CliRunner().invoke(app, [str(run_dir)])
    as_json = CliRunner().invoke(app, [str(run_dir), "--json"])
    assert plain.exit_code == as_json.exit_code == 0
    assert plain.stdout.strip() == json.loads(as_json.stdout)["report"] == str(run_dir / "report.html")


def test_command_refuses_a_folder_that_is_no_run_folder(tmp_path: Path) -> None:
    assert isinstance(CliRunner().invoke(app, [str(tmp_path)]).exception, CheckpointError)


@pytest.mark.parametrize(
    ("columns", "evaluated", "shots", "options"),
    [
        (COLUMNS, None, None, ""),
        (("zero_shot", "federated"), None, None, " --no-baselines"),
        (COLUMNS, (*COLUMNS, "left_out"), None, " --leave-one-out"),
        (COLUMNS, COLUMNS, (1, 2, 5), " --few-shot 1,2"),  # the last is all that there are
    ],
)
def test_command_that_reproduces_a_run_asks_for_the_arms_that_ran(columns, evaluated, shots, options) -> None:
    evaluation = None if evaluated is None else SimpleNamespace(columns=evaluated)
    few_shot = None if shots is None else SimpleNamespace(trained=[SimpleNamespace(patients=n) for n in shots])
    command = server.report._command(SimpleNamespace(columns=columns), evaluation, few_shot)
    assert command == f"medfed simulate STUDY.toml{options}"
