"""What :func:`hc_transform.diagnose` found: records, a table, plain data, a picture."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from tabulate import tabulate
from torch import Tensor

from ..errors import HCTransformError

DIGITS = 3


@dataclass(frozen=True, eq=False)
class SiteDiagnosis:
    """One residual, on the batch that was given. T tokens; k is n, or n m with m fractions; m is 1 without.

    Attributes:
        name: of the residual.
        trunk: number of its trunk.
        h_pre, h_pre_spread: mean and standard deviation over tokens of the reads, ``[m, k]``.
        h_post, h_post_spread: of the writes, ``[k, m]``.
        h_res, h_res_spread: of the mixing, ``[k, k]``, row i being target i.
        read_entropy: entropy of the reads' absolute weights over log k: 0 reads one stream, 1 all alike.
        mixing_share: 1 - tr(h_res) / k.
        row_error, column_error: largest deviation from 1 of a sum of a row, or a column, of h_res over all tokens.
        spread, cosine, directions, effective_streams: how the streams lie that the site is given: see
            :class:`~hc_transform.training.site_statistics.StreamStatistics`.
        similarity: cosine of each pair of streams, ``[n, n]``.
        gain_forward, gain_backward: of the product of h_res of the trunk up to this site: see :class:`TrunkDiagnosis`.
        gradient: norm of the gradients of the connection's parameters; None if there are none.
        ablation: by how much the loss changes if the connection is set to its start; None if that was not asked for.
    """

    name: str
    trunk: int
    h_pre: Tensor
    h_pre_spread: Tensor
    h_post: Tensor
    h_post_spread: Tensor
    h_res: Tensor
    h_res_spread: Tensor
    read_entropy: float
    mixing_share: float
    row_error: float
    column_error: float
    spread: float
    cosine: float
    directions: float
    effective_streams: float
    similarity: Tensor
    gain_forward: float
    gain_backward: float
    gradient: float | None = None
    ablation: float | None = None


@dataclass(frozen=True)
class TrunkDiagnosis:
    """One trunk.

    Attributes:
        index: its number.
        sites: how many residuals it has.
        gain_forward, gain_backward: largest absolute row sum and column sum of the product of h_res over its sites,
            the mean over tokens (mHC, arXiv 2512.24880).
        by_means: whether the product is of means over tokens, for sites of the trunk see different tokens.
    """

    index: int
    sites: int
    gain_forward: float
    gain_backward: float
    by_means: bool = False


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """A converted model on one batch. ``str()`` is a table in which equal blocks share a line.

    Attributes:
        sites: in order of execution.
        trunks: in order of their first site.
        loss: on the batch; None if the model gave none.
        not_called: residuals that this call did without.
    """

    sites: tuple[SiteDiagnosis, ...]
    trunks: tuple[TrunkDiagnosis, ...]
    loss: float | None = None
    not_called: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain data, ready for JSON."""
        return {
            "sites": [_plain(site) for site in self.sites],
            "trunks": [_plain(trunk) for trunk in self.trunks],
            "loss": self.loss,
            "not_called": list(self.not_called),
        }

    def scalars(self) -> dict[str, float]:
        """Return the figures that are single numbers by name, for a logger: ``<residual>/mixing_share``."""
        found = {
            f"{site.name}/{name}": value
            for site in self.sites
            for name, value in _plain(site).items()
            if isinstance(value, float)
        }
        for trunk in self.trunks:
            found[f"trunk {trunk.index}/gain_forward"] = trunk.gain_forward
            found[f"trunk {trunk.index}/gain_backward"] = trunk.gain_backward
        return found

    def __str__(self) -> str:
        columns = {
            "read entropy": "read_entropy",
            "mixing": "mixing_share",
            "row error": "row_error",
            "column error": "column_error",
            "spread": "spread",
            "cosine": "cosine",
            "directions": "directions",
            "effective": "effective_streams",
            "gradient": "gradient",
            "ablation": "ablation",
        }
        shown = {head: name for head, name in columns.items() if any(getattr(s, name) is not None for s in self.sites)}
        rows = [
            (s.name, [s.trunk, *_writes(s), *(_rounded(getattr(s, n)) for n in shown.values())]) for s in self.sites
        ]
        table = [(name, *figures) for name, figures in folded(rows)]
        parts = [tabulate(table, headers=("residual", "trunk", "writes from", "to", *shown), disable_numparse=True)]
        gains = [(t.index, t.sites, _rounded(t.gain_forward), _rounded(t.gain_backward)) for t in self.trunks]
        heads = ("trunk", "residuals", "gain forward", "gain backward")
        parts.append(tabulate(gains, headers=heads, disable_numparse=True))
        if self.loss is not None:
            parts.append(f"Loss {self.loss:.4f}.")
        if self.not_called:
            parts.append(f"Not called: {', '.join(self.not_called)}.")
        return "\n\n".join(parts)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Save a picture: h_res, reads and writes over depth, gains and mixing, how the streams lie.

        Needs matplotlib. The file's ending says its kind.

        Raises:
            HCTransformError: matplotlib is not installed.
        """
        from .picture import draw

        try:
            draw(self, path)
        except ModuleNotFoundError as error:
            raise HCTransformError(f"a picture needs {error.name}: pip install matplotlib, or use to_dict()") from error


def folded(rows: Sequence[tuple[str, list[Any]]]) -> list[tuple[Any, ...]]:
    """Return rows in which names that differ in a number alone, with equal figures one after the other, are one.

    >>> folded([("h.0.a", [1]), ("h.0.b", [2]), ("h.1.a", [1]), ("h.1.b", [3])])
    [('h.[0-1].a', [1]), ('h.0.b', [2]), ('h.1.b', [3])]
    """
    groups: list[tuple[str, list[Any], list[str]]] = []
    latest: dict[str, int] = {}
    for name, figures in rows:
        pattern = re.sub(r"\d+", "*", name)
        at = latest.get(pattern)
        if at is not None and groups[at][1] == figures:
            groups[at][2].append(name)
        else:
            latest[pattern] = len(groups)
            groups.append((pattern, figures, [name]))
    return [(_name_of(names), figures) for _, figures, names in groups]


def _name_of(names: Sequence[str]) -> str:
    """Return names that differ in numbers as one."""
    parts = [re.split(r"(\d+)", name) for name in names]
    return "".join(p[0] if len(set(p)) == 1 else f"[{p[0]}-{p[-1]}]" for p in zip(*parts, strict=True))


def _writes(site: SiteDiagnosis) -> tuple[str, str]:
    return _rounded(float(site.h_post.min())), _rounded(float(site.h_post.max()))


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.{DIGITS}g}" if abs(value) > 1e-6 else "0"


def _plain(record: Any) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in values.items()}
