"""A picture of a diagnosis: coefficients and streams over depth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Drawable(Protocol):
    """What of a diagnosis is drawn."""

    @property
    def sites(self) -> Sequence[Any]:
        """A record for each residual."""

    @property
    def trunks(self) -> Sequence[Any]:
        """A record for each trunk."""


def draw(diagnosis: Drawable, path: str | os.PathLike[str]) -> None:
    """Save a picture of a diagnosis; without a display, and leaving matplotlib's state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites = diagnosis.sites
    figure = Figure(figsize=(max(8.0, 0.3 * len(sites) + 3), 13), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(5, 1, sharex=True, height_ratios=[2, 1, 1, 1, 1])
    k = sites[0].h_res.shape[-1]
    entries = [f"{i},{j}" for i in range(k) for j in range(k)]
    _heat(figure, axes[0], [s.h_res.flatten() for s in sites], "h_res (target, source)", entries)
    _heat(figure, axes[1], [s.h_pre.flatten() for s in sites], "h_pre")
    _heat(figure, axes[2], [s.h_post.flatten() for s in sites], "h_post")
    axes[3].plot([s.mixing_share for s in sites], "o-", label="mixing share")
    axes[3].plot([s.read_entropy for s in sites], "s-", label="read entropy")
    for trunk in diagnosis.trunks:
        at = [i for i, s in enumerate(sites) if s.trunk == trunk.index]
        for way in ("forward", "backward"):
            gains = [getattr(sites[i], f"gain_{way}") for i in at]
            axes[3].plot(at, gains, "--" if way == "backward" else "-", label=f"gain {way}, trunk {trunk.index}")
    axes[4].plot([s.cosine for s in sites], "o-", label="cosine of streams")
    axes[4].plot([s.effective_streams for s in sites], "s-", label="effective streams")
    axes[4].plot([s.spread for s in sites], "^-", label="spread")
    for axis in axes[3:]:
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    step = max(1, len(sites) // 40)
    axes[4].set_xticks(range(0, len(sites), step), [s.name for s in sites[::step]], rotation=90, fontsize="small")
    figure.savefig(os.fspath(path), dpi=120)


def _heat(figure: Any, axis: Any, columns: Sequence[torch.Tensor], title: str, names: Sequence[str] = ()) -> None:
    """Draw one column for each site; white is zero."""
    size = max(len(c) for c in columns)
    values = torch.stack(
        [torch.nn.functional.pad(c.float(), (0, size - len(c)), value=float("nan")) for c in columns], 1
    )
    most = float(values.nan_to_num().abs().max()) or 1.0
    image = axis.imshow(values.tolist(), aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    axis.set_title(title, loc="left", fontsize="medium")
    if 0 < len(names) <= 36:
        axis.set_yticks(range(len(names)), names, fontsize="x-small")
    figure.colorbar(image, ax=axis)
