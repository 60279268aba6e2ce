"""The audit refutes the claim of each broken mechanism, by the attack that is meant for it, and never a sound one."""

import importlib.util
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest

from privacy.randomness import RandomStream

ROOT = Path(__file__).parents[3]
RUNS = 300


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("broken_mechanisms", ROOT / "benchmarks/broken_mechanisms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["broken_mechanisms"] = module
    spec.loader.exec_module(module)
    return module


script = _script()
SOUND = [mechanism for mechanism in script.MECHANISMS if mechanism.caught_by is None]
BROKEN = [mechanism for mechanism in script.MECHANISMS if mechanism.caught_by is not None]


def audited(mechanism: "script.Mechanism", *, seed: int = 0) -> "list[script.Finding]":
    """Noise is unknown to the attackers and the same in every test run."""
    numbers = count()

    def noise(_round: int) -> RandomStream:
        return RandomStream.for_simulation(seed, "unknown", next(numbers))

    return script.audit(mechanism, runs=RUNS, coins=RandomStream.for_simulation(seed, "coins"), noise=noise)


@pytest.mark.parametrize("mechanism", BROKEN, ids=lambda mechanism: mechanism.name)
def test_broken_mechanism_is_caught(mechanism: "script.Mechanism") -> None:
    refuted_by = {finding.attack for finding in audited(mechanism) if finding.exceeds}
    assert mechanism.caught_by in refuted_by


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mechanism", SOUND, ids=lambda mechanism: mechanism.name)
def test_sound_mechanism_is_never_flagged(mechanism: "script.Mechanism", seed: int) -> None:
    findings = audited(mechanism, seed=seed)
    assert not [finding for finding in findings if finding.exceeds]
    assert [finding.attack for finding in findings] == ["likelihood", "repeats", "replay"]


def test_attack_on_a_sound_mechanism_sees_something() -> None:
    """A lower bound of zero from an attack that sees nothing would say nothing of the mechanism."""
    everybody = SOUND[1]
    likelihood = audited(everybody)[0]
    assert 0.3 * likelihood.claimed < likelihood.epsilon < likelihood.claimed
