"""Sealed examples: chosen and committed to before anything was tuned, opened for the evaluation that counts."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from pathlib import Path

from mohs.errors import DataError
from mohs.records import Sealed, look

_SHORTEST = 16


def new_salt() -> str:
    """A random salt; keep it with the indices, and show neither before the seal is opened."""
    return secrets.token_hex(16)


def seal(indices: Iterable[int], salt: str) -> str:
    """Commit to examples without showing which they are.

    An attack or a defense that was tuned on the examples it is judged on proves little. So choose some at random, publish
    the commitment, tune on others, and open the seal for the evaluation whose verdict counts. It fails where somebody looks
    at the examples without saying so; ``open_seal`` keeps a list of the looks that were said.

    The commitment is ``SHA-256`` of the indices, in their order, and the salt, without which short lists could be guessed.

    Args:
        indices: positions in the data set, in the order in which they will be evaluated.
        salt: at least 16 characters that nobody can guess, such as ``new_salt()``.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: no indices, repeated or negative ones, or too short a salt.

    >>> seal([4, 7, 1], "an example's salt") == seal([4, 7, 1], "an example's salt")
    True

    **Differs from the paper**: a hash with a salt instead of a promise.

    **Source**: Athalye, Carlini and Wagner, Obfuscated gradients give a false sense of security, ICML 2018, section 6.3, for
    the demand that what is tuned and what is tested be kept apart.
    """
    listed = _listed(indices)
    if len(salt) < _SHORTEST:
        raise DataError(
            f"A salt needs {_SHORTEST} characters or more, as short ones can be guessed; got {len(salt)}. Use new_salt()."
        )
    content = json.dumps({"indices": listed, "salt": salt}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def unseal(commitment: str, indices: Iterable[int], salt: str) -> list[int]:
    """Check that these are the indices that were committed to.

    Returns:
        The indices, in their order.

    Raises:
        DataError: they are not, or the salt is another one.
    """
    listed = _listed(indices)
    if not secrets.compare_digest(seal(listed, salt), str(commitment).strip().lower()):
        raise DataError(
            f"The {len(listed)} indices and the salt do not fit the commitment {str(commitment)[:12]}. Give them exactly as "
            "they were sealed, in the same order; if they are lost, the seal cannot be opened."
        )
    return listed


def open_seal(
    commitment: str, indices: Iterable[int], salt: str, *, looks: str | Path, who: str, run: str
) -> tuple[list[int], Sealed]:
    """Open a seal for an evaluation, and write down that somebody looked.

    Args:
        commitment: what ``seal`` returned.
        indices, salt: what it was given.
        looks: the list of looks, such as ``mohs.records.looks_beside(out)``.
        who: the command, or whoever looks.
        run: the identity of the run; the same run may go on without being another look.

    Returns:
        The indices, and what the header of the record says of the look.

    Raises:
        DataError: the indices are not those that were sealed; no look is written down then.
        RecordError: the list of looks was changed, or cannot be written: then nothing is opened.
    """
    listed = unseal(commitment, indices, salt)
    return listed, look(looks, seal(listed, salt), who=who, run=run)


def _listed(indices: Iterable[int]) -> list[int]:
    given = list(indices)
    try:
        listed = [int(i) for i in given]
    except (TypeError, ValueError):
        listed = []
    if not listed or listed != given or min(listed) < 0 or len(set(listed)) < len(listed):
        raise DataError(
            f"Sealed indices must be distinct positions >= 0, at least one; got {len(given)}"
            + (f", {len(given) - len(set(map(str, given)))} of them repeated" if given else "")
            + ". Give each example once."
        )
    return listed
