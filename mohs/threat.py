"""Who attacks, with what, and how far they may go: the threat model as a value that parses, serialises and compares."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Any

from mohs.errors import ThreatError
from mohs.regions import L0, L1, L2, Box, Linf, Lp, Patch, Region, Words


class Access(IntEnum):
    """What one look at the model shows, from nothing to gradients; each level includes the ones below.

    NONE serves transfer attacks, which never support a claim.
    """

    NONE = 0
    LABEL = 1
    SCORE = 2
    LOGIT = 3
    GRADIENT = 4


@dataclass(frozen=True)
class Knowledge:
    """What the adversary knows before the first look.

    Args:
        weights: the trained parameters.
        training_data: the examples the model was trained on.
        architecture, training_algorithm: must be known; a secret here is no security (Kerckhoffs).
        randomness: of a random model: 'distribution' (how it draws) or 'values' (each draw). Never unknown.
    """

    weights: bool = True
    training_data: bool = True
    architecture: bool = True
    training_algorithm: bool = True
    randomness: str = "distribution"

    def __post_init__(self) -> None:
        if not (self.architecture and self.training_algorithm):
            raise ThreatError(
                "A threat that hides the architecture or the training algorithm is unrealistic: these leak and cannot be "
                "changed like a key. Allowed: to hide weights or training data. Set architecture=True and training_algorithm=True."
            )
        if self.randomness not in ("distribution", "values"):
            raise ThreatError(
                f"The randomness known to the adversary was {self.randomness!r}. Allowed: 'distribution' (how the model draws) "
                "or 'values' (each draw); an unknown distribution is no realistic threat."
            )

    def __le__(self, other: Knowledge) -> bool:
        return (
            self.weights <= other.weights
            and self.training_data <= other.training_data
            and (self.randomness == other.randomness or other.randomness == "values")
        )


@dataclass(frozen=True)
class Threat:
    """Region, box, access, query limit, knowledge, and how a random model is scored.

    Args:
        region: the allowed change, such as ``Linf(8 / 255)``.
        box: lowest and highest valid input value; infinite bounds are allowed, and words have no others.
        access: what a look shows.
        queries: looks per example, None for no limit.
        knowledge: what is known beforehand.
        draws: 0 for a deterministic model. A random one answers with the majority of its draws; so many fresh ones score
            each adversarial candidate while an attack runs, and more confirm what it reports (``mohs.evaluation.confirm``).

    >>> threat = Threat.parse("linf:8/255")
    >>> threat.region, threat.box, threat.access.name
    (Linf(eps=0.03137254901960784), (0.0, 1.0), 'GRADIENT')
    >>> Threat.parse("linf:0.1") <= Threat.parse("linf:0.2")
    True
    """

    region: Region
    box: Box = (0.0, 1.0)
    access: Access = Access.GRADIENT
    queries: int | None = None
    knowledge: Knowledge = field(default_factory=Knowledge)
    draws: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.region, Lp | L0 | Patch | Words):
            raise ThreatError(
                f"A threat needs a region; got {self.region!r}. Allowed: mohs.Linf(eps), L2, L1, Lp(p, eps), L0(k), Patch(side), "
                "Words(k)."
            )
        # words are swapped, not moved: no value can leave a box
        swapped = isinstance(self.region, Words)
        lo, hi = (-math.inf, math.inf) if swapped else (float(v) for v in self.box)
        if not lo < hi:
            raise ThreatError(f"The box of valid inputs was {self.box}. Give (lowest, highest), such as (0, 1).")
        object.__setattr__(self, "box", (lo, hi))
        object.__setattr__(self, "access", Access(self.access))
        if self.queries is not None and self.queries < 1:
            raise ThreatError(
                f"The query limit was {self.queries}. Give at least 1, or None for no limit; an adversary who may not "
                "look at all cannot be evaluated."
            )
        if self.draws < 0:
            raise ThreatError(f"draws was {self.draws}. Give 0 for a deterministic model, 20 or more for a random one.")

    @classmethod
    def parse(cls, text: str | Threat | Region) -> Threat:
        """Read the short form: ``linf:8/255``, ``l2:0.5``, ``l1:10``, ``l1.5:0.3``, ``l0:20``, ``l0-features:20``, ``l2:inf``,
        ``patch:5`` (a square of 5 x 5 pixels anywhere), ``patch@10,12:5`` (from row 10, column 12 on), ``words:2``.

        A box other than [0, 1] follows in words: ``linf:8 in [0, 255]``. A Threat passes through; a bare region gets
        the box [0, 1].

        Raises:
            ThreatError: the text is no threat; the message lists the forms.
        """
        if isinstance(text, Threat):
            return text
        if isinstance(text, Lp | L0 | Patch | Words):
            return cls(text)
        match = re.fullmatch(r"\s*(\S+?)\s*:\s*([^\s]+)(?:\s+in\s+\[\s*([^,\s]+)\s*,\s*([^\]\s]+)\s*\])?\s*", str(text))
        try:
            if match is None:
                raise ValueError
            name, size, lo, hi = match.groups()
            eps = _number(size)
            box = (0.0, 1.0) if lo is None else (_number(lo), _number(hi))
            return cls(_region(name.lower(), eps), box)
        except (ValueError, ZeroDivisionError) as error:
            if isinstance(error, ThreatError):
                raise
            raise ThreatError(
                f"Cannot read the threat {text!r}. Allowed: linf:8/255, l2:0.5, l1:10, l1.5:0.3, l0:20, l0-features:20, "
                "patch:5, patch@10,12:5, words:2, an infinite radius (l2:inf) for the smallest change, and a box: 'linf:8 in [0, 255]'."
            ) from None

    def __str__(self) -> str:
        plain = self.box == (0.0, 1.0) or isinstance(self.region, Words)
        box = "" if plain else f" in [{_text(self.box[0])}, {_text(self.box[1])}]"
        return f"{self.region.name}:{_text(self.region.eps)}{box}"

    @property
    def minimum(self) -> bool:
        """Does the threat ask for the smallest change rather than for one of a given size?"""
        return math.isinf(self.region.eps)

    def with_eps(self, eps: float) -> Threat:
        """The same threat at another radius."""
        return replace(self, region=replace(self.region, eps=eps))

    def __le__(self, other: Threat) -> bool:
        """Is every change of this adversary open to the other one? Then a break here is a break there."""
        return (
            _within(self.region, other.region)
            and other.box[0] <= self.box[0]
            and self.box[1] <= other.box[1]
            and self.access <= other.access
            and (other.queries is None or (self.queries is not None and self.queries <= other.queries))
            and self.knowledge <= other.knowledge
            and self.draws == other.draws
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; infinite numbers are the text 'inf' because JSON has none."""
        return {
            "region": self.region.name,
            "eps": _json_number(self.region.eps),
            "box": [_json_number(v) for v in self.box],
            "access": self.access.name,
            "queries": self.queries,
            "knowledge": asdict(self.knowledge),
            "draws": self.draws,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Threat:
        """Inverse of ``to_dict``."""
        return cls(
            region=_region(data["region"], float(data["eps"])),
            box=(float(data["box"][0]), float(data["box"][1])),
            access=Access[data["access"]],
            queries=data["queries"],
            knowledge=Knowledge(**data["knowledge"]),
            draws=data["draws"],
        )


def _within(mine: Region, theirs: Region) -> bool:
    if isinstance(mine, Patch) and isinstance(theirs, Patch):
        return mine.within(theirs)
    same_form = type(mine) is type(theirs) and replace(mine, eps=0) == replace(theirs, eps=0)
    return same_form and mine.eps <= theirs.eps


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _number(text: str) -> float:
    top, slash, bottom = text.partition("/")
    value = float(top) / float(bottom) if slash else float(top)
    if math.isnan(value) or (math.isinf(value) and "inf" not in top.lower()) or (slash and "inf" in text.lower()):
        raise ValueError  # neither a number too large for a float nor a fraction of infinity is a radius
    return value


def _text(value: float) -> str:
    """8/255 rather than 0.03137..., else the shortest decimal."""
    if 0 < value < 1 and round(value * 255) / 255 == value and float(f"{value:.4g}") != value:
        return f"{round(value * 255)}/255"
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _region(name: str, eps: float) -> Region:
    named = {"linf": Linf, "l2": L2, "l1": L1}
    if name in named:
        return named[name](eps)
    if name in ("l0", "l0-features"):
        return L0(eps, features=name.endswith("features"))
    if name == "words":
        return Words(eps)
    if name == "patch":
        return Patch(eps)
    if place := re.fullmatch(r"patch@(\d+),(\d+)", name):
        return Patch(eps, at=(int(place[1]), int(place[2])))
    if re.fullmatch(r"l\d*\.?\d+(e[+-]?\d+)?", name) and float(name[1:]) > 1:
        return L2(eps) if float(name[1:]) == 2 else Lp(float(name[1:]), eps)
    raise ValueError(name)
