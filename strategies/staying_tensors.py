"""Personalisation by tensors that stay: FedBN keeps layers of normalisation, FedRep heads."""

from __future__ import annotations

import re
from collections.abc import Sequence

from medfed.adapter_manifest import AdapterManifest
from medfed.errors import StudyError
from strategies.personal import Personalisation
from strategies.subspace import Subspace

_NORM = re.compile(r"(?:.*\.)?(?:layer_?norm|batch_?norm|group_?norm|norm|ln|bn)(?:\d+|_\w+)?\.(?:weight|bias)")

_PEFT = "base_model.model."
"""Begins the names of tensors in a PEFT file, before the name of the module."""


def norms_of(manifest: AdapterManifest) -> frozenset[str]:
    """Names of tensors of layers of normalisation: vectors, of a layer that is called so."""
    matrices = {spec.name.rpartition(".")[0] for spec in manifest.tensors if len(spec.shape) > 1}
    names = [spec.name for spec in manifest.tensors if _NORM.fullmatch(spec.name)]
    return frozenset(name for name in names if name.rpartition(".")[0] not in matrices)


def heads_of(manifest: AdapterManifest, heads: Sequence[str]) -> frozenset[str]:
    """Names of the tensors of a backbone's heads, given the names of these modules."""
    starts = tuple(f"{head}." for head in heads)
    return frozenset(spec.name for spec in manifest.tensors if spec.name.removeprefix(_PEFT).startswith(starts))


class FedBN(Personalisation):
    """Scales and shifts of normalisation are each site's own (Li et al. 2021, "FedBN").

    For sites whose images look different: scanners, protocols, stains.

    Args:
        manifest: of the adapter.

    Raises:
        StudyError: if it has no layer of normalisation.
    """

    name = "fedbn"

    def __init__(self, manifest: AdapterManifest) -> None:
        self._norms = norms_of(manifest)
        if not self._norms:
            raise StudyError(
                "Expected an adapter with layers of normalisation for strategy.personal.method = 'fedbn', got none; "
                "set adapter.train_norms = true, or use another method."
            )

    def stays(self, name: str) -> bool:
        """Scales and shifts."""
        return name in self._norms


class FedRep(Personalisation):
    """Heads are each site's own (Collins et al. 2021, "Exploiting Shared Representations", Algorithm 1).

    A round trains the heads on the representation as it came, and then the representation with these heads.

    Args:
        manifest: of the adapter.
        heads: names of the backbone's modules that are heads.

    Raises:
        StudyError: if the adapter has no heads, or nothing else.
    """

    name = "fedrep"

    def __init__(self, manifest: AdapterManifest, heads: Sequence[str]) -> None:
        self._heads = heads_of(manifest, heads)
        if not 0 < len(self._heads) < len(manifest.tensors):
            raise StudyError(
                "Expected heads and something else in the adapter for strategy.personal.method = 'fedrep', got "
                f"{'heads alone' if self._heads else 'no heads'}; use adapter.method = 'lora' on a backbone with heads."
            )

    def stays(self, name: str) -> bool:
        """Heads."""
        return name in self._heads

    def passes(self, trainable: Subspace) -> tuple[Subspace, ...]:
        """Heads; the rest.

        Raises:
            StudyError: if one of them does not train.
        """
        heads = {name: part for name, part in trainable.parts.items() if name in self._heads}
        rest = {name: part for name, part in trainable.parts.items() if name not in self._heads}
        if not (heads and rest):
            raise StudyError(
                "Expected a strategy that trains heads and something else for strategy.personal.method = 'fedrep', "
                f"got one that trains {'heads' if heads else 'no heads'}; change strategy.name."
            )
        return Subspace(trainable.adapter, heads), Subspace(trainable.adapter, rest)
