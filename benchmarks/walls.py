"""Wall time of each attack that looks for the smallest change, beside the public implementations of the same attack."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from .measure import Times, alternate, ratios, table
from .minimum import NORMS, RELAY, SAME, TWICE, Found, Run, TooSlow, fitting, measured, ours, theirs
from .robust import RobustSubject, available
from .subjects import Options

HEAD = ["attack", "peer", "median size", "wall", "seconds, ours", "seconds, peer", "passes", "steps"]


def run(options: Options) -> Iterator[str]:
    """One table per net and norm."""
    yield "## Wall time of single attacks"
    yield (
        f"Each attack and each public implementation of the same one, with as many steps as about {options.passes} passes per "
        "image allow (found on a few rows first; both take that many steps of their own). 'Median size' is ours over the peer's, "
        "scored outside as under 'Smallest changes'; 'wall' is ours over the peer's seconds, round by round, median (minimum to "
        f"maximum) of {options.repeats} rounds that take turns; passes and steps are ours / the peer's. Whoever takes more than "
        f"{options.patience} CPU seconds is left out. Only a quiet machine tells walls."
        + ("" if options.share == 1 else f" Ours gets {options.share:.0%} of these passes.")
    )
    chosen, absent = available(options.subjects, 2 * options.robust_rows)
    yield from absent
    for subject in (s.correct().take(options.robust_rows) for s in chosen):
        for norm in options.norms:
            yield from _walls(subject, norm, options)


def _walls(subject: RobustSubject, norm: str, options: Options) -> Iterator[str]:
    rows: list[list[object]] = []
    failures: list[str] = []
    for mine, (label, peer) in pairs(norm, options):
        try:
            rows.append([mine, label, *compared(subject, norm, mine, peer, options)])
            options.keep("walls", [{"net": subject.name, "norm": norm, **dict(zip(HEAD, rows[-1], strict=True))}])
        except TooSlow:
            failures.append(f"{mine} beside {label} left out: more than {options.patience} s.")
        except Exception as error:  # a peer may fail in any way
            said = " ".join(str(error).split())[:200]
            failures.append(f"{mine} beside {label} failed: {type(error).__name__}: {said}")
        subject.net.zero_grad(set_to_none=True)
    if rows:
        yield f"**{subject.name}**, {norm}, {len(subject.x)} correctly classified images:\n\n{table(HEAD, rows)}"
    yield from failures


def pairs(norm: str, options: Options) -> Iterator[tuple[str, tuple[str, Run]]]:
    """Our attack by name, and each peer's implementation of the same one."""
    rivals = theirs(norm, options)
    for mine in (name.removeprefix("mohs ") for name in ours(norm, options.attacks) if name not in (RELAY, TWICE)):
        for label, attack in rivals.items():
            if mine in SAME and label.split(" ", 1)[1] == SAME[mine]:
                yield mine, (label, attack)


def compared(subject: RobustSubject, norm: str, name: str, peer: Run, options: Options) -> list[object]:
    """Sizes, times, passes and steps of both sides, as the cells of a row."""
    sides = {"ours": ours(norm, (name,))[f"mohs {name}"], "peer": peer}
    found: dict[str, Found] = {}
    calls: dict[str, Any] = {}
    for side, attack in sides.items():
        passes = round(options.passes * (options.share if side == "ours" else 1))
        steps = fitting(attack, subject, passes, options.patience)
        found[side] = measured(attack, subject, NORMS[norm], steps, options.patience)
        calls[side] = partial(attack, subject.net, subject.x, subject.y, steps)
    times: dict[str, Times] = alternate(calls, options.repeats)
    share = ratios(times["ours"], times["peer"])
    a, b = found["ours"], found["peer"]
    return [
        f"{a.median / b.median:.3f}", f"{share.median:.2f} ({min(share.seconds):.2f} to {max(share.seconds):.2f})",
        f"{times['ours'].median:.2f}", f"{times['peer'].median:.2f}", f"{a.passes:.0f} / {b.passes:.0f}", f"{a.steps} / {b.steps}",
    ]  # fmt: skip
