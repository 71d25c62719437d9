"""What is drawn of a converted model: trunks with their residuals, and what is around them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from ..folding import Node, fold
from .printout import home_of, is_hidden, trunk_paths
from .steps import Site, Step, gives_streams, origin, relative_to, steps_of


@dataclass(frozen=True)
class Element:
    """One part of a drawing.

    Attributes:
        kind: "ops", "expand", "site", "carried", "readout", "tap" (a readout on the way), "python".
        label: the name of a residual, or what is said of an end of a trunk.
        names: of the modules and functions in it.
        inside: of a residual whose branch holds trunks: what is in it.
        streams: their number, of "expand".
        beside: whether operations stand beside a trunk that goes on.
        trunk: what tells it from others, None for what is on none.
        nodes: of the graph.
    """

    kind: str
    label: str = ""
    names: tuple[str, ...] = ()
    inside: tuple[Any, ...] = ()
    streams: int = 0
    beside: bool = False
    trunk: Any = field(default=None, compare=False)
    nodes: frozenset[fx.Node] = field(default=frozenset(), compare=False)


Placed = tuple[str, Element]


@dataclass(frozen=True)
class _Context:
    """What is known of the whole model: paths and numbers of trunks by the nodes that they begin with."""

    homes: Mapping[Any, str]
    numbers: Mapping[fx.Node, Any]
    streams: int


def sketch(hc: nn.Module) -> tuple[Any, ...]:
    """Return the elements of a converted model in order, equal blocks folded: elements, and nodes that hold some."""
    steps = steps_of(hc)
    shown = [step for step in steps if not is_hidden(step) and step.role != "input"]
    report = getattr(hc, "hc_report", None)
    streams = report.converted[0].streams if report is not None and report.converted else 4
    context = _Context(trunk_paths(hc, steps), _numbers(hc, steps), streams)
    placed = list(_contiguous(_elements(shown, 0, context)))
    if any(step.prefix for step in steps):
        placed = list(_with_python(placed, type(hc).__name__))
    return fold(placed)


def _numbers(hc: nn.Module, steps: Sequence[Step]) -> Mapping[fx.Node, Any]:
    """Return what tells each trunk from others, by the nodes that its streams begin with."""
    report = getattr(hc, "hc_report", None)
    known = {r.name: r.trunk for r in report.converted} if report is not None else {}
    return {site.trunk: known.get(site.name, site.trunk) for step in steps for site in step.sites}


def _level(step: Step) -> int:
    return len(step.sites) - (step.role in ("read", "write"))


def _elements(steps: Sequence[Step], level: int, context: _Context) -> list[Placed]:
    """Return the elements of one level: of the model, or of the branch of a residual."""
    inside: dict[int, list[Step]] = {}
    for step in steps:
        if _level(step) > level:
            inside.setdefault(id(step.sites[level]), []).append(step)
    made: list[Placed] = []
    drawn: set[int] = set()
    after = [*(step.path for step in steps[1:]), None]
    for step, then in zip(steps, after, strict=True):
        if _level(step) > level or step.role in ("read", "write"):
            site = step.sites[level]
            if id(site) not in drawn:
                drawn.add(id(site))
                made.append(_site(site, inside.get(id(site), []), level, context))
            continue
        path, element = home_of(step, context.homes, then), _element(step, context)
        last = made[-1] if made else None
        if last is not None and element.kind in ("ops", "carried") and last[1].kind == element.kind and path == last[0]:
            names, nodes = (*last[1].names, *element.names), last[1].nodes | element.nodes
            made[-1] = path, replace(last[1], names=names, nodes=nodes)
        else:
            made.append((path, element))
    return made


def _site(site: Site, steps: Sequence[Step], level: int, context: _Context) -> Placed:
    name = relative_to(site.module, site.name)
    nested = any(step.role in ("read", "write") for step in steps)
    inside = fold(_contiguous(_elements(steps, level + 1, context))) if nested else ()
    names = () if nested else tuple(step.what for step in steps)
    own = frozenset((site.write, *site.region))
    label = "" if name == site.module else name
    return site.module, Element("site", label, names, inside, trunk=context.numbers[site.trunk], nodes=own)


def _element(step: Step, context: _Context) -> Element:
    nodes = frozenset((step.node,))
    if step.role == "expand":
        return Element("expand", streams=context.streams, trunk=context.numbers.get(step.node), nodes=nodes)
    if step.role == "readout":
        streams_read: Any = step.node.args[0]
        kind = "tap" if any(gives_streams(user) for user in streams_read.users) else "readout"
        return Element(kind, trunk=context.numbers.get(origin(streams_read)), nodes=nodes)
    if step.role == "carried":
        given: Any = next((n for n in step.node.all_input_nodes if gives_streams(n)), None)
        return Element("carried", names=(step.what,), trunk=context.numbers.get(origin(given)), nodes=nodes)
    return Element("ops", names=(step.what,), nodes=nodes)


def _contiguous(placed: Iterable[Placed]) -> Iterator[Placed]:
    """Yield elements so that those of one trunk follow each other, with operations between them beside it."""
    waiting = list(placed)
    while waiting:
        path, element = waiting.pop(0)
        yield path, element
        if element.trunk is None:
            continue
        same = [i for i, (_, other) in enumerate(waiting) if other.trunk == element.trunk]
        last = same[-1] + 1 if same else 0
        own = [other for _, other in waiting[:last] if other.trunk == element.trunk]
        for where, other in waiting[:last]:
            if other.trunk == element.trunk:
                yield where, other
            elif other.trunk is None and _belongs(other, own):
                yield where, replace(other, beside=True)
        later = [one for one in waiting[:last] if one[1].trunk not in (None, element.trunk)]
        waiting = [*later, *waiting[last:]]


def _belongs(ops: Element, own: Sequence[Element]) -> bool:
    """Whether operations take a value that is read out of a trunk on its way, or give one that is carried with it."""
    taps = {node for other in own if other.kind == "tap" for node in other.nodes}
    carried = {node for other in own if other.kind == "carried" for node in other.nodes}
    return any(taps.intersection(node.all_input_nodes) or carried.intersection(node.users) for node in ops.nodes)


def _with_python(placed: Sequence[Placed], name: str) -> Iterator[Placed]:
    """Yield the elements of blocks with the Python around them."""
    around = Element("python", names=(f"code of {name}",))
    yield "", around
    for i, (path, element) in enumerate(placed):
        yield path, element
        ends = element.kind == "readout" or (element.kind == "ops" and not element.beside)
        if ends and i + 1 < len(placed) and placed[i + 1][1].kind == "expand":
            yield "", replace(around, names=("code between",))
    yield "", around


def elements_in(content: Iterable[Any]) -> Iterator[Element]:
    """Yield all elements of a tree, in order."""
    for part in content:
        if isinstance(part, Node):
            yield from elements_in(part.content)
        else:
            yield part
