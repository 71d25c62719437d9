"""What to convert, and into what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .connections import CONNECTIONS, Connection, ConnectionLike, connection_maker
from .connections.base import INITS

READOUTS = ("mean", "sum", "learned")
NESTED = ("largest", "all")
SHORTCUTS = ("break", "carry")


@dataclass(frozen=True)
class Options:
    """What to convert, and into what. Checked when it is made.

    The arguments of :func:`hc_transform.convert`, and ``keep_layout``: whether streams lie in memory as the value does
    that they begin as. :func:`hc_transform.make_plan` sets it where the model's code asks how its values lie.

    Raises:
        ValueError: an option is out of range; the message names the choices.
    """

    num_streams: int = 4
    connection: ConnectionLike = "dynamic"
    init: str = "paper"
    readout: str = "mean"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    nested: str = "largest"
    feature_axis: int | None = None
    num_fractions: int = 1
    stream_embedding: bool = False
    stream_dropout: float = 0.0
    recompute: bool = False
    shortcuts: str = "break"
    min_residuals: int = 1
    keep_layout: bool = False

    @property
    def plain(self) -> bool:
        """Whether there is one stream of one fraction, so that every residual stays as it was."""
        return self.num_streams == 1 and self.num_fractions == 1

    def __post_init__(self) -> None:  # noqa: C901  # one check for each option
        if not isinstance(self.num_streams, int) or self.num_streams < 1:
            raise ValueError(f"num_streams is a whole number of at least 1, got {self.num_streams!r}")
        for name, value, choices in (
            ("init", self.init, INITS),
            ("readout", self.readout, READOUTS),
            ("nested", self.nested, NESTED),
            ("shortcuts", self.shortcuts, SHORTCUTS),
        ):
            if value not in choices:
                raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}; got {value!r}")
        if self.connection not in CONNECTIONS and not callable(self.connection):
            names = ", ".join(map(repr, CONNECTIONS))
            raise ValueError(f"connection is one of {names}, or makes a Connection; got {self.connection!r}")
        for name in ("num_fractions", "min_residuals"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1, got {value!r}")
        if self.num_fractions > 1 and self.connection != "frac":
            raise ValueError(f"num_fractions={self.num_fractions} needs connection='frac', got {self.connection!r}")
        if not 0 <= self.stream_dropout < 1:
            raise ValueError(f"stream_dropout is a probability below 1, got {self.stream_dropout!r}")
        if not self.plain:  # what a variant does not support is known before anything is traced
            self.make_connection(index=0, dim=self.num_fractions, feature_axis=-1)
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a list of patterns, got the string {getattr(self, name)!r}")

    def make_connection(self, *, index: int, dim: int | None, feature_axis: int) -> Connection:
        """Return a new connection of the chosen kind.

        Raises:
            ValueError: the variant does not support the number of streams or fractions, or needs ``dim``.
        """
        settings: dict[str, Any] = {"num_fractions": self.num_fractions} if self.connection == "frac" else {}
        if self.recompute:
            settings["recompute"] = True
        return connection_maker(self.connection)(
            self.num_streams, index=index, dim=dim, feature_axis=feature_axis, init=self.init, **settings
        )
