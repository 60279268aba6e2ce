"""Proof on the real model, before any privacy is spent, that an engine is right for it.

An engine that is wrong says nothing: training goes on, the loss falls, and patients contribute many times the
clip norm. So each study begins with this check, on made-up tensors of the real shapes, with the real module
and losses, and with an adapter moved away from its start (where LoRA's B is zero, half of all gradients are
zero whatever an engine does).

Legend: B samples, P adapter parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from medfed.errors import EngineError
from privacy.clipping import ClippedSum
from privacy.per_sample.engine import Batch, Engine, Losses, one_per_sample, samples, stored_statistics
from privacy.per_sample.loop import Loop
from privacy.per_sample.lora_exact import LoraExact
from privacy.per_sample.vmap import Vmap

TOLERANCE = 1e-3
"""Largest error of a sample's gradient, over the largest norm of a sample's gradient."""

_NUM_SAMPLES = 3
_JITTER = 0.02
"""Standard deviation of what is added to the adapter for the check."""

_DEAD = 1e-9
"""Share of the loss that moving the adapter by its own length must change: far below one float32 rounding."""

BatchOf = Callable[[int], Batch]
"""Makes a batch of that many different samples, of the real shapes; the same at every call."""


def self_check(engine: Engine, *, batch_of: BatchOf, clip_norm: float) -> None:
    """Make sure that ``engine`` gives each sample's own gradient; the module is put back as it was.

    1. The check can fail: the loss of each sample is its own, its gradient is not lost in rounding, and no two
       samples have the same gradient, so that mistaking one for another shows.
    2. The gradients of a batch of three are those of three batches of one, each sample by its global norm (a
       comparison tensor by tensor misleads where gradients are nearly zero).
    3. Batches of none and of one work.
    4. Taking one sample out of the batch moves the clipped sum by at most ``clip_norm``, within the tolerance.
    5. In training mode no buffer changes, 2 holds as far as training is not random (batches of one draw the same
       dropout as the loop; three do not), and changing one sample changes no other sample's gradient.

    Raises:
        EngineError: naming what failed, the tensor where the error is largest, and what to change.
    """
    batch = batch_of(_NUM_SAMPLES)
    with _as_it_was(engine.module), _moved_adapter(engine), torch.random.fork_rng():
        with _mode(engine.module, training=False):
            expected_BP = _expected(engine, batch)
            got_BP, _ = engine.gradients(batch)
            _refuse_difference(engine, got_BP, expected_BP)
            _refuse_strange_sizes(engine, batch, expected_BP)
            _refuse_large_contribution(engine, batch, got_BP, clip_norm)
        with _mode(engine.module, training=True):
            _refuse_side_effects(engine, batch)
            _refuse_difference_in_training(engine, batch)
            _refuse_influence(engine, batch)


def choose_engine(
    choice: str,
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    losses: Losses,
    *,
    batch_of: BatchOf,
    clip_norm: float,
) -> Engine:
    """The engine that a study asks for, or the fastest that passes the self-check for ``auto``.

    Raises:
        EngineError: if none does; the message holds the reason of each and what to change.
    """
    kinds: dict[str, type[Engine]] = {kind.name: kind for kind in (LoraExact, Vmap, Loop)}
    if choice != "auto" and choice not in kinds:
        raise EngineError(f"Expected privacy.engine of auto, {', '.join(kinds)}, got {choice!r}.")
    wanted = [LoraExact, Vmap] if choice == "auto" else [kinds[choice]]
    reasons: dict[str, str] = {}  # a reason that all engines give is told once
    for kind in wanted:
        try:
            engine = kind(module, parameters, losses)
            self_check(engine, batch_of=batch_of, clip_norm=clip_norm)
        except EngineError as error:
            reasons[str(error)] = kind.name
        else:
            return engine
    told = [reason if len(reasons) == 1 else f"{name}: {reason}" for reason, name in reasons.items()]
    raise EngineError(
        "No engine for per-sample gradients is right for this model, so nothing was trained and no budget was spent. "
        + " | ".join(told)
    )


def _expected(engine: Engine, batch: Batch) -> Tensor:
    """The gradients by batches of one, which every engine must give, on a model where that means something."""
    expected_BP, alone_B = Loop(engine.module, engine.parameters, engine.losses).gradients(batch)
    _refuse_coupled_losses(engine, batch, alone_B)
    if not torch.isfinite(expected_BP).all():
        raise EngineError(
            f"Expected finite gradients in the self-check, got NaN or infinity in {_largest(engine, expected_BP)}; "
            "check the backbone's weights and the loss."
        )
    _refuse_dead_adapter(engine, expected_BP, alone_B)
    _refuse_equal_gradients(engine, expected_BP)
    return expected_BP


def _refuse_coupled_losses(engine: Engine, batch: Batch, alone_B: Tensor) -> None:
    with torch.no_grad():
        together_B = one_per_sample(engine.losses(batch), len(alone_B)).float()
    scale = float(torch.maximum(together_B.abs(), alone_B.abs()).max())
    error = float((together_B - alone_B).abs().max())
    if error > TOLERANCE * scale:
        raise EngineError(
            f"Expected the loss of each sample to depend on that sample alone, got losses that differ by "
            f"{error / scale:.3g} of their size between a batch of {len(alone_B)} and batches of one: samples are "
            "compared with each other (in-batch contrast) or normalised together (batch statistics), which cannot be "
            "made private per patient; use another loss, or a backbone with group or layer normalisation."
        )


def _refuse_dead_adapter(engine: Engine, expected_BP: Tensor, alone_B: Tensor) -> None:
    length = float(torch.cat([parameter.detach().reshape(-1) for parameter in engine.parameters.values()]).norm())
    effect_B = expected_BP.norm(dim=1) * length
    if bool((effect_B <= _DEAD * alone_B.abs()).any()):
        raise EngineError(
            "Expected the adapter to act on the loss, got a gradient that is zero, or lost in rounding, for a sample "
            f"in the self-check (parameters: {next(iter(engine.parameters))} and so on); on such a model every engine "
            "would pass. Check adapter.targets, and that the backbone has its pretrained weights."
        )


def _refuse_equal_gradients(engine: Engine, expected_BP: Tensor) -> None:
    """Two samples that are mistaken for each other must show as an error above the tolerance."""
    distances_BB = torch.cdist(expected_BP, expected_BP, compute_mode="donot_use_mm_for_euclid_dist")
    distances_BB.fill_diagonal_(float("inf"))
    if not float(distances_BB.min()) > 2 * TOLERANCE * float(expected_BP.norm(dim=1).max()):
        raise EngineError(
            "Expected different samples to have different gradients in the self-check, got two that are the same: "
            "mistaking one for the other would not show. Check that the loss depends on the image, and that the "
            "backbone has its pretrained weights."
        )


def _refuse_difference(engine: Engine, got_BP: Tensor, expected_BP: Tensor) -> None:
    scale = float(expected_BP.norm(dim=1).max())
    error = float((got_BP - expected_BP).norm(dim=1).max()) / scale
    if not error < TOLERANCE:
        raise EngineError(
            f"Expected engine {engine.name!r} to give each sample's own gradient, got a relative error of "
            f"{error:.3g}, most of it in {_largest(engine, got_BP - expected_BP)}; adapt other layers, or set "
            "privacy.engine = 'loop', which is exact and slower."
        )


def _refuse_strange_sizes(engine: Engine, batch: Batch, expected_BP: Tensor) -> None:
    none_BP, losses_B = engine.gradients(samples(batch, slice(0, 0)))
    if none_BP.shape != (0, engine.num_parameters) or len(losses_B):
        raise EngineError(
            f"Expected no gradients of no samples, got shape {tuple(none_BP.shape)} from engine {engine.name!r}."
        )
    one_BP, _ = engine.gradients(samples(batch, slice(0, 1)))
    _refuse_difference(engine, one_BP, expected_BP[:1])


def _refuse_large_contribution(engine: Engine, batch: Batch, got_BP: Tensor, clip_norm: float) -> None:
    def clipped_sum(gradients_BP: Tensor) -> Tensor:
        total = ClippedSum(gradients_BP.shape[1], clip_norm=clip_norm, device=gradients_BP.device)
        total.add(gradients_BP, range(len(gradients_BP)), [1.0] * len(gradients_BP))
        return total.close().sum_P

    without_last_BP, _ = engine.gradients(samples(batch, slice(0, -1)))
    moved = float((clipped_sum(got_BP) - clipped_sum(without_last_BP)).norm())
    # A batch of another size may round otherwise, which moves the other samples a little, too.
    if not moved <= clip_norm * (1 + TOLERANCE):
        raise EngineError(
            f"Expected one sample to move the clipped sum by at most {clip_norm:g}, got {moved:g} from engine "
            f"{engine.name!r}; set privacy.engine = 'loop', which is exact and slower."
        )


def _refuse_side_effects(engine: Engine, batch: Batch) -> None:
    before = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    engine.gradients(batch)
    for name, buffer in engine.module.named_buffers():
        if name not in before or not torch.equal(before[name], buffer):
            raise EngineError(
                f"Expected buffers to stay as they are, got {name} changed by a training pass: it would carry "
                "patient data out of the accounted part; put that layer in evaluation mode, or replace it."
            )


def _refuse_difference_in_training(engine: Engine, batch: Batch) -> None:
    """What runs in training mode only (checkpointing, deep supervision) must be right, too."""

    def seeded(engine: Engine, batch: Batch) -> Tensor:
        torch.manual_seed(0)
        return engine.gradients(batch)[0]

    loop = Loop(engine.module, engine.parameters, engine.losses)
    # Fused attention draws its dropout otherwise than the plain kernel, the only one that vmap has.
    with sdpa_kernel(SDPBackend.MATH):
        one = samples(batch, slice(0, 1))
        expected_1P = seeded(loop, one)
        _refuse_difference(engine, seeded(engine, one), expected_1P)
        if torch.equal(expected_1P, loop.gradients(one)[0]):  # without the seed: nothing is random
            _refuse_difference(engine, engine.gradients(batch)[0], _expected(engine, batch))


def _refuse_influence(engine: Engine, batch: Batch) -> None:
    def gradients(batch: Batch) -> Tensor:
        torch.manual_seed(0)  # dropout draws the same in both
        return engine.gradients(batch)[0]

    other = tree_map(lambda leaf: torch.cat([leaf[:-1], leaf[:1]]), batch)  # the last sample becomes the first
    before_BP, after_BP = gradients(batch), gradients(other)
    moved_BP = (after_BP - before_BP)[:-1]
    scale = float(before_BP.norm(dim=1).max())
    error = float(moved_BP.norm(dim=1).max()) / scale if scale else 0.0
    if not error < TOLERANCE:
        raise EngineError(
            f"Expected each sample's gradient to depend on that sample alone, got a relative change of {error:.3g}, "
            f"most of it in {_largest(engine, moved_BP)}, from changing another sample in training mode; "
            "batch-coupled layers and losses (in-batch contrast, batch statistics) cannot be made private per patient."
        )


def _largest(engine: Engine, values_BP: Tensor) -> str:
    """The tensor that holds the largest part of ``values_BP``, by norm; NaN counts as largest."""
    pieces = torch.split(values_BP, [parameter.numel() for parameter in engine.parameters.values()], dim=1)
    norms = torch.stack([piece.norm() for piece in pieces]).nan_to_num(nan=float("inf"))
    return list(engine.parameters)[int(norms.argmax())]


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """After the context, buffers are what they were before, even where the check was refused because of them."""
    kept = [
        (layer, name, buffer, None if buffer is None else buffer.clone())
        for layer in module.modules()
        for name, buffer in layer._buffers.items()
    ]
    try:
        yield
    finally:
        for layer, name, buffer, value in kept:
            layer._buffers[name] = buffer
            if buffer is not None and value is not None:
                with torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def _moved_adapter(engine: Engine) -> Iterator[None]:
    """What may train is moved, also where a phase holds it: behind a B of zero LoRA's A has no gradient to check."""
    may_train = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    parameters = list({id(parameter): parameter for parameter in (*engine.parameters.values(), *may_train)}.values())
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=_JITTER)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


@contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Every layer of ``module`` in one mode inside the context; in evaluation mode nothing is random."""
    before = [(layer, layer.training) for layer in module.modules()]
    module.train(training)
    try:
        with stored_statistics(module):
            yield
    finally:
        for layer, was_training in before:
            layer.training = was_training
