"""How a simulated hospital differs from the others: ``[sites.shift]`` of a study file.

A profile is a set of families, each of which may be absent. Where a study names strengths as a range, each image
(or patient) draws its own, uniformly. ``docs/domain-shift.md`` shows every family and where its size comes from;
:mod:`simulation.shift` applies them. A profile says nothing of real patients and binds nobody: it is for simulation.

A range is written as two numbers, ``[lowest, highest]``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from medfed.section import Name, Section


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"expected [lowest, highest], got [{bounds[0]:g}, {bounds[1]:g}]; exchange them")
    return bounds


def _is_none(value: object) -> bool:
    return value is None


_AtLeastZero = Annotated[float, Field(ge=0)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(gt=0)]
_PositiveFraction = Annotated[float, Field(gt=0, le=1)]

AnyRange = Annotated[tuple[float, float], AfterValidator(_ordered)]
Strengths = Annotated[tuple[_AtLeastZero, _AtLeastZero], AfterValidator(_ordered)]
"""A range of numbers of at least 0, where 0 changes nothing."""
Fractions = Annotated[tuple[_Fraction, _Fraction], AfterValidator(_ordered)]
Positives = Annotated[tuple[_Positive, _Positive], AfterValidator(_ordered)]
PositiveFractions = Annotated[tuple[_PositiveFraction, _PositiveFraction], AfterValidator(_ordered)]

Splits = Literal["train", "all"]
"""``train`` leaves held-out patients labelled as they should be, so that scores are against the truth."""


class ContrastShift(Section):
    """Another sequence or vendor: tissues keep their order of brightness, not its spacing.

    Attributes:
        gamma: exponent on grey levels; 1 changes nothing.
        histogram_points: control points of a random monotone map of grey levels; none if left out.
    """

    gamma: Positives = (1.0, 1.0)
    histogram_points: Annotated[int, Field(ge=4, le=64)] | None = None


class BiasFieldShift(Section):
    """Coil sensitivity: brightness drifts smoothly over the image.

    Attributes:
        strength: largest coefficient of the polynomial that is the logarithm of the field; 0 changes nothing.
        degree: of the polynomial.
    """

    strength: Strengths
    degree: Annotated[int, Field(ge=1, le=6)] = 3


class PointSpreadShift(Section):
    """Blur.

    Attributes:
        sigma_px: standard deviation of the Gaussian point spread; 0 changes nothing.
    """

    sigma_px: Strengths


class ResolutionShift(Section):
    """Larger pixels, interpolated back to the size they should have.

    Attributes:
        zoom: pixels along an edge, over those of the original; 1 changes nothing.
    """

    zoom: PositiveFractions


class SliceThicknessShift(Section):
    """Thick slices: tissue above and below is averaged in; the annotation is that of the middle.

    Attributes:
        thickness_mm: of the slab; 0 changes nothing.
    """

    thickness_mm: Annotated[float, Field(ge=0, le=20)]


class GhostingShift(Section):
    """Displaced copies along the rows, by pulsation or breathing.

    Attributes:
        intensity: fraction that every ``num_ghosts``-th line of k-space loses; 0 changes nothing.
        num_ghosts: copies over the field of view.
    """

    intensity: Fractions
    num_ghosts: Annotated[int, Field(ge=2, le=32)] = 4


class MotionShift(Section):
    """The patient moves while the outer lines of k-space are read.

    Attributes:
        max_shift_px: largest movement along rows and columns; 0 changes nothing.
        num_movements: positions that the outer lines are read at.
        still_fraction: lines around the middle that are read at rest, which fixes where the anatomy is.
    """

    max_shift_px: Strengths
    num_movements: Annotated[int, Field(ge=1, le=64)] = 6
    still_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1


class GibbsShift(Section):
    """Truncation ripples: the outer part of k-space is not read.

    Attributes:
        alpha: fraction of the radius that is lost; 0 changes nothing.
    """

    alpha: Fractions


class SpikesShift(Section):
    """A spark while a line is read: stripes over the whole image.

    Attributes:
        amplitude: of the stripes, over the image's mean; 0 changes nothing.
    """

    amplitude: Strengths


class NoiseShift(Section):
    """Thermal noise.

    Attributes:
        kind: ``rician`` (magnitude images of MRI) or ``gaussian``.
        sd: standard deviation, where healthy tissue is in [0, 1]; 0 changes nothing.
    """

    kind: Literal["rician", "gaussian"] = "rician"
    sd: Strengths


class WindowShift(Section):
    """The window in which images are stored: grey levels outside of it are cut off.

    Attributes:
        low: grey level that becomes 0, where the brightest tissue is 1; 0 changes nothing.
        high: grey level that becomes 1; 1 changes nothing.
    """

    low: Fractions = (0.0, 0.0)
    high: PositiveFractions = (1.0, 1.0)

    @model_validator(mode="after")
    def _is_open(self) -> WindowShift:
        if self.low[1] >= self.high[0]:
            raise ValueError(f"expected low below high, got {self.low[1]:g} and {self.high[0]:g}; part them")
        return self


class StainShift(Section):
    """Another laboratory's stain, for RGB images of histology: ``medfed cohort shift``.

    Attributes:
        space: ``hed`` (fixed stain vectors, Tellez et al. 2018) or ``macenko`` (the image's own, Macenko et al. 2009).
        scale: each stain's concentration is multiplied by 1 plus or minus a number up to this; 0 changes nothing.
        offset: and has a number up to this added or taken away.
    """

    space: Literal["hed", "macenko"] = "hed"
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    offset: Annotated[float, Field(ge=0, le=1)] = 0.0


class LabelShift(Section):
    """Other patients come: for lesions, who has one and of which side and size.

    Attributes:
        finding: row of the real prevalence table, in place of the site's ``lesion_prevalence``.
        source: column of the table: the hospitals or data set it was counted in.
        concentration: alpha of a Dirichlet distribution around the types' common proportions, from which the site's
            own are drawn once (Hsu et al. 2019), and by those each patient's: none, or one of two sides and two sizes.
            Small is extreme. Left out: the common ones.
    """

    finding: Name | None = None
    source: Name | None = None
    concentration: Annotated[float, Field(gt=0, le=1e6)] | None = None

    @model_validator(mode="after")
    def _table_has_row_and_column(self) -> LabelShift:
        if (self.finding is None) != (self.source is None):
            raise ValueError("finding and source name one number of the prevalence table together; add the other one")
        if self.finding is None and self.concentration is None:
            raise ValueError("expected finding and source, or concentration, got nothing; remove labels")
        return self


class AnnotatorShift(Section):
    """Those who outline do it in their own way.

    Attributes:
        margin_px: outlines lie this far outside of the truth, or inside if negative; drawn for each image.
        boundary_sd_px: standard deviation by which an outline strays from where its reader would want it.
        boundary_scale_px: along an outline, straying goes on for about this long.
        misses: probability that a structure (for lesions: the lesion) is overlooked.
        readers: people between whom the patients fall; each has a margin of their own.
        disagreement_px: standard deviation of the readers' own margins.
        splits: which patients' annotations are theirs.
    """

    margin_px: AnyRange = (0.0, 0.0)
    boundary_sd_px: Annotated[float, Field(ge=0, le=64)] = 0.0
    boundary_scale_px: Annotated[float, Field(ge=1, le=256)] = 6.0
    misses: _Fraction = 0.0
    readers: Annotated[int, Field(ge=1, le=64)] = 1
    disagreement_px: Annotated[float, Field(ge=0, le=64)] = 0.0
    splits: Splits = "train"


class MissingShift(Section):
    """Labels that are not there.

    Attributes:
        labels: probability that a patient was never annotated. An outline is then empty; a lesion counts as absent,
            as in labels mined from reports, where what is not mentioned is negative.
        classes: structures that the site never outlines; for lesions, sides or sizes (``left``, ``large``) that never
            come to it.
        splits: which patients' labels are missing; classes of lesions are absent from both.
    """

    labels: _Fraction = 0.0
    classes: tuple[Name, ...] = ()
    splits: Splits = "train"


class DemographicShift(Section):
    """Who comes: written to the manifest as ``sex`` and ``age_group``, with an effect on anatomy.

    Attributes:
        female: probability that a patient is.
        age_groups: probabilities of ``under-40``, ``40-64`` and ``65-plus``.
    """

    female: _Fraction = 0.5
    age_groups: tuple[_Fraction, _Fraction, _Fraction] = (0.25, 0.5, 0.25)

    @model_validator(mode="after")
    def _groups_are_all(self) -> DemographicShift:
        if abs(sum(self.age_groups) - 1.0) > 1e-6:
            raise ValueError(f"expected age_groups that sum to 1, got {sum(self.age_groups):g}; correct them")
        return self


class DriftShift(Section):
    """The scanner is replaced: from a round on, the site's patients are those that the new one sees.

    Attributes:
        from_round: first round with the new scanner.
        scanner: its profile.
    """

    from_round: Annotated[int, Field(ge=1)]
    scanner: Name


class AvailabilityShift(Section):
    """The site is not always there, or not in time. Of training only; it always evaluates.

    Attributes:
        absent_rounds: rounds in which it is never asked.
        dropout: probability of the same, for every other round.
        late: probability that it trains and its update comes after the deadline: it is not used, and its privacy is
            spent all the same.
    """

    absent_rounds: tuple[Annotated[int, Field(ge=1)], ...] = ()
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    late: Annotated[float, Field(ge=0, lt=1)] = 0.0


class QuantityShift(Section):
    """Large and small hospitals: ``[cohort.quantity]`` of a study, for the sites without ``train_patients``.

    Attributes:
        total_train_patients: of those sites together.
        concentration: alpha of the symmetric Dirichlet distribution of their shares; small is extreme.
        least: patients that each has at least.
    """

    total_train_patients: Annotated[int, Field(ge=1, le=99999)]
    concentration: Annotated[float, Field(gt=0, le=1e6)]
    least: Annotated[int, Field(ge=1)] = 1


class ShiftProfile(Section):
    """One hospital's shift: families in the order in which they act on an image, then those of people and time.

    Attributes:
        presets: named profiles to begin with; a family of a later one replaces that of an earlier one, and what is
            written out here replaces both.
    """

    presets: tuple[Name, ...] = Field(default=(), exclude_if=lambda names: not names)
    demographics: DemographicShift | None = Field(default=None, exclude_if=_is_none)
    labels: LabelShift | None = Field(default=None, exclude_if=_is_none)
    slice_thickness: SliceThicknessShift | None = Field(default=None, exclude_if=_is_none)
    contrast: ContrastShift | None = Field(default=None, exclude_if=_is_none)
    bias_field: BiasFieldShift | None = Field(default=None, exclude_if=_is_none)
    point_spread: PointSpreadShift | None = Field(default=None, exclude_if=_is_none)
    resolution: ResolutionShift | None = Field(default=None, exclude_if=_is_none)
    ghosting: GhostingShift | None = Field(default=None, exclude_if=_is_none)
    motion: MotionShift | None = Field(default=None, exclude_if=_is_none)
    gibbs: GibbsShift | None = Field(default=None, exclude_if=_is_none)
    spikes: SpikesShift | None = Field(default=None, exclude_if=_is_none)
    noise: NoiseShift | None = Field(default=None, exclude_if=_is_none)
    window: WindowShift | None = Field(default=None, exclude_if=_is_none)
    stain: StainShift | None = Field(default=None, exclude_if=_is_none)
    annotator: AnnotatorShift | None = Field(default=None, exclude_if=_is_none)
    missing: MissingShift | None = Field(default=None, exclude_if=_is_none)
    drift: DriftShift | None = Field(default=None, exclude_if=_is_none)
    availability: AvailabilityShift | None = Field(default=None, exclude_if=_is_none)

    @property
    def families(self) -> dict[str, Section]:
        """The families that are there, by name, in order."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "presets"}
        return {name: family for name, family in named.items() if family is not None}
