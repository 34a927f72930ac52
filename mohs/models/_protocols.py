"""The two protocols of prediction servers: what is sent for some inputs, and the numbers in what comes back.

Whatever comes back is somebody else's: nothing in it is believed before it has been looked at.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np

from mohs.errors import ModelError, rows_text

FORMS = (
    ".../models/NAME:predict (TensorFlow Serving, KServe V1)",
    ".../v2/models/NAME/infer (Open Inference Protocol, KServe V2: Triton, MLServer, TorchServe, OpenVINO)",
)
"""The URLs that are understood."""
_PREDICT = re.compile(r"/models/[^/]+?(/(versions|labels)/[^/]+?)?:predict$")
_INFER = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/infer$")
_FLOATS = {"FP32": np.float32, "FP64": np.float64}
_NUMBERS = ("FP16", "BF16", "FP32", "FP64", *(f"{u}INT{b}" for u in ("", "U") for b in (8, 16, 32, 64)))
_LEVELS = 8
_MOST_BATCH, _MOST_SIDE = 1024, 1 << 31
"""No server is believed that it takes larger batches only, or inputs longer along one dimension."""


class UnfitError(Exception):
    """An answer that is none: what was seen, and what to do."""

    def __init__(self, saw: str, remedy: str = "") -> None:
        super().__init__(saw)
        self.saw, self.remedy = saw, remedy


class Predict:
    """``POST {"instances": [...]}``, answered by ``{"predictions": [...]}``: one entry per input."""

    allowed = '{"predictions": [...]} with one number, or one list of numbers, per input'
    inquiry: str | None = None
    batch: int | None = None

    def __init__(self, url: str, input: str | None, output: str | None) -> None:
        self.input, self.output = input, output

    def body(self, x: np.ndarray) -> bytes:
        """The request for inputs [n, ...]."""
        rows = x.astype(np.float64).tolist()
        return _dump({"instances": rows if self.input is None else [{self.input: row} for row in rows]})

    def scores(self, answer: bytes, n: int) -> np.ndarray:
        """The numbers of an answer, float64 [n] or [n, K]."""
        rows = _entry(parse(answer), "predictions", list)
        if len(rows) != n:
            raise UnfitError(f"{len(rows)} predictions came for {n} inputs")
        if rows and all(isinstance(row, dict) for row in rows):
            rows = self._named(rows)
        if not any(isinstance(row, list) for row in rows):
            return _array(rows, (n,))
        width = len(rows[0]) if isinstance(rows[0], list) else 0
        ragged = [i for i, row in enumerate(rows) if not isinstance(row, list) or len(row) != width]
        if ragged or not width:
            raise UnfitError(f"the predictions differ in length or are empty ({rows_text(ragged or [0])})")
        return _array([value for row in rows for value in row], (n, width))

    def _named(self, rows: list[Any]) -> list[Any]:
        names = sorted(map(str, rows[0]))
        name = _chosen(names, self.output)
        if any(name not in row for row in rows):
            raise UnfitError(f"not every prediction has an output {name!r}")
        return [row[name] for row in rows]


class Infer:
    """``POST {"inputs": [tensor]}``, answered by ``{"outputs": [tensor, ...]}``; ``GET`` of the model tells the input."""

    allowed = '{"outputs": [{"name", "shape", "datatype", "data"}]} with one number, or one row of numbers, per input'

    def __init__(self, url: str, input: str | None, output: str | None) -> None:
        self.inquiry: str | None = url.removesuffix("/infer")
        self.input, self.output = input or "input-0", output
        self.batch: int | None = None
        self._wanted, self._datatype = input, "FP32"
        self._shape: list[int] = []

    def learn(self, answer: bytes) -> None:
        """Name, type and shape of the input, from the model's metadata."""
        told = parse(answer)
        if isinstance(told, dict) and told.get("inputs") is None:
            return  # some servers know nothing of their models
        inputs = [t for t in _entry(told, "inputs", list) if isinstance(t, dict) and isinstance(t.get("name"), str)]
        names = [t["name"] for t in inputs]
        if not names:
            return
        name = self._wanted if self._wanted is not None else names[0]
        if name not in names or (self._wanted is None and len(names) > 1):
            raise UnfitError(
                f"the model takes {len(names)} inputs ({_some(names)})"
                + (f" and none is {name!r}" if self._wanted else ""),
                "Exactly one can be attacked; wrap the model in a function of one input and mohs.models.BlackBox.",
            )
        tensor = inputs[names.index(name)]
        datatype, shape = tensor.get("datatype", "FP32"), tensor.get("shape", [])
        if not isinstance(datatype, str) or datatype not in _FLOATS:
            raise UnfitError(
                f"the model takes {datatype if isinstance(datatype, str) else 'inputs of an unknown type'}",
                "Inputs are FP32 or FP64 here; put the conversion into the served model, or into a function around it "
                "(mohs.models.BlackBox).",
            )
        if isinstance(shape, list) and 2 <= len(shape) <= _LEVELS and all(type(d) is int for d in shape):
            self._shape, self.batch = shape, _batch(shape)
        self.input, self._datatype = name, datatype

    def body(self, x: np.ndarray) -> bytes:
        """The request for inputs [n, ...]."""
        shape = [len(x), *self._fitted(list(x.shape[1:]))]
        data = x.astype(_FLOATS[self._datatype]).astype(np.float64).ravel().tolist()
        tensor = {"name": self.input, "shape": shape, "datatype": self._datatype, "data": data}
        wanted = {} if self.output is None else {"outputs": [{"name": self.output}]}
        return _dump({"inputs": [tensor], **wanted})

    def _fitted(self, row: list[int]) -> list[int]:
        """The shape of one input as the model declares it, if it holds as many numbers."""
        declared = self._shape[1:]
        fits = len(declared) == len(row) and all(d in (-1, r) for d, r in zip(declared, row))
        if fits or not declared:
            return row
        size = math.prod(row)
        known, free = math.prod(d for d in declared if d >= 0), sum(d < 0 for d in declared)
        if (free == 0 and known == size) or (free == 1 and known and size % known == 0):
            return [size // known if d < 0 else d for d in declared]
        raise ModelError(
            f"the served model takes inputs of shape {declared}, got {row}. Do model and data belong together?"
        )

    def scores(self, answer: bytes, n: int) -> np.ndarray:
        """The numbers of an answer, float64 [n] or [n, K]."""
        outputs = _entry(parse(answer), "outputs", list)
        if not outputs or not all(isinstance(t, dict) for t in outputs):
            raise UnfitError('"outputs" holds no tensors')
        names = [str(t.get("name")) for t in outputs]
        tensor = outputs[names.index(_chosen(names, self.output))]
        datatype, shape, data = tensor.get("datatype"), tensor.get("shape"), tensor.get("data")
        if datatype not in _NUMBERS:
            said = f"of type '{datatype}', which holds" if isinstance(datatype, str) else "of no type, and holds"
            raise UnfitError(f"the output is {said} no numbers")
        if not isinstance(data, list):
            raise UnfitError('the output has no "data" in JSON')
        if not isinstance(shape, list) or not shape or len(shape) > _LEVELS or any(type(d) is not int for d in shape):
            raise UnfitError("the output has no shape")
        while len(shape) > 2 and shape[-1] == 1:  # [n, K, 1, 1], as a convolution leaves it
            shape = shape[:-1]
        if shape[0] != n or len(shape) > 2 or shape[-1] < 1:
            raise UnfitError(f"the output has shape {shape} for {n} inputs")
        for _ in range(_LEVELS):  # the rows may be nested or not
            if not data or not isinstance(data[0], list):
                break
            if not all(isinstance(part, list) for part in data):
                raise UnfitError("the data are nested unevenly")
            data = [value for part in data for value in part]
        if len(data) != math.prod(shape):
            raise UnfitError(f"{len(data)} numbers came for shape {shape}")
        return _array(data, tuple(shape))


Protocol = Predict | Infer


def protocol_of(url: str, input: str | None, output: str | None) -> Protocol:
    """The protocol that the path of a URL speaks; ModelError for any other path."""
    if _INFER.search(url):
        return Infer(url, input, output)
    if _PREDICT.search(url):
        return Predict(url, input, output)
    raise ModelError(
        f"{url} ends in none of the forms that prediction servers have: {'; '.join(FORMS)}. For any other service write a "
        "function from array to array and wrap it in mohs.models.BlackBox."
    )


def parse(answer: bytes) -> Any:
    """JSON from strangers; UnfitError where it is none."""
    if not answer.strip():
        raise UnfitError("the answer was empty")
    if answer.lstrip()[:1] == b"<":
        raise UnfitError("a web page came, no JSON", "Is this the address of the model, or of something before it?")
    try:
        return json.loads(answer.decode("utf-8"))
    except RecursionError:
        raise UnfitError("the JSON is nested too deeply") from None
    except ValueError as error:  # also of numbers with thousands of digits
        raise UnfitError(f"no JSON came ({error})") from None


def _entry(found: Any, name: str, kind: type) -> Any:
    if isinstance(found, dict) and name not in found and isinstance(found.get("error"), str):
        raise UnfitError(f"the server reports an error: {found['error']}")
    if not isinstance(found, dict) or not isinstance(found.get(name), kind):
        raise UnfitError(f'there is no list "{name}" in the answer')
    return found[name]


def _batch(shape: list[int]) -> int | None:
    """The batch that a model insists on, None for any; UnfitError where it cannot be meant."""
    if any(abs(d) > _MOST_SIDE for d in shape[1:]):
        raise UnfitError(f"the model takes inputs of shape {shape[1:]}", "No data set holds such inputs.")
    if shape[0] == -1:
        return None
    if not 1 <= shape[0] <= _MOST_BATCH:
        raise UnfitError(
            f"the model takes {shape[0]} inputs at once",
            f"A fixed batch holds 1 to {_MOST_BATCH} inputs, and -1 stands for any: export the model with such a shape.",
        )
    return shape[0]


def _chosen(names: list[str], wanted: str | None) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None or wanted not in names:
        missed = "it is not said which counts" if wanted is None else f"none is {wanted!r}"
        raise UnfitError(
            f"the model has {len(names)} outputs ({_some(names)}), and {missed}",
            'Name one: mohs.models.Served(url, output="..."), on the command line made by a function of yours, as '
            "package.module:factory.",
        )
    return wanted


def _array(values: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Numbers and nothing else; null is what some servers write for nan."""
    strangers = {type(v) for v in values} - {int, float, type(None)}
    if strangers:
        kinds = {str: "texts", bool: "true or false", list: "lists", dict: "objects"}
        raise UnfitError(f"there are {' and '.join(sorted(kinds[k] for k in strangers))} where numbers belong")
    try:
        return np.array([math.nan if v is None else v for v in values], dtype=np.float64).reshape(shape)
    except OverflowError:
        raise UnfitError("there are numbers beyond all floating-point ones") from None


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:6])) + (" ..." if len(names) > 6 else "")
