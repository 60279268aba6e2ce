"""Whether a charge fits under the cap of its cohort, and what to say when it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from medfed.errors import BudgetError
from privacy.accounting import Mechanism, epsilon_spent
from privacy.ledger_chain import Spending
from privacy.ledger_entry import Cap, Charge, ChargedMechanism


def require_one_unit(charge: Charge, cap: Cap, earlier: Sequence[Spending]) -> None:
    """Refuse to add up epsilons of different units, which say different things.

    Raises:
        BudgetError: if the cap or an earlier charge of the cohort protects another unit than the charge.
    """
    for whose, unit in [("its cap", cap.unit), *((f"entry {s.reserved.sequence}", s.charge.unit) for s in earlier)]:
        if unit != charge.unit:
            raise BudgetError(
                f"Expected a charge per {unit} on cohort {charge.cohort!r}, as {whose} has it, got one per "
                f"{charge.unit}; the two do not compose: use unit {unit!r}, or a cohort of other patients."
            )


def projected_epsilon(earlier: Sequence[ChargedMechanism], mechanism: ChargedMechanism, cap: Cap) -> float:
    """The epsilon of everything charged before and one charge more, at the cap's delta."""
    return epsilon_spent([*earlier, mechanism], cap.delta).value


def refusal(earlier: Sequence[ChargedMechanism], charge: Charge, cap: Cap, projected: float) -> BudgetError:
    """The error for a charge that does not fit, with the numbers: cap, projected, spent, and what would fit."""
    mechanism = charge.mechanism
    spent = epsilon_spent(earlier, cap.delta).value
    fits = _steps_that_fit(earlier, mechanism, cap)
    steps = "1 step" if mechanism.steps == 1 else f"{mechanism.steps} steps"
    noise = "" if isinstance(mechanism, Mechanism) else f" ({mechanism.noise})"
    return BudgetError(
        f"Expected cohort {charge.cohort!r} to stay within epsilon {cap.epsilon:.6g} (delta {cap.delta:g}, unit "
        f"{cap.unit}, adjacency {charge.adjacency}), got {projected:.6g} with round {charge.round} of study "
        f"{charge.study!r}: {steps} at noise multiplier {mechanism.noise_multiplier:g}{noise} and sampling "
        f"rate {mechanism.sampling_rate:g}. Spent so far: {spent:.6g}; {fits or 'no'} more such "
        f"{'step fits' if fits == 1 else 'steps fit'}. Ask for fewer steps or more noise, or let the hospital "
        f"raise its cap."
    )


def _steps_that_fit(earlier: Sequence[ChargedMechanism], mechanism: ChargedMechanism, cap: Cap) -> int:
    """The largest number of steps, less than the mechanism's own, that stays within the cap."""
    fitting, too_many = 0, mechanism.steps
    while too_many - fitting > 1:
        steps = (fitting + too_many) // 2
        if projected_epsilon(earlier, replace(mechanism, steps=steps), cap) <= cap.epsilon:
            fitting = steps
        else:
            too_many = steps
    return fitting
