"""Writes skellam_epsilon.json: epsilon of sampled Skellam noise in 50 digits, and what calibration gives.

Epsilons come from the formulas written down once more, in exact arithmetic where privacy/ has float64, and from
dp-accounting's conversion. Calibrated noise is held for good: a study that was approved keeps its numbers. From the
repository root (half a minute):

    .venv/bin/python tests/golden/skellam_epsilon.py
"""

from __future__ import annotations

import json
from decimal import Decimal, getcontext
from fractions import Fraction
from math import ceil, comb, isqrt
from pathlib import Path

from dp_accounting.rdp import compute_epsilon

from privacy.skellam_accounting import calibrate_skellam

GOLDEN = Path(__file__).with_suffix(".json")
ORDERS = [*range(2, 65), *range(68, 129, 4), *range(144, 257, 16), 320, 384, 448, 512, 768, 1024]

# noise multiplier, sampling rate, steps, L2 bound, number of parameters; delta
HISTORIES: list[tuple[list[tuple[str, str, int, int, int]], float]] = [
    ([("1.0", "1", 100, 2**16, 10**6)], 1e-5),
    ([("6.2244", "0.2", 200, 10528, 50_000)], 1e-5),
    ([("6.2244", "0.2", 200, 10528, 50_000)], 1e-8),
    ([("11.5748", "0.2", 200, 5661, 50_000)], 1e-5),
    ([("4.6071", "0.5", 200, 14225, 50_000)], 1e-5),
    ([("2.0", "0.01", 1, 100, 10)], 1e-5),
    ([("4.0", "0.5", 20, 3, 1000)], 1e-5),
    ([("6.0", "0.2", 100, 2**12, 50_000), ("3.0", "1", 3, 2**14, 1000)], 1e-6),
]
TARGETS = [(epsilon, q, steps) for epsilon in (1.0, 2.0, 8.0) for q in (0.2, 0.5, 1.0) for steps in (20, 50, 200)]
SETTINGS = {"delta": 1e-5, "num_parameters": 50_000, "noise_std_integer": 2**16}


def divergence(order: int, noise_multiplier: str, l2_bound: int, num_parameters: int) -> Fraction:
    """The bound of Agarwal, Kairouz and Liu 2021."""
    variance = ceil((Fraction(float(noise_multiplier)) * l2_bound) ** 2)
    squared, l1_bound = l2_bound**2, min(isqrt(num_parameters * l2_bound**2), l2_bound**2)
    near = Fraction((2 * order - 1) * squared + 6 * l1_bound, 4 * variance**2)
    return Fraction(order * squared, 2 * variance) + min(near, Fraction(3 * l1_bound, 2 * variance))


def decimal(value: Fraction) -> Decimal:
    """To the digits of the context."""
    return Decimal(value.numerator) / Decimal(value.denominator)


def curve(noise_multiplier: str, q: str, l2_bound: int, num_parameters: int) -> list[Decimal]:
    """The binomial expansion, one order after another."""
    exponentials = [
        ((k - 1) * decimal(divergence(k, noise_multiplier, l2_bound, num_parameters))).exp() if k > 1 else Decimal(1)
        for k in range(ORDERS[-1] + 1)
    ]
    rate = decimal(Fraction(float(q)))
    powers, rests = [Decimal(1)], [Decimal(1)]
    for _ in range(ORDERS[-1]):
        powers.append(powers[-1] * rate)
        rests.append(rests[-1] * (1 - rate))
    moments = [
        sum((comb(a, k) * rests[a - k] * powers[k] * exponentials[k] for k in range(a + 1)), Decimal(0)) for a in ORDERS
    ]
    return [moment.ln() / (a - 1) for a, moment in zip(ORDERS, moments, strict=True)]


def main() -> None:
    """Writes the table."""
    getcontext().prec = 50
    getcontext().Emax = 10**9
    rows = []
    for history, delta in HISTORIES:
        composed = [Decimal(0)] * len(ORDERS)
        for noise_multiplier, q, steps, l2_bound, num_parameters in history:
            step = curve(noise_multiplier, q, l2_bound, num_parameters)
            composed = [total + steps * one for total, one in zip(composed, step, strict=True)]
        epsilon, order = compute_epsilon(ORDERS, [float(value) for value in composed], delta)
        rows.append({"history": history, "delta": delta, "epsilon": epsilon, "order": order})
    calibrated = []
    for epsilon, q, steps in TARGETS:
        mechanism = calibrate_skellam(epsilon=epsilon, sampling_rate=q, steps=steps, **SETTINGS)  # type: ignore[arg-type]
        row = {"epsilon": epsilon, "sampling_rate": q, "steps": steps}
        calibrated.append({**row, "noise_multiplier": mechanism.noise_multiplier, "l2_bound": mechanism.l2_bound})
    golden = {
        "about": "Skellam noise, add/remove adjacency; regenerate with tests/golden/skellam_epsilon.py",
        "rows": rows,
        "calibration": {**SETTINGS, "rows": calibrated},
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
