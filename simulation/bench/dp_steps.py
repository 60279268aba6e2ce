"""The training steps that the privacy benchmark compares, each on a model of its own; one process per question.

``python -m simulation.bench.dp_steps WORKLOAD times REPEATS ARM...`` runs the arms in turn, the first round to warm
up, and prints a line of JSON for each step. ``memory ARM`` prints by how much two steps raise the peak resident
memory. ``gradients`` prints how far the engines' gradients are from those of a loop over batches of one, and P.
WORKLOAD is JSON, the fields of :class:`Workload`.

The backbone has the shape of ``vit-s-focus`` (width 384, 6 heads, 224 px in patches of 14) and random weights: what
a step costs does not depend on their values, and no weights file is needed.

Legend: B images of a batch, P adapter parameters.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfed.device import prepare_cpu
from medfed.models.adapted import AdaptedModel
from medfed.models.registry import backbone_of, register_backbone
from medfed.models.weights import VIT_S_FOCUS
from medfed.study import StudyConfig
from medfed.study_sections import BackboneConfig, ClassificationConfig, SegmentationConfig
from medfed.tasks import task_of
from privacy.clipping import ClippedSum
from privacy.noise import add_gaussian
from privacy.per_sample.engine import Engine
from privacy.per_sample.loop import Loop
from privacy.per_sample.lora_exact import LoraExact
from privacy.per_sample.vmap import Vmap
from privacy.randomness import RandomStream

Step = Callable[[], None]

CPU = torch.device("cpu")
LEARNING_RATE = 1e-3
CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.0
JITTER = 0.02
"""What is added to the adapter: where LoRA's B is zero, half of the gradients are zero whatever an engine does."""


@dataclass(frozen=True)
class Workload:
    """What one step computes.

    Attributes:
        batch_size: B; every image is another patient's.
        num_blocks: transformer blocks; 12 in a ViT-S.
    """

    batch_size: int
    num_blocks: int


class Trainee:
    """A fresh model, its batch and its losses.

    Args:
        work: the workload.
        targets: preset of ``vit-s-focus``: where LoRA of rank 8 sits on queries and values.
    """

    def __init__(self, work: Workload, targets: str = "all-blocks") -> None:
        study = _study(work, targets)
        self.model = AdaptedModel(study, CPU)
        self.task = task_of(study.task)
        generator = torch.Generator().manual_seed(0)
        jitter_P = torch.randn(self.model.initial_P.shape, generator=generator)
        self.model.load(self.model.initial_P + JITTER * jitter_P)
        self.model.train()
        self.image_B3HW = torch.randn(work.batch_size, 3, 224, 224, generator=generator)
        self.annotations = [{"lesion": index % 2} for index in range(work.batch_size)]

    def batch(self) -> tuple[Tensor, Any]:
        """The batch as a site without a feature cache makes it in every step."""
        return self.model.encode(self.image_B3HW), self.task.stack(self.annotations, CPU)

    def losses(self, batch: tuple[Tensor, Any]) -> Tensor:
        """The loss of each image, shape (B,)."""
        return self.task.stacked_losses(self.model, *batch)

    def engine(self, kind: type[Engine]) -> Engine:
        """An engine for the model."""
        return kind(self.model.module, self.model.trainable, self.losses)


def non_private(work: Workload) -> Step:
    """Forward, backward, update."""
    trainee = Trainee(work)
    flat = trainee.model.flat
    gradient_P = flat.grad
    assert gradient_P is not None

    def step() -> None:
        gradient_P.zero_()
        trainee.losses(trainee.batch()).mean().backward()  # type: ignore[no-untyped-call]
        flat.data.add_(gradient_P, alpha=-LEARNING_RATE)

    return step


def private(trainee: Trainee, kind: type[Engine], batch: Callable[[], tuple[Tensor, Any]]) -> Step:
    """Per-sample gradients, each patient clipped, noise on the sum, update."""
    engine, flat = trainee.engine(kind), trainee.model.flat
    stream = RandomStream.from_system()
    num_images = len(trainee.annotations)

    def step() -> None:
        gradients_BP, _ = engine.gradients(batch())
        clipped = ClippedSum(engine.num_parameters, clip_norm=CLIP_NORM, device=CPU)
        clipped.add(gradients_BP, range(num_images), [1.0] * num_images)
        noised_P = add_gaussian(clipped.close().sum_P, noise_std=NOISE_MULTIPLIER * CLIP_NORM, stream=stream)
        flat.data.add_((noised_P / num_images).float(), alpha=-LEARNING_RATE)

    return step


def lora_exact(work: Workload) -> Step:
    """The default engine."""
    trainee = Trainee(work)
    return private(trainee, LoraExact, trainee.batch)


def vmap(work: Workload) -> Step:
    """The general engine."""
    trainee = Trainee(work)
    return private(trainee, Vmap, trainee.batch)


def cached(work: Workload) -> Step:
    """The default engine, LoRA in the last quarter of the blocks, what lies before it from the feature cache."""
    from client.data import Item
    from client.features import FeatureCache

    trainee, features = Trainee(work, "last-quarter"), FeatureCache()
    items = [
        Item(f"patient-{index}", "site", image_3HW, annotation, image_digest=str(index), reference_digest=str(index))
        for index, (image_3HW, annotation) in enumerate(zip(trainee.image_B3HW, trainee.annotations, strict=True))
    ]

    def batch() -> tuple[Tensor, Any]:
        return features.batch(items, trainee.model), trainee.task.stack(trainee.annotations, CPU)

    return private(trainee, LoraExact, batch)


def opacus_hooks(work: Workload) -> Step:
    """Opacus as its users run it: ``GradSampleModule`` and ``DPOptimizer``, float32 noise of torch's generator."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    trainee = Trainee(work)
    _wrapped = GradSampleModule(trainee.model.module, strict=False)
    optimizer = DPOptimizer(_sgd(trainee), **_opacus_settings(work))

    def step() -> None:
        optimizer.zero_grad()
        trainee.losses(trainee.batch()).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def opacus_ghost(work: Workload) -> Step:
    """Opacus' ghost clipping: norms without gradients, then a second backward pass."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    trainee = Trainee(work)
    wrapped = GradSampleModuleFastGradientClipping(
        trainee.model.module, strict=False, max_grad_norm=CLIP_NORM, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(_sgd(trainee), **_opacus_settings(work))

    def step() -> None:
        optimizer.zero_grad()
        DPTensorFastGradientClipping(wrapped, optimizer, trainee.losses(trainee.batch())).backward()
        optimizer.step()

    return step


ARMS: Mapping[str, Callable[[Workload], Step]] = {
    "non-private": non_private,
    "lora-exact": lora_exact,
    "vmap": vmap,
    "cached": cached,
    "opacus-hooks": opacus_hooks,
    "opacus-ghost": opacus_ghost,
}


def print_times(work: Workload, repeats: int, names: list[str]) -> None:
    """Run the arms in turn; each repeat begins with the next of them, so that none always follows the same."""
    arms = {name: ARMS[name](work) for name in names}
    for repeat in range(repeats + 1):  # repeat 0 warms up
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            arms[name]()
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            _print({"arm": name, "repeat": repeat, "wall_s": wall_s, "cpu_s": cpu_s})


def print_memory(work: Workload, name: str) -> None:
    """Growth of the peak resident memory from before the first step to after the second."""
    step = ARMS[name](work)
    gc.collect()
    before = _peak_bytes()
    for _ in range(2):
        step()
    _print({"peak_bytes": _peak_bytes() - before})


def print_gradients(work: Workload) -> None:
    """Largest error of a sample's gradient over the largest norm of one; and the number of parameters."""
    trainee = Trainee(work)
    batch = trainee.batch()
    expected_BP, _ = trainee.engine(Loop).gradients(batch)
    scale = float(expected_BP.norm(dim=1).max())
    errors = {}
    for kind in (LoraExact, Vmap):
        got_BP, _ = trainee.engine(kind).gradients(batch)
        errors[kind.name] = float((got_BP - expected_BP).norm(dim=1).max()) / scale
    _print({"errors": errors, "num_parameters": trainee.model.manifest.num_elements})


def _study(work: Workload, targets: str) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "benchmark",
            "seed": 0,
            "backbone": {"name": _backbone(work.num_blocks), "sha256": "0" * 64},
            "adapter": {"method": "lora", "rank": 8, "alpha": 8.0, "targets": targets},
            "task": {"kind": "classification", "targets": {"lesion": ["absent", "present"]}},
            "training": {"local_epochs": 1, "batch_size": work.batch_size, "learning_rate": LEARNING_RATE},
            "rounds": {"num_rounds": 1},
            "sites": [{"name": "site"}],
        }
    )


@cache
def _backbone(num_blocks: int) -> str:
    """Name of a registered backbone that is ``vit-s-focus`` but for its weights and number of blocks."""

    def build(_task: SegmentationConfig | ClassificationConfig, generator: torch.Generator) -> torch.nn.Module:
        from transformers import Dinov2Model

        from medfed.models.vit_classifier import VitClassifier
        from medfed.models.vit_onnx import vit_s14_config

        config = vit_s14_config()
        config.num_hidden_layers = num_blocks
        return VitClassifier(Dinov2Model(config), {"lesion": 2}, generator=generator)

    name = f"benchmark-vit-s-{num_blocks}"
    focus = backbone_of(BackboneConfig(name="vit-s-focus", sha256=VIT_S_FOCUS.sha256))
    register_backbone(name, replace(focus, build=build, weights=None))
    return name


def _sgd(trainee: Trainee) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainee.model.trainable.values(), lr=LEARNING_RATE)


def _opacus_settings(work: Workload) -> dict[str, Any]:
    return {
        "noise_multiplier": NOISE_MULTIPLIER,
        "max_grad_norm": CLIP_NORM,
        "expected_batch_size": work.batch_size,
    }


def _peak_bytes() -> int:
    """Peak resident memory of this process since it began."""
    status = Path("/proc/self/status")
    if status.exists():  # the value of getrusage would count what the parent held when it forked
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _print(facts: dict[str, object]) -> None:
    print(json.dumps(facts), flush=True)


def main(workload: str, what: str, *arguments: str) -> None:
    """Answer one question; see the top of this file."""
    warnings.simplefilter("ignore")  # Opacus and vmap warn about what is measured here
    prepare_cpu(num_threads=1)
    work = Workload(**json.loads(workload))
    if what == "times":
        print_times(work, int(arguments[0]), list(arguments[1:]))
    elif what == "memory":
        print_memory(work, arguments[0])
    else:
        print_gradients(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
