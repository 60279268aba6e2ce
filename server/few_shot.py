"""How good each arm is by the number of training patients of each site: ``few_shot.json`` of a run.

Whoever simulated the study writes it; the report reads it. It holds numbers over patients, never a patient's own.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from medfed.errors import CheckpointError
from server.evaluation import Measured
from server.results import Column

FEW_SHOT_FILE = "few_shot.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FewShotPoint(_Part):
    """All arms with one number of training patients of each site.

    Attributes:
        patients: that each site trained on at most; 0 before training.
        patients_at: site -> how many that were there.
        mean: column -> primary metric, mean over sites; before training ``zero_shot`` alone.
        sites: site -> column -> primary metric.
        joining: federated less local-only, mean over sites, over the same resampled patients; None without baselines.
        joining_at: site -> the same of one site.
    """

    patients: int
    patients_at: dict[str, int]
    mean: dict[Column, Measured]
    sites: dict[str, dict[Column, Measured]]
    joining: Measured | None
    joining_at: dict[str, Measured]


class FewShot(_Part):
    """The curve.

    Attributes:
        resamples: draws of held-out patients behind every interval; each site's are resampled by themselves.
        metric: the primary metric; larger is better.
        points: from no patient to all of them.
    """

    resamples: int
    metric: str
    points: tuple[FewShotPoint, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """The arms that were trained."""
        every: tuple[Column, ...] = ("local_only", "federated", "pooled")
        return tuple(column for column in every if column in self.points[-1].mean)

    @property
    def trained(self) -> tuple[FewShotPoint, ...]:
        """The points with a patient."""
        return tuple(point for point in self.points if point.patients)

    @property
    def before(self) -> Measured | None:
        """The mean over sites before training: the same in every arm."""
        return self.points[0].mean.get("zero_shot")

    @property
    def has_joining(self) -> bool:
        """Whether there are local-only arms to compare the federation with."""
        return self.points[-1].joining is not None

    def is_all(self, point: FewShotPoint) -> bool:
        """Whether every site gave all of its training patients."""
        return point == self.points[-1]

    def label(self, point: FewShotPoint) -> str:
        """What a point is called: how many patients, and of the last one that they are all."""
        if not self.is_all(point):
            return str(point.patients)
        fewest, most = min(point.patients_at.values()), max(point.patients_at.values())
        return f"all ({most})" if fewest == most else f"all ({fewest} to {most})"


def read_few_shot(folder: Path) -> FewShot | None:
    """The curve of a run; None if it has none.

    Raises:
        CheckpointError: if the file is something else.
    """
    path = folder / FEW_SHOT_FILE
    if not path.is_file():
        return None
    try:
        return FewShot.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"Expected the few-shot curve of a run at {path}, got: {where} {first['msg']}; remove the file and resume "
            "the run, which writes it again."
        ) from None
