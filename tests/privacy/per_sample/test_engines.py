"""What every engine promises, whatever it computes with; and the layers that the fast engine knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medfed.errors import EngineError
from privacy.per_sample.engine import Engine, count_samples
from privacy.per_sample.loop import Loop
from privacy.per_sample.lora_exact import LoraExact
from privacy.per_sample.opacus_hooks import OpacusHooks
from privacy.per_sample.vmap import Vmap

# Legend: B samples, I inputs, C channels, P parameters.

OURS = (LoraExact, Vmap, Loop)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def squares(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A loss per sample of whatever the module returns, with a different pull on every output."""

    def losses(x: Tensor) -> Tensor:
        rows = module(x).reshape(len(x), -1)
        return (rows * torch.linspace(0.5, 1.5, rows.shape[1])).square().mean(dim=1)

    return losses


def made(kind: type[Engine], module: nn.Module) -> Engine:
    return kind(module, trainable(module), squares(module))


def by_autograd(module: nn.Module, batch: Tensor) -> Tensor:
    """The gradients, sample by sample, without any of our code."""
    rows = []
    for index in range(len(batch)):
        loss = squares(module)(batch[index : index + 1]).sum()
        gradients = torch.autograd.grad(
            loss, list(trainable(module).values()), allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    return torch.stack(rows)


def assert_right(kind: type[Engine], module: nn.Module, batch: Tensor) -> None:
    expected_BP = by_autograd(module, batch)
    got_BP, _ = made(kind, module).gradients(batch)
    assert float(expected_BP.norm()) > 1e-3
    assert float((got_BP - expected_BP).norm() / expected_BP.norm()) < 1e-5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------- layers of the fast engine

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias, two more axes": (lambda: nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "conv 1-D, dilation": (lambda: nn.Conv1d(2, 4, 3, dilation=2), (2, 9)),
    "conv 2-D, stride and padding": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 7, 6)),
    "conv 2-D, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "conv 2-D, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 5)),
    "conv 2-D, reflected border": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "conv 3-D, everything": (lambda: nn.Conv3d(2, 4, (3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1), groups=2), (2, 4, 5, 3)),
    "transposed conv 1-D": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (2, 5)),
    "transposed conv 2-D": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 3, 4)),
    "transposed conv 3-D": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, dilation=2), (2, 2, 3, 2)),
    "layer norm": (lambda: nn.LayerNorm(5), (4, 5)),
    "layer norm of two axes": (lambda: nn.LayerNorm((4, 5)), (4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "instance norm 1-D": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 7)),
    "instance norm 2-D": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 5)),
    "instance norm 3-D": (lambda: nn.InstanceNorm3d(3, affine=True), (3, 2, 3, 4)),
    "batch norm 1-D": (lambda: nn.BatchNorm1d(3), (3,)),
    "batch norm 2-D": (lambda: nn.BatchNorm2d(3), (3, 4, 4)),
    "batch norm 3-D": (lambda: nn.BatchNorm3d(3), (3, 2, 2, 2)),
}  # fmt: skip


class Folded(nn.Module):
    """Cuts each sample into two rows and gives them to ``layer`` as if they were samples: windows, or boxes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.layer(x.flatten(0, 1))
        return rows.unflatten(0, (len(x), -1))


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_of_the_fast_engine_agrees_with_autograd_also_with_folded_rows(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2.0)
    for num_samples in (1, 3):
        batch = torch.randn(num_samples, *shape)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()  # what autograd must see; the engine does the same in training mode
        assert_right(LoraExact, layer, batch)
        assert_right(LoraExact, Folded(layer), torch.randn(num_samples, 2, *shape))


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.BatchNorm2d(4).eval()])
def test_an_activation_in_place_behind_a_norm_does_not_cut_off_its_gradient(norm: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.LeakyReLU(inplace=True), nn.Conv2d(4, 1, 1))
    assert_right(LoraExact, network, torch.randn(3, 1, 6, 6))


def test_a_gradient_that_was_not_heard_of_is_refused_with_the_name_of_the_layer() -> None:
    in_place = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 1))
    with pytest.raises(EngineError, match=r"weight of 0 \(Linear\).*in place.*'vmap' or 'loop'"):
        made(LoraExact, in_place).gradients(torch.randn(3, 4, 5))  # a linear layer returns a view for three axes

    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.inner.weight)

    with pytest.raises(EngineError, match=r"weight of inner \(Linear\).*no call accounts for"):
        made(LoraExact, Bypass()).gradients(torch.randn(3, 5))


def test_an_adapter_that_is_no_known_layer_is_refused_by_name() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    class OwnForward(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight) + x.mean()

    with pytest.raises(EngineError, match=r"factor in 0 \(Scale\).*'vmap'"):
        made(LoraExact, nn.Sequential(Scale()))
    with pytest.raises(EngineError, match=r"weight in 0 \(OwnForward\)"):
        made(LoraExact, nn.Sequential(OwnForward(5, 5)))


def test_a_layer_that_all_samples_share_is_refused_by_name() -> None:
    class Shared(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.prompts = nn.Linear(5, 3)
            self.register_buffer("words", torch.randn(rows, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.prompts(self.words).T

    with pytest.raises(EngineError, match=r"rows of prompts.*all samples share.*'vmap'"):
        made(LoraExact, Shared(4)).gradients(torch.randn(3, 3))
    assert_right(Vmap, Shared(3), torch.randn(3, 3))


def test_a_layer_called_with_more_than_its_input_is_refused_by_name() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[8, 8])

    with pytest.raises(EngineError, match=r"up \(ConvTranspose2d\).*input only.*'vmap'"):
        made(LoraExact, Sized()).gradients(torch.randn(2, 2, 3, 3))
    assert_right(Vmap, Sized(), torch.randn(2, 2, 3, 3))


# ------------------------------------------------------------------------------------------- all engines


class Twice(nn.Module):
    """A layer that is called twice and is registered twice, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.again = nn.ModuleList([self.layer])
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.again[0](x)))


@pytest.mark.parametrize("kind", OURS)
def test_layers_called_twice_add_up_registered_twice_count_once_and_unused_ones_are_zero(kind: type[Engine]) -> None:
    module = Twice()
    assert_right(kind, module, torch.randn(3, 5))
    gradients_BP, _ = made(kind, module).gradients(torch.randn(3, 5))
    assert not gradients_BP[:, 30:].any()


def state_of(module: nn.Module) -> list[Any]:
    return [
        (name, id(parameter), type(parameter), parameter.requires_grad, parameter.detach().clone(), parameter.grad)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    ]


# Opacus' hooks say so where a layer's input needs no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", [*OURS, OpacusHooks])
def test_the_module_is_left_as_it_was(kind: type[Engine]) -> None:
    module = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2)) if kind is OpacusHooks else Twice()
    frozen = nn.Linear(5, 5)  # trainable, but not ours
    whole = nn.Sequential(frozen, module)
    for parameter in whole.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = state_of(whole)
    hooks = [len(layer._forward_hooks) for layer in whole.modules()]
    engine = kind(whole, {f"1.{name}": parameter for name, parameter in trainable(module).items()}, squares(whole))
    engine.gradients(torch.randn(3, 5))
    engine.gradients(torch.randn(3, 5))
    after = state_of(whole)
    assert [row[:4] for row in after] == [row[:4] for row in before]
    for (_, _, _, _, value, gradient), (*_, value_after, gradient_after) in zip(before, after, strict=True):
        assert torch.equal(value, value_after)
        assert gradient_after is gradient
        assert bool((gradient_after == 7.0).all())
    assert [len(layer._forward_hooks) for layer in whole.modules()] == hooks


@pytest.mark.parametrize("kind", OURS)
def test_a_batch_of_none_gives_nothing_and_computes_nothing(kind: type[Engine]) -> None:
    module = nn.Linear(5, 2)

    def losses(_: Tensor) -> Tensor:
        raise AssertionError

    gradients_BP, losses_B = kind(module, trainable(module), losses).gradients(torch.randn(0, 5))
    assert gradients_BP.shape == (0, 12)
    assert losses_B.shape == (0,)


@pytest.mark.parametrize("kind", OURS)
def test_losses_that_do_not_reach_the_adapter_have_gradient_zero(kind: type[Engine]) -> None:
    module = nn.Linear(5, 2)
    gradients_BP, losses_B = kind(module, trainable(module), lambda x: x.sum(dim=1)).gradients(torch.ones(3, 5))
    assert not gradients_BP.any()
    assert torch.equal(losses_B, torch.full((3,), 5.0))


@pytest.mark.parametrize("kind", OURS)
def test_columns_follow_the_order_of_the_parameters_and_batches_may_nest(kind: type[Engine]) -> None:
    module = nn.Linear(5, 2)
    backwards = {"b": module.bias, "w": module.weight}
    x, y = torch.randn(3, 5), torch.randn(3, 2)
    engine = kind(module, backwards, lambda batch: (module(batch["in"][0]) - batch["target"]).square().sum(dim=1))
    gradients_BP, losses_B = engine.gradients({"in": (x,), "target": y})
    difference_BO = (2 * (module(x) - y)).detach()
    torch.testing.assert_close(gradients_BP[:, :2], difference_BO)
    torch.testing.assert_close(gradients_BP[:, 2:].view(3, 2, 5), torch.einsum("bo,bi->boi", difference_BO, x))
    assert gradients_BP.dtype == torch.float32
    assert not gradients_BP.requires_grad
    assert not losses_B.requires_grad


@pytest.mark.parametrize("kind", OURS)
def test_gradients_are_computed_also_where_autograd_is_switched_off(kind: type[Engine]) -> None:
    module = nn.Linear(5, 2)
    batch = torch.randn(3, 5)
    with torch.no_grad():
        gradients_BP, _ = made(kind, module).gradients(batch)
    torch.testing.assert_close(gradients_BP, by_autograd(module, batch))


@pytest.mark.parametrize("kind", OURS)
def test_batch_norm_in_training_mode_uses_and_keeps_its_stored_statistics(kind: type[Engine]) -> None:
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1))
    batch = torch.randn(3, 1, 6, 6)
    module[1].running_mean.normal_()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    got_BP, _ = made(kind, module.train()).gradients(batch)
    assert module[1].training
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())
    torch.testing.assert_close(got_BP, by_autograd(module.eval(), batch))


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_stored_statistics_is_refused_in_either_mode(kind: type[Engine], training: bool) -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False)).train(training)
    with pytest.raises(EngineError, match="none in 1: it always mixes.*group or layer normalisation"):
        made(kind, module).gradients(torch.randn(3, 5))


@pytest.mark.parametrize("kind", OURS)
def test_tied_parameters_are_refused_with_both_names(kind: type[Engine]) -> None:
    module = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    module[1].weight = module[0].weight
    with pytest.raises(EngineError, match=r"tied between 0\.weight and 1\.weight.*untie"):
        made(kind, module)
    one = nn.Linear(5, 5)
    one.alias = one.weight
    with pytest.raises(EngineError, match="tied between weight and alias"):
        made(kind, one)
    plain = nn.Linear(5, 5)
    with pytest.raises(EngineError, match="got b and a, which are one tensor"):
        kind(plain, {"a": plain.weight, "b": plain.weight}, squares(plain))


@pytest.mark.parametrize("kind", OURS)
def test_adapter_parameters_outside_the_module_are_refused_by_name(kind: type[Engine]) -> None:
    module = nn.Linear(5, 5)
    with pytest.raises(EngineError, match="got elsewhere outside it"):
        kind(module, {"weight": module.weight, "elsewhere": nn.Parameter(torch.zeros(3))}, squares(module))
    with pytest.raises(EngineError, match="at least one adapter parameter"):
        kind(module, {}, squares(module))


@pytest.mark.parametrize("kind", [LoraExact, Loop, OpacusHooks])
def test_losses_that_are_not_one_per_sample_are_refused(kind: type[Engine]) -> None:
    module = nn.Linear(5, 2)
    with pytest.raises(EngineError, match=r"one loss per sample, shape \(\d,\), got \(\).*without reduction"):
        kind(module, trainable(module), lambda x: module(x).mean()).gradients(torch.randn(3, 5))


def test_vmap_refuses_losses_that_are_not_one_per_sample() -> None:
    module = nn.Linear(5, 2)
    with pytest.raises(EngineError, match=r"one loss per sample, shape \(1,\), got \(\)"):
        Vmap(module, trainable(module), lambda x: module(x).mean()).gradients(torch.randn(3, 5))


def test_a_batch_without_a_common_sample_axis_is_refused() -> None:
    with pytest.raises(EngineError, match="one leading sample axis"):
        count_samples({"a": torch.zeros(3, 2), "b": torch.zeros(2)})
    with pytest.raises(EngineError, match="one leading sample axis"):
        count_samples([torch.zeros(3), torch.tensor(1.0)])
    with pytest.raises(EngineError, match="one leading sample axis"):
        count_samples(())


# ------------------------------------------------------------------------------------------- checkpointing


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.inner, x.detach().requires_grad_(), use_reentrant=self.reentrant)
        return self.head(hidden)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [LoraExact, Loop])
def test_checkpointing_of_either_kind_is_right(kind: type[Engine], reentrant: bool) -> None:
    module = Checkpointed(reentrant=reentrant)
    batch = torch.randn(3, 5)
    got_BP, _ = made(kind, module).gradients(batch)
    module.forward = lambda x: module.head(module.inner(x))  # type: ignore[method-assign]
    torch.testing.assert_close(got_BP, by_autograd(module, batch))


@pytest.mark.parametrize("reentrant", [True, False])
def test_vmap_refuses_checkpointing_with_a_way_out(reentrant: bool) -> None:
    with pytest.raises(EngineError, match="privacy.engine = 'loop'"):
        made(Vmap, Checkpointed(reentrant=reentrant)).gradients(torch.randn(3, 5))


def test_vmap_names_the_layer_that_it_cannot_vectorise() -> None:
    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.detach().sum()) > 0 else x

    with pytest.raises(EngineError, match=r"in 1 \(Peeks\)"):
        made(Vmap, nn.Sequential(nn.Linear(5, 5), Peeks())).gradients(torch.randn(3, 5))
