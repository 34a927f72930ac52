"""``mohs demo``: the whole of Mohs in under a minute, from what the package carries."""

from __future__ import annotations

import time
from pathlib import Path

from mohs.cli import screen

THREAT, CLAIM = "linf:0.1", "accuracy >= 0.5"
NETS = (
    ("bundled:fashion-natural", "trained on clean images"),
    ("bundled:fashion-pgd", "trained on PGD examples at linf:0.1"),
)


def demo(out: Path, n: int | None) -> int:
    """Evaluate two bundled nets under the same threat and claim, and write a report for each."""
    from mohs import data, models
    from mohs.evaluation import evaluate
    from mohs.reports import render

    dataset = data.load("bundled:fashion-mnist", n=n)  # refuses a bad n before anything is said
    began = time.perf_counter()
    screen.say(f"Two nets of the same shape, one claim: '{CLAIM}' when every pixel may change by at most 0.1.\n")
    pages = []
    for spec, what in NETS:
        screen.out.rule(f"[bold]{spec}[/] {what}", align="left", style="dim")
        name = spec.partition(":")[2]
        with screen.Progress() as progress:
            record = evaluate(
                models.load(spec), dataset, THREAT, plan="quick", claim=CLAIM, out=out / name,
                subject=spec, command=f"mohs demo --out {out}", notify=progress.notify,
            )  # fmt: skip
        pages.append(render(record, out / name / "report.html"))
        screen.findings(record.header.checks)
        screen.record(record)
    screen.say(f"\nDone in {time.perf_counter() - began:.0f} s.")
    screen.next_steps(
        [
            *(f"open {page}" for page in pages),
            f"mohs replay {out / 'fashion-natural'}",
            "mohs run bundled:fashion-pgd bundled:fashion-mnist --n 50 --threat linf:0.1 --plan standard "
            "--claim 'accuracy >= 0.5' --certify crown --out runs/mine",
        ]
    )
    return 0
