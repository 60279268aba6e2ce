"""Large and small hospitals: training patients of simulated sites, drawn once when a study file is read.

What is drawn is written into the study, so that its digest covers it and every site knows its public size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import ValidationError

from medfed.canonical import derive_seed
from medfed.errors import StudyError
from medfed.shift_profile import QuantityShift


def with_quantities(data: dict[str, Any]) -> dict[str, Any]:
    """The content of a study file with ``train_patients`` of every site where ``[cohort.quantity]`` spreads them.

    Sites that say how many they have keep it. What is malformed is left as it is, for the study's own checks.
    """
    cohort, sites, seed = data.get("cohort"), data.get("sites"), data.get("seed")
    if not (isinstance(cohort, dict) and isinstance(sites, list) and isinstance(seed, int) and "quantity" in cohort):
        return data
    try:
        quantity = QuantityShift.model_validate(cohort["quantity"])
    except ValidationError:
        return data
    open_sites = [site for site in sites if isinstance(site, dict) and "train_patients" not in site]
    counts = iter(spread(quantity, len(open_sites), derive_seed(seed, "quantity")))
    filled = [{**site, "train_patients": next(counts)} if site in open_sites else site for site in sites]
    return {**data, "sites": filled}


def spread(quantity: QuantityShift, num_sites: int, seed: int) -> list[int]:
    """How many of the patients each site gets; at least ``least`` each, and the total together.

    Shares are Dirichlet (Yurochkin et al. 2019, ICML, "quantity" skew of Li et al. 2022, ICDE); what is left over by
    rounding goes to the sites with the largest remainders.

    Raises:
        StudyError: if there are not enough patients for the least of each.
    """
    if num_sites == 0:
        return []
    if quantity.least * num_sites > quantity.total_train_patients:
        raise StudyError(
            f"Expected total_train_patients of at least {quantity.least * num_sites} for {num_sites} sites of at least "
            f"{quantity.least}, got {quantity.total_train_patients}; raise it or lower least."
        )
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(num_sites, quantity.concentration))
    spare = quantity.total_train_patients - quantity.least * num_sites
    exact = shares * spare
    counts = np.floor(exact).astype(int)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: spare - int(counts.sum())]] += 1
    return [int(count) + quantity.least for count in counts]
