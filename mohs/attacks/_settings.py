"""What every attack asks of its own fields, said in one way: which field, of which attack, what is allowed, what came."""

from __future__ import annotations

import math

from mohs.errors import UsageError


def check_whole(attack: object, *names: str, least: int = 1) -> None:
    """Fields that are whole numbers of at least ``least``."""
    for name in names:
        value = getattr(attack, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise _wrong(attack, name, f"a whole number >= {least}")


def check_positive(attack: object, *names: str) -> None:
    """Fields that are finite numbers above 0."""
    for name in names:
        value = getattr(attack, name)
        if not (_number(value) and 0 < value < math.inf):
            raise _wrong(attack, name, "a finite number above 0")


def check_least(attack: object, least: float, *names: str) -> None:
    """Fields that are finite numbers of at least ``least``."""
    for name in names:
        value = getattr(attack, name)
        if not (_number(value) and least <= value < math.inf):
            raise _wrong(attack, name, f"a finite number >= {least:g}")


def check_share(attack: object, *names: str, zero: bool = False, most: float = 1.0) -> None:
    """Fields that are shares of something: above 0, or 0 where ``zero`` allows it, and at most ``most``."""
    for name in names:
        value = getattr(attack, name)
        if not (_number(value) and 0 <= value <= most and (zero or value > 0)):
            raise _wrong(attack, name, f"from 0 to {most:g}" if zero else f"above 0 and at most {most:g}")


def check_ascent(attack: object) -> None:
    """Steps, the length of one (None: the default) and a function to climb, where the attack has such fields."""
    check_whole(attack, "steps")
    if getattr(attack, "step_size", None) is not None:
        check_positive(attack, "step_size")
    if not callable(getattr(attack, "objective", check_ascent)):
        raise _wrong(attack, "objective", "one of mohs.objectives, such as mohs.objectives.margin")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(attack: object, name: str, allowed: str) -> UsageError:
    return UsageError(f"{type(attack).__name__}'s {name} must be {allowed}; got {getattr(attack, name)!r}.")
