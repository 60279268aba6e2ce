"""What ``medfed audit`` found about a run: ``audit.json`` of the run folder, and how it reads in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfed.errors import CheckpointError

AUDIT = "audit.json"

_Share = Annotated[float, Field(ge=0, le=1)]

Protection = Literal["off", "clipped", "clipped and noised", "masked"]

Attack = Literal["likelihood", "repeats", "replay", "one-run-gradients", "one-run-images"]

ATTACKS: dict[Attack, str] = {
    "likelihood": "many short runs: noised sums",
    "repeats": "many short runs: noise used again",
    "replay": "many short runs: noise that can be recomputed",
    "one-run-gradients": "one run: canaries with gradients of their own",
    "one-run-images": "one run: mislabelled images, by their loss",
}
"""Each attack in words."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AuditBound(_Frozen):
    """A lower bound on epsilon, beside the claim.

    Attributes:
        attack: which attack.
        epsilon: lower bound.
        claimed: epsilon that is claimed at the same delta; None where nothing is.
        delta: of both.
        confidence: with which this bound holds by itself.
        num_trials: runs, or canaries of one run.
        num_guessed: how many of them were guessed, where the bound was largest.
        num_correct: how many of these were guessed right.
    """

    attack: Attack
    epsilon: Annotated[float, Field(ge=0)]
    claimed: Annotated[float, Field(ge=0)] | None
    delta: _Share
    confidence: _Share
    num_trials: Annotated[int, Field(ge=1)]
    num_guessed: Annotated[int, Field(ge=0)]
    num_correct: Annotated[int, Field(ge=0)]

    @property
    def exceeds(self) -> bool:
        """Whether the claim is refuted."""
        return self.claimed is not None and self.epsilon > self.claimed


class Hits(_Frozen):
    """Members that are found at a false-alarm rate.

    Attributes:
        false_alarm_rate: at most this share of non-members is taken for members.
        share: of members that are found.
        low: lower end of the interval of Clopper and Pearson, 95 %; the threshold is taken as given.
        high: its upper end.
    """

    false_alarm_rate: _Share
    share: _Share
    low: _Share
    high: _Share


class Membership(_Frozen):
    """Membership inference on an adapter, or on several of the same patients.

    Attributes:
        attack: ``loss``: a low loss means a member. ``calibrated``: a loss that fell more than others since before
            training does. ``likelihood-ratio``: a loss that is rather that of adapters which had the patient.
        num_members: patients who trained it; of several adapters, all pairs of one and a patient who did.
        num_others: patients who did not, likewise.
        auroc: area under the ROC curve; 0.5 is guessing.
        low: lower end of its interval, 95 %, bootstrap over patients, and over adapters if there are several.
        high: its upper end.
        hits: at small false-alarm rates.
    """

    attack: Literal["loss", "calibrated", "likelihood-ratio"]
    num_members: Annotated[int, Field(ge=1)]
    num_others: Annotated[int, Field(ge=1)]
    auroc: _Share
    low: _Share
    high: _Share
    hits: tuple[Hits, ...]


class ShadowAttack(_Frozen):
    """Membership inference by shadow adapters (LiRA).

    Attributes:
        num_shadows: adapters that were trained for the attack.
        num_patients: of the audited site, half of whom trained each.
        num_newcomers: how many of them were made for the attack, and are in nobody's cohort.
        num_trained: patients of each shadow.
        released: on the adapter of the run: the site's training patients against the others.
        alone: on each shadow, by means of the others: adapters of the site alone, with nobody to average with.
    """

    num_shadows: Annotated[int, Field(ge=1)]
    num_patients: Annotated[int, Field(ge=1)]
    num_newcomers: Annotated[int, Field(ge=0)]
    num_trained: Annotated[int, Field(ge=1)]
    released: tuple[Membership, ...]
    alone: tuple[Membership, ...]


class Inversion(_Frozen):
    """How well an image is reconstructed from one update.

    Attributes:
        protection: of the update.
        psnr_db: peak signal-to-noise ratio beside the original, at most 120, which is exact.
        ssim: structural similarity; 1 is equal.
    """

    protection: Protection
    psnr_db: float
    ssim: float


class Search(_Frozen):
    """Where a search for the image behind an update of the study's own adapter ended.

    Attributes:
        protection: of the update.
        start: what the search began with.
        cosine: of the found image's gradient and the update; 1 is a perfect match.
        psnr_db: peak signal-to-noise ratio beside the original.
        ssim: structural similarity; 1 is equal.
        rank: place of the original among the site's training images, by how close they are to the found one (SSIM);
            1 is the closest.
    """

    protection: Protection
    start: Literal["noise", "mean image"]
    cosine: Annotated[float, Field(ge=-1.000001, le=1.000001)]
    psnr_db: float
    ssim: float
    rank: Annotated[int, Field(ge=1)]


class AdapterInversion(_Frozen):
    """Gradient inversion of the study's own adapter, through its frozen backbone.

    Attributes:
        steps: of each search.
        num_values: numbers of the update.
        num_pixels: numbers of the image that is searched.
        num_images: training images of the site, one of which is the original.
        mean_psnr_db: of the mean of all the others, which says nothing of the original.
        mean_ssim: likewise.
        searches: one or more of each protection.
    """

    steps: Annotated[int, Field(ge=1)]
    num_values: Annotated[int, Field(ge=1)]
    num_pixels: Annotated[int, Field(ge=1)]
    num_images: Annotated[int, Field(ge=2)]
    mean_psnr_db: float
    mean_ssim: float
    searches: tuple[Search, ...]


class AuditResult(_Frozen):
    """One audit.

    Attributes:
        study: name.
        study_digest: of the resolved study.
        site: whose training was run again.
        unit: of the promise; None without one.
        trust: of the promise; None without a [privacy] section.
        claimed: epsilon of the study; None where nothing is claimed.
        delta: of the claim; None likewise.
        noise_multiplier: z; None likewise.
        steps: noised steps of the study; None likewise.
        confidence: with which all bounds hold together.
        bounds: lower bounds.
        membership: inference on the released adapter; empty if it was not tried.
        shadows: inference by shadow adapters; None if none were trained.
        inversion: of one update of a first layer; empty if it was not tried.
        adapter_inversion: of one update of the study's adapter; None if it was not tried.
        notes: what a reader must know beside the numbers.
        wall_s: how long it took.
    """

    study: str
    study_digest: str
    site: str
    unit: Literal["patient", "record"] | None
    trust: Literal["site", "consortium", "none"] | None
    claimed: float | None
    delta: float | None
    noise_multiplier: float | None
    steps: int | None
    confidence: _Share
    bounds: tuple[AuditBound, ...]
    membership: tuple[Membership, ...]
    shadows: ShadowAttack | None = None
    inversion: tuple[Inversion, ...]
    adapter_inversion: AdapterInversion | None = None
    notes: tuple[str, ...]
    wall_s: float

    @property
    def refuted(self) -> bool:
        """Whether any bound exceeds its claim."""
        return any(bound.exceeds for bound in self.bounds)

    @property
    def sentence(self) -> str:
        """The outcome in plain words, with what it does not mean."""
        largest = max((bound.epsilon for bound in self.bounds), default=0.0)
        if self.refuted:
            worst = next(bound for bound in self.bounds if bound.exceeds)
            return (
                f"The promise does not hold: the attack '{ATTACKS[worst.attack]}' shows epsilon of at least "
                f"{worst.epsilon:.2f} where {worst.claimed:.2f} is claimed. Do not use this software for this study "
                "before the cause is found."
            )
        if self.claimed is None:
            return (
                f"Nothing is promised, and attacks show epsilon of at least {largest:.2f}: this study does not protect "
                "who is in it. More canaries would show more."
            )
        return (
            f"No attack contradicts the claimed epsilon of {self.claimed:.2f}; the best one shows at least "
            f"{largest:.2f}. That is a test passed, not a proof: a bound far below the claim may mean that the attack "
            "is weak. The promise rests on the accounting, the audit looks for faults in the code that keeps it."
        )


def read_audit(folder: Path) -> AuditResult | None:
    """The audit of a run folder; None if there was none.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = folder / AUDIT
    if not path.is_file():
        return None
    try:
        return AuditResult.model_validate_json(path.read_bytes())
    except ValidationError:
        raise CheckpointError(f"Expected an audit at {path}, got something else; run medfed audit again.") from None
