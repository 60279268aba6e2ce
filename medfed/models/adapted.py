"""A backbone with its adapter attached, and the adapter as one flat vector.

The trainable parameters are views into one flat buffer in manifest order. Putting an adapter in, taking one
out and taking an optimiser step are each a single operation on that buffer, whatever the number of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from medfed.adapter_manifest import AdapterManifest
from medfed.canonical import canonical_bytes, derive_seed, sha256_hex
from medfed.errors import StudyError
from medfed.models.folding import Fold, FoldableBase, ModelState, lora_layers, stacked
from medfed.models.multiplied_out import multiply_out
from medfed.models.peft_folder import replace_pairs
from medfed.models.pixels import PixelSpec
from medfed.models.registry import Backbone, backbone_of
from medfed.models.staged import count_frozen_stages
from medfed.study import StudyConfig
from medfed.study_sections import FullAdapterConfig, HeadsAdapterConfig, LoraAdapterConfig


class AdaptedModel:
    """A frozen backbone and the small part of it that is trained.

    Attributes:
        backbone: the module, with adapter layers injected; computes stage by stage.
        manifest: the tensors that may travel: exactly the trainable ones.
        initial_P: the adapter before any training, on the CPU; does not change the model's outputs, except
            through a fresh head.
        module: everything that a loss is computed with, adapter layers included.
        trainable: the adapter's parameters by name, in manifest order.
        flat: one Parameter of shape (P,) whose storage the trainable parameters view, with its gradient
            viewed likewise; what an optimiser steps.
        num_frozen_stages: leading stages without trainable parameters: the cacheable prefix.
        prefix_digest: identifies the frozen prefix: weights, and how far it reaches.
        pixels: the preprocessing that the backbone expects.
        device: where it computes.
    """

    def __init__(self, study: StudyConfig, device: torch.device) -> None:
        entry = backbone_of(study.backbone)
        if entry.task_kind != study.task.kind:
            raise StudyError(
                f"Expected task.kind = {entry.task_kind!r} for backbone {study.backbone.name}, "
                f"got {study.task.kind!r}; change the task or the backbone."
            )
        generator = torch.Generator().manual_seed(derive_seed(study.seed, "head"))
        try:
            backbone = entry.build(study.task, generator)
        except KeyError as error:  # torch refuses some names of modules, such as "type"
            raise StudyError(f"Expected other names in [task] for {study.backbone.name}: {error}.") from None
        self._peft = _attach_adapter(backbone, entry, study)
        self.backbone: Any = self._peft.get_base_model()
        self.pixels: PixelSpec = entry.pixels
        self.device = device
        self._peft.to(device)

        trainable = _trainable_by_name(self._peft)
        self.module: nn.Module = self._peft
        self.manifest = AdapterManifest.of(
            {name: parameter.detach() for name, parameter in trainable.items()},
            method=study.adapter.method,
            rank=study.adapter.rank if isinstance(study.adapter, LoraAdapterConfig) else None,
        )
        self.initial_P = self.manifest.flatten({name: p.detach() for name, p in trainable.items()})
        self.trainable = {spec.name: trainable[spec.name] for spec in self.manifest.tensors}
        self._base = FoldableBase(lora_layers(self._peft))
        self.flat = _view_as_one(self.trainable, self.manifest, device)
        inner = [name.removeprefix("base_model.model.") for name in trainable]
        self.num_frozen_stages = count_frozen_stages(self.backbone.stages, inner)
        # Without a weights file the seed is what the weights come from.
        weights = study.backbone.sha256 if entry.weights else f"{study.backbone.name}:{study.seed}"
        self.prefix_digest = sha256_hex(
            canonical_bytes([weights, list(self.backbone.stages[: self.num_frozen_stages])])
        )

    def load(self, vector_P: Tensor) -> None:
        """Put an adapter in place.

        Raises:
            AdapterMismatchError: if length or dtype do not fit the manifest; the model is then unchanged. Values
                are looked at where they enter a process and where training ends.
        """
        self.manifest.check_form(vector_P)
        with torch.no_grad():
            self.flat.copy_(vector_P)

    def read(self) -> Tensor:
        """A copy of the adapter in place: float32, on the CPU, shape (P,)."""
        return self.flat.detach().to("cpu", copy=True)

    def put(self, state: ModelState) -> None:
        """Put an adapter in place, on base weights that are the backbone's with exactly the state's folds.

        Raises:
            AdapterMismatchError: if the adapter does not fit.
            StudyError: if a fold does not fit.
        """
        self.fold(state.folds)
        self.load(state.adapter_P)

    def fold(self, folds: Sequence[Fold]) -> None:
        """Have the base weights be the backbone's with exactly these folds; the adapter in place stays.

        Raises:
            StudyError: if a fold does not fit.
        """
        self._base.fold(folds)

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Features after the frozen prefix, without gradient; independent of the adapter."""
        # In full precision wherever it is called: features are kept, and must not depend on who asked first.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            features: Tensor = self.backbone.prefix(image_B3HW, self.num_frozen_stages)
        return features

    def embed(self, features: Tensor) -> Tensor:
        """The embedding that the task's head reads, from features after the frozen prefix."""
        embedding: Tensor = self.backbone.resume(features, self.num_frozen_stages)
        return embedding

    def train(self, mode: bool = True) -> None:
        """Switch dropout and the like on or off."""
        if self._peft.training != mode:  # the modules below switch together, and there may be thousands
            self._peft.train(mode)

    def save(self, folder: Path, state: ModelState) -> None:
        """Write a state as a standard PEFT folder, which ``PeftModel.from_pretrained`` reads onto the plain backbone.

        Folds become part of the adapter: its rank grows by that of every fold, up to the smaller side of each layer.
        The adapter in place is put back afterwards.
        """
        before_P = self.read()
        self.load(state.adapter_P)
        try:
            self._peft.save_pretrained(str(folder))
        finally:
            self.load(before_P)
        if state.folds:
            adapter = self.manifest.unflatten(state.adapter_P)
            replace_pairs(folder, stacked([*(fold.pairs for fold in state.folds), adapter]))


def _attach_adapter(backbone: nn.Module, entry: Backbone, study: StudyConfig) -> Any:
    """Freeze the backbone but for copies of its heads and norms, and inject LoRA if the study says so.

    LoRA's A is drawn from the study's seed, B is zero; heads and norms start as the backbone has them.
    """
    from peft import LoraConfig, get_peft_model

    saved = [*entry.heads, *_trained_norms(backbone, entry, study), *_layers_in_full(backbone, entry, study)]
    config = LoraConfig(modules_to_save=saved or None, **_lora_arguments(entry, study))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(study.seed, "adapter"))
        try:
            peft_model = get_peft_model(backbone, config)
        except ValueError as error:
            raise StudyError(
                f"Expected an adapter that fits {study.backbone.name}, got {study.adapter.in_words}: {error}"
            ) from None
    _call_trained_heads_directly(backbone)
    if entry.large_activations:
        multiply_out(peft_model)
    return peft_model


def _trained_norms(backbone: Any, entry: Backbone, study: StudyConfig) -> list[str]:
    """Names of the LayerNorms that train.

    A BatchNorm never does: it is frozen by contract, and its statistics would couple the patients of a batch.

    Raises:
        StudyError: if the study wants them to, and there is none.
    """
    if not isinstance(study.adapter, LoraAdapterConfig) or not study.adapter.train_norms:
        return []
    targets = re.compile(entry.target_expression(study.adapter.targets))
    modules: dict[str, nn.Module] = dict(backbone.named_modules())
    first = count_frozen_stages(backbone.stages, [name for name in modules if targets.fullmatch(name)])
    stages = tuple(f"{stage}." for stage in backbone.stages[first:])
    norms = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine and f"{name}.".startswith(stages)
    ]
    if not norms:
        raise StudyError(
            f"Expected LayerNorms in {study.backbone.name} from the first adapted stage on for adapter.train_norms, "
            "got none; remove it, or choose other targets."
        )
    return norms


def _layers_in_full(backbone: nn.Module, entry: Backbone, study: StudyConfig) -> list[str]:
    """Names of the linear layers that train in full, beside the heads.

    Raises:
        StudyError: if the study wants some and the targets name none.
    """
    if not isinstance(study.adapter, FullAdapterConfig):
        return []
    targets = re.compile(entry.target_expression(study.adapter.targets))
    found = [
        name for name, module in backbone.named_modules() if isinstance(module, nn.Linear) and targets.fullmatch(name)
    ]
    if not found:
        raise StudyError(f"Expected adapter.targets of linear layers, got {study.adapter.targets!r}, which names none.")
    return found


def _call_trained_heads_directly(backbone: nn.Module) -> None:
    """Let each of PEFT's wrapped heads call its trained copy at once.

    The wrapper would look for the active adapter at every call; here there is one, and it is always active.
    """
    from peft.utils import ModulesToSaveWrapper

    for module in backbone.modules():
        if isinstance(module, ModulesToSaveWrapper):
            (trained_head,) = module.modules_to_save.values()
            module.forward = trained_head.__call__


def _lora_arguments(entry: Backbone, study: StudyConfig) -> dict[str, Any]:
    if isinstance(study.adapter, LoraAdapterConfig):
        return {
            "r": study.adapter.rank,
            "lora_alpha": study.adapter.alpha,
            "target_modules": entry.target_expression(study.adapter.targets),
        }
    if isinstance(study.adapter, HeadsAdapterConfig) and not entry.heads:
        raise StudyError(
            f"Expected a backbone with fresh heads for adapter.method = 'heads', got {study.backbone.name}; use 'lora'."
        )
    # PEFT's own name for "inject nothing": what is left of the adapter are the modules to save.
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return {"target_modules": DUMMY_TARGET_MODULES}


def _trainable_by_name(peft_model: Any) -> dict[str, nn.Parameter]:
    """Trainable parameters under the names of a PEFT file; refuses any that such a file would not hold."""
    from peft import get_peft_model_state_dict

    by_storage = {p.data_ptr(): p for p in peft_model.parameters() if p.requires_grad}
    stored = get_peft_model_state_dict(peft_model)
    named = {name: by_storage[t.data_ptr()] for name, t in stored.items() if t.data_ptr() in by_storage}
    if len(named) != len(by_storage) or len(named) != len(stored):
        raise StudyError(
            f"Expected every trainable parameter to be part of the adapter file, got {len(by_storage)} trainable "
            f"and {len(stored)} stored; choose other adapter.targets."
        )
    return named


def _view_as_one(trainable: dict[str, nn.Parameter], manifest: AdapterManifest, device: torch.device) -> nn.Parameter:
    """One flat Parameter whose storage, and gradient storage, the given parameters become views of."""
    flat = nn.Parameter(torch.empty(manifest.num_elements, dtype=torch.float32, device=device))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for spec in manifest.tensors:
        parameter, stop = trainable[spec.name], start + spec.num_elements
        with torch.no_grad():
            flat[start:stop].copy_(parameter.reshape(-1))
            parameter.data = flat.data[start:stop].view(spec.shape)
        parameter.grad = flat.grad[start:stop].view(spec.shape)
        start = stop
    return flat


_loaded: dict[tuple[str, str], AdaptedModel] = {}
_loading = Lock()


def adapted_model(study: StudyConfig, device: torch.device) -> AdaptedModel:
    """The one adapted model of this process for a study; loaded at the first call, then shared.

    All virtual sites of a simulation use it in turn, each putting its own adapter in place. Models of other
    studies are dropped: a process works for one study at a time.

    Raises:
        StudyError: if the study does not fit the backbone.
        WeightsError: if the weights are missing or not the ones the study names.
    """
    key = (study.model_digest, str(device))
    with _loading:
        if key not in _loaded:
            for other in [other for other in _loaded if other[0] != study.model_digest]:
                del _loaded[other]
            _loaded[key] = AdaptedModel(study, device)
        return _loaded[key]


def resolve(study: StudyConfig, device: torch.device) -> StudyConfig:
    """The study with the manifest of the real model in it; what its digest then covers is what may travel."""
    return study.with_manifest(adapted_model(study, device).manifest)


def load_adapter(folder: Path, backbone: nn.Module) -> Any:
    """The backbone with the adapter of a PEFT folder attached, as a ``PeftModel`` in eval mode.

    Args:
        folder: as written by a run: ``adapter_config.json`` and ``adapter_model.safetensors``.
        backbone: the backbone the adapter was made for, with its pretrained weights.

    Raises:
        StudyError: if the folder holds no adapter.
    """
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise StudyError(f"Expected an adapter folder at {folder}, got no adapter_config.json there.")
    return PeftModel.from_pretrained(backbone, str(folder)).eval()
