"""Sealed examples: chosen and committed to before anything was tuned, opened for the evaluation that counts."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mohs.errors import DataError
from mohs.records import Sealed, look, looks_beside

_SHORTEST = 16


def new_salt() -> str:
    """A random salt; keep it with the indices, and show neither before the seal is opened."""
    return secrets.token_hex(16)


def seal(indices: Iterable[int], salt: str) -> str:
    """Commit to examples without showing which they are.

    An attack or a defense that was tuned on the examples it is judged on proves little. So choose some at random, publish
    the commitment, tune on others, and open the seal for the evaluation whose verdict counts. It fails where somebody looks
    at the examples without saying so; ``Seal.look`` keeps a list of the looks that were said.

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


@dataclass(frozen=True)
class Seal:
    """Sealed examples together with what opens them: for ``mohs.evaluate(..., seal=...)`` and ``mohs run --seal``.

    Args:
        commitment: what was published.
        indices: positions in the data set, in the order in which they will be evaluated.
        salt: what was hashed with them.
    """

    commitment: str
    indices: tuple[int, ...]
    salt: str

    @classmethod
    def of(cls, total: int, n: int) -> Seal:
        """Seal n of a data set's examples, drawn at random by the system's generator, so that nobody can choose them.

        Raises:
            DataError: more than there are, or none.
        """
        if not 1 <= n <= total:
            raise DataError(f"Of {total} examples, 1 to {total} can be sealed; got {n}.")
        indices, salt = tuple(secrets.SystemRandom().sample(range(total), n)), new_salt()
        return cls(seal(indices, salt), indices, salt)

    @classmethod
    def read(cls, path: str | Path) -> Seal:
        """Read what ``write`` wrote.

        Raises:
            DataError: there is no such file, or it is no seal.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(str(content["commitment"]), tuple(_listed(content["indices"])), str(content["salt"]))
        except OSError as error:
            raise DataError(f"{path}: a seal was asked for, and it cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no seal. Make one with `mohs seal`, and keep the file as it is.") from error

    def write(self, path: str | Path) -> None:
        """Write it to a file of its own, which only its owner can read; one that exists is not overwritten.

        Raises:
            DataError: the file exists, or cannot be written.
        """
        content = {"commitment": self.commitment, "indices": list(self.indices), "salt": self.salt}
        try:
            with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(json.dumps(content) + "\n")
        except FileExistsError:
            raise DataError(f"{path} exists, and a seal that is lost cannot be opened. Choose another file.") from None
        except OSError as error:
            raise DataError(f"The seal cannot be written to {path} ({error.strerror}). Choose another file.") from error

    def opened(self) -> list[int]:
        """The indices, if they are those that were committed to.

        Raises:
            DataError: they are not.
        """
        return unseal(self.commitment, self.indices, self.salt)

    def look(self, out: str | Path, run: str, who: str) -> Sealed:
        """Write down, beside the directory of a run, that somebody looks.

        Args:
            out: the directory of the record.
            run: the identity of the run; the same run may go on without being another look.
            who: the command, or whoever looks.

        Returns:
            What the header of the record says of the look.

        Raises:
            DataError: the indices are not those that were sealed; no look is written down then.
            RecordError: the list of looks was changed, or cannot be written: then nothing is opened.
        """
        return look(looks_beside(out), seal(self.opened(), self.salt), who=who, run=run)


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
