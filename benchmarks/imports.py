"""What `import mohs` adds to `import torch`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .measure import Times, alternate, table
from .subjects import Options

BAR = 0.3


def run(options: Options) -> Iterator[str]:
    """Whole processes, wall time, compiled files on disk already."""
    yield "## Import"
    statements = ("import torch", "import torch, mohs")
    for statement in statements:
        _process(statement)
    times = alternate({statement: partial(_process, statement) for statement in statements}, options.repeats)
    torch_alone, both = times.values()
    added = Times(tuple(b - a for a, b in zip(torch_alone.seconds, both.seconds, strict=True)))
    held = "yes" if added.median <= BAR else "NO"
    yield table(
        ["process", "time, s", "bar", "held"],
        [*([f"`{name}`", taken, "", ""] for name, taken in times.items()), ["added", added, f"<= {BAR}", held]],
    )


def _process(statement: str) -> None:
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", statement], check=True, cwd=root)  # the working directory is importable
