"""Programs saved by ``torch.export``, opened only after what torch would run on opening them has been ruled out.

``torch.export.load`` unpickles parts of the archive without restriction, evaluates shape expressions as Python and
turns names into source code. The gate below accepts the plain form that ``torch.export.save`` writes for an ordinary
net (tensors as raw bytes, aten operators, simple shape expressions) and refuses everything else before torch sees it.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mohs.errors import ModelError

MAX_BYTES = 8 << 30
_FREE_TEXT = frozenset({"metadata"})  # stack traces and module names: kept by torch as text
_PLAIN = re.compile(r"[A-Za-z0-9_.+ :-]*")
_TARGET = re.compile(r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.sym_\w+|math\.\w+|_operator\.(\w+)")
_OPERATORS = re.compile(r"add|sub|mul|floordiv|truediv|mod|pow|neg|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_")
_FUNCTIONS = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Mod|PythonMod|"
    r"FloorDiv|CleanDiv|CeilDiv|CeilToInt|FloorToInt|TruncToInt|ToFloat|IntTrueDiv|FloatTrueDiv|"
    r"PowByNatural|ModularIndexing|Where|Identity|Equality|Unequality|LessThan|StrictLessThan|"
    r"GreaterThan|StrictGreaterThan"
)
_WORD = re.compile(r"[a-z]{1,2}\d+|oo|int_oo|true|false|True|False")
_ROOM = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop, ast.Load)
_MEMBERS = re.compile(
    r"models/model\.json|archive_format|archive_version|byteorder|version|\.data/\w+|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)


class Exported(nn.Module):
    """A program whose mode was fixed when it was exported: ``train()`` and ``eval()`` have no effect on it."""

    def __init__(self, program: nn.Module, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.program = program
        self.shape = shape
        self.training = False

    def train(self, mode: bool = True) -> Exported:
        """Stay as exported; torch's own module would raise."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the program."""
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise ModelError(
                f"the exported program takes inputs [N, {', '.join(map(str, self.shape))}], got {list(x.shape)}."
            )
        return self.program(x)


def load_pt2(path: Path) -> nn.Module:
    """The program in a .pt2 file as a module; ModelError where it is unsafe, damaged or of fixed batch size."""
    check_archive(path)
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises anything here
        raise ModelError(
            f"{path}: torch {torch.__version__} cannot read this program ({_short(error)}). Export it again."
        ) from error
    shape = _input_shape(program, path)
    _check_mode(program, path)
    # without guards: they are source code from the file; the shape is checked in Exported
    module = program.module(check_guards=False)
    try:
        with torch.no_grad():
            logits = [module(torch.zeros(n, *shape)) for n in (1, 3)]
    except Exception as error:
        raise ModelError(f"{path}: the program fails on batches of 1 and 3 zeros ({_short(error)}).") from error
    if not all(isinstance(z, Tensor) and z.dim() in (1, 2) and len(z) == n for z, n in zip(logits, (1, 3))):
        raise ModelError(f"{path}: a classifier must answer one tensor [N, classes]; this program does not.")
    return Exported(module, shape)


def _input_shape(program: Any, path: Path) -> tuple[int, ...]:
    names = program.graph_signature.user_inputs
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    if len(names) != 1 or len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() < 2:
        raise ModelError(f"{path}: takes {len(names)} inputs; a classifier takes one tensor [N, ...].")
    size = values[0].shape
    if isinstance(size[0], int):
        raise ModelError(
            f"{path}: exported for batches of exactly {size[0]}, but batches of any size are needed. Export again with "
            "torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)) and len(x) >= 2."
        )
    if not all(isinstance(d, int) for d in size[1:]):
        raise ModelError(f"{path}: only the batch dimension may be free, got {list(map(str, size))}. Export again.")
    return tuple(int(d) for d in size[1:])


def _check_mode(program: Any, path: Path) -> None:
    """Refuse dropout and batch statistics that were frozen in training mode: they cannot be switched off any more."""
    places = {"aten.dropout.default": 2, "aten.batch_norm.default": 5, "aten.feature_dropout.default": 2}
    for node in program.graph.nodes:
        place = places.get(str(node.target))
        if place is not None and len(node.args) > place and node.args[place] is True:
            raise ModelError(
                f"{path}: {node.target} was exported in training mode. Call model.eval() before torch.export.export."
            )


def check_archive(path: Path) -> None:
    """Refuse an archive in which anything could run while it is opened."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = [info.filename.partition("/")[2] for info in infos]
            roots = {info.filename.partition("/")[0] for info in infos}
            if len(roots) != 1 or len(set(names)) != len(names):
                raise ModelError(f"{path}: not laid out like a file of torch.export.save; refused.")
            odd = [name for name in names if not _MEMBERS.fullmatch(name)]
            if odd:
                raise ModelError(f"{path}: holds {odd[0]!r}, which a plain exported program does not need; refused.")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise ModelError(f"{path}: is compressed, which torch.export.save never does; refused.")
            if sum(info.file_size for info in infos) > MAX_BYTES:
                raise ModelError(f"{path}: unpacks to more than {MAX_BYTES:,} bytes; refused.")
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{path}: not a .pt2 archive ({error}). Make one with torch.export.save.") from error
    try:
        # torch's own reader, so that the gate and the loader cannot see different contents
        reader = torch._C.PyTorchFileReader(str(path))
        if set(reader.get_all_records()) != set(names):
            raise ModelError(f"{path}: its table of contents is ambiguous; refused.")
        for kind in ("weights", "constants"):
            _check_payload(json.loads(reader.get_record(f"data/{kind}/model_{kind}_config.json")), path)
        program = json.loads(reader.get_record("models/model.json"))
        samples = reader.get_record("data/sample_inputs/model.pt")
    except (RuntimeError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: not a readable .pt2 archive ({_short(error)}). Export it again.") from error
    try:
        torch.load(io.BytesIO(samples), weights_only=True)
    except Exception as error:
        raise ModelError(f"{path}: its sample inputs are not plain tensors ({_short(error)}); refused.") from error
    if not isinstance(program, dict):
        raise ModelError(f"{path}: its program is damaged. Export it again.")
    program.pop("guards_code", None)  # run only by module(check_guards=True), which is never called here
    _check_text(program, "", path)


def _check_payload(config: Any, path: Path) -> None:
    entries = config.get("config") if isinstance(config, dict) else None
    for name, entry in (entries or {}).items():
        place = entry.get("path_name", "") if isinstance(entry, dict) else ""
        if not isinstance(place, str) or not re.fullmatch(r"(weight|tensor)_\d+", place) or entry.get("use_pickle"):
            raise ModelError(f"{path}: stores {name!r} as a pickle or object, not as plain numbers; refused.")
        if not _PLAIN.fullmatch(name):
            raise ModelError(f"{path}: tensor name {name[:80]!r} is not a plain name; refused.")


def _check_text(value: Any, key: str, path: Path) -> None:
    """Every text in the program is a plain word, an operator that is known, or an expression that is harmless."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not _PLAIN.fullmatch(name):
                raise ModelError(f"{path}: name {name[:80]!r} in the program is not a plain name; refused.")
            if name not in _FREE_TEXT:
                _check_text(inner, name, path)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner, key, path)
    elif isinstance(value, str):
        if key == "expr_str":
            good = _is_harmless(value)
        elif key == "target":
            match = _TARGET.fullmatch(value)
            good = bool(match and (match[1] is None or _OPERATORS.fullmatch(match[1]))) or _is_plain_name(value)
        elif key in ("in_spec", "out_spec"):
            good = _is_plain_tree(value)
        else:
            good = bool(_PLAIN.fullmatch(value))
        if not good:
            raise ModelError(f"{path}: {key} {value[:80]!r} is not what an ordinary classifier needs; refused.")


def _is_plain_name(value: str) -> bool:
    return bool(re.fullmatch(r"(?!torch|math|_operator)[\w.]*", value))  # a weight or value, no function


def _is_harmless(expression: str) -> bool:
    """Whether a shape expression is built from numbers, symbols and known functions only."""
    try:
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in nodes:
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not _FUNCTIONS.fullmatch(node.func.id):
                return False
        elif isinstance(node, ast.Name):
            if not _FUNCTIONS.fullmatch(node.id) and not _WORD.fullmatch(node.id):
                return False
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and not _WORD.fullmatch(node.value):
                return False
        elif isinstance(node, ast.keyword):
            if node.arg not in ("positive", "integer", "nonnegative", "real"):
                return False
        elif not isinstance(node, _ROOM):
            return False
    return True


def _is_plain_tree(text: str) -> bool:
    """Whether a structure description uses tuples, lists and dictionaries only (others import modules by name)."""

    def plain(tree: Any) -> bool:
        if not isinstance(tree, dict) or tree.get("type") not in (
            None,
            "builtins.tuple",
            "builtins.list",
            "builtins.dict",
        ):
            return False
        context = json.loads(tree.get("context") or "null")
        words = context is None or (isinstance(context, list) and all(re.fullmatch(r"\w+", str(w)) for w in context))
        return words and all(plain(child) for child in tree.get("children_spec", ()))

    if not text:
        return True
    try:
        spec = json.loads(text)
        return isinstance(spec, list) and len(spec) == 2 and plain(spec[1])
    except (ValueError, TypeError, RecursionError):
        return False


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
