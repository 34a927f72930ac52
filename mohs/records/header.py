"""Reading, writing and comparing the header of a record."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from mohs.errors import RecordError
from mohs.records import _files
from mohs.records.schema import SCHEMA_VERSION, Header


def load_header(directory: str | Path) -> Header:
    """Read and check ``record.json`` of a run directory."""
    path = Path(directory) / _files.RECORD
    if not path.is_file():
        raise RecordError(
            f"a record was asked for, but there is no {path}. Give the directory an evaluation wrote (its --out)."
        )
    with _files.guard(path, "read the record"):
        raw = path.read_bytes()
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise RecordError(
            f"{path} is damaged or cut short ({error}). Restore it from a copy, "
            "or run the evaluation again into another --out."
        ) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema version {version}; this Mohs reads version {SCHEMA_VERSION}. "
            "Use the Mohs that wrote it, or run the evaluation again."
        )
    try:
        return Header.model_validate(content)
    except ValidationError as error:
        raise RecordError(
            f"{path} is not a record of this version: {first_error(error)}. "
            "Restore it from a copy, or run the evaluation again."
        ) from error


def header_text(header: Header) -> str:
    """Return the content of ``record.json``."""
    return header.model_dump_json(indent=2) + "\n"


def header_differences(a: Header, b: Header) -> list[tuple[str, str, str]]:
    """List what two headers disagree on among the things results depend on, as (name, in a, in b)."""
    named = [
        ("model", a.subject.weights_sha256, b.subject.weights_sha256),
        ("code", a.subject.code_sha256 or "unknown", b.subject.code_sha256 or "unknown"),
        ("arithmetic", a.subject.dtype, b.subject.dtype),
        ("data", a.data.hash, b.data.hash),
        ("threat", _threat_text(a, b), _threat_text(b, a)),
        ("plan", _plan_text(a, b), _plan_text(b, a)),
        ("seed", str(a.seed), str(b.seed)),
        ("batch", str(a.batch), str(b.batch)),
        ("adaptive", a.adaptive, b.adaptive),
        ("version of Python", *(h.environment.python.rpartition(".")[0] for h in (a, b))),
        ("version of Mohs", a.environment.mohs, b.environment.mohs),
        ("version of torch", a.environment.torch, b.environment.torch),
    ]
    return [(name, left, right) for name, left, right in named if left != right]


def first_error(error: ValidationError) -> str:
    """Name the first field that is wrong."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def _threat_text(one: Header, other: Header) -> str:
    if one.threat_text != other.threat_text or one.threat == other.threat:
        return one.threat_text
    return json.dumps(one.threat, sort_keys=True)


def _plan_text(one: Header, other: Header) -> str:
    if one.plan.name != other.plan.name or one.plan == other.plan:
        return one.plan.name
    return f"{one.plan.name}: " + "; ".join(f"{s.config} x{s.restarts}" for s in one.plan.steps)
