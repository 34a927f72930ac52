"""The page: one self-contained HTML file that opens from disk, asks the network for nothing and runs no script."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from mohs.records import Finding, Record, mean_bounds, write_atomically
from mohs.reports import charts, pictures, plain, words

TEMPLATES = Path(__file__).parent / "templates"
LOUDNESS = {"block": 0, "warn": 1, "info": 2, "ok": 3}


def render(record: Record, path: str | Path) -> Path:
    """Write the report of a record as one HTML page.

    Everything that comes from outside, such as class names and commands, is escaped; the page's own policy forbids
    scripts, forms and any request, so that even a mistake there could do nothing.

    Args:
        record: what an evaluation found.
        path: the file to write; its directory is made if absent. It appears complete or not at all.

    Returns:
        The path.

    Raises:
        RecordError: the record's ledger cannot be read, or the file cannot be written.
    """
    path = Path(path)
    write_atomically(path, html(record), parents=True)
    return path


def html(record: Record) -> str:
    """Return the page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": words.percent, "count": words.count, "span": words.span, "time": words.seconds}
    # The policy names the hash of exactly these bytes: no other style can take effect.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        style=Markup(style), style_hash=f"sha256-{digest}", **_content(record)
    )


def _content(record: Record) -> dict[str, Any]:
    header = record.header
    title, rest = words.headline(record)
    shown, not_shown = pictures.exhibits(record)
    return {
        "record": record,
        "header": header,
        "word": record.verdict.word if record.verdict else ("no claim" if record.attacks else "no attack"),
        "grade": words.graded(record.verdict) if record.verdict else "",
        "title": title,
        "rest": rest,
        "standing": words.standing(header),
        "claimed": words.claimed(header) is not None,
        "bracket": charts.bracket(record) if record.n else "",
        "key": _key(record) if record.n else [],
        "threat": words.threat_rows(header),
        "curve": charts.radius_curve(record) if len(header.curve) > 1 else "",
        "cost": charts.cost_curve(record) if (record.breaker >= 0).any() else "",
        "curve_key": charts.curve_key(record),
        "radius": lambda eps: words.radius(eps, header.threat_text),
        "losses": charts.loss_panels(record),
        "shown": shown,
        "not_shown": not_shown,
        "broken": int((record.breaker >= 0).sum()),
        "loud": sorted((f for f in header.checks if f.severity != "ok"), key=_loudness),
        "quiet": [f for f in header.checks if f.severity == "ok"],
        "tactics": words.tactics(header),
        "limits": words.limits(record),
        "facts": _facts(record),
        "plain": plain.text(record),
    }


def _loudness(finding: Finding) -> int:
    return LOUDNESS[finding.severity]


def _key(record: Record) -> list[tuple[str, str, str]]:
    """The ends of the bracket and the clean accuracy, as (name, share, count and interval)."""

    def entry(name: str, what: str, share: float | None) -> tuple[str, str, str]:
        k = {"certified": record.certified, "survived": record.survived, "correct": record.correct}[what]
        total = 0 if k is None else int(k.sum())
        return name, words.percent(share), f"{total:,} of {record.n:,}; 95% {words.span(record.interval(what))}"

    one_draw = []
    if record.scores is not None:
        under = f"of a right answer at the strongest points found; 95% {words.span(mean_bounds(record.scores))}"
        one_draw = [("Chance of one draw", words.percent(record.expected_accuracy), under)]
    return [
        ("Certified", "–", "no certificate ran")
        if record.certified is None
        else entry("Certified: proved", "certified", record.certified_accuracy),
        entry("Survived: an upper bound", "survived", record.robust_accuracy)
        if record.attacks
        else ("Survived", "–", "no attack ran"),
        *one_draw,
        entry("Right without any attack", "correct", record.clean_accuracy),
    ]


def _facts(record: Record) -> list[tuple[str, str, bool]]:
    """What identifies the run, as (name, value, set in a typewriter face)."""
    header, machine = record.header, record.header.environment
    subject, data = header.subject, header.data
    versions = {"Python": machine.python, "torch": machine.torch, "NumPy": machine.numpy, "Mohs": machine.mohs}
    black = words.black_box(header)
    parameters = "unknown" if black else f"{subject.parameters:,} in {subject.dtype}"
    device = f"{machine.device}, " if machine.device else ""
    threads = f"{machine.threads} threads" if machine.threads else ""
    facts = [
        ("Model", subject.spec, True),
        ("Layers", subject.arch, True),
        ("Parameters", f"{parameters}, {subject.classes} classes", False),
        ("Weights", f"{'unknown; of the name: ' if black else ''}sha256 {subject.weights_sha256}", True),
        ("Code", f"sha256 {subject.code_sha256}" if subject.code_sha256 else "", True),
        ("Data", data.spec, True),
        ("Inputs", f"{data.n:,} of shape {' × '.join(map(str, data.shape))}", False),
        ("Data hash", f"sha256 {data.hash}", True),
        ("Plan", f"{header.plan.name}; seed {header.seed}; batch {header.batch or 'as given'}", False),
        ("Gradients", words.ADAPTIVE[header.adaptive], False),
        ("Versions", ", ".join(f"{name} {v}" for name, v in versions.items() if v), False),
        ("Machine", f"{machine.platform}; {device}{threads}".strip("; "), False),
        ("Started", header.created.strftime("%-d %B %Y, %H:%M UTC"), False),
        ("Ended", header.finished.strftime("%-d %B %Y, %H:%M UTC") if header.finished else "not yet", False),
        ("Identity", header.identity, True),
        ("Ledger digest", header.ledger_digest or "written when the run ends", True),
    ]
    return [fact for fact in facts if fact[1]]
