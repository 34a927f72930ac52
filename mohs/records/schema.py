"""The header of a record: everything about a run that is not one row per example.

It lies in ``record.json`` beside the ledger. The field order is the order in the file, ``schema_version`` is
raised whenever a field changes meaning, and unknown fields are refused, so that a record that loads is
understood completely.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA_VERSION: Literal[1] = 1


class _Part(BaseModel):
    """Base of all parts: unknown fields are refused and infinities survive JSON."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings", validate_assignment=True)


class Subject(_Part):
    """The classifier under test."""

    spec: str = Field(description="how it was named on the command line, or the class of the module")
    arch: str = Field(default="", description="the layers in words")
    weights_sha256: str
    code_sha256: str = Field(
        default="", description="of the code and the plain settings of its modules; empty: of an older record"
    )
    parameters: int = Field(ge=0, description="number of trainable and fixed numbers")
    classes: int = Field(ge=1)
    reject: int | None = Field(
        default=None, description="the logit by which it rejects an input; None: it rejects nothing"
    )
    dtype: str = "float32"


class Data(_Part):
    """The examples it was tested on."""

    spec: str
    n: int = Field(ge=0)
    hash: str = Field(description="SHA-256 over all inputs and labels in order")
    shape: list[int] = Field(description="shape of one input, channels first for images")
    class_names: list[str] = Field(default_factory=list)


class Step(_Part):
    """One attack of the plan as it was configured."""

    name: str
    config: str = Field(description="repr of the attack: its whole configuration")
    restarts: int = Field(default=1, ge=1)
    targets: int | None = Field(default=None, description="how many target classes, None when untargeted")
    rank: str = Field(default="logit", description="what put the target classes in order")
    start: str = Field(
        default="own", description="own: as the attack begins; best: at the strongest point found so far"
    )
    share: float = Field(default=1.0, gt=0, le=1, description="share of the survivors, those nearest to breaking")
    note: str = ""


class Plan(_Part):
    """The attacks in the order they ran."""

    name: str
    steps: list[Step] = Field(default_factory=list)


class Claim(_Part):
    """What was claimed: at least ``tau`` of the answers stay right, or of what else its kind counts or measures."""

    text: str
    tau: float = Field(ge=0)
    kind: Literal["accuracy", "stability", "certified", "median", "detection"] = "accuracy"

    @model_validator(mode="after")
    def _of_a_share(self) -> Self:
        if self.tau > 1 and self.kind != "median":
            raise ValueError(f"a share above 1 is none; got {self.tau}")
        return self

    @property
    def share(self) -> float | None:
        """The claimed share of all examples, None where the claim is not about one."""
        return self.tau if self.kind in ("accuracy", "certified") else None


class Sealed(_Part):
    """The examples were chosen and committed to before; this is who looked at them when."""

    commitment: str = Field(description="hash of the positions, of the inputs and labels there, and of a salt")
    look: int = Field(ge=1, description="1: nobody had looked before")
    head: str = Field(description="hash of the list of looks up to this one")


class Verdict(_Part):
    """What the run says about the claim."""

    word: Literal["refuted", "certified", "upheld so far", "undecided", "blocked"]
    sentence: str
    exit_code: int
    grade: Literal["", "A", "B"] = Field(
        default="",
        description="of what is upheld so far. A: every check is quiet; B: some warn; empty: no checks looked",
    )
    lower: float | None = Field(default=None, description="bound on what is claimed, from below, by proof")
    upper: float | None = Field(default=None, description="and from above")
    alpha: float = Field(default=0.05, gt=0, lt=1)


class Environment(_Part):
    """Versions and machine."""

    python: str = ""
    torch: str = ""
    numpy: str = ""
    mohs: str = ""
    platform: str = ""
    threads: int | None = None
    device: str = ""


class Finding(_Part):
    """What one check of the doctor saw."""

    id: str
    name: str
    severity: Literal["ok", "info", "warn", "block"]
    saw: str
    means: str = ""
    remedy: str = ""


class Tactic(_Part):
    """One way to get gradients, tried on a few examples because the model's own were suspect."""

    name: str
    against: str = Field(default="", description="what it counters: shattered, stochastic, vanishing, declared")
    broken: int = Field(ge=0)
    n: int = Field(ge=0, description="examples it was tried on")
    passes: int = Field(default=0, ge=0)
    chosen: bool = Field(default=False, description="did it guide the attacks?")
    second: bool = Field(default=False, description="did it guide one more attack, on those who survived the plan?")
    after: str = Field(default="", description="the one whose unbroken examples it was tried on; empty: on all")
    steps: int = Field(default=0, ge=0, description="of the attack that tried it")
    error: str = Field(default="", description="why it could not run")


class AttackSummary(_Part):
    """One attack of the plan in numbers."""

    index: int = Field(ge=0, description="position in the plan, the key of its rows in the ledger")
    name: str
    config: str = ""
    access: str = ""
    given: int = Field(default=0, ge=0, description="rows that were still right when it began")
    broke: int = Field(default=0, ge=0, description="of those")
    accuracy_after: float | None = None
    alone_broke: int | None = Field(
        default=None,
        description="broken in the control subset, all of which it got",
    )
    alone_n: int | None = Field(default=None, description="size of the control subset; null where a check ran")
    forwards: int = Field(default=0, ge=0)
    backwards: int = Field(default=0, ge=0)
    queries: int = Field(default=0, ge=0)
    seconds: float = Field(default=0.0, ge=0)


class CurvePoint(_Part):
    """Survivors at one radius."""

    eps: float
    survived: int = Field(ge=0)
    n: int = Field(ge=0)
    source: str = Field(default="", description="which attack or method; points of one source form one line")
    lost: int = Field(default=0, ge=0, description="broken at a smaller radius and not found again at this one")


class CertificateSummary(_Part):
    """One certificate in numbers."""

    name: str
    certified: int = Field(ge=0)
    n: int = Field(ge=0, description="examples it was asked about")
    seconds: float = Field(default=0.0, ge=0)
    note: str = Field(default="", description="soundness: deterministic, or holds except with a stated probability")


class Totals(_Part):
    """Counts over all examples, taken from the ledger."""

    n: int = Field(default=0, ge=0)
    clean_correct: int = Field(default=0, ge=0)
    survived: int = Field(default=0, ge=0)
    certified: int | None = Field(default=None, description="None when no certificate ran")
    expected_accuracy: float | None = Field(
        default=None,
        description="of a random model: mean chance that one query at the strongest points found is answered rightly",
    )


class Header(_Part):
    """The whole of ``record.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    status: Literal["running", "complete", "interrupted"] = "running"
    identity: str = Field(description="SHA-256 of what the results depend on; equal identities may be resumed")
    command: str = ""
    created: datetime = Field(default_factory=lambda: utc_now())
    finished: datetime | None = None
    seed: int = 0
    batch: int | None = None
    subject: Subject
    data: Data
    threat: dict[str, Any]
    threat_text: str
    plan: Plan
    stated_accuracy: float | None = Field(default=None, description="clean accuracy the model was said to have")
    claim: Claim | None = None
    until: Literal["end", "decided"] = Field(
        default="end", description="decided: it may end before all examples were seen"
    )
    ended_at: int | None = Field(
        default=None, description="examples after which the plan had decided the claim; None: it had not"
    )
    adaptive: Literal["declared", "blind", "off"] = Field(
        default="declared",
        description="how gradients were sought where the model hides them: with what defenses declare, without believing them, or "
        "not at all",
    )
    sealed: Sealed | None = None
    verdict: Verdict | None = None
    environment: Environment = Field(default_factory=Environment)
    checks: list[Finding] = Field(default_factory=list)
    tactics: list[Tactic] = Field(default_factory=list, description="in the order tried; empty: nothing was suspect")
    attacks: list[AttackSummary] = Field(default_factory=list)
    curve: list[CurvePoint] = Field(default_factory=list)
    certificates: list[CertificateSummary] = Field(default_factory=list)
    totals: Totals = Field(default_factory=Totals)
    limits: list[str] = Field(default_factory=list, description="what this run in particular does not say")
    ledger_digest: str | None = Field(default=None, description="digest of the ledger when the run ended")


def utc_now() -> datetime:
    """Return the present time in UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def identity_of(parts: Mapping[str, Any]) -> str:
    """Hash what the results depend on, whatever the order of the parts.

    Args:
        parts: JSON-able values by name: model hash, data hash, threat, plan, seed, batch, code version.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    >>> identity_of({"seed": 0, "model": "ab"}) == identity_of({"model": "ab", "seed": 0})
    True
    """
    text = json.dumps(dict(parts), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
