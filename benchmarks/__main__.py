"""`python -m benchmarks`: Mohs beside the public libraries, as a Markdown page on standard output."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from mohs.errors import MohsError

from . import batches, imports, overhead, strength
from .peers import PEERS
from .subjects import BUNDLED_DATA, BUNDLED_NETS, Options, load_text, setup

SECTIONS: dict[str, Callable[[Options], Iterator[str]]] = {
    "overhead": overhead.run,
    "pgd": strength.pgd,
    "deepfool": strength.deepfool,
    "batches": batches.run,
    "import": imports.run,
}
LIBRARIES = tuple(dict.fromkeys(library for libraries in PEERS.values() for library in libraries))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; writes a file only where --out asks for one."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description="Mohs beside the public libraries, in one run."
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="three repeats on few images: does it run, not how fast")
    parser.add_argument("--repeats", type=_count, help="timed runs of each side (default 7)")
    parser.add_argument("--rows", type=_count, help="images at most (default 1000)")
    parser.add_argument("--peers", default=",".join(LIBRARIES), help="which libraries; empty for none (default: all)")
    parser.add_argument("--nets", default=",".join(BUNDLED_NETS), help="models as `mohs run` takes them")
    parser.add_argument("--data", default=BUNDLED_DATA, help="28 x 28 grey images as `mohs run` takes them")
    parser.add_argument("--threads", type=_count, help="torch threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="write the page to this file too")
    given = parser.parse_args(arguments)
    sections = given.sections or list(SECTIONS)
    libraries = tuple(name for name in given.peers.split(",") if name)
    for what, names, known in (("section", sections, SECTIONS), ("peer", libraries, LIBRARIES)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"no {what} {unknown[0]!r}; there are {', '.join(known)}")
    options = Options(libraries=libraries, nets=tuple(given.nets.split(",")), data=given.data)
    if given.quick:
        options = replace(options, repeats=3, rows=64, slow_rows=4, wide_rows=32)
    options = replace(options, repeats=given.repeats or options.repeats, rows=given.rows or options.rows)
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


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1; got {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
