"""Fresh frames: every so many rounds what was learnt is folded into the base, and new random frames are drawn.

One-sided rules learn in the span of their frames only. Here the frames are redrawn from the study's seed, so that in
time every direction has its turn, while each round stays linear. What the old frames carried becomes part of the
base weights, at the server and at every site alike: sites are told a replay list, the coordinates of each fold, and
draw the frames again themselves. The sum of all folds is the update; its rank grows up to that of the layer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from strategies.lora import is_a, is_b, lora_pairs
from strategies.rules.ffa_lora import all_but_a, frames_of_a
from strategies.rules.twin import half_of, twin_frames, twin_subspace
from strategies.strategy import Rule, Setting, State, Tree
from strategies.subspace import Subspace


class FfaFresh(Rule):
    """FFA-LoRA whose A is redrawn every ``hold_frames`` rounds."""

    name = "ffa-fresh"
    exact = True
    fixed_subspace = False
    takes_ranks = True

    def start(self, adapter: Tree) -> State:
        """As of the first frames; the model computes what it did."""
        return State({**adapter, **self.frames(0)})

    def gauge(self, round_number: int, state: State) -> State:
        """If frames are due: the same model with the old pairs folded, and nothing learnt yet in new frames."""
        if round_number == 1 or self.num_folds(round_number) == self.num_folds(round_number - 1):
            return state
        number = self.num_folds(round_number)
        learnt = {
            fold_name(number, name): self._learns.parts[name].coordinates(state.adapter[name]).contiguous()
            for name in self._learns.parts
        }
        return replace(
            state,
            adapter={**state.adapter, **self.frames(number)},
            broadcast={**state.broadcast, **learnt},
        )

    def trainable(self, round_number: int) -> Subspace:
        """All but A."""
        return Subspace.of(self.manifest, all_but_a)

    def frames(self, number: int) -> dict[str, Tensor]:
        """The pairs after ``number`` folds, before anything is learnt in them."""
        zeros = {pair.b: torch.zeros(pair.d_out, pair.rank) for pair in lora_pairs(self.manifest)}
        return {**frames_of_a(self.manifest, self.setting.seed, number), **zeros}

    def num_folds(self, round_number: int) -> int:
        """Folds that were made before a round trains."""
        return max(0, round_number - 1) // (self.setting.config.hold_frames or 1)

    def told_in(self, round_number: int) -> AdapterManifest | None:
        """The replay list: the coordinates of every fold so far."""
        count = self.num_folds(round_number)
        if count == 0:
            return None
        learns = self._learns.manifest
        specs = [
            TensorSpec(name=fold_name(number, spec.name), shape=spec.shape)
            for number in range(1, count + 1)
            for spec in learns.tensors
        ]
        ordered = tuple(sorted(specs, key=lambda spec: spec.name))
        return AdapterManifest(method=learns.method, rank=learns.rank, tensors=ordered)

    def folds(self, broadcast: Tree) -> list[Tree]:
        """The pairs of every fold: its frames, with its coordinates in them."""
        first = next(iter(self._learns.parts))
        folded: list[Tree] = []
        # Others may have something told too.
        while fold_name(len(folded) + 1, first) in broadcast:
            number = len(folded) + 1
            pairs = self.frames(number - 1)
            for name, part in self._learns.parts.items():
                part.put(pairs[name], broadcast[fold_name(number, name)])
            folded.append(pairs)
        return folded

    @property
    def _learns(self) -> Subspace:
        """What of the LoRA pairs trains: what a fold is told by."""
        trainable = self.trainable(1)
        return Subspace(
            self.manifest, {name: part for name, part in trainable.parts.items() if is_a(name) or is_b(name)}
        )


class TwinFresh(FfaFresh):
    """Twin whose frames are redrawn every ``hold_frames`` rounds.

    Raises:
        StudyError: as :class:`~strategies.rules.twin.Twin`.
    """

    name = "twin-fresh"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        half_of(setting.manifest, self.name)

    def trainable(self, round_number: int) -> Subspace:
        """What trains between the frames."""
        return twin_subspace(self.manifest)

    def frames(self, number: int) -> dict[str, Tensor]:
        """Two frames for each pair."""
        return twin_frames(self.manifest, self.setting.seed, number)


def fold_name(number: int, tensor: str) -> str:
    """Name of a tensor of the replay list; sorted by name, folds come in their order."""
    return f"fold-{number:05d}:{tensor}"
