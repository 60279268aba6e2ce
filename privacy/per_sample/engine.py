"""What every engine offers: a batch in, one flat gradient per sample out.

Legend: B samples, P adapter parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from medfed.errors import EngineError

Batch = Any
"""Any nesting of tuples, lists and dicts of tensors, all with the sample as leading axis."""

Losses = Callable[[Batch], Tensor]
"""The loss of each sample of a batch, shape (B,), from the module's parameters as they are in place."""


class Engine(ABC):
    """Per-sample gradients of one module.

    Args:
        module: everything that ``losses`` computes with; put back as it was after every call.
        parameters: what is trained, by name, in the order of the flat gradient.
        losses: one loss per sample, each a function of that sample alone.

    Raises:
        EngineError: if this engine knows that it cannot be right for the module. That it raises nothing proves
            nothing: see :func:`privacy.per_sample.self_check.self_check`.
    """

    name: ClassVar[str]

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Losses) -> None:
        if not parameters:
            raise EngineError("Expected at least one adapter parameter to train, got none.")
        self.module = module
        self.parameters = dict(parameters)
        self.losses = losses
        self.num_parameters = sum(parameter.numel() for parameter in parameters.values())
        self._module_names = _names_in(module, self.parameters)

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The gradient and the loss of each sample.

        A parameter that a sample's loss does not reach has gradient zero. An empty batch gives empty results and
        computes nothing. Batch-normalisation layers use their stored statistics, and leave them as they are,
        whatever mode the module is in: in training mode one sample would move another's gradient.

        Returns:
            (B, P) float32 gradients, columns in the order of ``parameters``; (B,) losses, detached.

        Raises:
            EngineError: if the losses are not one number per sample, or the engine meets a layer that it cannot
                be right for.
        """
        num_samples = count_samples(batch)
        device = next(iter(self.parameters.values())).device
        if num_samples == 0:
            return torch.zeros(0, self.num_parameters, device=device), torch.zeros(0, device=device)
        with stored_statistics(self.module):
            return self._gradients(batch, num_samples)

    @abstractmethod
    def _gradients(self, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        """As :meth:`gradients`, for a batch that is not empty."""


def one_per_sample(losses_B: Tensor, num_samples: int) -> Tensor:
    """The losses, once it is clear that there is one for each sample.

    Raises:
        EngineError: otherwise.
    """
    if losses_B.shape != (num_samples,):
        raise EngineError(
            f"Expected one loss per sample, shape ({num_samples},), got {tuple(losses_B.shape)}; a loss that is "
            "reduced over the batch cannot be clipped per patient, so return it without reduction."
        )
    return losses_B


def count_samples(batch: Batch) -> int:
    """The number of samples in a batch.

    Raises:
        EngineError: if its tensors disagree.
    """
    leaves: list[Tensor] = tree_leaves(batch)
    counts = {len(leaf) for leaf in leaves if leaf.dim()}
    if len(counts) != 1 or not all(leaf.dim() for leaf in leaves):
        raise EngineError(
            f"Expected tensors with one leading sample axis, got shapes {[leaf.shape for leaf in leaves]}."
        )
    return counts.pop()


def samples(batch: Batch, which: slice) -> Batch:
    """Some samples of a batch, as a batch."""
    return tree_map(lambda leaf: leaf[which], batch)


@contextmanager
def own_gradients(module: nn.Module) -> Iterator[None]:
    """Inside the context ``.grad`` of every parameter begins as None; afterwards it is what it was before.

    Engines call ``backward`` rather than ``torch.autograd.grad``, which finds no gradient, without a word, behind
    reentrant checkpoints.
    """
    kept = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def stored_statistics(module: nn.Module) -> Iterator[None]:
    """Every batch-normalisation layer of ``module`` uses its stored statistics inside the context.

    Raises:
        EngineError: if such a layer has none; it would normalise by the batch in evaluation mode, too.
    """
    layers = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    for name, layer in layers:
        if layer.running_mean is None:
            raise EngineError(
                f"Expected batch normalisation with stored statistics, got none in {name}: it always mixes the "
                "samples of a batch; use a backbone with group or layer normalisation."
            )
    switched = [layer for _, layer in layers if layer.training]
    for layer in switched:
        layer.eval()
    try:
        yield
    finally:
        for layer in switched:
            layer.train()


def _names_in(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The name inside ``module`` of each parameter; refuses parameters that are used under two names."""
    wanted: dict[int, str] = {}
    for name, parameter in parameters.items():
        if id(parameter) in wanted:
            raise EngineError(
                f"Expected each adapter parameter once, got {name} and {wanted[id(parameter)]}, which are one tensor; "
                "train it under one name."
            )
        wanted[id(parameter)] = name
    found: dict[str, str] = {}
    for prefix, layer in module.named_modules():  # a layer that is registered twice appears once
        for own, parameter in layer.named_parameters(prefix=prefix, recurse=False, remove_duplicate=False):
            in_layer = wanted.get(id(parameter))
            if in_layer is None:
                continue
            if in_layer in found:
                raise EngineError(
                    f"Expected each adapter parameter in one layer, got one tensor that is tied between "
                    f"{found[in_layer]} and {own}; untie them, or adapt other layers."
                )
            found[in_layer] = own
    if missing := [name for name in parameters if name not in found]:
        raise EngineError(
            f"Expected every adapter parameter inside the module, got {missing[0]} outside it; make what holds it a "
            "part of the module."
        )
    return found
