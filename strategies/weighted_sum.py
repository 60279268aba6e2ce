"""The sum over sites: the only thing a strategy ever sees of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medfed.adapter_manifest import AdapterManifest
from strategies.strategy import Phase


def aggregate(
    phase: Phase,
    manifest: AdapterManifest,
    uploads: Mapping[str, Tensor],
    weights: Mapping[str, float],
    site_order: Sequence[str],
) -> dict[str, Tensor]:
    """The phase's statistics, summed over the sites that replied.

    Args:
        phase: the round's plan.
        manifest: the phase's upload manifest.
        uploads: flat float32 vectors of shape (P,) by site.
        weights: public weight of each site, > 0.
        site_order: all sites in the order of the study. Sums run in this order, in float64, so the result
            does not depend on who answered first or on how many workers there were.

    Returns:
        Aggregated tensors by name, float32: ``sum w x / sum w`` for a mean, ``sum w x`` for a sum.
    """
    present = [site for site in site_order if site in uploads]
    total_P = torch.zeros(manifest.num_elements, dtype=torch.float64)
    for site in present:
        total_P.add_(uploads[site], alpha=weights[site])
    return statistics_of(phase, manifest, total_P, sum(weights[site] for site in present))


def statistics_of(phase: Phase, manifest: AdapterManifest, total_P: Tensor, sum_of_weights: float) -> dict[str, Tensor]:
    """The phase's statistics from the weighted sum over sites: all that secure aggregation lets the server see.

    Args:
        phase: the round's plan.
        manifest: the phase's upload manifest.
        total_P: sum of weight times upload, float64, shape (P,).
        sum_of_weights: over the same sites.
    """
    tensors = {name: tensor.double() for name, tensor in zip(_names(manifest), _split(total_P, manifest), strict=True)}
    means = {stat.name for stat in phase.stats if stat.reduce == "mean"}
    return {
        name: (tensor / sum_of_weights if _stat_of(name, phase) in means else tensor).float()
        for name, tensor in tensors.items()
    }


def _names(manifest: AdapterManifest) -> list[str]:
    return [spec.name for spec in manifest.tensors]


def _split(vector_P: Tensor, manifest: AdapterManifest) -> list[Tensor]:
    pieces = torch.split(vector_P, [spec.num_elements for spec in manifest.tensors])
    return [piece.view(spec.shape) for piece, spec in zip(pieces, manifest.tensors, strict=True)]


def _stat_of(tensor_name: str, phase: Phase) -> str:
    return phase.stats[0].name if len(phase.stats) == 1 else tensor_name.split(":", 1)[0]
