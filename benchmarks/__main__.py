"""`python -m benchmarks`: Mohs beside the public libraries, as a Markdown page on standard output."""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from mohs.attacks import REGISTRY
from mohs.errors import MohsError
from mohs.evaluation.plans import available_plans

from . import (
    autoattack,
    batches,
    costs,
    doctor,
    exact,
    examined,
    imports,
    memory,
    minimum,
    overhead,
    peer_bugs,
    robust,
    simulations,
    strength,
    training,
    walls,
)  # fmt: skip
from .peers import LIBRARIES
from .subjects import BUNDLED_DATA, BUNDLED_NETS, Options, load_text, setup

SECTIONS: dict[str, Callable[[Options], Iterator[str]]] = {
    "overhead": overhead.run,
    "pgd": strength.pgd,
    "deepfool": strength.deepfool,
    "batches": batches.run,
    "import": imports.run,
    "autoattack": autoattack.run,
    "minimum": minimum.run,
    "walls": walls.run,
    "peer_bugs": peer_bugs.run,
    "exact": exact.run,
    "memory": memory.run,
    "doctor": doctor.run,
    "exam": examined.run,
    "costs": costs.run,
    "simulations": simulations.run,
    "training": training.run,
}
USUAL = ("overhead", "pgd", "deepfool", "batches", "import")
"""What runs where no section is named; the others take longer and say what they need."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; writes a file only where --out asks for one."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description="Mohs beside the public libraries, in one run."
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: {', '.join(USUAL)}"
    )
    parser.add_argument("--quick", action="store_true", help="three repeats on few images: does it run, not how fast")
    parser.add_argument("--repeats", type=_count, help="timed runs of each side (default 7)")
    parser.add_argument("--rows", type=_count, help="images at most (default 1000; of the robust nets 256)")
    parser.add_argument("--peers", default=",".join(LIBRARIES), help="which libraries; empty for none (default: all)")
    parser.add_argument("--nets", default=",".join(BUNDLED_NETS), help="models as `mohs run` takes them")
    parser.add_argument("--data", default=BUNDLED_DATA, help="28 x 28 grey images as `mohs run` takes them")
    parser.add_argument("--threads", type=_count, help="torch threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="write the page to this file too")
    parser.add_argument(
        "--json", type=Path, help="write the rows of autoattack, minimum, walls, exact ... to this file"
    )
    more = parser.add_argument_group("autoattack, minimum, walls, exact")
    more.add_argument("--subjects", default=",".join(robust.SUBJECTS), help="robust nets (default: all that are there)")
    more.add_argument(
        "--norms", "--norm", default="linf,l2,l1,l0", help="of minimum, walls and exact (default: all four)"
    )
    more.add_argument("--attacks", default="", help="ours, of minimum, walls and exact (default: every one that fits)")
    more.add_argument("--passes", type=_count, default=200, help="of minimum and walls, per image (default 200)")
    more.add_argument(
        "--share", type=_share, default=1.0, help="of walls: ours gets this share of the passes (default 1)"
    )
    more.add_argument(
        "--patience", type=_count, default=60, help="CPU seconds an attack may take in minimum and walls (default 60)"
    )
    more.add_argument("--plans", default="", help="ours, of autoattack (default: all that are built in)")
    more.add_argument("--aa-cache", type=Path, help="results of AutoAttack are taken from here, or put here")
    given = parser.parse_args(arguments)
    sections = given.sections or list(USUAL)
    libraries = _names(given.peers)
    chosen, norms = _names(given.subjects), _names(given.norms)
    for what, names, known in (
        ("section", sections, SECTIONS), ("peer", libraries, LIBRARIES), ("subject", chosen, robust.SUBJECTS),
        ("norm", norms, minimum.NORMS), ("plan", _names(given.plans), available_plans()),
        ("attack", _names(given.attacks), REGISTRY),
    ):  # fmt: skip
        if unknown := [name for name in names if name not in known]:
            parser.error(f"no {what} {unknown[0]!r}; there are {', '.join(known)}")
    options = Options(
        libraries=libraries, nets=tuple(given.nets.split(",")), data=given.data, subjects=chosen, norms=norms,
        attacks=_names(given.attacks), plans=_names(given.plans), passes=given.passes, share=given.share,
        patience=given.patience, aa_cache=given.aa_cache,
    )  # fmt: skip
    if given.quick:
        options = replace(options, repeats=3, rows=64, slow_rows=4, wide_rows=32, robust_rows=16)
    options = replace(options, repeats=given.repeats or options.repeats)
    if given.rows:
        options = replace(options, rows=given.rows, robust_rows=given.rows)
    if given.threads:
        torch.set_num_threads(given.threads)

    page: list[str] = []
    try:
        with _quiet():
            for part in _parts(sections, options):
                page.append(part)
                print(part + "\n", flush=True)
    except MohsError as error:
        parser.error(str(error))
    finally:  # an interrupted run keeps what it has measured
        if given.out and page:
            given.out.write_text("\n\n".join(page) + "\n", encoding="utf-8")
        if given.json and options.results:
            given.json.write_text(json.dumps(options.results, indent=1) + "\n", encoding="utf-8")
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the peers' warnings and remarks on each call out of the page."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _parts(sections: Sequence[str], options: Options) -> Iterator[str]:
    yield "# Benchmarks\n\n" + setup(options, torch.get_num_threads())
    start = time.perf_counter()
    for name in sections:
        yield from SECTIONS[name](options)
    yield f"Measured in {time.perf_counter() - start:.0f} s; load on end: {load_text()}."


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1; got {text!r}")
    return int(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1; got {text!r}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
