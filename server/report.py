"""The report of a run: one HTML file that needs nothing else, made from the files of the run folder alone.

What it holds, in the order in which a reader asks: the result and its limits, the numbers, pictures, what was
run, how to run it again, and what nobody measured.
"""

from __future__ import annotations

import base64
import json
import platform
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from medfed.errors import CheckpointError
from medfed.payload import HEADER_BYTES
from medfed.study import ALL_SITES, POOLED_SITE, StudyConfig, parse_study
from server.audit_fragment import audit_fragment
from server.checkpoint import write_durably
from server.evaluation import Evaluation, read_evaluation
from server.few_shot import FewShot, read_few_shot
from server.listed import listed
from server.model_card import model_card
from server.report_evaluation import view_of
from server.report_few_shot import few_shot_view
from server.report_figures import draw_losses, draw_scores
from server.report_gaps import not_measured
from server.results import (
    DECIMALS,
    Results,
    caveats,
    column_labels,
    read_results,
    result_sentence,
    rows_of,
)
from strategies.registry import strategy_of

REPORT = "report.html"

_BYTES_PER_ELEMENT = 4
_PACKAGES = ("medfed", "torch", "flwr", "peft", "opacus", "dp-accounting")
_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}


class Caption(BaseModel):
    """One entry of ``figures/captions.json``.

    Attributes:
        file: name of an image in the same folder.
        title: heading.
        caption: one or two sentences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    title: str
    caption: str


@dataclass(frozen=True)
class _Picture:
    title: str
    caption: str
    data_uri: str


def write_report(folder: Path) -> Path:
    """Render ``report.html`` of a finished run, replacing an earlier one, and return its path.

    The same folder and the same installed versions give the same bytes.

    Args:
        folder: with ``study.json`` and ``summary.json``; ``metrics.jsonl``, ``arms/*/metrics.jsonl``,
            ``inspection.jsonl``, ``evaluation.json``, ``few_shot.json``, ``audit.json`` and ``figures/captions.json``
            add to the report if they are there.

    Raises:
        CheckpointError: if this is no folder of a finished run, or one of its files is damaged.
        StudyError: if its study is not one.
    """
    study = _study(folder)
    results = read_results(folder)
    labels = column_labels(study.task.kind)
    metrics = _metrics(folder / "metrics.jsonl")
    pooled = _metrics(folder / "arms" / POOLED_SITE / "metrics.jsonl")
    evaluation, few_shot, audit = read_evaluation(folder), read_few_shot(folder), audit_fragment(folder)
    page = _template().render(
        study=study,
        results=results,
        run_name=folder.resolve().name,
        sentence=result_sentence(results, labels),
        caveats=caveats(results, labels),
        view=None if evaluation is None else view_of(evaluation, labels, results.metric_name),
        few_shot=None if few_shot is None else few_shot_view(few_shot, labels, results.metric_name),
        shows_own_images=study.cohort is None and not study.is_for_hospitals,
        columns=[(column, labels[column]) for column in results.columns],
        rows=rows_of(results),
        decimals=DECIMALS,
        scores_svg=draw_scores(results, labels) if results.columns else "",
        losses_svg=draw_losses([*metrics, *pooled], (*study.site_names, ALL_SITES), POOLED_SITE),
        has_pooled_loss=bool(pooled),
        pictures=_pictures(folder / "figures"),
        facts=_facts(study, results),
        card=model_card(study, results),
        held_out=_held_out_images([*metrics, *_metrics(folder / "inspection.jsonl")]),
        study_text=_study_text(study),
        versions=_versions(),
        not_measured=not_measured(study, evaluation, few_shot, is_audited=bool(audit)),
        audit=audit,
        command=_command(results, evaluation, few_shot),
    )
    path = folder / REPORT
    write_durably(path, page.encode("utf-8"))
    return path


def _command(results: Results, evaluation: Evaluation | None, few_shot: FewShot | None) -> str:
    """What runs the same arms of the same study, once it is in a file."""
    words = ["medfed", "simulate", "STUDY.toml"]
    if "local_only" not in results.columns:
        words += ["--no-baselines"]
    if evaluation is not None and "left_out" in evaluation.columns:
        words += ["--leave-one-out"]
    if few_shot is not None:
        words += ["--few-shot", ",".join(str(point.patients) for point in few_shot.trained[:-1])]
    return " ".join(words)


def _where(study: StudyConfig) -> str:
    return "from the first try to the last round" if study.is_for_hospitals else "on one machine, all arms together"


def _template() -> Any:
    pages = FunctionLoader(lambda name: resources.files("server").joinpath(name).read_text("utf-8"))
    environment = Environment(
        loader=pages, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def _study(folder: Path) -> StudyConfig:
    path = folder / "study.json"
    if not path.is_file():
        raise CheckpointError(f"Expected a run folder with study.json, got {folder}; check the path.")
    return parse_study(path.read_bytes())


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a ``metrics.jsonl``; none if the arm was not run."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise CheckpointError(
            f"Expected one JSON object per line in {path}, got: {error}; resume the run, which rewrites it."
        ) from None


def _pictures(folder: Path) -> list[_Picture]:
    """The images that ``captions.json`` names, each as a data URI."""
    index = folder / "captions.json"
    if not index.is_file():
        return []
    try:
        captions = TypeAdapter(list[Caption]).validate_json(index.read_bytes())
    except ValidationError:
        raise CheckpointError(
            f"Expected a list of file, title and caption in {index}, got something else; resume the run."
        ) from None
    return [_picture(folder, caption) for caption in captions]


def _picture(folder: Path, caption: Caption) -> _Picture:
    path = folder / caption.file
    media_type = _IMAGE_TYPES.get(path.suffix)
    if media_type is None or Path(caption.file).name != caption.file or not path.is_file():
        raise CheckpointError(
            f"Expected a PNG, JPEG or SVG file in {folder}, got {caption.file!r}; resume the run to draw it again."
        )
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return _Picture(caption.title, caption.caption, f"data:{media_type};base64,{data}")


def _facts(study: StudyConfig, results: Results) -> list[tuple[str, str]]:
    """The study in plain words: term and description."""
    manifest = study.resolved_manifest
    training, adapter = study.training, study.adapter
    by_size = study.strategy.weighting == "examples"
    size = "number of training images" if study.privacy is None else "declared size"
    weighed = f"a site counts by its {size}" if by_size else "every site counts the same"
    amount = _amount_of_training(study)
    decay = f", weight decay {training.weight_decay:g}" if training.weight_decay else ""
    return [
        ("Task", _task_in_words(study)),
        ("Backbone", f"{study.backbone.name}, frozen; weights with SHA-256 {study.backbone.sha256[:16]}…"),
        (
            "Adapter",
            f"{adapter.in_words}: {manifest.num_elements:,} parameters in {len(manifest.tensors)} tensors",
        ),
        (
            "One update",
            f"{_bytes_in_words(study)}; no image travels",
        ),
        (
            "Rounds",
            f"{results.rounds} of {study.rounds.num_rounds}, quorum {study.quorum} of {len(study.sites)} sites",
        ),
        (
            "At each site",
            f"{amount}, {training.optimizer} with learning rate "
            f"{training.learning_rate:g}{decay}, augmentation {training.augmentation}",
        ),
        ("Aggregation", f"{_strategy_in_words(study)}; {weighed}"),
        ("Time", f"{results.wall_s:,.0f} s {_where(study)}"),
    ]


def _bytes_in_words(study: StudyConfig) -> str:
    """What travels in a round, without masks: an upload, and the adapter with all that is told beside it."""
    strategy, manifest = strategy_of(study), study.resolved_manifest
    told = strategy.plan(study.rounds.num_rounds).broadcast
    up_bytes, down_bytes = (
        _BYTES_PER_ELEMENT * size + HEADER_BYTES for size in (strategy.num_uploaded, manifest.num_elements)
    )
    if told is None:
        return f"{up_bytes:,} bytes from each site in every round, {down_bytes:,} to it"
    down_bytes += _BYTES_PER_ELEMENT * told.num_elements + HEADER_BYTES
    return f"{up_bytes:,} bytes from each site in every round, up to {down_bytes:,} to it"


def _strategy_in_words(study: StudyConfig) -> str:
    config, parts = study.strategy, [study.strategy.name]
    if config.local is not None:
        parts.append(f"sites train by {config.local.method}")
    if config.personal is not None:
        parts.append(f"sites differ by {config.personal.method}")
    if config.server is not None:
        parts.append(f"the server steps by {config.server.optimizer}")
    if config.shrinkage:
        parts.append("noise is shrunk out of the mean change")
    if strategy_of(study).remembers_at_sites:
        parts.append("scores are of each site's own model where sites differ")
    return ", ".join(parts)


def _amount_of_training(study: StudyConfig) -> str:
    training, privacy = study.training, study.privacy
    if privacy is None:
        epochs = training.local_epochs
        return f"{epochs} local epoch{'s' if epochs != 1 else ''} in batches of {training.batch_size}"
    steps = privacy.steps_per_round
    images = privacy.images_per_patient
    limit = f", at most {images} image{'s' if images != 1 else ''} each" if images else ""
    return (
        f"{steps} step{'s' if steps != 1 else ''} a round, each on a random {privacy.sampling_rate:.0%} of all "
        f"{privacy.unit}s{limit}, clipped to norm {privacy.clip_norm:g}"
    )


def _task_in_words(study: StudyConfig) -> str:
    if study.task.kind == "segmentation":
        return f"segmentation of {listed(study.task.classes)}, each prompted with a box"
    targets = [f"{name} ({' / '.join(classes)})" for name, classes in study.task.targets.items()]
    return f"classification of {listed(targets)}"


def _held_out_images(metrics: list[dict[str, Any]]) -> dict[str, int]:
    """Images that each site was evaluated on."""
    return {
        line["site"]: line["num_examples"]
        for line in metrics
        if line["event"] == "evaluate" and line.get("num_examples")
    }


def _study_text(study: StudyConfig) -> str:
    """The study without what a reader does not need (tensor list) or must not see (paths to data)."""
    shown = study.model_dump(mode="json", exclude={"manifest": True, "sites": {"__all__": {"data"}}}, exclude_none=True)
    return json.dumps(shown, indent=2)


def _versions() -> list[tuple[str, str]]:
    return [("python", platform.python_version()), *((name, metadata.version(name)) for name in _PACKAGES)]
