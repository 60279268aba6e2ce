from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from medfed.errors import WeightsError
from medfed.models.vit_onnx import CLS_POSITION, PATCH_POSITIONS, load_vit_s_focus, recover_dinov2
from medfed.models.weights import VIT_S_FOCUS

GOLDEN = Path(__file__).parents[2] / "golden" / "vit_s_focus_cls.json"
TO_EXPORTED_NAME = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


@pytest.fixture
def config() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        use_mask_token=False,
    )


@pytest.fixture
def original(config: Dinov2Config) -> Dinov2Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Dinov2Model(config).eval()
        for parameter in model.parameters():  # so that no two tensors could be swapped unnoticed
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def exported_graph(state: dict[str, Tensor]) -> Any:
    """The part of torch's ONNX export that names weights: initializers, and MatMul followed by Add."""
    initializers, nodes = [], []

    def add(name: str, tensor: Tensor) -> None:
        initializers.append(numpy_helper.from_array(tensor.numpy(), name))

    for index, (name, tensor) in enumerate(state.items()):
        exported = "backbone." + name
        for current, former in TO_EXPORTED_NAME.items():
            exported = exported.replace(current, former)
        is_linear = name.endswith("weight") and tensor.ndim == 2
        if name == "embeddings.position_embeddings":
            add(CLS_POSITION, tensor[:, :1])
            add(PATCH_POSITIONS, tensor[:, 1:])
        elif is_linear:
            operand = f"onnx::MatMul_{index}"
            add(operand, tensor.T.contiguous())
            bias = exported.removesuffix("weight") + "bias"
            product, total = f"product_{index}", f"sum_{index}"
            nodes.append(helper.make_node("MatMul", ["x", operand], [product]))
            addends = [bias, product] if index % 2 else [product, bias]
            nodes.append(helper.make_node("Add", addends, [total]))
        else:
            add(exported, tensor)
    add("decoder.final_conv.bias", torch.zeros(1))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "backbone", [x], [x], initializers)


@pytest.fixture
def save_export(original: Dinov2Model, tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    """Saves the export after a change to its graph."""

    def save(change: Callable[[Any], None]) -> Path:
        graph = exported_graph(original.state_dict())
        change(graph)
        path = tmp_path / "model.onnx"
        onnx.save_model(helper.make_model(graph), path)
        return path

    return save


def initializer(graph: Any, name: str) -> Any:
    return next(item for item in graph.initializer if item.name == name)


def test_recovery_inverts_the_export(
    original: Dinov2Model, config: Dinov2Config, save_export: Callable[..., Path]
) -> None:
    recovered = recover_dinov2(save_export(lambda graph: None), config)

    expected = original.state_dict()
    assert recovered.state_dict().keys() == expected.keys()
    for name, tensor in recovered.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    assert not recovered.training


def test_recovered_parameters_can_be_written(config: Dinov2Config, save_export: Callable[..., Path]) -> None:
    recovered = recover_dinov2(save_export(lambda graph: None), config)
    with torch.no_grad():
        for parameter in recovered.parameters():
            assert parameter.is_contiguous()
            parameter.mul_(2)


def drop_scale(graph: Any) -> None:
    graph.initializer.remove(initializer(graph, "backbone.encoder.layer.1.layer_scale2.lambda1"))


def drop_linear(graph: Any) -> None:
    del graph.node[:2]


def drop_position(graph: Any) -> None:
    graph.initializer.remove(initializer(graph, CLS_POSITION))


def reshape_norm(graph: Any) -> None:
    norm = initializer(graph, "backbone.layernorm.weight")
    norm.CopyFrom(numpy_helper.from_array(np.ones(9, np.float32), norm.name))


def halve_norm(graph: Any) -> None:
    norm = initializer(graph, "backbone.layernorm.weight")
    norm.CopyFrom(numpy_helper.from_array(np.ones(8, np.float16), norm.name))


def add_unknown(graph: Any) -> None:
    graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "backbone.register_tokens"))


def share_bias(graph: Any) -> None:
    graph.node.append(helper.make_node("MatMul", ["x", graph.node[0].input[1]], ["again"]))
    bias = next(name for name in graph.node[1].input if name.startswith("backbone."))
    graph.node.append(helper.make_node("Add", [bias, "again"], ["again_sum"]))


def flatten_operand(graph: Any) -> None:
    operand = initializer(graph, graph.node[0].input[1])
    operand.CopyFrom(numpy_helper.from_array(np.ones(64, np.float32), operand.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_scale, r"Expected parameter encoder\.layer\.1\.layer_scale2\.lambda1 of shape \(8,\)"),
        (drop_linear, r"Expected parameter encoder\.layer\.0\.attention\.q_proj\.weight"),
        (drop_position, "Expected the folded position embedding onnx::Concat_1957"),
        (reshape_norm, r"layernorm\.weight of shape \(8,\) and torch\.float32, got \(9,\)"),
        (halve_norm, r"layernorm\.weight .* got \(8,\) and torch\.float16"),
        (add_unknown, "got register_tokens besides"),
        (share_bias, r"encoder\.layer\.0\.attention\.q_proj\.weight once .* got it twice"),
        (flatten_operand, r"Expected a matrix as the weight beside backbone\.encoder\.layer\.0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_recovery_names_the_tensor_that_does_not_fit(
    change: Callable[[Any], None], message: str, config: Dinov2Config, save_export: Callable[..., Path]
) -> None:
    with pytest.raises(WeightsError, match=message):
        recover_dinov2(save_export(change), config)


def wave_image(side_px: int) -> Tensor:
    """The input of tests/golden/vit_s_focus_cls.py."""
    channel, row, column = np.meshgrid(np.arange(3), np.arange(side_px), np.arange(side_px), indexing="ij")
    wave = np.sin(0.05 * (channel + 1) * row) + np.cos(0.03 * column * (3 - channel))
    return torch.from_numpy(wave[None].astype(np.float32))


@pytest.mark.weights
@pytest.mark.parametrize("side_px", [224, 518])
def test_vit_s_focus_answers_as_onnxruntime_does(side_px: int) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["onnx_sha256"] == VIT_S_FOCUS.sha256
    expected = torch.tensor(golden["cls_by_image_side_px"][str(side_px)])

    with torch.no_grad():
        cls = load_vit_s_focus()(wave_image(side_px)).last_hidden_state[0, 0, : len(expected)]

    # Entries reach 5.5; onnxruntime and torch sum in another order (4.2e-6 measured).
    torch.testing.assert_close(cls, expected, rtol=0, atol=5e-5)


@pytest.mark.weights
def test_vit_s_focus_has_the_parameters_of_vit_small() -> None:
    assert sum(parameter.numel() for parameter in load_vit_s_focus().parameters()) == 22_056_192
