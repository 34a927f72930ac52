"""A record as plain text, for logs, mails and pipes."""

from __future__ import annotations

from mohs.records import Record
from mohs.reports import words

WIDTH = 60


def text(record: Record) -> str:
    """Summarise a record in plain text.

    Args:
        record: what an evaluation found.

    Returns:
        Verdict, bracket, attacks, checks that are not quiet, and where the record lies; lines end with newlines.
    """
    header = record.header
    lines = []
    if record.verdict is not None:
        claim = f": claim '{header.claim.text}'" if header.claim else ""
        lines += [f"{record.verdict.word.upper()}{words.graded(record.verdict)}{claim}", record.verdict.sentence, ""]
    lines += [record.describe(), ""]
    if record.n:
        lines += _bracket(record)
    if header.attacks:
        lines += ["", f"{'attack':<24}{'given':>8}{'broke':>8}{'after':>9}{'alone':>12}{'forwards':>14}{'time':>10}"]
        for a in header.attacks:
            alone = "–" if a.alone_n is None else f"{a.alone_broke}/{a.alone_n}"
            lines.append(
                f"{a.name[:23]:<24}{a.given:>8,}{a.broke:>8,}{words.percent(a.accuracy_after):>9}{alone:>12}"
                f"{a.forwards:>14,}{words.seconds(a.seconds):>10}"
            )
    loud = [f for f in header.checks if f.severity in ("warn", "block")]
    if loud:
        lines += ["", "Checks that are not quiet:"]
        for f in loud:
            lines.append(f"  {f.severity.upper():<6}{f.id} {f.name}: {f.saw}")
            if f.remedy:
                lines.append(f"        do: {f.remedy}")
    if header.tactics:
        lines += ["", f"Gradients: {words.tactics(header)}"]
    if header.adaptive != "declared":
        lines += ["", f"Defenses: {words.ADAPTIVE[header.adaptive]}."]
    lines += ["", f"record    {record.dir}", f"model     {header.subject.spec}  {header.subject.weights_sha256[:16]}"]
    if header.subject.code_sha256:
        lines.append(f"code      {header.subject.code_sha256[:16]}")
    lines += [f"data      {header.data.spec}  n = {record.n:,}  {header.data.hash[:16]}"]
    if header.command:
        lines.append(f"command   {header.command}")
    return "\n".join(lines) + "\n"


def _bracket(record: Record) -> list[str]:
    certified = 0 if record.certified is None else int(record.certified.sum())
    survived, correct = int(record.survived.sum()), int(record.correct.sum())
    ends = [round(WIDTH * k / record.n) for k in (certified, max(survived, certified), correct, record.n)]
    bar, start = "", 0
    for end, sign in zip(ends, "#?x."):
        bar += sign * (end - start)
        start = max(end, start)
    names = [
        ("#", "certified", certified if record.certified is not None else None),
        ("?", "unknown (survived, not certified)", survived - certified),
        ("x", "broken by an attack", correct - survived),
        (".", "wrong without any attack", record.n - correct),
    ]
    lines = [f"0% [{bar}] 100%"]
    for sign, name, k in names:
        share = "no certificate ran" if k is None else f"{k:>7,}  {words.percent(k / record.n):>6}"
        lines.append(f"   {sign} {name:<36}{share}")
    return lines
