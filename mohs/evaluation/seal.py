"""Sealed examples: chosen and committed to before anything was tuned, opened for the evaluation that counts."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mohs.data import Dataset
from mohs.errors import DataError
from mohs.records import Sealed, look, looks_of

_SHORTEST = 16


def new_salt() -> str:
    """A random salt; keep it with the indices, and show neither before the seal is opened."""
    return secrets.token_hex(16)


def seal(data: Dataset, indices: Iterable[int], salt: str) -> str:
    """Commit to examples without showing which they are.

    An attack or a defense that was tuned on the examples it is judged on proves little. So choose some at random, publish
    the commitment, tune on others, and open the seal for the evaluation whose verdict counts. It fails where somebody looks
    at the examples without saying so; ``Seal.look`` keeps a list of the looks that were said.

    The commitment is ``SHA-256`` of the indices, in their order, of the hash of the inputs and labels there
    (``data.take(indices=indices).hash``), and of the salt, without which short lists could be guessed.

    Args:
        data: the data set, from which the examples are taken.
        indices: positions in it, in the order in which they will be evaluated.
        salt: at least 16 characters that nobody can guess, such as ``new_salt()``.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: no indices, repeated or negative ones, positions that the data set lacks, or too short a salt.

    >>> import torch
    >>> data = Dataset(torch.arange(8.0)[:, None], torch.zeros(8, dtype=torch.int64))
    >>> seal(data, [4, 7, 1], "an example's salt") == seal(data, [4, 7, 1], "an example's salt")
    True

    **Differs from the paper**: a hash with a salt instead of a promise.

    **Source**: Athalye, Carlini and Wagner, Obfuscated gradients give a false sense of security, ICML 2018, section 6.3, for
    the demand that what is tuned and what is tested be kept apart.
    """
    listed = _listed(indices)
    return _commitment(data.take(indices=listed).hash, listed, salt)


@dataclass(frozen=True)
class Seal:
    """Sealed examples together with what opens them: for ``mohs.evaluate(..., seal=...)`` and ``mohs run --seal``.

    Args:
        commitment: what was published.
        indices: positions in the data set, in the order in which they will be evaluated.
        salt: what was hashed with them.
        content: hash of the inputs and labels there.
        name: what the data set was called.
        path: the file that holds it all, beside which looks are listed; None before it is written.
    """

    commitment: str
    indices: tuple[int, ...]
    salt: str
    content: str
    name: str = ""
    path: Path | None = field(default=None, compare=False)

    @classmethod
    def of(cls, data: Dataset, n: int) -> Seal:
        """Seal n of a data set's examples, drawn at random by the system's generator, so that nobody can choose them.

        Raises:
            DataError: more than there are, or none.
        """
        if not 1 <= n <= len(data):
            raise DataError(f"Of {len(data)} examples, 1 to {len(data)} can be sealed; got {n}.")
        return cls.closed(data, secrets.SystemRandom().sample(range(len(data)), n), new_salt())

    @classmethod
    def closed(cls, data: Dataset, indices: Iterable[int], salt: str) -> Seal:
        """Seal these examples, as ``seal`` does, and keep what opens it.

        Raises:
            DataError: as ``seal``.
        """
        listed = _listed(indices)
        content = data.take(indices=listed).hash
        return cls(_commitment(content, listed, salt), tuple(listed), salt, content, data.name)

    @classmethod
    def read(cls, path: str | Path) -> Seal:
        """Read what ``write`` wrote.

        Raises:
            DataError: there is no such file, or it is no seal.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            texts = (str(found[key]) for key in ("commitment", "salt", "content", "data"))
            commitment, salt, content, name = texts
            return cls(commitment, tuple(_listed(found["indices"])), salt, content, name, Path(path))
        except OSError as error:
            raise DataError(f"{path}: a seal was asked for, and it cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no seal, or one that does not say which data it is of. Make one with `mohs seal`, and keep the file as "
                "it is."
            ) from error

    def write(self, path: str | Path) -> Seal:
        """Write it to a file of its own, which only its owner can read; one that exists is not overwritten.

        Returns:
            The seal, with its path: looks at it are listed beside it.

        Raises:
            DataError: the file exists, or cannot be written.
        """
        found = {
            "commitment": self.commitment, "indices": list(self.indices), "salt": self.salt, "content": self.content,
            "data": self.name,
        }  # fmt: skip
        try:
            with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(json.dumps(found) + "\n")
        except FileExistsError:
            raise DataError(f"{path} exists, and a seal that is lost cannot be opened. Choose another file.") from None
        except OSError as error:
            raise DataError(f"The seal cannot be written to {path} ({error.strerror}). Choose another file.") from error
        return replace(self, path=Path(path))

    def opened(self, data: Dataset) -> Dataset:
        """The sealed examples, taken from the data set that they were sealed in.

        Raises:
            DataError: indices, salt or content are not those that were committed to, or the data has other examples there.
        """
        listed = _listed(self.indices)
        if not secrets.compare_digest(_commitment(self.content, listed, self.salt), self.commitment.strip().lower()):
            raise DataError(
                f"The {len(listed)} indices, the salt and the content do not fit the commitment {self.commitment[:12]}. Give them "
                "exactly as they were sealed, in the same order; if they are lost, the seal cannot be opened."
            )
        if max(listed) < len(data) and (examples := data.take(indices=listed)).hash == self.content:
            return examples
        few = (
            f"; it has {len(data)} examples, and position {max(listed)} was sealed" if max(listed) >= len(data) else ""
        )
        raise DataError(
            f"{self.commitment[:12]} seals {len(listed)} examples of {self.name or 'a data set without a name'}, and "
            f"{data.name or 'this data set'} has other inputs or labels at their positions{few}. Give the same data, of the same split "
            "and precision and in the same order."
        )

    def look(self, run: str, who: str) -> Sealed:
        """Write down, beside the file of the seal, that somebody looks: wherever a run stands, it is in the same list.

        Args:
            run: the identity of the run; the same run may go on without being another look.
            who: the command, or whoever looks.

        Returns:
            What the header of the record says of the look.

        Raises:
            DataError: the seal has no file yet.
            RecordError: the list of looks was changed, or cannot be written: then nothing may be looked at.
        """
        return look(looks_of(self._file()), self.commitment.strip().lower(), who=who, run=run)

    def _file(self) -> Path:
        if self.path is None:
            raise DataError(
                "Looks at sealed examples are listed beside the file of the seal, and this one has none. Take what "
                "write(...) or Seal.read(...) returns."
            )
        return self.path


def _commitment(content: str, listed: list[int], salt: str) -> str:
    if len(salt) < _SHORTEST:
        raise DataError(
            f"A salt needs {_SHORTEST} characters or more, as short ones can be guessed; got {len(salt)}. Use new_salt()."
        )
    sealed = json.dumps({"content": content, "indices": listed, "salt": salt}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(sealed.encode()).hexdigest()


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
