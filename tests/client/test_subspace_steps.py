"""Steps on coordinates: what trains moves as torch's own optimiser would move it, the rest not by a bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.subspace_steps import SubspaceSteps
from medfed.adapter_manifest import AdapterManifest
from medfed.models.adapted import AdaptedModel
from medfed.study_sections import TrainingConfig
from strategies.lora import frame
from strategies.subspace import Core, Part, Slice, Subspace, Whole

# Legend: P adapter parameters, Z coordinates of what trains.

MANIFEST = AdapterManifest.of(
    {
        "layer.lora_A.weight": torch.zeros(2, 5),
        "layer.lora_B.weight": torch.zeros(6, 2),
        "z.bias": torch.zeros(3),
    },
    method="lora",
    rank=2,
)
RATE = 0.1

PARTS: dict[str, dict[str, Part]] = {
    "everything": {spec.name: Whole() for spec in MANIFEST.tensors},
    "B alone": {"layer.lora_B.weight": Whole()},
    "slices": {"layer.lora_A.weight": Slice(0, 1, 2), "layer.lora_B.weight": Slice(1, 0, 1), "z.bias": Whole()},
    "core": {"layer.lora_B.weight": Core(frame(6, 2, "test")), "z.bias": Whole()},
}


class FlatModel:
    """As much of an adapted model as steps need."""

    def __init__(self, start_P: Tensor) -> None:
        self.flat = nn.Parameter(start_P.clone())
        self.flat.grad = torch.zeros_like(self.flat)


def steps_of(start_P: Tensor, subspace: Subspace, optimizer: str, pull: Any = None) -> tuple[Any, SubspaceSteps]:
    model: Any = FlatModel(start_P)
    config = TrainingConfig(local_epochs=1, batch_size=1, learning_rate=RATE, optimizer=optimizer)  # type: ignore[arg-type]
    return model, SubspaceSteps(model, subspace, config, pull)


def in_subspace(subspace: Subspace) -> Tensor:
    """An adapter that the subspace holds: what a core does not span is zero."""
    start_P = torch.randn(MANIFEST.num_elements, generator=torch.Generator().manual_seed(0))
    return subspace.place(start_P, subspace.coordinates(start_P).clone())


def gradient(x_P: Tensor, number: int) -> Tensor:
    return torch.sin(x_P * (1 + number)) + 0.3


def pulls(offset_Z: Tensor) -> Tensor:
    return 0.5 * offset_Z + 0.25


@pytest.mark.parametrize("pull", [None, pulls], ids=["no pull", "pull"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("parts", PARTS)
def test_steps_agree_with_an_optimiser_of_the_coordinates(
    parts: str, optimizer: str, pull: Callable[[Tensor], Tensor] | None
) -> None:
    """Oracle: torch's optimiser on a parameter of its own, whose model is placed anew for each gradient."""
    subspace = Subspace(MANIFEST, PARTS[parts])
    start_P = in_subspace(subspace)
    model, steps = steps_of(start_P, subspace, optimizer, pull)
    z_Z = nn.Parameter(subspace.coordinates(start_P).clone())
    begin_Z = z_Z.detach().clone()
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    oracle = made([z_Z], lr=RATE, weight_decay=0.0)
    for number in range(4):
        model.flat.grad.copy_(gradient(model.flat.detach(), number))
        steps.step()
        x_P = subspace.place(start_P, z_Z.detach())
        along_Z = subspace.coordinates(gradient(x_P, number)).clone()
        z_Z.grad = along_Z if pull is None else along_Z + pull(z_Z.detach() - begin_Z)
        oracle.step()
        torch.testing.assert_close(model.flat.detach(), subspace.place(start_P, z_Z.detach()))


@pytest.mark.parametrize("parts", PARTS)
def test_what_does_not_train_stays_bit_for_bit(parts: str) -> None:
    subspace = Subspace(MANIFEST, PARTS[parts])
    start_P = in_subspace(subspace)
    model, steps = steps_of(start_P, subspace, "adamw", pulls)
    for number in range(3):
        model.flat.grad.copy_(gradient(model.flat.detach(), number))
        steps.step()
    before, after = MANIFEST.unflatten(start_P), MANIFEST.unflatten(model.flat.detach())
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in PARTS[parts])
    if parts == "slices":
        assert torch.equal(before["layer.lora_A.weight"][0], after["layer.lora_A.weight"][0])
        assert torch.equal(before["layer.lora_B.weight"][:, 1], after["layer.lora_B.weight"][:, 1])


def test_gradient_in_coordinates_is_the_same_step() -> None:
    subspace = Subspace(MANIFEST, PARTS["slices"])
    start_P = in_subspace(subspace)
    one, steps = steps_of(start_P, subspace, "sgd", pulls)
    other, along = steps_of(start_P, subspace, "sgd", pulls)
    for number in range(3):
        gradient_P = gradient(one.flat.detach(), number)
        one.flat.grad.copy_(gradient_P)
        steps.step()
        along.step_along(subspace.coordinates(gradient_P))
        assert torch.equal(one.flat, other.flat)


def test_pull_is_told_how_far_the_coordinates_have_come() -> None:
    seen: list[Tensor] = []

    def noting(offset_Z: Tensor) -> None:
        seen.append(offset_Z.clone())

    subspace = Subspace(MANIFEST, PARTS["slices"])
    start_P = in_subspace(subspace)
    model, steps = steps_of(start_P, subspace, "sgd", noting)
    for _ in range(3):
        before_P = model.flat.detach().clone()
        model.flat.grad.copy_(torch.ones_like(before_P))
        steps.step()
        expected_Z = subspace.coordinates(before_P) - subspace.coordinates(start_P)
        torch.testing.assert_close(seen[-1], expected_Z)
    assert torch.equal(seen[0], torch.zeros_like(seen[0]))
    torch.testing.assert_close(seen[2], torch.full_like(seen[2], -2 * RATE))


def test_real_model_is_stepped_in_place(model: AdaptedModel) -> None:
    subspace = Subspace.of(model.manifest, lambda spec: Whole() if "lora_B" in spec.name else None)
    model.load(model.initial_P)
    config = TrainingConfig(local_epochs=1, batch_size=1, learning_rate=RATE, optimizer="sgd")
    steps = SubspaceSteps(model, subspace, config, None)
    steps.step_along(torch.ones(subspace.manifest.num_elements))
    for name, parameter in model.trainable.items():
        start = model.manifest.unflatten(model.initial_P)[name]
        torch.testing.assert_close(parameter.detach(), start - RATE * ("lora_B" in name))
