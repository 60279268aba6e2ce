"""LoRA layers computed with the weight that they amount to, ``(W + s B A) x`` in place of ``W x + s B (A x)``.

The same function with the same gradients, up to rounding (LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685,
section 4.1, which does it once training is over). It is quicker where activations are far larger than weights, as on
the 4,096 pixels of each box in SAM's decoder: products with a rank of 4 move memory and compute next to nothing. In a
ViT it is not: what it saves there, the gradient of the full product costs again.

Whoever listens to the low-rank layers by hooks, as private training does for the gradient of each sample, is heard:
PEFT's own way is then taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def multiply_out(peft_model: nn.Module) -> int:
    """Let every LoRA layer on a plain Linear compute with one product; the number of such layers.

    Layers of other kinds, DoRA and such with dropout among them, stay as they are. Under autocast PEFT's own way is
    taken: bfloat16 would round a small update of a weight away.
    """
    from peft.tuners.lora import Linear

    found = 0
    for module in peft_model.modules():
        if isinstance(module, Linear) and _is_plain(module):
            module.forward = _Product(module)
            found += 1
    return found


def _is_plain(layer: Any) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and list(layer.lora_A) == ["default"]
        and not layer.lora_variant  # DoRA and others
        and isinstance(layer.lora_dropout["default"], nn.Identity)
    )


def _is_listened_to(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _Product:
    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        low, high = layer.lora_A["default"], layer.lora_B["default"]
        if _is_listened_to(low) or _is_listened_to(high) or torch.is_autocast_enabled(x.device.type):
            return type(layer).forward(layer, x)  # type: ignore[no-any-return]
        base: nn.Linear = layer.base_layer
        weight_ED = torch.addmm(base.weight, high.weight, low.weight, alpha=layer.scaling["default"])
        return nn.functional.linear(x, weight_ED, base.bias)
