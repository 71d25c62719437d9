"""Draw a converted encoder into encoder.svg beside this file: the picture of the README."""

from __future__ import annotations

from pathlib import Path

import torch

import hc_transform as hct


def main(folder: Path = Path(__file__).parent) -> Path:
    """Convert an encoder of 12 layers, draw it, and return the path of the drawing."""
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval()
    return hct.draw(hct.convert(encoder, args=(torch.randn(2, 10, 32),), scope="graph"), folder / "encoder.svg")


if __name__ == "__main__":
    print(main())
