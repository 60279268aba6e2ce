"""What was measured after training, beyond the score that studies are compared by: ``evaluation.json`` of a run.

Whoever ran the study writes it; the report reads it. It holds numbers over patients, never a patient's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medfed.errors import CheckpointError
from server.results import Column

EVALUATION = "evaluation.json"

EvaluatedColumn = Literal["zero_shot", "local_only", "federated", "pooled", "left_out"]
"""The arms, and the federation of all other sites (leave one hospital out)."""

Comparison = Literal["joining", "pooling", "adapting", "being_in"]
"""``joining``: federated less local-only. ``pooling``: pooled less federated. ``adapting``: federated less zero-shot.
``being_in``: federated less the federation without the site."""

COMPARISONS: dict[Comparison, tuple[EvaluatedColumn, EvaluatedColumn]] = {
    "joining": ("federated", "local_only"),
    "pooling": ("pooled", "federated"),
    "adapting": ("federated", "zero_shot"),
    "being_in": ("federated", "left_out"),
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measured(_Part):
    """A value and its 95 % interval over resampled patients; no interval where there are too few to have one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_told_from_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


class Reliability(_Part):
    """Bins of equal width of the likeliest class's confidence; sums, so that those of two sites add up."""

    count: tuple[int, ...]
    confidence: tuple[float, ...]
    correct: tuple[int, ...]


class Calibration(_Part):
    """Of one target, in the federated arm.

    Attributes:
        temperature: fitted on the site's training patients.
        before: bins as predicted.
        after: bins after dividing logits by the temperature.
    """

    temperature: float
    before: Reliability
    after: Reliability


class Flips(_Part):
    """Cases (structures, or targets of images) and how they changed from zero-shot to federated.

    Attributes:
        cases: all of them.
        lost: cases that the untrained model did clearly better: Dice higher by over 0.05, or right and now wrong.
        gained: the other way round.
    """

    cases: int
    lost: int
    gained: int


class SiteEvaluation(_Part):
    """One site.

    Attributes:
        patients: held-out patients.
        images: of them.
        distance_unit: of surface distances; None for a classifier.
        metrics: metric -> column -> value; what has no value is absent.
        differences: comparison -> paired difference of the primary metric, over the same resampled patients.
        calibration: target -> calibration; empty for segmentation.
        flips: what was forgotten of the untrained model's skill on the site's own cases; None without a skill.
    """

    patients: int
    images: int
    distance_unit: Literal["mm", "px"] | None
    metrics: dict[str, dict[EvaluatedColumn, Measured]]
    differences: dict[Comparison, Measured]
    calibration: dict[str, Calibration]
    flips: Flips | None


class OverSites(_Part):
    """A metric over sites.

    Attributes:
        mean: over the sites that have it.
        worst: the least favourable of them.
        worst_site: whose that is.
        gap: between the most and the least favourable.
    """

    mean: float
    worst: float
    worst_site: str
    gap: float


class GroupFairness(_Part):
    """Groups of patients over all sites, in the federated arm.

    Attributes:
        attribute: what tells the groups apart.
        cases: group -> cases in it.
        scores: group -> mean Dice, or fraction of targets predicted right.
        parity: target and class -> demographic parity difference; empty for segmentation.
        odds: target and class -> equalised odds difference, likewise.
    """

    attribute: str
    cases: dict[str, int]
    scores: dict[str, float]
    parity: dict[str, float]
    odds: dict[str, float]


class Saliency(_Part):
    """Whether a classifier looks where the expert does, over all sites' images with an outlined lesion.

    Attributes:
        target: whose true class's logit was explained.
        images: explained ones.
        mask_share: mean share of the image inside of the outline: what chance scores.
        pointing: fraction of images whose most salient point lies inside.
        mass: mean share of positive saliency that lies inside.
    """

    target: str
    images: int
    mask_share: float
    pointing: dict[EvaluatedColumn, float]
    mass: dict[EvaluatedColumn, float]


class Embedding(_Part):
    """How many directions the embedding of held-out images uses (effective rank).

    Attributes:
        images: of all sites.
        features: width of the embedding; no rank is above it, or above ``images`` less one.
        effective_rank: by column.
    """

    images: int
    features: int
    effective_rank: dict[EvaluatedColumn, float]


class Skill(_Part):
    """Mean Dice before and after training, and how it changed.

    Attributes:
        before: of the backbone as it was published.
        after: of the federated arm.
        change: after less before, over the same resampled patients.
    """

    before: Measured
    after: Measured
    change: Measured


class UntrainedStructure(Skill):
    """Skill on one structure that the study does not train.

    Attributes:
        cases: held-out images with it.
        other_side: whether its mirror image is trained.
    """

    cases: int
    other_side: bool


class Forgetting(_Part):
    """What training took from, or gave to, structures that it never showed: over all sites' held-out patients.

    Attributes:
        patients: all sites' together; each is resampled among those of its site.
        flips: cases that were clearly lost and gained.
        structures: name -> skill.
        other_sides: mean over the structures whose mirror image is trained; None if there is none.
        neither_side: mean over those trained on neither side, likewise.
    """

    patients: int
    flips: Flips
    structures: dict[str, UntrainedStructure]
    other_sides: Skill | None
    neither_side: Skill | None


class NotMeasured(_Part):
    """Why something was not: half a sentence, without a full stop."""

    why: str


class Evaluation(_Part):
    """Everything.

    Attributes:
        resamples: draws of patients behind every interval.
        sites: in the order of the study.
        over_sites: metric -> column -> over the sites.
        groups: one for each attribute of the manifests.
        embedding: None if there are fewer than two held-out images.
        saliency: None without expert outlines.
        forgetting: skill on structures that the study does not train, or why that was not measured.
        seconds: that it took.
    """

    resamples: int
    sites: dict[str, SiteEvaluation]
    over_sites: dict[str, dict[EvaluatedColumn, OverSites]]
    groups: tuple[GroupFairness, ...]
    embedding: Embedding | None
    saliency: Saliency | None
    forgetting: Forgetting | NotMeasured = NotMeasured(why="this run was evaluated before medfed looked at it")
    seconds: float

    def difference(self, comparison: Comparison) -> dict[str, Measured]:
        """A comparison at each site that has it."""
        return {name: site.differences[comparison] for name, site in self.sites.items()
                if comparison in site.differences}  # fmt: skip

    @property
    def columns(self) -> tuple[EvaluatedColumn, ...]:
        """The columns that were evaluated anywhere."""
        every: tuple[EvaluatedColumn, ...] = ("zero_shot", "local_only", "federated", "pooled", "left_out")
        found = {column for metric in self.over_sites.values() for column in metric}
        return tuple(column for column in every if column in found)


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation of a run; None if it has none.

    Raises:
        CheckpointError: if the file is something else.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return None
    try:
        return Evaluation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"Expected the evaluation of a run at {path}, got: {where} {first['msg']}; remove the file and resume the "
            "run, which writes it again."
        ) from None


def as_column(column: EvaluatedColumn) -> Column | None:
    """The column of the results table, or None for the federation without a site."""
    return None if column == "left_out" else column
