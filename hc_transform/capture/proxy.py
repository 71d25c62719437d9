"""Proxies that carry the value they stand for, and answer Python's questions by it."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..graphs import guards, meta
from ..graphs.aliases import layout_of, memory_of
from ..graphs.operations import is_constant, set_attribute, set_item
from ..models.state import OPAQUE
from .asserts import assert_of, check_assert
from .recorder import Recorder


class Unknown:
    """Marks a proxy without a value: the model is traced without example inputs."""

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = Unknown()
HELD_WHOLE = (torch.nn.Module, *OPAQUE)
ABOUT_GRADIENTS = frozenset({"requires_grad", "grad_fn", "is_leaf"})
SET_OF_TENSORS = frozenset({"data", "grad", "requires_grad", "real", "imag"})
OF_PROXIES = frozenset({"node", "tracer", "hc_value"})
CHANGES_GRAD_MODE = "it changes the grad mode or autocast state, which a graph does not hold"


class CannotInline(Exception):
    """A module's code cannot be traced; it is to stay a leaf.

    ``path`` is the module's, the root's being ""; ``of_place`` whether it is where the module is called that is the
    cause, and not what its class does.
    """

    def __init__(self, path: str, cause: BaseException | str, of_place: bool = False) -> None:
        super().__init__(path, cause)
        self.path = path
        self.cause = cause
        self.of_place = of_place


class AsksForGradients(CannotInline):
    """The code asks whether a computed tensor requires a gradient, which is to be traced with gradients."""


class AppliedFunction:
    """``function.apply`` of a custom autograd function, under a name that generated code can use."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = f"{function.__name__}_apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the function."""
        return self.function.apply(*args, **kwargs)


class ScriptedFunction:
    """A scripted function, under a name that generated code can use."""

    def __init__(self, function: torch.jit.ScriptFunction[Any, Any]) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = f"scripted_{function.name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ScriptedFunction:
        return self  # it has no state, and cannot be copied


class CompiledFunction:
    """A function that ``torch.compile`` made, under a name that generated code can use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = f"compiled_{getattr(function, '__name__', 'function')}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledFunction:
        return self  # as copies of functions are


def is_compiled(value: Any) -> bool:
    """Whether ``torch.compile`` made a function, or it is FlexAttention, which compiles itself."""
    if type(value) is not FunctionType:
        return False
    home = sys.modules.get("torch.nn.attention.flex_attention")
    if home is not None and value is vars(home)["flex_attention"]:
        return True
    return "_torchdynamo_orig_callable" in value.__dict__ and "_torchdynamo_disable" not in value.__dict__


class FreshObject:
    """Makes a new copy of an object on every call, under a name that generated code can use."""

    def __init__(self, template: Any) -> None:
        self.template = template
        self.__name__ = self.__qualname__ = f"new_{type(template).__name__}"

    def __call__(self) -> Any:
        """Return a copy."""
        return copy.deepcopy(self.template)


class RebuiltObject:
    """Makes an object of a class from its attributes, under a name that generated code can use."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.__name__ = self.__qualname__ = f"rebuilt_{cls.__name__}"

    def __call__(self, **attributes: Any) -> Any:
        """Return an object that holds ``attributes``; its ``__init__`` ran while it was traced."""
        made: Any = self.cls.__new__(self.cls)
        made.__dict__.update(attributes)
        return made


def holds_proxies(value: Any) -> bool:
    """Whether a traced value is in an object that traced code made, or in what it holds."""
    waiting, seen = [value], {id(value)}
    while waiting:
        held = getattr(waiting.pop(), "__dict__", {}).values()
        for leaf in pytree.tree_leaves(list(held)):
            if isinstance(leaf, fx.Proxy):
                return True
            holds = type(getattr(leaf, "__dict__", None)) is dict and not isinstance(leaf, HELD_WHOLE)
            if holds and id(leaf) not in seen:
                seen.add(id(leaf))
                waiting.append(leaf)
    return False


def _is_same(one: Any, other: Any) -> bool:
    """Whether both are one piece of memory, seen alike."""
    both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    return both and memory_of(one) == memory_of(other) and layout_of(one) == layout_of(other) is not None


class ValueProxy(fx.Proxy):
    """A proxy that knows its example value.

    Whatever Python code decides on it (truth, length, an integer) is answered by the value and
    recorded in the graph as a check.
    """

    tracer: Recorder  # type: ignore[assignment]

    def __init__(self, node: fx.Node, tracer: Recorder, value: Any) -> None:
        super().__init__(node, tracer)  # type: ignore[arg-type]
        self.hc_value = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") or name == "hc_value":
            raise AttributeError(name)
        if self.hc_value is UNKNOWN:
            return super().__getattr__(name)
        if name in ABOUT_GRADIENTS and self.node.op not in ("placeholder", "get_attr"):
            self.tracer.needs_gradients()
        asked = not isinstance(self.hc_value, torch.Tensor) and not hasattr(type(self.hc_value), name)
        try:
            attribute = self.tracer.look_at(self.hc_value, name)
        except AttributeError:
            if asked:
                self._decided(guards.check_attribute, name, False)
            raise
        if asked:
            self._decided(guards.check_attribute, name, True)
        if callable(attribute) and not isinstance(attribute, torch.nn.Module):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__.get("hc_value", UNKNOWN)
        if name not in OF_PROXIES and own is not UNKNOWN and not isinstance(own, torch.Tensor):
            self.tracer.create_proxy("call_function", set_attribute, (self, name, value), {})
            return
        if name not in SET_OF_TENSORS or not isinstance(own, torch.Tensor):
            super().__setattr__(name, value)
            return
        held, given = self.tracer.look_at(own, name), getattr(value, "hc_value", value)
        stays = held is given and self.node.op != "get_attr"  # which may hold another on the next call
        if not stays and not _is_same(held, given):  # as it is after x.data *= 2
            raise CannotInline(self.tracer._paths[-1], f"its code sets {name!r} of a tensor, which a graph would not")

    def __getitem__(self, index: Any) -> Any:
        value = self.hc_value
        if isinstance(value, (tuple, list)) and isinstance(index, slice):
            items = [self[i] for i in range(*index.indices(len(value)))]
            self._decided(guards.check_len, len(value))
            return items if isinstance(value, list) else tuple(items)
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", set_item, (self, index, value), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, operator.add, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, operator.sub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, operator.mul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, operator.truediv, other)

    def _in_place(self, on_tensor: Any, otherwise: Any, other: Any) -> Any:
        """Record an augmented assignment; numbers and unknown values are not changed by it."""
        function = on_tensor if isinstance(self.hc_value, torch.Tensor) else otherwise
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __bool__(self) -> bool:
        if self.hc_value is UNKNOWN:
            return super().__bool__()
        answer = bool(self.hc_value)
        if self._is_of_values():
            asserted = assert_of(sys._getframe(1))
            if asserted is not None and asserted.expected == answer:
                self.tracer.create_proxy("call_function", check_assert, (self, *asserted), {})
                return answer
        self._note_values()
        self._decided(guards.check_true if answer else guards.check_false)
        return answer

    def __len__(self) -> int:
        if self.hc_value is UNKNOWN:
            return super().__len__()
        length = len(self.hc_value)
        self._decided(guards.check_len, length)
        return length

    def __iter__(self) -> Iterator[Any]:
        if self.hc_value is UNKNOWN:
            return super().__iter__()
        if isinstance(self.hc_value, dict):
            return iter(self._keys())
        if isinstance(self.hc_value, (set, frozenset)):
            if not all(map(is_constant, self.hc_value)):
                raise CannotInline(self.tracer._paths[-1], "it goes through a set of tensors or objects")
            self._decided(guards.check_equal, frozenset(self.hc_value))
            return iter(self.hc_value)
        return iter([self[i] for i in range(len(self))])

    # Properties, so that a field of any of these names is found on other values.

    @property
    def keys(self) -> Any:
        """Return what gives the keys of a mapping, for ``**proxy``; any other value's own attribute."""
        return self._keys if isinstance(self.hc_value, dict) else self.__getattr__("keys")

    @property
    def items(self) -> Any:
        """Return what gives the items of a mapping; any other value's own attribute."""
        return self._items if isinstance(self.hc_value, dict) else self.__getattr__("items")

    @property
    def values(self) -> Any:
        """Return what gives the values of a mapping; any other value's own attribute."""
        return self._values if isinstance(self.hc_value, dict) else self.__getattr__("values")

    @property
    def get(self) -> Any:
        """Return what gives an entry of a mapping; any other value's own attribute."""
        return self._get if isinstance(self.hc_value, dict) else self.__getattr__("get")

    def __contains__(self, item: Any) -> bool:
        contained = self.tracer.create_proxy("call_function", operator.contains, (self, item), {})
        return bool(contained)

    def __index__(self) -> int:
        return self._exactly(operator.index)

    def __int__(self) -> int:
        return self._exactly(int)

    def __float__(self) -> float:
        return self._exactly(float)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        import numpy  # which asks for it

        if isinstance(self.hc_value, (bool, int, float)):
            return numpy.asarray(self._exactly(type(self.hc_value)), *args, **kwargs)
        if isinstance(self.hc_value, (tuple, list)):
            return numpy.asarray([numpy.asarray(entry) for entry in self], *args, **kwargs)
        raise TypeError(f"numpy takes the values of {self.node.name}, which a graph does not hold")

    def __hash__(self) -> int:
        if isinstance(self.hc_value, (bool, int, float, str, torch.dtype, torch.device)):
            return self._exactly(hash)
        return id(self)

    def __str__(self) -> str:
        return str(self.node.name if self.hc_value is UNKNOWN else self.hc_value)

    def __format__(self, spec: str) -> str:
        return format(self.node.name if self.hc_value is UNKNOWN else self.hc_value, spec)

    def _keys(self) -> list[Any]:
        keys = list(self.hc_value)
        self._decided(guards.check_keys, tuple(keys))
        return keys

    def _items(self) -> list[tuple[Any, Any]]:
        return [(key, self[key]) for key in self._keys()]

    def _values(self) -> list[Any]:
        return [self[key] for key in self._keys()]

    def _get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def _exactly(self, convert: Any) -> Any:
        if self.hc_value is UNKNOWN:
            raise fx.proxy.TraceError(
                "the code needs a number that depends on the input; give example inputs with args="
            )
        self._note_values()
        fits_no_other = isinstance(self.hc_value, (float, complex)) and meta.ON_VALUES.known(self.node)
        if (isinstance(self.hc_value, torch.Tensor) or fits_no_other) and not self.tracer.probing:
            raise fx.proxy.TraceError("its code needs the values of a tensor as Python numbers")
        self._decided(guards.check_equal, self.hc_value)
        return convert(self.hc_value)

    def _note_values(self) -> None:
        """Note that the code decides on a tensor, or on what was computed from a tensor's values or drawn."""
        if self._is_of_values():
            self.tracer.decides_on_values()

    def _is_of_values(self) -> bool:
        return isinstance(self.hc_value, torch.Tensor) or meta.ON_VALUES.known(self.node)

    def _decided(self, check: Any, *expected: Any) -> None:
        plain = (v.item() if type(v).__module__ == "numpy" and v.shape == () else v for v in expected)
        self.tracer.record_decision(self, check, *plain)
