"""Plans: which attacks run, in which order, as data. A plan is a TOML file; the built-in ones lie in ``plans/``."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mohs.errors import UsageError
from mohs.threat import Access, Threat

if TYPE_CHECKING:
    from mohs.attacks import Attack

ALL_CLASSES = 1_000_000
"""What ``aims = "all"`` means; whoever runs the plan cuts it to the classes there are."""
OBJECTIVES = ("cross_entropy", "margin", "dlr", "probability_margin")
"""Objectives a plan may name."""

_FOLDER = Path(__file__).parent / "plans"
_PLAN_KEYS = ("name", "description", "attack")
_STEP_KEYS = ("use", "with", "restarts", "aims", "rank", "start", "share", "only", "access", "rejects", "skip", "note")
RANKINGS = ("logit", "distance")
"""How the classes to move towards are ordered: by logit, or by linearised distance."""
KINDS = ("linf", "l2", "l1", "lp", "l0", "patch", "words")
"""Families of regions."""
ACCESSES = tuple(level.name.lower() for level in Access if level > Access.NONE)
"""What an adversary may see, from least to most."""
STARTS = ("own", "best", "other")
"""Where an attack begins: as it does by itself, at the strongest point an earlier attack of the plan found, or, of an attack that
comes from outside, at the nearest example that the model answers otherwise."""


@dataclass(frozen=True)
class PlanStep:
    """One attack of a plan; made by ``PlanStep.make``, which checks it and fills in the defaults.

    Args:
        name: of the attack, as in ``mohs.attacks.REGISTRY``.
        parameters: every field of the attack with its value, in the attack's order; objectives by name.
        restarts: independent tries per example.
        aims: classes to move towards, besides no aim at all: 0 for none, ``ALL_CLASSES`` for all others.
        rank: what orders these classes, one of ``RANKINGS``.
        start: where it begins, one of ``STARTS``.
        share: run only that share of the survivors, those nearest to breaking by the margins found so far.
        only: the regions it is meant for; empty: all it serves. Elsewhere it is passed over without a word.
        access: the step is meant for adversaries who see no more than this, such as ``label``; empty: for all whom it serves.
        rejects: the step is meant for models that reject inputs, and passed over where one does not.
        skips: (norm, reason) pairs: the regions this step does not serve. ``l0`` stands for ``l0-features`` too.
        note: for the reader.
    """

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()
    restarts: int = 1
    aims: int = 0
    rank: str = "logit"
    start: str = "own"
    share: float = 1.0
    only: tuple[str, ...] = field(default=(), repr=False)
    access: str = field(default="", repr=False)
    rejects: bool = field(default=False, repr=False)
    skips: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    note: str = field(default="", repr=False)

    @classmethod
    def make(
        cls, name: str, parameters: Mapping[str, Any] | None = None, *, restarts: int = 1, aims: int | str = 0,
        rank: str = "logit", start: str = "own", share: float = 1.0,
        only: Sequence[str] = (), access: str = "", rejects: bool = False, skip: Mapping[str, str] | None = None, note: str = "",
    ) -> PlanStep:  # fmt: skip
        """Check a step and complete it.

        Raises:
            UsageError: an unknown attack, parameter or objective, or a value of the wrong type; the message lists the
                allowed ones.

        >>> PlanStep.make("FGSM", {"objective": "margin"})
        PlanStep(name='FGSM', parameters=(('objective', 'margin'),), restarts=1, aims=0, rank='logit', start='own', share=1.0)
        """
        complete = _complete(name, parameters or {})
        count = ALL_CLASSES if aims == "all" else aims
        for what, value, least in (("restarts", restarts, 1), ("aims", count, 0)):
            if type(value) is not int or value < least:
                extra = " or 'all'" if what == "aims" else ""
                raise UsageError(f"{name}: {what} must be a whole number >= {least}{extra}; got {value!r}.")
        for key, choice, allowed in (("rank", rank, RANKINGS), ("start", start, STARTS)):
            if choice not in allowed:
                raise UsageError(f"{name}: {key} must be one of {', '.join(allowed)}; got {choice!r}.")
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise UsageError(f"{name}: share must be above 0 and at most 1; got {share!r}.")
        if not isinstance(only, list | tuple) or not all(norm in KINDS for norm in only):
            raise UsageError(f"{name}: only lists regions, of {', '.join(KINDS)}; got {only!r}.")
        if access and access not in ACCESSES:
            raise UsageError(f"{name}: access must be one of {', '.join(ACCESSES)}; got {access!r}.")
        if not isinstance(rejects, bool):
            raise UsageError(f"{name}: rejects must be true or false; got {rejects!r}.")
        skips = tuple(sorted((skip or {}).items()))
        if not all(isinstance(reason, str) and reason for _, reason in skips):
            raise UsageError(f'{name}: skip maps a norm to the reason, such as {{l0 = "..."}}; got {dict(skips)!r}.')
        step = cls(
            name,
            complete,
            restarts,
            typing.cast(int, count),
            rank,
            start,
            float(share),
            tuple(only),
            access,
            rejects,
            skips,
            note,
        )
        step.build()
        return step

    @property
    def label(self) -> str:
        """Short name for tables: the attack and what tells it from others of its kind.

        >>> PlanStep.make("PGD", {"steps": 20, "objective": "margin"}, restarts=5).label
        'PGD-20 margin x5'
        """
        values = dict(self.parameters)
        text = f"{self.name}-{values['steps']}" if "steps" in values else self.name
        if values.get("objective") == "cross_entropy":
            text += " CE"
        elif "objective" in values:
            text += f" {values['objective']}"
        if self.aims:
            text += " all aims" if self.aims == ALL_CLASSES else f" {self.aims} aims"
        text = f"{text} x{self.restarts}" if self.restarts > 1 else text
        return f"{text}, nearest {self.share:.0%}" if self.share < 1 else text

    def build(self) -> Attack:
        """The attack with its parameters."""
        from mohs import objectives
        from mohs.attacks import REGISTRY

        values = {k: getattr(objectives, v) if _is_objective(self.name, k) else v for k, v in self.parameters}
        try:
            return REGISTRY[self.name](**values)
        except UsageError as error:
            raise UsageError(f"{self.name} in a plan: {error}") from error

    def refusal(self, threat: Threat) -> str | None:
        """Why this step cannot run under a threat, or None if it can."""
        from mohs.attacks.run import refused_norm

        for norm, reason in self.skips:
            if threat.region.name.removesuffix("-features") == norm:
                return f"{self.name} does not serve {threat.region.name}: {reason}"
        attack = self.build()
        if (refused := refused_norm(attack, threat)) is not None:
            return refused
        aimed = (Access.GRADIENT if self.rank == "distance" else Access.LOGIT) if self.aims else Access.NONE
        needs = max(attack.needs, aimed)
        if needs > threat.access:
            return f"{self.name} needs access {needs.name}; the threat grants {threat.access.name}"
        rows = self.restarts * max(self.aims if self.aims < ALL_CLASSES else 1, 1)
        if threat.queries is not None and threat.queries - bool(self.aims) < rows:
            return f"{self.name} makes {rows} tries per example; the threat allows {threat.queries} queries"
        if attack.finite and threat.minimum:
            return f"{self.name} needs a finite radius; the threat is {threat}"
        return None

    def build_for(self, threat: Threat, rejects: bool = False) -> Attack | None:
        """The attack, or None where ``refusal`` has a reason."""
        return None if self.elsewhere(threat, rejects) or self.refusal(threat) else self.build()

    def elsewhere(self, threat: Threat, rejects: bool = False) -> bool:
        """Is the step meant for other regions, for adversaries who see less, or for models that reject, which this one does not?"""
        if self.rejects and not rejects:
            return True
        if self.access and threat.access > Access[self.access.upper()]:
            return True
        return bool(self.only) and threat.region.kind not in self.only


@dataclass(frozen=True)
class Plan:
    """Attacks in the order they run, cheap ones first. The repr is deterministic, and complete but for remarks.

    Args:
        name: as records show it.
        steps: at least one.
        description: for the reader.
    """

    name: str
    steps: tuple[PlanStep, ...]
    description: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps:
            raise UsageError(f"The plan {self.name!r} has no attack. Give at least one [[attack]].")

    def skipped(self, threat: Threat, rejects: bool = False) -> list[str]:
        """The reasons why steps cannot run under a threat, in plan order."""
        there = [s for s in self.steps if not s.elsewhere(threat, rejects)]
        return [f"{s.label}: {reason}" for s in there if (reason := s.refusal(threat)) is not None]


def available_plans() -> list[str]:
    """Names of the built-in plans, sorted.

    >>> available_plans()
    ['autoattack', 'quick', 'standard', 'thorough']
    """
    return sorted(p.stem for p in _FOLDER.glob("*.toml"))


def load_plan(source: str | Path | Plan) -> Plan:
    """A built-in plan by name, or one from a TOML file; a ``Plan`` passes through.

    A file looks like this; of an attack, only ``use`` is needed::

        name = "mine"
        description = "One attack, five restarts."

        [[attack]]
        use = "PGD"
        with = { steps = 100, objective = "margin" }
        restarts = 5
        aims = 9
        rank = "distance"
        start = "best"
        share = 0.5
        only = ["linf", "l2"]
        access = "gradient"
        rejects = true
        skip = { l0 = "too slow there" }

    Args:
        source: such as ``"standard"`` or ``"mine.toml"``.

    Returns:
        The plan, checked: every attack can be built.

    Raises:
        UsageError: no such plan or file, no TOML, or anything in it is unknown; the message lists what is allowed.

    >>> [step.label for step in load_plan("quick").steps]  # doctest: +NORMALIZE_WHITESPACE
    ['APGD-10 probability_margin', 'APGD-25 probability_margin, nearest 25%', 'APGD-20 margin 5 aims, nearest 12%',
    'APGD-50 probability_margin, nearest 6%', 'Square-300 margin, nearest 3%', 'SPGD-60 CE', 'LaVAN-80 margin',
    'PatchSearch-300 margin, nearest 3%', 'HotFlip-100 margin', 'HopSkipJump-500']
    """
    if isinstance(source, Plan):
        return source
    path = Path(source)
    if path.suffix != ".toml":
        path = _FOLDER / f"{source}.toml"
        if str(source) not in available_plans():
            raise UsageError(
                f"There is no plan {str(source)!r}. Allowed: {', '.join(available_plans())}, or the path of a .toml "
                "file."
            )
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"Cannot read the plan {path}: {error}. Allowed: {', '.join(available_plans())}, or a .toml file."
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"The plan {path} is not valid TOML: {error}.") from error
    try:
        return _plan(content, path.stem)
    except UsageError as error:
        raise UsageError(f"The plan {path}: {error}") from error


def _plan(content: dict[str, Any], stem: str) -> Plan:
    _known("a plan", content, _PLAN_KEYS)
    for key in ("name", "description"):
        if not isinstance(content.get(key, ""), str):
            raise UsageError(f"{key} must be a text; got {content[key]!r}.")
    attacks = content.get("attack", [])
    if not isinstance(attacks, list) or not all(isinstance(a, dict) for a in attacks):
        raise UsageError("attacks are written as [[attack]] tables, in the order they run.")
    steps = []
    for i, entry in enumerate(attacks):
        try:
            steps.append(_step(entry))
        except UsageError as error:
            raise UsageError(f"attack {i + 1} of {len(attacks)}: {error}") from error
    return Plan(content.get("name", stem), tuple(steps), " ".join(content.get("description", "").split()))


def _step(entry: dict[str, Any]) -> PlanStep:
    _known("an attack", entry, _STEP_KEYS)
    if not isinstance(entry.get("use"), str):
        raise UsageError(f'it names no attack: write use = "PGD". Allowed: {_names()}.')
    for key in ("with", "skip"):
        if not isinstance(entry.get(key, {}), dict):
            raise UsageError(f"{key} must be a table of names and values; got {entry[key]!r}.")
    return PlanStep.make(
        entry["use"], entry.get("with"), restarts=entry.get("restarts", 1), aims=entry.get("aims", 0),
        rank=entry.get("rank", "logit"), start=entry.get("start", "own"), share=entry.get("share", 1.0),
        only=entry.get("only", ()), access=entry.get("access", ""), rejects=entry.get("rejects", False),
        skip=entry.get("skip"), note=entry.get("note", ""),
    )  # fmt: skip


def _known(what: str, table: Mapping[str, Any], allowed: Sequence[str]) -> None:
    unknown = sorted(set(table) - set(allowed))
    if unknown:
        raise UsageError(f"{what} has no {', '.join(map(repr, unknown))}. Allowed: {', '.join(allowed)}.")


def _names() -> str:
    from mohs.attacks import REGISTRY

    return ", ".join(sorted(REGISTRY))


def _hints(name: str) -> dict[str, Any]:
    """Type of every parameter of an attack, in the order of its fields."""
    from mohs.attacks import REGISTRY

    if name not in REGISTRY:
        raise UsageError(f"there is no attack {name!r}. Allowed: {_names()}.")
    types_ = typing.get_type_hints(REGISTRY[name])
    return {f.name: types_[f.name] for f in dataclasses.fields(REGISTRY[name]) if f.init}


def _is_objective(name: str, parameter: str) -> bool:
    from mohs.objectives import Objective

    return _hints(name)[parameter] is Objective


def _complete(name: str, given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """All parameters of an attack: the given ones, checked, and the defaults of the others."""
    from mohs.attacks import REGISTRY

    hints = _hints(name)
    _known(name, given, tuple(hints))
    fields = {f.name: f for f in dataclasses.fields(REGISTRY[name])}
    complete = []
    for parameter, hint in hints.items():
        if parameter in given:
            value = _value(f"{name}: {parameter}", given[parameter], hint)
        elif fields[parameter].default is not dataclasses.MISSING:
            default = fields[parameter].default
            value = repr(default) if _is_objective(name, parameter) else default
        else:
            raise UsageError(f"{name} needs {parameter}; give it in 'with'.")
        complete.append((parameter, value))
    return tuple(complete)


def _value(what: str, value: Any, hint: Any) -> Any:
    """The value in the type of the parameter, or a UsageError."""
    from mohs.objectives import Objective

    if hint is Objective:
        if value not in OBJECTIVES:
            raise UsageError(f"{what} must be one of {', '.join(OBJECTIVES)}; got {value!r}.")
        return value
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int:
        return float(value)
    named = " or ".join(t.__name__ for t in allowed if t is not types.NoneType)
    raise UsageError(f"{what} must be of type {named}; got {value!r}.")
