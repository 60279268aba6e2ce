"""How the federated arm treats groups of patients, over the held-out cases of all sites.

Legend: N cases of all sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from client.case_scores import CaseScores
from medfed.metrics.class_scores import ClassScores
from medfed.metrics.fairness import MIN_GROUP, demographic_parity_difference, equalised_odds_difference
from server.evaluation import GroupFairness


def group_fairness(sites: Sequence[CaseScores]) -> tuple[GroupFairness, ...]:
    """One entry for each attribute; cases whose group is not known are left out, and so are small groups."""
    names = sorted({name for scores in sites for name in scores.attributes})
    return tuple(_of_attribute(name, [scores for scores in sites if name in scores.attributes]) for name in names)


def _of_attribute(name: str, sites: Sequence[CaseScores]) -> GroupFairness:
    group_N = np.array([group for scores in sites for group in scores.attributes[name]])
    score_N = np.concatenate([scores.case_scores for scores in sites])
    groups, counts = np.unique(group_N[group_N != ""], return_counts=True)
    large = [str(group) for group, count in zip(groups, counts, strict=True) if count >= MIN_GROUP]
    parity: dict[str, float] = {}
    odds: dict[str, float] = {}
    classifiers = [scores for scores in sites if isinstance(scores, ClassScores)]
    if classifiers:
        known_N = group_N != ""
        number_N = np.unique(group_N, return_inverse=True)[1][known_N]
        for target, num_classes in classifiers[0].num_classes.items():
            predicted_N = np.concatenate([scores.logits[target].argmax(axis=1) for scores in classifiers])[known_N]
            truth_N = np.concatenate([scores.truth[target] for scores in classifiers])[known_N]
            for index in [1] if num_classes == 2 else range(num_classes):
                of_class = (predicted_N == index, truth_N == index)
                key = f"{target}/{index}"
                if not math.isnan(value := demographic_parity_difference(of_class[0], number_N)):
                    parity[key] = value
                if not math.isnan(value := equalised_odds_difference(*of_class, number_N)):
                    odds[key] = value
    return GroupFairness(
        attribute=name,
        cases={str(group): int(count) for group, count in zip(groups, counts, strict=True)},
        scores={group: float(score_N[group_N == group].mean()) for group in large},
        parity=parity,
        odds=odds,
    )
