"""Writes epsilon.json: what the libraries' own accountants say of a table of histories, with their own defaults.

medfed composes the parts of these accountants itself, within limits of its own, so the whole accountants are the
oracle. From the repository root (a minute):

    .venv/bin/python tests/golden/epsilon.py
"""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from pathlib import Path

import dp_accounting
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

GOLDEN = Path(__file__).with_suffix(".json")

History = list[tuple[float, float, int]]  # noise multiplier, sampling rate, steps

TABLE: list[tuple[History, float]] = [
    ([(0.8372, 0.1, 200)], 1e-5),  # 10 rounds of 20 steps: 14.13
    ([(1.8865, 0.2, 200)], 1e-5),  # calibrated for 8
    ([(5.7971, 0.2, 200)], 1e-5),  # calibrated for 2
    ([(10.7656, 0.2, 200)], 1e-5),  # calibrated for 1
    ([(1.0, 0.1, 20)], 1e-5),
    ([(1.0, 0.1, 200)], 1e-5),
    ([(1.0, 0.1, 200)], 1e-7),
    ([(1.0, 0.1, 200)], 1e-3),
    ([(1.1, 0.01, 10000)], 1e-5),
    ([(2.0, 0.02, 1)], 1e-6),
    ([(0.7, 0.05, 50)], 1e-5),
    ([(1.0, 1.0, 1)], 1e-5),
    ([(5.0, 1.0, 60)], 1e-5),
    ([(20.0, 0.5, 1000)], 1e-6),
    ([(1.0, 0.02, 100), (2.0, 0.1, 50), (0.8, 0.01, 300)], 1e-5),
    ([(1.5, 0.2, 40), (3.0, 1.0, 5)], 1e-5),
]


def prv(history: History, delta: float) -> float:
    """Opacus' upper bound."""
    accountant = PRVAccountant()
    accountant.history = history
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # log(0) at q = 1; orders of a bound that is sound at any
        return float(accountant.get_epsilon(delta))


def pld(history: History, delta: float) -> float:
    """dp-accounting's pessimistic value, on its default grid of 1e-4."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for noise_multiplier, sampling_rate, steps in history:
        step = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


def main() -> None:
    """Writes the table."""
    golden = {
        "about": "epsilon under add/remove adjacency; regenerate with tests/golden/epsilon.py",
        "opacus": importlib.metadata.version("opacus"),
        "dp_accounting": importlib.metadata.version("dp-accounting"),
        "rows": [
            {"history": history, "delta": delta, "prv": prv(history, delta), "pld": pld(history, delta)}
            for history, delta in TABLE
        ],
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
