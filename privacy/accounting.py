"""How much privacy a history of noised steps has spent: epsilon at a given delta, from two accountants.

Every step is a Poisson-subsampled Gaussian mechanism: each unit (a patient, say) takes part with probability q,
independently of all others, contributes a vector of L2 norm at most C, and noise N(0, (z C)^2) is added to the
sum. All epsilons here hold under **add/remove** adjacency: two cohorts are neighbours when one is the other with
one unit added or removed. They do *not* hold for replacing a unit, which costs about twice as much, nor for
loaders that shuffle, nor for batches of a fixed size.

Two accountants that share no code give one upper bound each, and the larger counts:

==== ======================================================= ===================================================
PRV  privacy loss random variables, Gopi, Lee and Wutschitz  the upper end of the error interval, never the
     2021 (https://arxiv.org/abs/2106.02848), from Opacus    estimate; covers the removal of a unit
PLD  privacy loss distributions, Doroshenko et al. 2022      pessimistic discretisation (connect the dots);
     (https://arxiv.org/abs/2207.04380), from dp-accounting  covers addition and removal
==== ======================================================= ===================================================

Rényi accounting is 9-22 % looser and the central-limit (GDP) accountant under-reports: neither is offered for
Gaussian noise. Where one accountant cannot answer, or the two differ by more than their errors allow, there is no
answer: :class:`~medfed.errors.PrivacyError`. A single opinion is never reported.

Noise that neither accountant knows (:class:`~privacy.skellam_accounting.SkellamMechanism`) is accounted for by its
Rényi curve, which is a proven bound (:mod:`privacy.renyi`). A history with any such step is composed by its curves
alone, Gaussian steps included, and reported as a :class:`RenyiEpsilon`.

The accountants' libraries are imported where they are asked: a site that spends nothing does not pay for them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol, TypeGuard, overload

import numpy as np

from medfed.errors import PrivacyError
from privacy.fft_plans import forget_fft_plans
from privacy.renyi import Renyi, epsilon_of_renyi, gaussian_renyi

PRV_EPSILON_ERROR = 0.01
"""Half-width of the PRV interval in epsilon: what is reported exceeds the truth by about this much."""

PRV_DELTA_ERROR = 1e-3
"""Part of delta that the PRV interval gives to truncation and discretisation, as Opacus has it."""

PLD_EPSILON_ERROR = 2e-4
"""What connecting the dots may add to epsilon over all steps; very long runs of weak steps take up to 0.01."""

MAX_PRIVACY_LOSS = 700.0
"""Extent of the grids beyond which nothing is reported: exp of a loss leaves float64 at 709."""

MAX_POINTS = 2**23
"""Longest grid of privacy losses, 64 MiB in float64; some seconds. Refused with it are epsilons above about 150
at 200 steps and 60 at 20 000, which protect nothing."""

MAX_DISAGREEMENT = 0.05
"""Largest difference between the accountants that their errors explain; measured: PRV minus PLD is -0.003 to
+0.015 for z in [0.3, 100], q in [1e-4, 1], up to 100 000 steps, delta 1e-5 and 1e-8, epsilon up to 190."""

NOISE_DECIMALS = 4
"""Calibrated noise multipliers are multiples of 10 to the minus this: exact in a study file, short to read."""
_TICKS: int = 10**NOISE_DECIMALS

MAX_NOISE_MULTIPLIER = 1e6
"""Most noise that calibration considers."""

RENYI_ORDERS = (*range(2, 17), 20, 24, 32, 48, 64)
"""Orders tried for the bound that fixes the extent of the grids. Any gives a sound one; only integers have a
finite sum (the series of fractional orders takes minutes at q = 0.5 and much noise)."""


class NoisedSteps(Protocol):
    """A run of equal noised steps, as a frozen dataclass; what the accountants know of its noise is the curve."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def steps(self) -> int:
        """Number of steps."""

    def renyi(self) -> Renyi:
        """Rényi divergence of one of the steps, in both directions, at :data:`privacy.renyi.ORDERS`."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Mechanism:
    """One homogeneous run of noised steps: Poisson-subsampled Gaussian, add/remove adjacency.

    Attributes:
        noise_multiplier: z, standard deviation of the noise over the L2 bound of a unit's contribution; > 0.
        sampling_rate: q, probability with which each unit takes part in a step; in (0, 1].
        steps: number of steps, empty batches included; 0 spends nothing.

    Raises:
        PrivacyError: if a value is outside its range; there is no accounting for steps without noise.
    """

    noise: ClassVar[str] = "gaussian"

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        require_sampled_noise(self.noise_multiplier, self.sampling_rate, self.steps)

    def renyi(self) -> Renyi:
        """Rényi divergence of one step, for histories in which some noise is not Gaussian."""
        return gaussian_renyi(float(self.noise_multiplier), float(self.sampling_rate))


_Run = tuple[float, float, int]  # noise multiplier, sampling rate, steps >= 1; one per distinct setting


@dataclass(frozen=True)
class Epsilon:
    """Two upper bounds of one epsilon, from independent accountants.

    Attributes:
        prv: upper end of the interval of the PRV accountant.
        pld: pessimistic value of the PLD accountant.
    """

    prv: float
    pld: float

    @property
    def value(self) -> float:
        """The epsilon to report and to charge: the larger of the two."""
        return max(self.prv, self.pld)


@dataclass(frozen=True)
class RenyiEpsilon:
    """An upper bound of epsilon from a sum of Rényi curves.

    Attributes:
        value: the epsilon to report and to charge.
        order: the order of the divergence that gave it; 2 where nothing was spent.
    """

    value: float
    order: int


@overload
def epsilon_spent(mechanisms: Sequence[Mechanism], delta: float) -> Epsilon: ...


@overload
def epsilon_spent(mechanisms: Sequence[NoisedSteps], delta: float) -> Epsilon | RenyiEpsilon: ...


def epsilon_spent(mechanisms: Sequence[NoisedSteps], delta: float) -> Epsilon | RenyiEpsilon:
    """Epsilon of running all mechanisms on one cohort, at ``delta``, under add/remove adjacency.

    The composition is adaptive: later mechanisms may depend on what earlier ones released. The order does not
    matter, and splitting a run (into rounds, studies, restarts) changes nothing, because runs of equal noise
    and sampling are merged. Answers are remembered; a new one takes 0.05-0.5 s for each different setting,
    seconds beyond 10 000 steps or epsilon 50. With Rényi curves it takes milliseconds.

    Whom epsilon holds against is not in the number: noise that sites share holds against nobody who knows the
    shares, so a history with such steps is protected only from those whom that noise protects from.

    ========================== ============================================================================
    nothing, or only 0 steps   0
    any step not Gaussian      RenyiEpsilon of the whole history: Gaussian steps cost 9-22 % more there
    q = 1                      the Gaussian mechanism without amplification
    true epsilon 0             at most ``PRV_EPSILON_ERROR``
    epsilon of 60-150 or more  PrivacyError, see ``MAX_POINTS``
    delta too small            PrivacyError, when rounding of the Fourier transforms nears a tenth of delta
    ========================== ============================================================================

    Args:
        mechanisms: what was run on the cohort, in any order.
        delta: probability outside the guarantee, in (0, 1); below one over the number of units.

    Raises:
        PrivacyError: if ``delta`` is outside (0, 1), or no two sound bounds can be computed, or no finite one from
            Rényi curves.
    """
    require_delta(delta)
    if _all_gaussian(mechanisms):
        return _epsilon_of_runs(_merged(mechanisms), float(delta))
    return _epsilon_of_curves(mechanisms, float(delta))


def calibrate_noise(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, beside: Sequence[Mechanism] = ()
) -> float:
    """The smallest noise multiplier, of ``NOISE_DECIMALS`` decimals, whose epsilon is at most the target.

    :func:`epsilon_spent` of the returned value never exceeds the target; of the next smaller decimal it does, or
    refuses to answer (very large targets). Deterministic. Seconds the first time, then remembered.

    Args:
        epsilon: target for all steps together, > ``PRV_EPSILON_ERROR``: no noise reports less.
        delta: in (0, 1).
        sampling_rate: q, in (0, 1].
        steps: noised steps, >= 1.
        beside: what else is spent on the same cohort under the same epsilon, its noise given.

    Raises:
        PrivacyError: if an argument is outside its range, or no usable noise reaches the target.
    """
    require_delta(delta)
    if not (is_number(epsilon) and epsilon > PRV_EPSILON_ERROR):
        raise PrivacyError(
            f"Expected a finite epsilon > {PRV_EPSILON_ERROR:g}, got {epsilon!r}; that much is added for the error "
            "of the accountant, whatever the noise."
        )
    if not (is_count(steps) and steps >= 1):
        raise PrivacyError(f"Expected steps as an integer >= 1, got {steps!r}; count every noised step of the study.")
    noisiest = Mechanism(MAX_NOISE_MULTIPLIER, sampling_rate, steps)
    return _calibrated(float(epsilon), float(delta), noisiest, tuple(beside))


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite real number; True and False are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """Whether ``value`` is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def require_sampled_noise(noise_multiplier: float, sampling_rate: float, steps: int) -> None:
    """Refuses noised steps for which there is no accounting.

    Raises:
        PrivacyError: if the noise multiplier is not > 0, the sampling rate not in (0, 1] or steps not >= 0.
    """
    if not (is_number(noise_multiplier) and noise_multiplier > 0):
        raise PrivacyError(
            f"Expected a finite noise_multiplier > 0 to account for, got {noise_multiplier!r}; "
            "steps without noise have no finite epsilon."
        )
    if not (is_number(sampling_rate) and 0 < sampling_rate <= 1):
        raise PrivacyError(
            f"Expected sampling_rate in (0, 1], got {sampling_rate!r}; give the probability with which "
            "a unit takes part in a step."
        )
    if not (is_count(steps) and steps >= 0):
        raise PrivacyError(f"Expected steps as an integer >= 0, got {steps!r}; count every noised step.")


def require_delta(delta: float) -> None:
    """Refuses a delta that is no probability strictly between 0 and 1.

    Raises:
        PrivacyError: if it is not.
    """
    if not (is_number(delta) and 0 < delta < 1):
        raise PrivacyError(f"Expected delta in (0, 1), got {delta!r}; choose it below 1 / number of units.")


@lru_cache(maxsize=256)
def _calibrated(epsilon: float, delta: float, noisiest: Mechanism, beside: tuple[Mechanism, ...]) -> float:
    """The least noise that reaches the target with the sampling and the steps of ``noisiest``, ``beside`` included."""
    least = epsilon_spent([noisiest, *beside], delta).value
    if least > epsilon:
        raise PrivacyError(
            f"Expected a noise multiplier up to {noisiest.noise_multiplier:g} to reach epsilon {epsilon:g}, got "
            f"{least:.4g} there; raise epsilon or delta, or lower sampling_rate or the number of steps."
        )

    def at(ticks: int) -> Mechanism:
        return replace(noisiest, noise_multiplier=ticks / _TICKS)

    def nearly_fits(ticks: int) -> bool:
        runs = _merged([at(ticks), *beside])
        return _pld_epsilon(runs, _usable_delta(runs, delta)) <= epsilon - PRV_EPSILON_ERROR

    def fits(ticks: int) -> bool:
        return epsilon_spent([at(ticks), *beside], delta).value <= epsilon

    # The PLD accountant is several times faster and PRV lies its stated error above it: one leads near the
    # answer, both together decide.
    near = _smallest_that(_or_unaccountable(nearly_fits), guess=_TICKS, stride=_TICKS // 2)
    return _smallest_that(_or_unaccountable(fits), guess=near, stride=1) / _TICKS


def _merged(mechanisms: Sequence[Mechanism]) -> tuple[_Run, ...]:
    """Runs of equal noise and sampling as one, sorted; runs of no steps left out."""
    steps_by_setting: Counter[tuple[float, float]] = Counter()
    for mechanism in mechanisms:
        steps_by_setting[float(mechanism.noise_multiplier), float(mechanism.sampling_rate)] += mechanism.steps
    return tuple(sorted((*setting, steps) for setting, steps in steps_by_setting.items() if steps))


def _all_gaussian(mechanisms: Sequence[NoisedSteps]) -> TypeGuard[Sequence[Mechanism]]:
    return all(isinstance(mechanism, Mechanism) for mechanism in mechanisms)


def _epsilon_of_curves(mechanisms: Sequence[NoisedSteps], delta: float) -> RenyiEpsilon:
    """Rényi composition of steps of any noise; equal steps are merged and the sum depends on no order."""
    steps_by_setting: Counter[NoisedSteps] = Counter()
    for mechanism in mechanisms:
        steps_by_setting[replace(mechanism, steps=1)] += mechanism.steps
    curves = [steps * setting.renyi() for setting, steps in steps_by_setting.items() if steps]
    if not curves:
        return RenyiEpsilon(value=0.0, order=2)
    epsilon, order = epsilon_of_renyi(np.sum(np.sort(curves, axis=0), axis=0), delta)
    if not math.isfinite(epsilon):
        raise PrivacyError(
            f"Expected Rényi curves to bound {sum(steps_by_setting.values())} steps at delta {delta:g}, got {epsilon}; "
            "raise noise_multiplier, or lower sampling_rate or the number of steps."
        )
    return RenyiEpsilon(value=max(0.0, epsilon), order=order)


@lru_cache(maxsize=4096)
def _epsilon_of_runs(runs: tuple[_Run, ...], delta: float) -> Epsilon:
    if not runs:
        return Epsilon(prv=0.0, pld=0.0)
    usable_delta = _usable_delta(runs, delta)
    epsilon = Epsilon(prv=_prv_epsilon(runs, usable_delta), pld=_pld_epsilon(runs, usable_delta))
    if not abs(epsilon.prv - epsilon.pld) <= MAX_DISAGREEMENT:
        raise PrivacyError(
            f"Expected two accountants to agree to {MAX_DISAGREEMENT:g}, got epsilon {epsilon.prv:.4f} (PRV) and "
            f"{epsilon.pld:.4f} (PLD) at delta {delta:g}; use a larger delta or fewer different noise settings."
        )
    return epsilon


def _pld_epsilon(runs: tuple[_Run, ...], delta: float) -> float:
    """Upper bound by pessimistic privacy loss distributions."""
    from dp_accounting.pld import privacy_loss_distribution

    _extent(runs, delta)
    # Connecting the dots errs by about interval^2 per step (measured 0.95).
    total_steps = sum(steps for _, _, steps in runs)
    interval = min(1e-3, math.sqrt(PLD_EPSILON_ERROR / total_steps))
    composed = None
    with _refusing_failures("PLD", total_steps, delta):
        for noise_multiplier, sampling_rate, steps in runs:
            step = privacy_loss_distribution.from_gaussian_mechanism(
                standard_deviation=noise_multiplier,
                sampling_prob=sampling_rate,
                value_discretization_interval=interval,
                pessimistic_estimate=True,
                use_connect_dots=True,
            )
            run = step.self_compose(steps)
            composed = run if composed is None else composed.compose(run)
        assert composed is not None
        return float(composed.get_epsilon_for_delta(delta))


def _prv_epsilon(runs: tuple[_Run, ...], delta: float) -> float:
    """Upper bound by privacy loss random variables: Opacus' ``PRVAccountant``, within stated limits.

    The accountant itself is not used because it allocates whatever grid it computes (45 GB for a million steps
    at z = 1), lets float64 overflow with a warning, checks the rounding of its float64 transforms against the
    precision of long double, and warns through the process-wide filter about the orders of a bound that is
    sound at every order.
    """
    from opacus.accountants.analysis.prv import (
        Domain,
        PoissonSubsampledGaussianPRV,
        TruncatedPrivacyRandomVariable,
        compose_heterogeneous,
        discretize,
    )

    total_steps = sum(steps for _, _, steps in runs)
    extent = _extent(runs, delta)
    # log(1 - q) is minus infinity at q = 1, and right so. Overflow and NaN would be wrong answers.
    with (
        np.errstate(divide="ignore", over="raise", invalid="raise"),
        _refusing_failures("PRV", total_steps, delta),
    ):
        domain = Domain.create_aligned(-extent, extent, _prv_mesh(total_steps, delta))
        prvs = [
            TruncatedPrivacyRandomVariable(
                PoissonSubsampledGaussianPRV(sampling_rate, noise_multiplier), domain.t_min, domain.t_max
            )
            for noise_multiplier, sampling_rate, _ in runs
        ]
        composed = compose_heterogeneous(
            dprvs=[discretize(prv, domain) for prv in prvs],
            num_self_compositions=[steps for _, _, steps in runs],
        )
        _, _, upper = composed.compute_epsilon(delta, delta * PRV_DELTA_ERROR, PRV_EPSILON_ERROR)
        return max(0.0, float(upper))


@contextmanager
def _refusing_failures(accountant: str, total_steps: int, delta: float) -> Iterator[None]:
    """Turns whatever a library raises at its limits into a refusal to answer, and keeps none of its plans."""
    try:
        yield
    except (ArithmeticError, RuntimeError, ValueError, IndexError) as error:
        raise PrivacyError(
            f"Expected the {accountant} accountant to bound {total_steps} steps at delta {delta:g}, got {error}; "
            "change noise_multiplier, sampling_rate or the number of steps, or raise delta."
        ) from error
    finally:
        forget_fft_plans()


def _prv_mesh(total_steps: int, delta: float) -> float:
    """Width of a cell such that all steps together err by ``PRV_EPSILON_ERROR`` (theorem 5.5 of the paper)."""
    return PRV_EPSILON_ERROR / math.sqrt(total_steps * math.log(12 / (delta * PRV_DELTA_ERROR)) / 2)


@lru_cache(maxsize=64)
def _extent(runs: tuple[_Run, ...], delta: float) -> float:
    """Privacy loss beyond which the composition has less mass than the error allows (remark 5.6 of the paper).

    Raises:
        PrivacyError: if grids of this extent do not fit: into float64, or into ``MAX_POINTS`` (PRV has the
            finer grid). Without this, memory would run out first.
    """
    total_steps = sum(steps for _, _, steps in runs)
    renyi_by_run = [_renyi(noise_multiplier, sampling_rate) for noise_multiplier, sampling_rate, _ in runs]
    composed = np.sum([renyi * steps for renyi, (_, _, steps) in zip(renyi_by_run, runs, strict=True)], axis=0)
    delta_error = delta * PRV_DELTA_ERROR
    bounds = [_epsilon_of_renyi(composed, delta_error / 4)]
    bounds += [_epsilon_of_renyi(renyi, delta_error / (8 * total_steps)) for renyi in renyi_by_run]
    extent = float(np.max([*bounds, PRV_EPSILON_ERROR])) + 3  # the paper's authors add 3
    num_points = 2 * extent / _prv_mesh(total_steps, delta)
    if not (extent <= MAX_PRIVACY_LOSS and num_points <= MAX_POINTS):
        raise PrivacyError(
            f"Expected privacy losses up to {MAX_PRIVACY_LOSS:g} on at most {MAX_POINTS} grid points, got losses up to "
            f"{extent:.4g} on {num_points:.3g} points for {total_steps} steps; raise noise_multiplier, or lower "
            "sampling_rate or the number of steps."
        )
    return extent


def _renyi(noise_multiplier: float, sampling_rate: float) -> np.ndarray:
    """Rényi divergence of one step at ``RENYI_ORDERS``; infinite where z^2 leaves float64."""
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = list(RENYI_ORDERS)
    try:
        return np.array(compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders))
    except ArithmeticError:
        return np.full(len(orders), math.inf)


def _epsilon_of_renyi(renyi: np.ndarray, delta: float) -> float:
    """(epsilon, delta) of a Rényi curve at ``RENYI_ORDERS``."""
    return epsilon_of_renyi(renyi, delta, RENYI_ORDERS)[0]


def _usable_delta(runs: tuple[_Run, ...], delta: float) -> float:
    """Delta less what float64 Fourier transforms may lose of it; both accountants are asked at this.

    Each probability of the finer grid is off by about one unit of rounding. Raising the spectrum to a power of
    ``steps`` multiplies its rounding by that, which spreads over about ten standard deviations of the grid.

    Raises:
        PrivacyError: if a tenth of delta or more would be lost.
    """
    total_steps = sum(steps for _, _, steps in runs)
    no_less = max(delta, 1e-13)  # refused below, whatever the grid; its logarithm is safe
    num_points = 2 * _extent(runs, no_less) / _prv_mesh(total_steps, no_less)
    lost = (num_points + 10 * total_steps) * float(np.finfo(np.float64).eps)
    if lost >= delta / 10:
        raise PrivacyError(
            f"Expected delta > {10 * lost:.2g} for {total_steps} steps, got {delta:g}; below it, float64 rounding "
            "would decide the answer. Choose a larger delta or fewer steps."
        )
    return delta - lost


def _or_unaccountable(fits: Callable[[int], bool]) -> Callable[[int], bool]:
    """``fits``, where noise too small to account for does not fit."""

    def judge(ticks: int) -> bool:
        try:
            return fits(ticks)
        except PrivacyError:
            return False

    return judge


def _smallest_that(fits: Callable[[int], bool], *, guess: int, stride: int) -> int:
    """The smallest positive integer that fits, if all above it fit and none below; searched from a guess.

    Some integer up to the most noise considered must fit. Whatever ``fits`` does, the returned integer fits.
    """
    limit = int(MAX_NOISE_MULTIPLIER) * _TICKS
    if fits(guess):
        failing, fitting = max(0, guess - stride), guess
        while failing > 0 and fits(failing):
            stride *= 2
            failing, fitting = max(0, failing - stride), failing
    else:
        failing, fitting = guess, min(limit, guess + stride)
        while fitting < limit and not fits(fitting):
            stride *= 2
            failing, fitting = fitting, min(limit, fitting + stride)
    while fitting - failing > 1:
        middle = (failing + fitting) // 2
        failing, fitting = (failing, middle) if fits(middle) else (middle, fitting)
    return fitting
