"""What a model computes beside its weights: a hash of the code of its modules and of their plain settings."""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import re
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mohs.models.weights import weights_hash

_FOREIGN = {"torch", "numpy", "builtins", *sys.stdlib_module_names} - {"__main__"}
"""Libraries whose code is not read: the versions of torch and of Python stand in the environment of a record."""
_STATE = {
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "call_super_init",
    "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_is_full_backward_hook", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_version", "trained_against",
}  # fmt: skip
"""What modules hold that is weights, or says nothing about the answers."""
DEPTH = 16
"""Containers inside containers that are read at most."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_MUTATORS = {
    "append", "extend", "insert", "pop", "popitem", "clear", "remove", "update", "setdefault", "appendleft", "popleft",
}  # fmt: skip


def code_hash(model: nn.Module) -> str:
    """SHA-256 (hex) over the code of a model and its settings: with ``weights_hash`` it says which model was evaluated.

    Weights alone do not: the same weights with another constant in ``forward`` are another model. The hash covers, for every
    module in the order of ``named_modules``,

    - the name of its class, and of each class it derives from that is not one of torch, numpy or Python: the bytecode of all
      functions with their constants, names, defaults, closures and the globals they name, and the plain class attributes;
    - its own plain attributes (numbers, texts, None, tuples, lists and dictionaries of them, dtypes, data classes by their
      fields, functions by their code), tensors and arrays that are neither weights nor buffers by their bytes, forward hooks.

    An attribute, global or closed-over variable to which ``forward`` or a method it names assigns is state, such as a counter or a
    cache, and does not count; likewise a list or dictionary that such a method changes. Nor do docstrings, file names,
    line numbers and annotations, nor what a model says of its training (``trained_against``).

    It fails to see: objects of other kinds, such as a codec or a generator of random numbers, which count by their type and
    the code of their class alone; code of torch, numpy, Python and of other installed packages that the model calls; files and
    servers it asks; and what state holds. Bytecode belongs to one minor version of Python, so another one gives another
    hash.

    Args:
        model: any module.

    Returns:
        64 hexadecimal digits, equal in every process.

    Cost: milliseconds; no forward.

    >>> class Scaled(nn.Module):
    ...     def __init__(self, by: float) -> None:
    ...         super().__init__()
    ...         self.by = by
    ...
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return self.by * x
    >>> code_hash(Scaled(2.0)) == code_hash(Scaled(2.0)), code_hash(Scaled(2.0)) == code_hash(Scaled(3.0))
    (True, False)
    """
    return hash_of_parts(code_parts(model))


def hash_of_parts(before: Mapping[str, str], after: Mapping[str, str] | None = None) -> str:
    """The hash from parts; those that a forward in between changed are state and do not count."""
    kept = {name: part for name, part in before.items() if after is None or after.get(name) == part}
    digest = hashlib.sha256()
    for name, part in sorted(kept.items()):
        digest.update(f"{len(name)} {name} {len(part)} {part}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def code_parts(model: nn.Module) -> dict[str, str]:
    """What ``code_hash`` hashes, by where it was found; two calls around a forward show what is state."""
    return _Reader(model).parts


@dataclasses.dataclass(frozen=True)
class _Uses:
    """What a function does with names: those it mentions, the globals among them, those it assigns to; does it change
    containers?"""

    names: frozenset[str]
    globals: frozenset[str]
    stored: frozenset[str]
    writes: bool


@functools.lru_cache(8192)
def _uses(code: types.CodeType) -> _Uses:
    named, asked, stored, writes = set(code.co_names), set(), set(), False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            asked.add(str(step.argval))
        elif step.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "STORE_DEREF"):
            stored.add(str(step.argval))
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            writes = True
    # a variable of the function itself that an inner one uses is no state of the model
    stored -= set(code.co_cellvars)
    for inner in _codes(code):
        uses = _uses(inner)
        named |= uses.names
        asked |= uses.globals
        stored |= uses.stored - set(code.co_cellvars)
        writes |= uses.writes
    named |= set(code.co_freevars)
    writes |= bool(named & _MUTATORS)
    return _Uses(frozenset(named), frozenset(asked), frozenset(stored), writes)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield from (part for part in code.co_consts if isinstance(part, types.CodeType))


class _Reader:
    """Walks a model once and notes every part under a name that does not depend on where objects lie in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.parts: dict[str, str] = {}
        self.seen: set[int] = set()
        self.kept: list[Any] = []  # what was seen stays alive, so that no other object gets its id
        self.open: list[int] = []  # containers that are being read, some of which may hold themselves
        self.stored: frozenset[str] = frozenset()
        self.written: frozenset[str] = frozenset()
        self._modules("module", model)

    def _modules(self, place: str, model: nn.Module) -> None:
        modules = list(model.named_modules())
        self.seen.update(id(module) for _, module in modules)
        stored, written = _state([module for _, module in modules])
        self.stored, self.written = self.stored | stored, self.written | written
        for name, module in modules:
            self._module(f"{place} {name}", module)

    def _put(self, name: str, part: str) -> None:
        place, again = name, 1
        while place in self.parts:
            place, again = f"{name} ({again + 1})", again + 1
        self.parts[place] = part

    def _once(self, thing: Any) -> bool:
        if id(thing) in self.seen:
            return False
        self.seen.add(id(thing))
        self.kept.append(thing)
        return True

    def _module(self, name: str, module: nn.Module) -> None:
        self._put(name, type(module).__qualname__)
        self._class(type(module))
        own = vars(module)
        for key in sorted(own.keys() - _STATE - set(_HOOKS)):
            if key not in self.stored:
                place = f"{name}.{key}"
                self._put(place, self._value(place, own[key], key in self.written))
        for kind in _HOOKS:
            for hook in own.get(kind, {}).values():
                self._put(f"{name} {kind}", self._value(f"{name} {kind}", hook))

    def _class(self, cls: type) -> None:
        for part in cls.__mro__:
            if not _foreign(part.__module__) and self._once(part):
                place = f"class {part.__qualname__}"
                self._put(place, " ".join(base.__qualname__ for base in part.__bases__))
                for key, value in sorted(vars(part).items()):
                    functions = list(_functions(value))
                    for function in functions:
                        if not key.startswith("__annotat"):
                            self._function(f"{place}.{key}", function)
                    if not functions and not key.startswith(("__", "_abc_")) and key not in self.stored:
                        self._put(f"{place}.{key}", self._value(f"{place}.{key}", value, key in self.written))

    def _function(self, place: str, function: types.FunctionType) -> None:
        """Its code, its defaults, the variables it closes over, and the globals it names."""
        if not self._once(function):
            return
        wrapped = getattr(function, "__wrapped__", None)
        if isinstance(wrapped, types.FunctionType):
            self._function(f"{place} wraps", wrapped)
        home = str(function.__globals__.get("__name__", ""))
        uses = _uses(function.__code__)
        if _foreign(home):  # a decorator of torch, say: what it was given counts, how it works does not
            self._put(place, f"{home} {function.__qualname__}")
        else:
            self._put(place, _bytecode(function.__code__, function.__doc__))
            defaults = [function.__defaults__, sorted((function.__kwdefaults__ or {}).items())]
            self._put(f"{place} defaults", self._value(f"{place} defaults", defaults))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            if name != "__class__" and name not in uses.stored:
                self._put(f"{place} over {name}", self._value(f"{place} over {name}", value, uses.writes))
        if not _foreign(home):
            for name in sorted(uses.globals - uses.stored):
                if name in function.__globals__ and not name.startswith("__"):
                    self._global(name, function.__globals__[name], home, uses)

    def _global(self, name: str, value: Any, home: str, uses: _Uses) -> None:
        if isinstance(value, types.ModuleType):
            if _near(value.__name__, home):
                for inner in sorted(uses.names & vars(value).keys()):
                    if not inner.startswith("__") and not isinstance(vars(value)[inner], types.ModuleType):
                        self._global(inner, vars(value)[inner], home, uses)
            return
        functions = list(_functions(value))
        for function in functions:
            if _near(str(function.__globals__.get("__name__", "")), home):
                self._function(f"function {function.__qualname__}", function)
        if isinstance(value, type):
            if _near(value.__module__, home):
                self._class(value)
        elif not functions:
            self._put(f"global {name}", self._value(f"global {name}", value, uses.writes))

    def _value(self, place: str, value: Any, changed: bool = False) -> str:
        """A value as text; what is inside functions and classes is noted beside it. changed: lists and the like are state."""
        if isinstance(value, str):  # texts may say where an object lies in memory
            return f"str {re.sub('0x[0-9a-f]+', '0x', value)!r}"
        if value is None or isinstance(value, bool | int | float | complex | bytes | np.generic | torch.dtype):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return f"array {value.dtype} {list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()}"
        if isinstance(value, type):
            if _near(value.__module__):
                self._class(value)
            return f"class {value.__qualname__}"
        functions = list(_functions(value))
        if functions:
            for function in functions:
                self._function(place, function)
            return " ".join(function.__qualname__ for function in functions)
        if isinstance(value, nn.Module) and self._once(
            value
        ):  # held in a list, say, so that it is no part of the model
            self._modules(place, value)
            return f"module {weights_hash(value)}"
        kind = type(value).__qualname__
        if isinstance(value, tuple | list | dict | set | frozenset | functools.partial) or dataclasses.is_dataclass(
            value
        ):
            if (changed and isinstance(value, list | dict | set)) or id(value) in self.open or len(self.open) > DEPTH:
                return kind
            self.open.append(id(value))
            inside = self._inside(place, value)
            self.open.pop()
            return f"{kind}({inside})"
        if not isinstance(value, nn.Module) and _near(type(value).__module__):
            self._class(type(value))
        return kind

    def _inside(self, place: str, value: Any) -> str:
        if isinstance(value, functools.partial):
            value = [value.func, value.args, sorted(value.keywords.items())]
        if isinstance(value, dict):
            pairs = [(self._value(place, key), self._value(f"{place}[{key!s:.40}]", v)) for key, v in value.items()]
            return ", ".join(sorted(f"{key}: {v}" for key, v in pairs))
        if isinstance(value, tuple | list):
            return ", ".join(self._value(f"{place}[{i}]", v) for i, v in enumerate(value))
        if isinstance(value, set | frozenset):
            return ", ".join(sorted(self._value(place, v) for v in value))
        self._class(type(value))
        fields = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        return ", ".join(f"{name} {self._value(f'{place}.{name}', getattr(value, name))}" for name in fields)


def _state(modules: list[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of attributes to which a forward assigns, and of those which a function in it names that changes containers."""
    methods: dict[str, list[types.CodeType]] = {}
    wanted = {"forward", "__call__"}
    for cls in {part: None for module in modules for part in type(module).__mro__ if not _foreign(part.__module__)}:
        for key, value in vars(cls).items():
            methods.setdefault(key, []).extend(f.__code__ for f in _functions(value))
    for module in modules:  # what is called through an attribute
        wanted |= {v.__name__ for v in vars(module).values() if isinstance(v, types.MethodType)}
        for hook in [h for kind in _HOOKS for h in vars(module).get(kind, {}).values()]:
            methods.setdefault("forward", []).extend(f.__code__ for f in _functions(hook))
    stored: set[str] = set()
    written: set[str] = set()
    done: set[str] = set()
    while wanted - done:
        name = min(wanted - done)
        done.add(name)
        for code in methods.get(name, ()):
            uses = _uses(code)
            stored |= uses.stored
            written |= uses.names if uses.writes else set()
            wanted |= uses.names & methods.keys() - {"__init__"}
    return frozenset(stored), frozenset(written)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions written in Python inside a method, a property and the like."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, staticmethod | classmethod | types.MethodType):
        yield from _functions(value.__func__)
    elif isinstance(value, property):
        yield from (f for part in (value.fget, value.fset, value.fdel) for f in _functions(part))
    elif isinstance(value, functools.cached_property):
        yield from _functions(value.func)
    elif hasattr(value, "cache_parameters"):  # of functools.cache
        yield from _functions(getattr(value, "__wrapped__", None))


def _foreign(module: str) -> bool:
    return module.partition(".")[0] in _FOREIGN


def _near(module: str, home: str = "") -> bool:
    """Is it a module whose functions are read where they are called: of the caller's own package, or not an installed one?"""
    top = module.partition(".")[0]
    if _foreign(module) or top == "mohs":  # its version counts instead
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return top == home.partition(".")[0] or not any(part in file for part in ("site-packages", "dist-packages"))


def _bytecode(code: types.CodeType, doc: str | None = None) -> str:
    """A code object without what does not change its answers."""
    consts = [
        "doc" if i == 0 and doc is not None and part == doc else _constant(part)
        for i, part in enumerate(code.co_consts)
    ]
    head = f"{code.co_name} {code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount} {code.co_flags}"
    names = f"{code.co_names} {code.co_freevars} {code.co_cellvars}"
    return f"{head} {names} {code.co_code.hex()} {code.co_exceptiontable.hex()} [{', '.join(consts)}]"


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return f"({_bytecode(value)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_constant, value))})"
    if isinstance(value, frozenset):  # whose order depends on the process
        return f"{{{', '.join(sorted(map(_constant, value)))}}}"
    return f"{type(value).__name__} {value!r}"


def _tensor(value: Tensor) -> str:
    try:
        flat = value.detach().cpu().contiguous()
        content = hashlib.sha256(flat.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    except (RuntimeError, TypeError):  # sparse, quantised or without storage
        return f"tensor {value.dtype} {list(value.shape)}"
    return f"tensor {flat.dtype} {list(flat.shape)} {content}"
