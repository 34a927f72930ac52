"""Every error a user can meet, each with the exit code of the command line.

A message says four things: what was asked, what came, what is allowed, what to do.
About a batch it names the rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable


class MohsError(Exception):
    """Base of all errors that Mohs raises on purpose; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UsageError(MohsError, ValueError):
    """The call, the command or a file given to it is wrong."""

    exit_code = 2


class DataError(UsageError):
    """A data set cannot be read, or its inputs or labels are not what the call needs."""


class ModelError(UsageError):
    """A model cannot be loaded, raises, or answers with something that is not logits."""


class ThreatError(UsageError):
    """A threat cannot be parsed, or describes no realistic adversary."""


class ClaimError(UsageError):
    """A claim cannot be parsed or is not testable."""


class AccessError(UsageError):
    """An attack asked the target for more than the threat grants."""


class RecordError(UsageError):
    """A run directory is unusable: not ours, of another run, locked, damaged or not writable."""


class CertificateContradicted(MohsError):
    """An attack broke an example that a deterministic certificate had declared safe."""

    exit_code = 13


def rows_text(rows: Iterable[int], most: int = 8) -> str:
    """Name rows for a message: ``rows 3, 17 and 40`` or the first few and how many more.

    >>> rows_text([3, 17, 40])
    'rows 3, 17 and 40'
    >>> rows_text([5])
    'row 5'
    >>> rows_text(range(12), most=3)
    'rows 0, 1, 2 and 9 more'
    """
    listed = [int(r) for r in rows]
    if len(listed) == 1:
        return f"row {listed[0]}"
    if len(listed) <= most:
        return "rows " + ", ".join(map(str, listed[:-1])) + f" and {listed[-1]}"
    return "rows " + ", ".join(map(str, listed[:most])) + f" and {len(listed) - most} more"


FAILURES = (MohsError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, copy.Error)
"""What is raised where a model cannot be taken apart, copied, or called in another way than usual."""


def gist(error: BaseException) -> str:
    """The first sentence of an error's message, without its end: to be quoted within another message.

    >>> gist(ValueError("No such key. Set the flag.\\nTraceback"))
    'No such key'
    """
    first = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    return first or type(error).__name__
