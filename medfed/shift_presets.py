"""Named profiles, for ``presets`` of ``[sites.shift]``: one line says what a hospital is like.

Presets combine: each says one thing, and a hospital may be several. Drift has none, since it names a round.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from medfed.errors import StudyError
from medfed.shift_profile import ShiftProfile
from medfed.study_sections import SiteConfig


@dataclass(frozen=True)
class Preset:
    """A named profile.

    Attributes:
        name: key in ``PRESETS``.
        description: one line.
        profile: its families; names no presets itself.
    """

    name: str
    description: str
    profile: ShiftProfile


def _preset(name: str, description: str, **families: Any) -> Preset:
    return Preset(name, description, ShiftProfile.model_validate(families))


_TABLE = (
    _preset(
        "low-field",
        "0.3 T open magnet: flat contrast, blur, strong noise",
        contrast={"gamma": (0.65, 0.8)},
        point_spread={"sigma_px": (1.0, 1.6)},
        noise={"sd": (0.06, 0.10)},
    ),
    _preset(
        "uncorrected-coil",
        "no intensity correction: brightness drifts over the head",
        bias_field={"strength": (0.25, 0.45)},
    ),
    _preset(
        "thick-slices",
        "fast protocol: 6 mm slices and large pixels",
        slice_thickness={"thickness_mm": 6.0},
        resolution={"zoom": (0.4, 0.55)},
    ),
    _preset(
        "restless-patients",
        "emergency department: motion, and a scan that is cut short",
        motion={"max_shift_px": (3.0, 7.0)},
        gibbs={"alpha": (0.3, 0.45)},
    ),
    _preset(
        "failing-hardware",
        "ghosts and spikes that nobody has called the vendor about",
        ghosting={"intensity": (0.4, 0.7)},
        spikes={"amplitude": (0.15, 0.4)},
    ),
    _preset(
        "other-vendor",
        "another vendor's sequence: tissues keep their order of brightness, not its spacing",
        contrast={"gamma": (1.2, 1.4), "histogram_points": 10},
    ),
    _preset(
        "narrow-window",
        "images exported as the viewer showed them: dark and bright tissue cut off",
        window={"low": (0.1, 0.25), "high": (0.7, 0.85)},
    ),
    _preset(
        "other-laboratory",
        "histology stained elsewhere (for medfed cohort shift)",
        stain={"space": "hed", "scale": 0.25, "offset": 0.04},
    ),
    _preset("generous-annotator", "outlines lie 1 to 2 px outside", annotator={"margin_px": (1.0, 2.0)}),
    _preset("tight-annotator", "outlines lie 1 to 2 px inside", annotator={"margin_px": (-2.0, -1.0)}),
    _preset(
        "hasty-annotator",
        "outlines stray by 1.5 px, and one structure in seven is overlooked",
        annotator={"boundary_sd_px": 1.5, "misses": 0.15},
    ),
    _preset(
        "three-readers",
        "three readers who do not agree",
        annotator={"readers": 3, "disagreement_px": 1.5, "boundary_sd_px": 0.7},
    ),
    _preset("part-annotated", "a third of the patients was never annotated", missing={"labels": 0.33}),
    _preset("emergency-mix", "as many findings as effusions at CheXpert: 38.6 %",
            labels={"finding": "effusion", "source": "chexpert"}),
    _preset("screening-mix", "as few findings as effusions at PadChest-IDC: 3.1 %",
            labels={"finding": "effusion", "source": "padchest-idc"}),
    _preset("skewed-mix", "which lesions come is drawn from a Dirichlet distribution, alpha 1",
            labels={"concentration": 1.0}),
    _preset("geriatric-clinic", "old patients, more women",
            demographics={"female": 0.6, "age_groups": (0.02, 0.18, 0.80)}),
    _preset("veterans-hospital", "mostly men, middle-aged and old",
            demographics={"female": 0.1, "age_groups": (0.1, 0.45, 0.45)}),
    _preset("university-volunteers", "young, both sexes alike",
            demographics={"female": 0.5, "age_groups": (0.85, 0.13, 0.02)}),
    _preset("weak-link", "misses every fifth round, and is late in one of ten",
            availability={"dropout": 0.2, "late": 0.1}),
)  # fmt: skip

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _TABLE})


def resolved(profile: ShiftProfile) -> ShiftProfile:
    """The profile with its presets written out; names none any more.

    Raises:
        ValueError: a preset that is not in the table; one line with all that are.
    """
    families: dict[str, object] = {}
    for name in profile.presets:
        if name not in PRESETS:
            close = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"Expected a preset of {', '.join(PRESETS)}, got {name!r}{hint}")
        families |= PRESETS[name].profile.families
    return ShiftProfile.model_validate({**families, **profile.families})


def resolved_at(site: SiteConfig) -> ShiftProfile | None:
    """The shift of a study's site, its presets written out; None if it has none.

    Raises:
        StudyError: names the site, and what of its shift does not exist or does not go together.
    """
    if site.shift is None:
        return None
    try:
        return resolved(site.shift)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise StudyError(f"site {site.name!r}: shift: {first['msg']}") from None
    except ValueError as error:
        raise StudyError(f"site {site.name!r}: shift.presets: {error}") from None
