"""The command line: ``mohs demo | list | check | seal | run | report | replay | diff | certify | train``.

Exit codes: 0 every claim upheld or certified, 10 refuted, 11 undecided, 12 a check blocks the verdict (or a replay does not
confirm the record), 13 a certificate was contradicted, 2 wrong usage, 1 internal error, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command ``mohs``: runs it and exits with its code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run one command; errors become a message on stderr and an exit code."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("\nmohs: interrupted. Issue the same command again to go on where it stopped.", file=sys.stderr)
        return 130


def _run(argv: Sequence[str]) -> int:
    from cyclopts import CycloptsError, UnusedCliTokensError

    from mohs.cli.commands import app
    from mohs.errors import MohsError

    try:
        return int(app(list(argv), exit_on_error=False, result_action="return_value") or 0)
    except CycloptsError as error:  # cyclopts has printed what was wrong
        if isinstance(error, UnusedCliTokensError):
            print(
                "mohs: an option takes one value each time it is given, such as --defense bit-depth:3 --defense jpeg:75. What is "
                "allowed stands in the command's --help.",
                file=sys.stderr,
            )
        return 2
    except MohsError as error:
        print(" ".join([f"mohs: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # the reader has gone before a verdict was given: nothing more can be said to it, but this is no success
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some room",
            errno.EROFS: "the place is read-only; choose another one",
            errno.EACCES: "permission was denied; choose another place",
        }
        if error.errno in reasons:
            where = f" ({error.filename})" if error.filename else ""
            print(f"mohs: {reasons[error.errno]}{where}, then issue the same command again.", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        print("mohs: this is a bug in Mohs; please report it with the lines above and the command.", file=sys.stderr)
        return 1
