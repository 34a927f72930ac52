"""Labelled sentences from a text file, as rows of token ids with a vocabulary."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mohs.data.dataset import Dataset
from mohs.errors import DataError

PADDING, UNKNOWN = 0, 1
"""The first two token ids: no word, and a word outside the vocabulary."""

_MAX_FILE = 256 << 20  # bytes
_MAX_LINE = 1 << 20  # characters
_MAX_IDS = 1 << 28  # numbers [N, length]
_MAX_CLASSES = 1000
_TOKEN = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and punctuation marks in lower case; an apostrophe inside a word belongs to it.

    >>> tokens("Don't miss it!")
    ["don't", 'miss', 'it', '!']
    """
    return [token.replace("\u2019", "'") for token in _TOKEN.findall(text.lower())]


@dataclass(frozen=True)
class Vocabulary:
    """The words that have an id, by falling frequency; id 0 is padding and id 1 any other word.

    Args:
        words: of each id, the first two named ``<pad>`` and ``<unk>``.
        counts: how often each occurs in the text it was made from; 0 of the padding.

    Raises:
        DataError: not one count >= 0 per word, a word twice, or no word at all.

    >>> vocabulary = Vocabulary.of(["a good film", "a bad film"], most=4)
    >>> vocabulary.words, vocabulary.counts
    (('<pad>', '<unk>', 'a', 'film'), (0, 2, 2, 2))
    >>> ids = vocabulary.encode(["A film, bad"], length=5)
    >>> ids.tolist(), vocabulary.decode(ids)
    ([[2.0, 3.0, 1.0, 1.0, 0.0]], ['a film <unk> <unk>'])
    """

    words: tuple[str, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        object.__setattr__(self, "counts", tuple(self.counts))
        fits = len(self.words) == len(self.counts) and all(type(c) is int and c >= 0 for c in self.counts)
        if not fits or len(set(self.words)) != len(self.words) or len(self.words) < 3:
            raise DataError(
                f"A vocabulary needs at least one word besides <pad> and <unk>, none twice, and a count >= 0 of each; got "
                f"{len(self.words)} words, {len(set(self.words))} of them different, and {len(self.counts)} counts. "
                "Vocabulary.of(texts) makes one."
            )

    @classmethod
    def of(cls, texts: Iterable[str], most: int = 5000, least: int = 1) -> Vocabulary:
        """The ``most`` - 2 most frequent words of the texts that occur at least ``least`` times; ties in alphabetical order."""
        for what, value, lowest in (("most", most, 3), ("least", least, 1)):
            if type(value) is not int or value < lowest:
                raise DataError(f"{what} of a vocabulary must be a whole number >= {lowest}; got {value!r}.")
        counted = Counter(token for text in texts for token in tokens(text))
        ranked = sorted(((-n, word) for word, n in counted.items() if n >= least))[: most - 2]
        rest = counted.total() + sum(n for n, _ in ranked)
        return cls(("<pad>", "<unk>", *(word for _, word in ranked)), (0, rest, *(-n for n, _ in ranked)))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: k for k, word in enumerate(self.words) if k > UNKNOWN}

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """Token ids as float32 [N, length]: the first ``length`` tokens of each text, then padding."""
        if type(length) is not int or length < 1 or len(texts) * length > _MAX_IDS:
            raise DataError(
                f"length must be a whole number of tokens >= 1, and texts times length at most {_MAX_IDS:,}; got "
                f"{len(texts)} texts and length {length!r}."
            )
        ids = torch.zeros(len(texts), length)
        for row, text in enumerate(texts):
            found = [self._ids.get(token, UNKNOWN) for token in tokens(text)[:length]]
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.float32)
        return ids

    def decode(self, ids: Tensor) -> list[str]:
        """The words of token ids [N, T], joined by spaces, without padding.

        Raises:
            DataError: an id that no word has.
        """
        if ids.dim() != 2 or not bool(((ids >= 0) & (ids < len(self)) & (ids == ids.round())).all()):
            raise DataError(f"decode needs whole token ids [N, T] from 0 to {len(self) - 1}; got {tuple(ids.shape)}.")
        return [" ".join(self.words[k] for k in row if k != PADDING) for row in ids.long().tolist()]


class Sentences(NamedTuple):
    """Labelled rows of token ids, and what the ids mean."""

    data: Dataset
    vocabulary: Vocabulary


def sentences(
    path: str | Path,
    *,
    label: int = 0,
    text: int = 1,
    threshold: float | None = None,
    margin: float = 0.0,
    length: int = 40,
    vocabulary: Vocabulary | int = 5000,
) -> Sentences:
    """Read a UTF-8 file with one labelled sentence per line, its columns parted by tabs.

    Args:
        path: the file; empty lines are passed over.
        label, text: which columns, counted from 0.
        threshold: labels are numbers, and a sentence is of class 1 where its number is above this one; None: labels are names, which
            become classes in alphabetical order.
        margin: with a threshold, leave out the sentences whose number is no farther than this from it.
        length: tokens kept of each sentence; shorter ones are padded with id 0.
        vocabulary: how many ids at most, counted in this file (``Vocabulary.of``), or the vocabulary to use, such as that of the
            training sentences.

    Returns:
        Token ids as float32 [N, length] with their labels, and the vocabulary.

    Raises:
        DataError: no such file, no text in UTF-8, too large, or a line without label and text; the message names the line.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "some.txt"
    >>> _ = file.write_text("1\\t2.5\\tA fine film.\\n2\\t-0.7\\tDull and long.\\n")
    >>> data, vocabulary = sentences(file, label=1, text=2, threshold=0.0, length=5)
    >>> data.y.tolist(), vocabulary.decode(data.x)
    ([1, 0], ['a fine film .', 'dull and long .'])
    """
    path = Path(path).expanduser()
    for what, column in (("label", label), ("text", text)):
        if type(column) is not int or column < 0:
            raise DataError(f"{what} is a column of {path}, counted from 0; got {column!r}.")
    if not margin >= 0 or (margin > 0 and threshold is None):
        raise DataError(f"margin must be >= 0 and needs a threshold; got margin={margin!r}, threshold={threshold!r}.")
    rows = _rows(path, label, text)
    if threshold is None:
        names = tuple(sorted({name for _, name, _ in rows}))
        if len(names) > _MAX_CLASSES:
            raise DataError(
                f"{path}: column {label} holds {len(names):,} different labels; at most {_MAX_CLASSES:,} classes are read. If they are "
                "scores, give a threshold; else name another column."
            )
        y = [names.index(name) for _, name, _ in rows]
    else:
        scores = [_score(path, number, name) for number, name, _ in rows]
        kept = [k for k, score in enumerate(scores) if abs(score - threshold) > margin or margin == 0]
        if not kept:
            raise DataError(f"{path}: no score is farther than {margin:g} from {threshold:g}. Lower the margin.")
        rows, y = [rows[k] for k in kept], [int(scores[k] > threshold) for k in kept]
        names = (f"at most {threshold:g}", f"above {threshold:g}")
    texts = [words for _, _, words in rows]
    known = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.of(texts, vocabulary)
    return Sentences(Dataset(known.encode(texts, length), torch.tensor(y), names, str(path)), known)


def _rows(path: Path, label: int, text: int) -> list[tuple[int, str, str]]:
    """(line, label, text) of every line that is not empty."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; name a text file with a label and a sentence per line.")
    if path.stat().st_size > _MAX_FILE:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes, more than the {_MAX_FILE:,} that are read. Split it.")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no text in UTF-8 ({error.reason} at byte {error.start}). Convert it first.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}). Check the path and its permissions.") from error
    found = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t") if len(line) <= _MAX_LINE else []
        if max(label, text) >= len(columns) or not columns[label].strip() or not tokens(columns[text]):
            raise DataError(
                f"{path}: line {number} has {len(columns)} columns; column {label} must hold a label and column {text} a sentence, "
                f"parted by tabs, in at most {_MAX_LINE:,} characters. Say where they stand with label= and text=."
            )
        found.append((number, columns[label].strip(), columns[text]))
    if not found:
        raise DataError(f"{path}: holds no sentence.")
    return found


def _score(path: Path, number: int, said: str) -> float:
    try:
        score = float(said)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(
            f"{path}: the label in line {number} is {said[:40]!r}, no finite number. Leave threshold out for names."
        )
    return score
