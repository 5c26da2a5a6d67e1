"""DINOv2-small out of an ONNX file: its weights under the names of the checkpoints on the hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
LEFT_OUT = "embeddings.mask_token"  # which only its pretraining needs


def save_backbone(file: Path, folder: Path) -> None:
    """A transformers model out of the module `backbone` of an ONNX file.

    Raises:
        ValueError: if weights of the model are not in the file, or it has others.
    """
    config = Dinov2Config(**SIZES)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    weights = named_weights(file) | {LEFT_OUT: torch.zeros(1, SIZES["hidden_size"])}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _, found = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    wrong = {
        name: sorted(found[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[name]
    }
    if wrong:
        raise ValueError(f"{file.name} does not hold DINOv2-small: {wrong}")


def named_weights(file: Path) -> dict[str, Tensor]:
    """Matrices have lost their names, but the products that they are in have not."""
    try:
        import onnx
        from onnx.numpy_helper import to_array
    except ImportError as error:
        raise ValueError("ONNX files are read with `onnx`: pip install onnx") from error
    graph = onnx.load(str(file)).graph
    arrays = {array.name: torch.from_numpy(to_array(array).copy()) for array in graph.initializer}
    found = {name.removeprefix("backbone."): x for name, x in arrays.items() if name.startswith("backbone.")}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        held = [arrays[name] for name in node.input if name in arrays and name.startswith("onnx::")]
        place = re.fullmatch(r"/backbone/(encoder/.*)/MatMul_output_0", node.output[0])
        if place and held:
            found[f"{place[1].replace('/', '.')}.weight"] = held[0].T.contiguous()
        elif node.output[0].startswith("/backbone/embeddings/") and held:
            positions[node.op_type] = held[0]  # [1, 1, D] of the first token, [1, N, D] of the patches
    if positions.keys() != {"Concat", "Reshape"}:
        raise ValueError(f"{file.name} has position embeddings in {sorted(positions)}: expected Concat and Reshape")
    found["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    return found
