"""An XLNet of random weights as an ONNX graph: `python export.py FOLDER`.

`xlnet.onnx` is made from the first of `CASES`. `cases.npz` has inputs of each size, and what PyTorch computes from them.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import XLNetConfig, XLNetModel

TOKENS, LENGTH = 32000, 64
NAMES = {"input_names": ["input_ids", "attention_mask"], "output_names": ["states"]}
# Rows, columns, and how many columns of the first row are padding: XLNet pads on the left.
CASES = ((2, 24, 7), (1, 57, 0), (5, 200, 31), (1, 3, 0))


class States(torch.nn.Module):
    """From tokens to the last layer's vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        config = XLNetConfig(vocab_size=TOKENS, d_model=LENGTH, n_layer=3, n_head=4, d_inner=4 * LENGTH)
        self.model = XLNetModel(config).eval()

    def forward(self, input_ids, attention_mask):  # type: ignore[no-untyped-def]
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_mems=False).last_hidden_state


def case(rows: int, columns: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(rows, columns)
    mask[0, :padding] = 0
    return torch.randint(0, TOKENS, (rows, columns)), mask


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    states = States().eval()  # the exporter sets back what it finds: in training mode, PyTorch's own outputs would be random
    inputs = [case(*size) for size in CASES]
    rows, columns = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("columns", min=2, max=512)
    shapes = {name: {0: rows, 1: columns} for name in NAMES["input_names"]}
    torch.onnx.export(states, inputs[0], folder / "xlnet.onnx", dynamo=True, dynamic_shapes=shapes, **NAMES)
    cases: dict[str, np.ndarray] = {}
    for number, (ids, mask) in enumerate(inputs):
        with torch.inference_mode():
            cases |= {f"ids{number}": ids.numpy(), f"mask{number}": mask.numpy(), f"states{number}": states(ids, mask).numpy()}
    np.savez(folder / "cases.npz", **cases)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
