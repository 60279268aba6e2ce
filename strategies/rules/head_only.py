"""The reference that leaves the backbone as it is: fresh heads alone are trained and averaged."""

from __future__ import annotations

from medfed.adapter_manifest import AdapterManifest, TensorSpec
from medfed.errors import StudyError
from strategies.lora import is_a, is_b
from strategies.strategy import Rule, Setting
from strategies.subspace import Part, Subspace, Whole


class HeadOnly(Rule):
    """Whatever is no LoRA pair trains.

    Raises:
        StudyError: if there is nothing else.
    """

    name = "head-only"
    exact = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if all(is_a(spec.name) or is_b(spec.name) for spec in setting.manifest.tensors):
            raise StudyError("Expected a backbone with fresh heads for strategy 'head-only', got LoRA pairs alone.")

    def trainable(self, round_number: int) -> Subspace:
        """Heads."""
        return _heads(self.manifest)


def _heads(manifest: AdapterManifest) -> Subspace:
    def part_of(spec: TensorSpec) -> Part | None:
        return None if is_a(spec.name) or is_b(spec.name) else Whole()

    return Subspace.of(manifest, part_of)
