"""The short form of defenses: ``jpeg:75``, ``noise:0.1,median:3``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from mohs.defenses._base import Defense, Stack
from mohs.errors import UsageError

SPOKEN = {"int": int, "float": float, "int | None": int}
"""Types of settings that can be written down, by their annotation."""


def parse_with(registry: Mapping[str, type[Defense]], text: str | Iterable[str]) -> Defense:
    """The defense, or the ``Stack``, that a text or several name."""
    texts = [text] if isinstance(text, str) else list(text)
    parts = [part.strip() for one in texts for part in one.split(",")]
    if not parts or not all(parts):
        raise UsageError(
            f"Cannot read the defense {text!r}: a name is missing. Write it as jpeg:75, and several as bit-depth:3,jpeg:75."
        )
    found = [_one(registry, part) for part in parts]
    return found[0] if len(found) == 1 else Stack(*found)


def _one(registry: Mapping[str, type[Defense]], part: str) -> Defense:
    name, *words = (word.strip() for word in part.split(":"))
    if name not in registry:
        near = difflib.get_close_matches(name, registry, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"There is no defense {name!r}.{hint} Known: {', '.join(sorted(registry))}.")
    kind = registry[name]
    known = {f.name: f for f in fields(kind) if f.init}
    form = form_of(name, kind)
    unsaid = [f.name for f in known.values() if f.type not in SPOKEN and f.default is MISSING]
    if unsaid:
        raise UsageError(
            f"The defense {name!r} needs {unsaid[0]}, which no text can give. Make it in Python: {kind.__name__}({unsaid[0]}=...)."
        )
    settings: dict[str, Any] = {}
    places = [f for f in known.values() if f.type in SPOKEN]
    for at, word in enumerate(words):
        key, equals, value = word.rpartition("=")
        if equals and key.strip() not in [f.name for f in places]:
            raise UsageError(f"The defense {name!r} has no setting {key.strip()!r}. Its form: {form}.")
        if not equals and (settings.keys() - {f.name for f in places[:at]} or at >= len(places)):
            why = "a value without a name follows a named one" if at < len(places) else "there are too many values"
            raise UsageError(f"Cannot read the defense {part!r}: {why}. Its form: {form}.")
        setting = known[key.strip()] if equals else places[at]
        if setting.name in settings:
            raise UsageError(f"The defense {part!r} gives {setting.name} twice. Its form: {form}.")
        settings[setting.name] = _value(part, setting, value.strip(), form)
    try:
        return kind(**settings)
    except UsageError as error:
        raise UsageError(f"The defense {part!r} cannot be: {error}") from None


def _value(part: str, setting: Field[Any], text: str, form: str) -> int | float | None:
    kind = SPOKEN[str(setting.type)]
    try:
        if text == "none" and "None" in str(setting.type):
            return None
        top, slash, bottom = text.partition("/")
        return kind(top) / kind(bottom) if slash and kind is float else kind(text)
    except (ValueError, ZeroDivisionError):
        wanted = "a whole number" if kind is int else "a number, such as 0.1 or 8/255"
        raise UsageError(
            f"Cannot read the defense {part!r}: {setting.name} must be {wanted}; got {text!r}. Its form: {form}."
        ) from None


def form_of(name: str, kind: type[Defense]) -> str:
    """How a defense is written, with its defaults.

    >>> from mohs.defenses import BitDepth
    >>> form_of("bit-depth", BitDepth)
    'bit-depth[:bits=3]'
    """
    places = [f for f in fields(kind) if f.init and f.type in SPOKEN]
    return name + "".join(f"[:{f.name}={'none' if f.default is None else f.default}]" for f in places)
