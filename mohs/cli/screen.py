"""What the commands show on the terminal; results go to stdout, progress to stderr."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

if TYPE_CHECKING:
    from mohs.evaluation import Replayed
    from mohs.records import Diff, Finding, Record


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Fall silent when the reader (head, less) has gone; the exit code must still be that of the verdict."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


out = _Terminal(highlight=False)
err = _Terminal(stderr=True, highlight=False)

COLOURS = {
    "refuted": "red",
    "certified": "green",
    "upheld so far": "green",
    "undecided": "yellow",
    "blocked": "magenta",
}
SEVERITY = {"ok": "green", "info": "blue", "warn": "yellow", "block": "red"}


def say(text: str) -> None:
    """Print a sentence as it is."""
    out.print(escape(text), soft_wrap=True)


def listing(what: str, rows: Sequence[tuple[str, str]]) -> None:
    """A table of names and one-line descriptions."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(what.rstrip("s") if what != "data" else "data", no_wrap=True, style="cyan")
    table.add_column("what it is")
    for name, description in rows:
        table.add_row(escape(name), escape(description))
    out.print(table)


def findings(found: Sequence[Finding]) -> None:
    """What the checks saw; the quiet ones in one line."""
    quiet = [f.name for f in found if f.severity == "ok"]
    for f in found:
        if f.severity != "ok":
            colour = SEVERITY[f.severity]
            out.print(f"[bold {colour}]{f.severity}[/] [bold]{escape(f.name)}[/]: {escape(f.saw)}", soft_wrap=True)
            for text in (f.means, f.remedy):
                if text:
                    out.print(f"  {escape(text)}", soft_wrap=True)
    if quiet:
        out.print(f"[bold green]ok[/] {escape(', '.join(quiet))}", soft_wrap=True)


def record(rec: Record) -> None:
    """The record as a table and a verdict."""
    head = rec.header
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("attack", overflow="fold")  # a long name takes two lines; no name and no figure is cut
    for name in ("given", "broke", "after", "alone", "forwards", "backwards", "sec"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("(no attack)", str(rec.n), str(rec.n - int(rec.correct.sum())), f"{rec.clean_accuracy:.1%}")
    for a in head.attacks:
        table.add_row(
            escape(a.name), str(a.given), str(a.broke), "" if a.accuracy_after is None else f"{a.accuracy_after:.1%}",
            "" if a.alone_n is None else f"{a.alone_broke}/{a.alone_n}", _short(a.forwards), _short(a.backwards),
            f"{a.seconds:.1f}",
        )  # fmt: skip
    for c in head.certificates:
        table.add_row(escape(c.name), str(c.n), "", f"{c.certified / max(c.n, 1):.1%}", "proven", "", "", "")
    loud = [f for f in head.checks if f.severity in ("warn", "block")]
    if loud:
        findings(loud)
    if head.tactics:
        from mohs.reports import words

        out.print(f"[bold]gradients[/] {escape(words.tactics(head))}", soft_wrap=True)
    out.print(table)
    for text in head.limits:
        out.print(f"[bold yellow]note[/] {escape(text)}", soft_wrap=True)
    verdict = rec.verdict
    text = verdict.sentence if verdict is not None else rec.describe()
    title = verdict.word.upper() if verdict is not None else "NO CLAIM"
    if verdict is not None and verdict.grade:
        title += f", grade {verdict.grade}"
    colour = COLOURS.get(verdict.word, "blue") if verdict is not None else "blue"
    out.print(Panel(escape(text), title=f"[bold {colour}]{title}[/]", title_align="left", border_style=colour))


def _short(count: int) -> str:
    """At most seven characters, such as 12,345 or 12,345k; the record has every digit."""
    for size, unit in ((1, ""), (1000, "k"), (1_000_000, "M")):
        if count < 100_000 * size:
            return f"{count / size:,.0f}{unit}"
    return f"{count / 1e9:,.0f}G"


def blocked_code(rec: Record) -> int:
    """Exit code of a run without a claim: 12 if a check blocks, else 0."""
    return 12 if any(f.severity == "block" for f in rec.header.checks) else 0


def next_steps(steps: Sequence[str]) -> None:
    """What to do next, one command a line."""
    out.print("Next: " + "\n      ".join(escape(s) for s in steps), soft_wrap=True)


def replayed(rec: Record, seen: Replayed) -> None:
    """What a replay confirmed."""
    from mohs.reports import words

    model = "the recorded weights" if seen.same_model else "OTHER weights than the recorded ones"
    if seen.same_code is False:
        model = (
            "OTHER code than the recorded one" if seen.same_weights else "OTHER weights and code than the recorded ones"
        )
    if words.black_box(rec.header):
        model = "the black box of the recorded name" if seen.same_model else "ANOTHER model than the recorded one"
    say(
        f"{seen.confirmed} of {seen.points} stored adversarial examples confirmed under {rec.header.threat_text} on {model}."
    )
    for name, rows in (("outside region or box", seen.outside), ("answered rightly", seen.right)):
        if rows:
            some = ", ".join(f"{rec.attack_name(a)} on example {e}" for a, e in rows[:5])
            say(f"{len(rows)} {name}: {some}{' ...' if len(rows) > 5 else ''}")
    if seen.other_draws:
        say(seen.other_draws)


def difference(d: Diff) -> None:
    """Two records side by side."""
    say(d.describe())
    for title, rows in (("newly broken", d.newly_broken), ("newly safe", d.newly_safe)):
        if len(rows):
            shown = ", ".join(map(str, rows[:20].tolist()))
            say(f"{title}: examples {shown}{' ...' if len(rows) > 20 else ''}")
    for name, left, right in d.headers:
        say(f"{name}: {left[:60]} -> {right[:60]}")


class Progress:
    """One bar per stage on stderr while a run works."""

    def __init__(self) -> None:
        self.bars = RichProgress(
            TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TimeElapsedColumn(), console=err, transient=True,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}

    def notify(self, stage: str, done: int, total: int, broken: int) -> None:
        """Show how far a stage is."""
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(escape(stage), total=total or 1, note="")
        note = f"{broken} broken" if broken else ""
        self.bars.update(self.tasks[stage], completed=done if total else 1, total=total or 1, note=note)

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()
