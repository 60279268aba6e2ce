"""What secure aggregation costs the demo, and whether its sum is right.

Five virtual hospitals adapt LiteMedSAM for two rounds, once with masks and once without, in turns and in this one
process. Printed is one JSON object: seconds of a training round of each, medians over all rounds, and how far the
adapters are apart after the first round beside the bound that fixed point promises. From the second round on both
train on slightly different adapters, so only the first can be held to the bound.

    python benchmarks/secure_demo.py FOLDER [--pairs N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from medfed.study import StudyConfig, read_study
from server import rounds
from server.checkpoint import Checkpoint
from simulation.bench.rows import this_machine
from simulation.harness import simulate
from simulation.run_folder import stored_study
from strategies.registry import strategy_of
from strategies.secure_channel import SecureChannel

EXAMPLE = Path(__file__).parent.parent / "examples" / "brain-structures.toml"
SCANNERS = ("reference-3t", "bias-3t", "noisy-1p5t", "legacy-lowres", "reference-3t")
MASKED = """
[secure_aggregation]
enabled = true
max_colluding = 1
update_clip_norm = 8.0
"""


def write_study(folder: Path, *, masked: bool) -> Path:
    """The demo with five sites and two rounds, with or without masks."""
    text = EXAMPLE.read_text().partition("[[sites]]")[0].replace("num_rounds = 4", "num_rounds = 2")
    sites = "".join(
        f'\n[[sites]]\nname = "site-{number}"\nscanner = "{scanner}"\ntrain_patients = 5\ntest_patients = 1\n'
        for number, scanner in enumerate(SCANNERS)
    )
    path = folder / f"{'masked' if masked else 'plain'}.toml"
    path.write_text(text + (MASKED if masked else "") + sites)
    read_study(path)
    return path


class Watched:
    """Seconds and adapter of every training round while it is in place."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.adapters: list[Tensor] = []
        self._trained = rounds._Loop.trained

    def __enter__(self) -> Watched:
        trained = self._trained

        def watched(loop: Any, state: Checkpoint) -> Checkpoint:
            started_s = time.perf_counter()
            after = trained(loop, state)
            self.seconds.append(time.perf_counter() - started_s)
            self.adapters.append(after.adapter_P)
            return after

        rounds._Loop.trained = watched  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        rounds._Loop.trained = self._trained  # type: ignore[method-assign]


def run(path: Path, folder: Path) -> tuple[Watched, StudyConfig]:
    """One simulated study."""
    with Watched() as watched:
        done = simulate(path, out=folder / "runs", workers=0, baselines=False)
    return watched, stored_study(done.folder)


def main() -> None:
    """Run the pairs and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    adapters: dict[bool, Tensor] = {}
    study: StudyConfig | None = None
    for _ in range(asked.pairs):
        for masked in (False, True):
            watched, resolved = run(write_study(asked.folder, masked=masked), asked.folder)
            seconds[masked] += watched.seconds
            adapters[masked] = watched.adapters[0]
            study = resolved if masked else study
    assert study is not None
    channel = SecureChannel.training(study, 1, strategy_of(study).plan(1))
    plain_s, masked_s = statistics.median(seconds[False]), statistics.median(seconds[True])
    print(
        json.dumps(
            {
                "plain_round_s": round(plain_s, 3),
                "masked_round_s": round(masked_s, 3),
                "overhead_s": round(masked_s - plain_s, 3),
                "overhead": round(masked_s / plain_s - 1, 4),
                "num_rounds": len(seconds[True]),
                "num_parameters": channel.num_elements - 2,
                "largest_difference": float((adapters[True] - adapters[False]).abs().max()),
                "quantisation_bound": channel.quantisation_bound(len(SCANNERS)),
                "machine": this_machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
