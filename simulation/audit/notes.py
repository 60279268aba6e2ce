"""What a reader of an audit must know beside its numbers, in whole sentences."""

from __future__ import annotations

from dataclasses import dataclass

from medfed.study import StudyConfig
from privacy.plan import PrivacyPlan
from server.audit_result import AdapterInversion, ShadowAttack

_GUESS = 0.5  # area under the ROC curve


@dataclass(frozen=True)
class Demonstration:
    """How the inverted update is protected: as the study protects, or by numbers that say so.

    Attributes:
        clip_norm: C.
        noise_multiplier: z, > 0.
        is_made_up: whether the study has no noise of its own.
    """

    clip_norm: float
    noise_multiplier: float
    is_made_up: bool

    @classmethod
    def of(cls, plan: PrivacyPlan | None) -> Demonstration:
        """For a study's plan, or for none."""
        if plan is not None and plan.is_private:
            return cls(plan.clip_norm, plan.noise_multiplier, is_made_up=False)
        return cls(0.1 if plan is None else plan.clip_norm, 1.0, is_made_up=True)


def notes(
    study: StudyConfig,
    plan: PrivacyPlan | None,
    inverted: Demonstration,
    *,
    nothing_claimed: bool,
    shadows: ShadowAttack | None,
    searched: AdapterInversion | None,
) -> tuple[str, ...]:
    """The sentences, those about the promise first.

    Args:
        study: that was audited.
        plan: of its privacy; None without.
        inverted: of the inversion.
        nothing_claimed: whether a bound stands beside no claim.
        shadows: attack by shadow adapters; None if there was none.
        searched: inversion of the study's own adapter; None likewise.
    """
    found = []
    if plan is None:
        found.append("The study has no [privacy] section: there are no noised steps to look into.")
    else:
        found.append(
            f"Many short runs: all {plan.total_steps} noised steps of the study, with one made-up {plan.unit} or "
            f"nobody. One run: the site's own {plan.unit}s and the canaries. Gradients of canaries are made up; "
            "drawing, micro-batches, clipping, noise and steps are the product's. Steps are plain SGD, without "
            "augmentation."
        )
    if plan is not None and plan.is_private and study.cohort is not None:
        found.append(
            "The patients of this run are made up, and its draws and noise follow from the study's seed, which "
            "protects nobody. The audit draws from the operating system, as a hospital does."
        )
    if plan is not None and plan.trust == "consortium":
        found.append(
            "The audited sum holds the shares of as many sites as are counted on; masks are not attacked. Mislabelled "
            "images are looked for in training at one site alone, which then adds all of the noise."
        )
    if nothing_claimed:
        found.append("Where nothing is claimed, a bound is limited by the number of runs and canaries.")
    if study.withholds_evaluation:
        found.append("Membership inference was not tried: held-out patients are withheld in this study.")
    else:
        found.append(
            "Membership inference on the released adapter throws no coins: the cohort says who trains and who is held "
            "out. With few held-out patients a small false-alarm rate means no false alarm at all."
        )
        found.append(_of_shadows(shadows))
    found.append(
        "The inversion of a first layer attacks a small network that sees the pixels of one image, not the study's "
        f"adapter, with clip norm {inverted.clip_norm:g} and noise multiplier {inverted.noise_multiplier:g}"
        f"{', which the study itself has not' if inverted.is_made_up else ''}. Clipping shortens an update and hides "
        "nothing; noise and masks hide."
    )
    found.append(_of_search(searched))
    return tuple(found)


def _of_shadows(shadows: ShadowAttack | None) -> str:
    if shadows is None:
        return "No shadow adapters were trained; --shadows 16 trains them, for a stronger attack on membership."
    ratio = next(one for one in shadows.alone if one.attack == "likelihood-ratio")
    told = "better than by guessing" if ratio.low > _GUESS else "no better than by guessing"
    made = f", {shadows.num_newcomers} of them made for the attack" if shadows.num_newcomers else ""
    return (
        f"{shadows.num_shadows} shadow adapters were trained as the site trains, with nobody to average with, each on "
        f"{shadows.num_trained} of {shadows.num_patients} patients{made}: a fair "
        "game, as coins said who. The released adapter is that of all sites; shadows of one site fit it less well, and "
        f"its scores are moved to their level. Who trained a shadow is told {told}."
    )


def _of_search(searched: AdapterInversion | None) -> str:
    if searched is None:
        return "What can be made of an update of the study's own adapter was not tried; --inversion-steps 100 searches."
    return (
        f"The search for an image behind the adapter's own update had {searched.num_values} numbers of a step on that "
        f"image alone, the annotation, and {searched.steps} steps to find {searched.num_pixels} pixels. It looks at "
        "the direction of the update, which clipping does not change. It has found something of the patient only "
        "where it ends closer to the original than the mean of the other images, SSIM "
        f"{searched.mean_ssim:.2f}. A search that fails proves nothing: more steps or a better idea of what images "
        "look like may succeed."
    )
