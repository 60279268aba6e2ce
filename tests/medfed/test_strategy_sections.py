"""The parts of [strategy] in a study file: one sentence for each mistake."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medfed.errors import StudyError
from medfed.study import StudyConfig, read_study


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"local": {"method": "fedprox"}}, "strategy.local.mu: Field required"),
        ({"local": {"method": "fedprox", "mu": -1.0}}, "strategy.local.mu: .* got -1"),
        ({"local": {"method": "scaffold", "mu": 1.0}}, "unknown key 'strategy.local.mu'; remove it"),
        ({"local": {"method": "feddyn", "alpha": 0.0}}, "strategy.local.alpha: .* greater than 0, got 0"),
        ({"local": {"method": "fedproxy"}}, "strategy.local.method: expected one of 'fedprox', .* got 'fedproxy'"),
        ({"local": {"mu": 1.0}}, "strategy.local.method: is missing"),
        ({"personal": {"method": "ditto"}}, "strategy.personal.proximal: Field required"),
        ({"personal": {"method": "fedbn", "proximal": 1.0}}, "unknown key 'strategy.personal.proximal'; remove it"),
        ({"server": {"optimizer": "fedadam"}}, "strategy.server.learning_rate: Field required"),
        ({"server": {"optimizer": "fedavgm", "tau": 1.0}}, "unknown key 'strategy.server.tau'; remove it"),
        (
            {"server": {"optimizer": "fedadagrad", "learning_rate": 1.0, "beta_2": 0.9}},
            "strategy.server: beta_2 has no meaning for 'fedadagrad'",
        ),
        ({"shrinkage": True}, r"strategy.shrinkage needs \[privacy\] with noise"),
    ],
)
def test_mistake_is_named_with_its_key(
    make_study: Callable[..., StudyConfig],
    study_file: Callable[[StudyConfig], Path],
    strategy: dict[str, Any],
    message: str,
) -> None:
    path = study_file(make_study(("here",)))
    lines = path.read_text().split("[strategy]\n")
    given = "\n".join(f"{key} = {_toml(value)}" for key, value in strategy.items())
    path.write_text(f"{lines[0]}[strategy]\n{given}\n[[sites]]{lines[1].split('[[sites]]')[1]}")
    with pytest.raises(StudyError, match=message):
        read_study(path)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return {True: "true"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')


def test_parts_that_are_left_out_are_absent(make_study: Callable[..., StudyConfig]) -> None:
    strategy = make_study(("here",)).strategy
    assert (strategy.local, strategy.personal, strategy.server, strategy.shrinkage) == (None, None, None, False)


def test_shrinkage_needs_noise_of_a_known_size(make_private_study: Callable[..., StudyConfig]) -> None:
    private = make_private_study()
    sgd = private.training.model_copy(update={"optimizer": "sgd"})
    private.replace(training=sgd, strategy={"shrinkage": True})
    for changes, message in [
        ({}, "optimizer = 'sgd', got 'adamw'"),
        ({"training": sgd, "strategy": {"shrinkage": True, "local": {"method": "fedprox", "mu": 1.0}}}, "'fedprox'"),
        ({"privacy": private.privacy.model_copy(update={"trust": "none", "noise_multiplier": None})}, "with noise"),
    ]:
        with pytest.raises(ValueError, match=message):
            private.replace(**{"strategy": {"shrinkage": True}, **changes})
