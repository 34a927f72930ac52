"""Models behind a prediction server: inputs go out in HTTP requests, numbers come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from mohs.errors import ModelError, rows_text
from mohs.models._protocols import Infer, UnfitError, protocol_of
from mohs.models._transport import Transport, check_url
from mohs.models.blackbox import BlackBox, _from_labels, _from_probabilities

Answers = Literal["probabilities", "logits", "labels"]
ANSWERS: tuple[Answers, ...] = ("probabilities", "logits", "labels")
"""What a server may answer."""
_MOST_ROWS, _REQUEST_BYTES, _NUMBER_BYTES = 64, 768 << 10, 24
"""At most so many inputs, and about so many bytes, in one request: front ends often refuse more than a megabyte."""


class Served(BlackBox):
    """A black box behind the URL of a prediction server; it answers, and no gradient flows through it.

    Two protocols are spoken, and the path of the URL says which:

    - ``.../models/NAME:predict`` (also ``/versions/V``, ``/labels/L``): TensorFlow Serving and KServe V1.
    - ``.../v2/models/NAME/infer`` (also ``/versions/V``): the Open Inference Protocol, KServe V2, spoken by Triton,
      MLServer, TorchServe and OpenVINO. Name, type and shape of the input come from the server, if it tells them.

    For any other service wrap a function in ``BlackBox``. The server must be one you may attack: an evaluation asks
    it many thousands of times, and never for a copy that only fills a batch.

    The weights behind a URL are unknown and may change; the record says so. Its answers may depend in the last digit on
    how the server groups inputs, so two runs need not agree bit for bit. A row that holds nan or inf counts as an error
    of the model. Redirects are not followed, certificates are verified, proxies named by the environment are not used,
    and an answer is read up to 64 MiB. To use the settings below on the command line, return the model from a function
    of yours: ``package.module:factory``.

    Args:
        url: of the predictions, http or https. It is recorded, so it may hold no user, password or query.
        answers: what the server sends: ``"probabilities"`` (or that of class 1 alone), ``"logits"`` or ``"labels"``.
        classes: how many there are; needed for labels, and only there.
        headers: sent with each request, such as ``{"Authorization": "Bearer ..."}``. No record and no message shows them.
        input: name of the input. None: as the server says; without metadata "input-0" in V2, and none in V1.
        output: name of the output that counts, where there are several.
        rows: inputs per request at most. None: as many as make about 0.75 MB, at most 64.
        timeout: seconds to wait for an answer, and for the connection at most ten of them.
        retries: further tries where there is no connection, or the server answers 429, 502, 503 or 504. Pauses double
            from half a second, or are as long as the server asks for, up to a minute. They are no further queries.

    Raises:
        ModelError: at once, for a URL or argument that cannot be used, or where urllib3 is missing
            (``pip install "mohs[http]"``); in the forward pass, for anything but one row of numbers per input.

    >>> Served("http://localhost:8501/v1/models/net:predict")
    Served('http://localhost:8501/v1/models/net:predict', answers='probabilities')
    """

    def __init__(
        self,
        url: str,
        *,
        answers: Answers = "probabilities",
        classes: int | None = None,
        headers: Mapping[str, str] | None = None,
        input: str | None = None,
        output: str | None = None,
        rows: int | None = None,
        timeout: float = 60.0,
        retries: int = 4,
    ) -> None:
        self._protocol = protocol_of(check_url(url), input, output)
        _check_answers(answers, classes)
        if rows is not None and (type(rows) is not int or rows < 1):
            raise ModelError(f"rows must be a whole number >= 1 (inputs per request); got {rows!r}.")
        self.url, self.answers, self.classes, self.rows = url, answers, classes, rows
        self._transport = Transport(headers, timeout, retries)
        self._learned, self._width = self._protocol.inquiry is None, 0
        given = {"answers": answers, "classes": classes, "input": input, "output": output}
        self._shown = ", ".join([repr(url), *(f"{k}={v!r}" for k, v in given.items() if v is not None)])
        super().__init__(self._logits, name=self._shown)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._shown})"

    def _logits(self, x: np.ndarray) -> np.ndarray:
        """Logits [N, K] or [N] of inputs [N, ...]; each input of the copies at the end is asked for once."""
        if not len(x):
            return np.zeros((0, max(self._width, 1)), dtype=np.float32)
        if not np.isfinite(x).all():
            raise ModelError(f"{self.url}: inputs must be finite, as JSON knows no other numbers.")
        self._learn()
        distinct = _without_padding(x)
        rows = self._protocol.batch or self.rows or _usual_rows(x)
        found = np.concatenate([self._ask(x[at : min(at + rows, distinct)]) for at in range(0, distinct, rows)])
        return found[np.arange(len(x)).clip(max=distinct - 1)]

    def _learn(self) -> None:
        """Ask the server once what its input is called; many do not know."""
        protocol = self._protocol
        if self._learned or not isinstance(protocol, Infer) or protocol.inquiry is None:
            return
        answer = self._transport.ask("GET", protocol.inquiry, without=(400, 404, 405, 501))
        if answer is not None:
            self._believe(
                answer, "its input", '{"inputs": [{"name", "datatype", "shape"}]}', lambda: protocol.learn(answer)
            )
        self._learned = True

    def _ask(self, x: np.ndarray) -> np.ndarray:
        """One request: logits [n, K] or [n] of inputs [n, ...]."""
        n, fixed = len(x), self._protocol.batch
        sent = x if fixed is None else x[np.arange(fixed).clip(max=n - 1)]
        answer = self._transport.ask("POST", self.url, self._protocol.body(sent)) or b""
        logits: np.ndarray = self._believe(
            answer,
            f"{len(sent)} input{'s' * (len(sent) != 1)}",
            self._protocol.allowed,
            lambda: self._read(answer, len(sent)),
        )
        return logits[:n]

    def _read(self, answer: bytes, n: int) -> np.ndarray:
        found = self._protocol.scores(answer, n)
        if found.ndim == 2 and found.shape[1] == 1:
            found = found[:, 0]
        width = found.shape[1] if found.ndim == 2 else 1
        if self._width not in (0, width):
            raise UnfitError(
                f"rows of {width} numbers came, and {self._width} before", "Was the served model replaced?"
            )
        self._width = width
        if self.answers == "labels":
            assert self.classes is not None
            return _from_labels(_labels(found, self.classes), n, self.classes)
        finite = np.isfinite(found).reshape(n, -1).all(1)
        if self.answers == "probabilities":
            _check_probabilities(found, finite)
            found = _from_probabilities(found)
        found[~finite] = np.nan  # that row's error, as with any model
        return found

    def _believe(self, answer: bytes, what: str, allowed: str, read: Callable[[], Any]) -> Any:
        """What is read from an answer; if it is none, an error that says what was asked, what came, and what is allowed."""
        shown = self._transport.shown
        try:
            return read()
        except UnfitError as error:
            came = f"; the answer begins '{shown(answer, 120)}'" if answer.strip() else ""
            raise ModelError(
                f"{self.url} was asked about {what}; {shown(error.saw, 300)}{came}. Allowed is {allowed}. "
                f"{error.remedy or 'Check that this is the model meant, and that it answers with its scores.'}"
            ) from None


def _check_answers(answers: str, classes: int | None) -> None:
    if answers not in ANSWERS:
        raise ModelError(f"answers says what the server sends; got {answers!r}, allowed are {', '.join(ANSWERS)}.")
    if answers == "labels" and (type(classes) is not int or classes < 2):
        raise ModelError(
            f"A server that answers labels does not say how many there are: give classes >= 2; got {classes!r}."
        )
    if answers != "labels" and classes is not None:
        raise ModelError(
            f"classes={classes!r} is needed for labels only; {answers} show how many there are. Leave it out."
        )


def _without_padding(x: np.ndarray) -> int:
    """How many rows are left when copies of the last one at the end count once; equal bits, not equal numbers."""
    bits = np.ascontiguousarray(x).reshape(len(x), -1).view(np.int32)
    other = np.flatnonzero((bits != bits[-1]).any(1))
    return int(other[-1]) + 2 if len(other) else 1


def _usual_rows(x: np.ndarray) -> int:
    return max(1, min(_MOST_ROWS, _REQUEST_BYTES // (_NUMBER_BYTES * max(x[0].size, 1))))


def _labels(found: np.ndarray, classes: int) -> np.ndarray:
    """Labels as integers [n]; UnfitError where these are none."""
    if found.ndim == 2:
        raise UnfitError(
            f"rows of {found.shape[1]} numbers came where labels were said to come",
            'Say what it answers: "probabilities" or "logits" (answers=..., or --answers on the command line).',
        )
    bad = np.flatnonzero(~((found >= 0) & (found < classes) & (found == np.floor(found))))
    if len(bad):
        raise UnfitError(
            f"there is no label in {rows_text(bad.tolist())} of the answer ({found[bad[0]]:g})",
            f"Labels are whole numbers from 0 to {classes - 1}. Is the number of classes right?",
        )
    return found.astype(np.int64)


def _check_probabilities(found: np.ndarray, finite: np.ndarray) -> None:
    """Between 0 and 1 and, by row, summing to one, as far as two decimals tell."""
    rows = found.reshape(len(found), -1)
    with np.errstate(invalid="ignore"):
        bad = ((rows < -1e-6) | (rows > 1 + 1e-6)).any(1)
        if found.ndim == 2:
            bad |= np.abs(rows.sum(1) - 1) > 0.01 + 0.005 * rows.shape[1]
    where = np.flatnonzero(bad & finite)
    if len(where):
        row = rows[where[0]]
        raise UnfitError(
            f"there are no probabilities in {rows_text(where.tolist())} of the answer (from {row.min():.4g} to "
            f"{row.max():.4g}, sum {row.sum():.4g})",
            "Probabilities lie between 0 and 1 and sum to one. If it answers logits or labels, say so: answers=..., or "
            "--answers on the command line.",
        )
