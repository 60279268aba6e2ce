"""Strategies by the name a study file uses."""

from __future__ import annotations

from medfed.errors import StudyError
from medfed.study_sections import StrategyConfig
from strategies.fedit import FedIT
from strategies.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in (FedIT,)}


def strategy_of(config: StrategyConfig) -> Strategy:
    """The strategy of a study.

    Raises:
        StudyError: for a name that is not registered.
    """
    if config.name not in STRATEGIES:
        raise StudyError(f"Expected strategy.name of {', '.join(sorted(STRATEGIES))}, got {config.name!r}.")
    return STRATEGIES[config.name]()
