"""The privacy plan of a study: what is drawn, clipped and noised at a site, and what that promises, as one object.

Sampler, clip, noise, steps and the accounted event come from the same few numbers, so that no part can be changed
without the others. Nothing that follows from these numbers is stored: epsilon and the event are computed from them
whenever they are asked for. A plan whose numbers contradict each other cannot be built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

from medfed.errors import PrivacyError
from medfed.study import StudyConfig
from medfed.study_sections import NoisedEvaluation, PrivacyConfig
from privacy.accounting import (
    Epsilon,
    Mechanism,
    RenyiEpsilon,
    calibrate_noise,
    epsilon_spent,
    is_count,
    is_number,
    require_delta,
)
from privacy.skellam_accounting import SkellamMechanism, calibrate_skellam

if TYPE_CHECKING:
    import dp_accounting

Trust = Literal["site", "consortium", "none"]
Unit = Literal["patient", "record"]


NOISE_STD_INTEGER = 2**16
"""Standard deviation, in integers, of the noise that a secure sum is accounted with. Finer costs nothing in privacy
(2**10 would cost a lot: Agarwal et al. 2021, section 5), coarser leaves more room in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """DP-SGD of one site, over a whole study.

    Guarantee, if the training code does what the plan says: everything a site sends over the study is
    (``epsilon.value``, ``delta``)-differentially private with respect to adding or removing one unit of its
    training cohort, and with ``evaluation_noise`` of its held-out patients too: a patient may be either, so both are
    added up. Not covered: replacing a unit (about twice as much), metrics released without noise and the patients
    behind them, and other studies on the same patients, which the site's ledger adds up.

    With trust ``consortium`` this holds for what the server and up to c colluding sites learn, as long as secure
    aggregation lets them see sums of at least ``min_honest`` honest sites and nothing else: what a site sends is
    masked, and the sum carries the noise of each. All other sites' noise is left out of account.

    The noise that a site adds (:attr:`noise_std`) and the noise that is accounted (:attr:`mechanism`) are asked
    for separately. They are equal where a site trusts nobody.

    ==================== ==========================================================================
    ``trust = "none"``   draws and clips, adds no noise: :attr:`is_private` is False, epsilon infinite
    ``unit = "record"``  a unit is one image: there is no image limit, ``images_per_patient`` is None
    empty batch          is noised, released and counted as any other step
    ==================== ==========================================================================

    Attributes:
        trust: ``site``: the site adds all noise itself. ``consortium``: it adds a share. ``none``: nobody adds any.
        unit: whose presence is hidden: a ``patient`` with all images, or a ``record``, one image.
        clip_norm: C, L2 bound of what one unit contributes to a step's sum; > 0.
        sampling_rate: q, probability with which each unit takes part in a step, independently of all others;
            in (0, 1].
        noise_multiplier: z, standard deviation over ``clip_norm`` of the noise that is accounted: of a site's own,
            or of the least honest noise in a sum; > 0, but 0 for ``none``.
        steps_per_round: noised steps in each round; >= 1, and 1 for ``consortium``.
        num_rounds: rounds of the study; >= 1.
        delta: probability outside the guarantee; in (0, 1), and see :meth:`check_cohort`.
        images_per_patient: K, images of a drawn patient that are used at most, chosen at random; >= 1. Costs no
            privacy: a patient's gradients are averaged before they are clipped.
        views: augmented views of each image, averaged before clipping; >= 1. Costs no privacy either.
        min_honest: h, honest sites in a sum at least; >= 1, for ``consortium`` and None otherwise.
        num_parameters: P, elements of the sum; likewise.
        evaluation_noise: standard deviation of the noise on released counts of held-out patients, over the length of
            what one of them adds; > 0, for unit ``patient``; None where no noised counts leave. Each site adds all of
            it, also with trust ``consortium``.
        num_evaluations: releases of such counts over the whole study; >= 1 with ``evaluation_noise``, else 0.

    Raises:
        PrivacyError: if a value is outside its range, or two of them contradict each other.
    """

    adjacency: ClassVar[Literal["add-remove"]] = "add-remove"

    trust: Trust
    unit: Unit
    clip_norm: float
    sampling_rate: float
    noise_multiplier: float
    steps_per_round: int
    num_rounds: int
    delta: float
    images_per_patient: int | None
    views: int
    min_honest: int | None
    num_parameters: int | None
    evaluation_noise: float | None
    num_evaluations: int

    def __post_init__(self) -> None:
        if self.trust not in ("site", "consortium", "none"):
            raise PrivacyError(
                f"Expected trust 'site', 'consortium' or 'none', got {self.trust!r}; choose who is trusted."
            )
        if self.unit not in ("patient", "record"):
            raise PrivacyError(f"Expected unit 'patient' or 'record', got {self.unit!r}; choose what is hidden.")
        if not (is_number(self.clip_norm) and self.clip_norm > 0):
            raise PrivacyError(
                f"Expected a finite clip_norm > 0, got {self.clip_norm!r}; without a bound no noise is enough."
            )
        if not (is_number(self.sampling_rate) and 0 < self.sampling_rate <= 1):
            raise PrivacyError(
                f"Expected sampling_rate in (0, 1], got {self.sampling_rate!r}; give the probability with which "
                "a unit takes part in a step."
            )
        if not (is_number(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise PrivacyError(
                f"Expected a finite noise_multiplier >= 0, got {self.noise_multiplier!r}; calibrate it from epsilon, "
                "or give it."
            )
        require_delta(self.delta)
        for name in ("steps_per_round", "num_rounds", "views"):
            self._require_positive_count(name)
        if self.trust != "none" and self.noise_multiplier == 0:
            raise PrivacyError(
                f"Expected noise_multiplier > 0 with trust {self.trust!r}, got 0, which protects nobody; add noise, or "
                "say so with trust 'none'."
            )
        if self.trust == "none" and self.noise_multiplier > 0:
            raise PrivacyError(
                f"Expected noise_multiplier 0 with trust 'none', got {self.noise_multiplier!r}; remove it, or set "
                "trust 'site'."
            )
        if self.unit == "record" and self.images_per_patient is not None:
            raise PrivacyError(
                f"Expected no images_per_patient with unit 'record', got {self.images_per_patient!r}; a record is "
                "one image: remove it, or set unit 'patient'."
            )
        if self.unit == "patient":
            self._require_positive_count("images_per_patient")
        self._check_sharing()
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        """Released counts carry noise of a known multiplier, or there are none."""
        if self.evaluation_noise is None:
            if self.num_evaluations != 0:
                raise PrivacyError(
                    f"Expected evaluation_noise for {self.num_evaluations!r} evaluations, got none; give it."
                )
            return
        if self.trust == "none" or self.unit != "patient":
            raise PrivacyError(
                f"Expected evaluation_noise with trust 'site' or 'consortium' and unit 'patient' alone, got "
                f"{self.trust!r} and {self.unit!r}; remove it."
            )
        if not (is_number(self.evaluation_noise) and self.evaluation_noise > 0):
            raise PrivacyError(
                f"Expected a finite evaluation_noise > 0, got {self.evaluation_noise!r}; counts without noise are not "
                "private."
            )
        self._require_positive_count("num_evaluations")

    def _check_sharing(self) -> None:
        """Noise is shared among a known number of sites, over integers that hold it, in steps of one gradient."""
        if self.trust != "consortium":
            if (self.min_honest, self.num_parameters) != (None, None):
                raise PrivacyError(
                    f"Expected min_honest and num_parameters with trust 'consortium' alone, got them with "
                    f"{self.trust!r}; remove them."
                )
            return
        for name in ("min_honest", "num_parameters"):
            self._require_positive_count(name)
        if self.steps_per_round != 1:
            raise PrivacyError(
                f"Expected steps_per_round 1 with trust 'consortium', got {self.steps_per_round}: after a second step "
                "a sum of updates no longer is a sum of clipped gradients; use more rounds, or trust 'site'."
            )
        num_parameters = self.num_parameters or 0
        if self.l2_bound**2 < num_parameters:
            raise PrivacyError(
                f"Expected noise_multiplier of at most {NOISE_STD_INTEGER / math.sqrt(num_parameters):.4g} for "
                f"{num_parameters} parameters, got {self.noise_multiplier:g}: rounding to integers would be most "
                "of the sum; use fewer parameters, or less noise."
            )

    def _require_positive_count(self, name: str) -> None:
        value = getattr(self, name)
        if not (is_count(value) and value >= 1):
            raise PrivacyError(f"Expected {name} as an integer >= 1, got {value!r}; give a whole number.")

    @classmethod
    def of_study(cls, study: StudyConfig) -> PrivacyPlan:
        """The plan of a study; the same for all its sites.

        Args:
            study: with a privacy section, and resolved if its trust is ``consortium``: how many elements are summed
                counts.

        Raises:
            PrivacyError: as :meth:`of`.
            StudyError: if a study has to be resolved first.
        """
        assert study.privacy is not None
        noised = study.num_evaluations if study.noises_evaluation else 0
        if study.privacy.trust != "consortium":
            return cls.of(study.privacy, study.rounds.num_rounds, num_evaluations=noised)
        return cls.of(
            study.privacy,
            study.rounds.num_rounds,
            min_honest=study.secure_quorum.min_honest,
            num_parameters=study.resolved_manifest.num_elements,
            num_evaluations=noised,
        )

    @classmethod
    def of(
        cls,
        config: PrivacyConfig,
        num_rounds: int,
        *,
        min_honest: int | None = None,
        num_parameters: int | None = None,
        num_evaluations: int = 0,
    ) -> PrivacyPlan:
        """The plan of a study's privacy section over ``num_rounds`` rounds.

        Noise that the section does not fix is calibrated from its epsilon. A section with both, as a resolved
        study has, is held to its word: the noise must reach the epsilon.

        Args:
            config: the section.
            num_rounds: rounds of the study.
            min_honest: h, for trust ``consortium``.
            num_parameters: P, likewise.
            num_evaluations: releases of noised counts, for a section that noises them.

        Raises:
            PrivacyError: if the noise does not reach the epsilon, no noise does, or a value is out of range.
        """

        def plan(noise_multiplier: float) -> PrivacyPlan:
            return cls(
                trust=config.trust,
                unit=config.unit,
                clip_norm=config.clip_norm,
                sampling_rate=config.sampling_rate,
                noise_multiplier=noise_multiplier,
                steps_per_round=config.steps_per_round,
                num_rounds=num_rounds,
                delta=config.delta,
                images_per_patient=config.images_per_patient,
                views=config.views,
                min_honest=min_honest,
                num_parameters=num_parameters,
                evaluation_noise=evaluation.noise_multiplier if isinstance(evaluation, NoisedEvaluation) else None,
                num_evaluations=num_evaluations,
            )

        evaluation = config.evaluation
        if config.trust == "none":
            return plan(0.0)
        if config.noise_multiplier is None:
            return plan(_calibrated_noise(config, plan))
        given = plan(config.noise_multiplier)
        if config.epsilon is not None and given.epsilon.value > config.epsilon:
            raise PrivacyError(
                f"Expected epsilon of at most {config.epsilon:g} at delta {config.delta:g}, got "
                f"{given.epsilon.value:.4f} from noise_multiplier {config.noise_multiplier:g} over {given.total_steps} "
                "steps; remove noise_multiplier to have it calibrated, or raise epsilon."
            )
        return given

    @property
    def is_private(self) -> bool:
        """Whether anything is promised at all."""
        return self.noise_multiplier > 0

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that the site adds to each element of a step's clipped sum.

        z C, or with trust ``consortium`` z C / sqrt(h): the noise of h sites together has z C.
        """
        if self.trust != "consortium":
            return self.noise_multiplier * self.clip_norm
        return math.sqrt(self.share_variance) * self.clip_norm / self.l2_bound

    @property
    def l2_bound(self) -> int:
        """D2: integers of a ``consortium`` sum are gradients times D2 / C, rounded, of L2 norm D2 at most per unit.

        Raises:
            PrivacyError: for noise so large that a unit would have less than one integer.
        """
        bound = int(NOISE_STD_INTEGER / Fraction(repr(self.noise_multiplier)))  # as written, in decimals
        if bound < 1:
            raise PrivacyError(
                f"Expected noise_multiplier of at most {NOISE_STD_INTEGER} with trust 'consortium', got "
                f"{self.noise_multiplier:g}; raise epsilon."
            )
        return bound

    @property
    def share_variance(self) -> int:
        """Variance, in integers, of the Skellam noise that each site adds with trust ``consortium``."""
        assert self.min_honest is not None
        mechanism = self.mechanism(self.num_rounds)
        assert isinstance(mechanism, SkellamMechanism)
        return mechanism.share_variance(self.min_honest)

    @property
    def alone(self) -> PrivacyPlan:
        """The plan of a site that shares its noise with nobody: with trust ``consortium`` it adds all of it."""
        if self.trust != "consortium":
            return self
        return replace(self, trust="site", min_honest=None, num_parameters=None)

    @property
    def total_steps(self) -> int:
        """Noised steps of a site over the whole study."""
        return self.steps_per_round * self.num_rounds

    def mechanism(self, rounds: int) -> Mechanism | SkellamMechanism:
        """What ``rounds`` rounds of the plan cost, for the accountant and the ledger; 0 rounds cost nothing.

        Raises:
            PrivacyError: if the plan has fewer rounds, or adds no noise, for which there is no accounting.
        """
        if not (is_count(rounds) and 0 <= rounds <= self.num_rounds):
            raise PrivacyError(
                f"Expected rounds as an integer from 0 to the plan's {self.num_rounds}, got {rounds!r}; a longer "
                "study needs a plan of its own."
            )
        steps = self.steps_per_round * rounds
        if self.trust != "consortium":
            return Mechanism(self.noise_multiplier, self.sampling_rate, steps)
        assert self.num_parameters is not None
        return SkellamMechanism(self.noise_multiplier, self.sampling_rate, steps, self.l2_bound, self.num_parameters)

    @property
    def epsilon(self) -> Epsilon | RenyiEpsilon:
        """Epsilon of the whole study at :attr:`delta`, add/remove adjacency; infinite without noise.

        Raises:
            PrivacyError: if the accountants give no two sound bounds; see :func:`~privacy.accounting.epsilon_spent`.
        """
        if not self.is_private:
            return Epsilon(prv=math.inf, pld=math.inf)
        return epsilon_spent([self.mechanism(self.num_rounds), *self.evaluations], self.delta)

    @property
    def evaluation_mechanism(self) -> Mechanism:
        """What one release of held-out counts costs: every patient takes part.

        Raises:
            PrivacyError: if none is released.
        """
        if self.evaluation_noise is None:
            raise PrivacyError("Expected a plan that releases noised counts, got one that releases none.")
        return Mechanism(self.evaluation_noise, 1.0, 1)

    @property
    def evaluations(self) -> tuple[Mechanism, ...]:
        """What all releases of held-out counts cost, as runs of steps; nothing where none is released."""
        if self.evaluation_noise is None:
            return ()
        return (replace(self.evaluation_mechanism, steps=self.num_evaluations),)

    @property
    def event(self) -> dp_accounting.DpEvent:
        """The whole study in the language of ``dp_accounting``, whose accountants can check it."""
        import dp_accounting

        if not self.is_private:
            return dp_accounting.NonPrivateDpEvent()
        if self.trust == "consortium":
            return dp_accounting.UnsupportedDpEvent()  # the library knows no Skellam noise
        step = dp_accounting.PoissonSampledDpEvent(
            self.sampling_rate, dp_accounting.GaussianDpEvent(self.noise_multiplier)
        )
        training = dp_accounting.SelfComposedDpEvent(step, self.total_steps)
        if self.evaluation_noise is None:
            return training
        release = dp_accounting.GaussianDpEvent(self.evaluation_noise)
        return dp_accounting.ComposedDpEvent(
            [training, dp_accounting.SelfComposedDpEvent(release, self.num_evaluations)]
        )

    def check_cohort(self, num_units: int) -> None:
        """Refuses a cohort of which ``delta`` would allow one unit to be given away whole.

        Releasing one unit at random, unprotected, is (0, 1/n)-private among n: a delta of 1/n or more promises
        nothing. A plan without noise promises nothing anyway and is not refused.

        Args:
            num_units: units in the site's training cohort: patients, or images for ``unit = "record"``.

        Raises:
            PrivacyError: if ``delta >= 1 / num_units``, or there is no unit.
        """
        if not (is_count(num_units) and num_units >= 1):
            raise PrivacyError(f"Expected at least one {self.unit} in the cohort, got {num_units!r}; add data.")
        if self.is_private and self.delta >= 1 / num_units:
            raise PrivacyError(
                f"Expected delta below 1/{num_units} = {1 / num_units:.3g}, one over the number of {self.unit}s in the "
                f"cohort, got {self.delta:g}; lower delta to a tenth of that or less."
            )

    def noise_to_signal(self, num_units: int, num_parameters: int) -> float:
        """Norm of a step's noise over the largest norm that its signal can be expected to have.

        z C sqrt(P) / (q N C): a prediction from public numbers only, for approving a study. The signal is
        smaller where units pull in different directions, so training is noisier than this says; the clip norm
        cancels. Zero without noise.

        Args:
            num_units: N, public number of units that contribute to what is noised: in the site's training cohort,
                or with trust ``consortium`` in those of all sites of a sum.
            num_parameters: P, elements of the adapter.

        Raises:
            PrivacyError: if a number is not an integer >= 1.
        """
        for name, value in (("num_units", num_units), ("num_parameters", num_parameters)):
            if not (is_count(value) and value >= 1):
                raise PrivacyError(f"Expected {name} as an integer >= 1, got {value!r}; give a whole number.")
        return self.noise_multiplier * math.sqrt(num_parameters) / (self.sampling_rate * num_units)


def calibrated(study: StudyConfig) -> StudyConfig:
    """The study with its noise fixed: ``privacy.noise_multiplier`` calibrated from ``privacy.epsilon``.

    A study without privacy section, without noise, or whose noise is given is returned as it is, after its plan
    was built and so checked.

    Raises:
        PrivacyError: as :meth:`PrivacyPlan.of`.
    """
    if study.privacy is None:
        return study
    plan = PrivacyPlan.of_study(study)
    if not plan.is_private or study.privacy.noise_multiplier is not None:
        return study
    fixed = {**study.privacy.model_dump(), "noise_multiplier": plan.noise_multiplier}
    return study.replace(privacy=PrivacyConfig.model_validate(fixed))


def _calibrated_noise(config: PrivacyConfig, plan: Callable[[float], PrivacyPlan]) -> float:
    """Noise for the section's epsilon over the steps of the plan; the plan is checked before the search."""
    if config.epsilon is None:
        raise PrivacyError(
            f"Expected epsilon or noise_multiplier with trust {config.trust!r}, got neither; give one of them."
        )
    checked = plan(1.0)
    if config.trust == "consortium":
        assert checked.num_parameters is not None
        return calibrate_skellam(
            epsilon=config.epsilon,
            delta=config.delta,
            sampling_rate=config.sampling_rate,
            steps=checked.total_steps,
            num_parameters=checked.num_parameters,
            noise_std_integer=NOISE_STD_INTEGER,
            beside=checked.evaluations,
        ).noise_multiplier
    return calibrate_noise(
        epsilon=config.epsilon,
        delta=config.delta,
        sampling_rate=config.sampling_rate,
        steps=checked.total_steps,
        beside=checked.evaluations,
    )
