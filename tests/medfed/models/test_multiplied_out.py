"""A LoRA layer multiplied out is the same function, with the same gradients, for everybody who may look."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from medfed.models.multiplied_out import multiply_out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 5, bias=False)
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x_TD: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x_TD)))
        return y


def adapted(**config: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = get_peft_model(
        Net(), LoraConfig(r=3, lora_alpha=7, target_modules=["first", "second"], **config)
    )  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def outcome(model: nn.Module, x_TD: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of what trains."""
    x_TD = x_TD.clone().requires_grad_()
    model.zero_grad()
    out = model(x_TD)
    out.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert x_TD.grad is not None
    return [out.detach(), x_TD.grad, *(g.clone() for g in gradients if g is not None)]


X = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))


def test_output_and_gradients_are_those_of_peft() -> None:
    model = adapted()
    expected = outcome(model, X)
    assert multiply_out(model) == 2
    found = outcome(model, X)
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_change_of_the_base_weight_counts_at_once() -> None:
    model = adapted()
    multiply_out(model)
    before = model(X)
    with torch.no_grad():
        model.get_submodule("base_model.model.second.base_layer").weight.mul_(2)  # type: ignore[operator]
    assert not torch.allclose(before, model(X))


@pytest.mark.parametrize(
    "listen",
    [
        lambda layer, heard: layer.register_forward_hook(lambda *_: heard.append("forward")),
        lambda layer, heard: layer.register_forward_pre_hook(lambda *_: heard.append("before")),
        lambda layer, heard: layer.register_full_backward_hook(lambda *_: heard.append("backward")),
    ],
)
@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_whoever_listens_to_a_low_rank_layer_hears_it(
    which: str, listen: Callable[[nn.Module, list[str]], object]
) -> None:
    model = adapted()
    multiply_out(model)
    heard: list[str] = []
    listen(model.get_submodule(f"base_model.model.first.{which}.default"), heard)
    outcome(model, X)
    assert heard


def test_autocast_does_not_round_a_small_update_away() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-3)
    multiply_out(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heard = model(X)
        for module in model.modules():
            if "forward" in vars(module):
                del module.forward
        torch.testing.assert_close(heard, model(X), rtol=0, atol=0)


def test_other_kinds_of_layers_are_left_alone() -> None:
    assert multiply_out(adapted(use_dora=True)) == 0
    assert multiply_out(adapted(lora_dropout=0.5)) == 0
