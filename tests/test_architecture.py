"""The shape of the package: who may import whom, what an import loads, how long files are, and what they never name."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mohs"

NOUNS = {
    "threat", "regions", "problem", "objectives", "streams", "target", "look", "guide", "_rows", "_geometry", "_patch", "_words",
    "errors",
}  # fmt: skip
BASE = NOUNS | {"gradients", "models", "data"}
"""What attacks, certificates and defenses stand on."""
MAY_IMPORT = {
    **dict.fromkeys(NOUNS, NOUNS),
    "gradients": NOUNS,
    "models": NOUNS,
    "data": NOUNS,
    "attacks": BASE,
    "certificates": BASE,
    "defenses": BASE,
    "records": {"errors"},
    "reports": {"records", "errors"},
    "evaluation": BASE | {"attacks", "certificates", "defenses", "records"},
    "cli": BASE | {"attacks", "certificates", "defenses", "records", "reports", "evaluation"},
    "__main__": {"cli"},
    # the face of the package names everything, but loads it only when asked
    "__init__": set(),
}
"""For each part of the package the other parts it may import; whatever is not here is a part without a place."""
HEAVY = ("pydantic", "scipy", "rich", "jinja2", "cyclopts", "PIL", "sqlite3")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if typing_only(node):
            assert isinstance(node, ast.If)
            for other in node.orelse:
                yield other
                yield from executed(other)
        else:
            yield node
            yield from executed(node)


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, at its head or inside functions, and of ``mohs.part`` in code."""
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            elif node.module == "mohs":
                yield from ((node.lineno, f"mohs.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mohs":
            yield node.lineno, f"mohs.{node.attr}"


# names that ``mohs`` itself offers for parts below it
FACE = {
    "attack": "attacks",
    "Stop": "attacks",
    "evaluate": "evaluation",
    "check": "evaluation",
    "certify": "certificates",
}


def trespasses(part: str, source: str) -> list[str]:
    """What a file of a part imports although it may not."""
    found = []
    for line, name in imports(source):
        if name.startswith("."):
            found.append(f"line {line}: relative import {name}")
        top, _, rest = name.partition(".")
        other = FACE.get(rest.split(".")[0], rest.split(".")[0])
        if top == "torch" and part in ("records", "reports", "errors"):
            found.append(f"line {line}: {part} imports torch")
        if top == "mohs" and other in MAY_IMPORT and other != part and other not in MAY_IMPORT[part]:
            found.append(f"line {line}: {part} imports {other}")
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    assert part_of(path) in MAY_IMPORT, "a new part of the package: say above what it may import"
    assert trespasses(part_of(path), path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("part", "source", "said"),
    [
        ("attacks", "from mohs.certificates import IBP", "attacks imports certificates"),
        ("attacks", "def f():\n    import mohs.evaluation.engine", "attacks imports evaluation"),
        ("defenses", "from mohs import attacks", "defenses imports attacks"),
        ("defenses", "import mohs\ndef f(x):\n    return mohs.attack(x)", "defenses imports attacks"),
        ("certificates", "from mohs.records import Record", "certificates imports records"),
        ("records", "import torch.nn", "records imports torch"),
        ("records", "from mohs.threat import Threat", "records imports threat"),
        ("reports", "from mohs.evaluation import claims", "reports imports evaluation"),
        ("threat", "from mohs.models import load", "threat imports models"),
        ("evaluation", "from mohs.reports import render", "evaluation imports reports"),
        ("models", "from mohs.data import load", "models imports data"),
        ("cli", "from ..errors import MohsError", "relative import ..errors"),
    ],
)
def test_trespasses_are_seen(part: str, source: str, said: str) -> None:
    assert any(said in line for line in trespasses(part, source))


def test_types_alone_are_no_imports() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mohs.attacks import Attack\nelse:\n    import torch"
    assert trespasses("defenses", source) == []
    assert trespasses("records", source) == ["line 5: records imports torch"]


def loaded(code: str) -> set[str]:
    """Modules at the top that a fresh process holds after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"],
        capture_output=True, text=True, check=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    return set(done.stdout.split())


def test_import_and_attack_load_nothing_heavy() -> None:
    bare = loaded("import torch")
    attacking = loaded("import mohs\nmohs.attack, mohs.attacks.PGD(), mohs.Threat.parse('linf:8/255'), mohs.Linf(0.1)")
    assert "torch" in attacking
    assert not (attacking - bare) & set(HEAVY)


def test_records_are_read_and_shown_without_torch() -> None:
    bare = loaded("import mohs")
    assert "torch" not in bare
    assert not bare & set(HEAVY)
    reading = loaded("import mohs.records, mohs.reports\nmohs.records.Record.load, mohs.reports.render")
    assert "mohs" in reading
    assert "torch" not in reading


def tracked() -> list[Path]:
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [p for p in paths if p.is_file()]


def test_files_are_short() -> None:
    for path in tracked():
        if path.suffix == ".py":
            lines = len(path.read_text("utf-8").splitlines())
            assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines, allowed are 450: split it"


def test_names_of_test_files_are_unique() -> None:
    # pytest imports test files by their bare names, so two of one name in different folders collide
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# in pieces, so that this file does not hold them itself
FORBIDDEN = [
    "".join(pieces)
    for pieces in (
        ("/wo", "rk/"), ("/tmp", "/w/"), ("/ro", "ot/"), ("/home", "/"), ("/Us", "ers/"), ("py", "pi.org"),
        ("python", "hosted"), ("registry.", "npm"), ("--index", "-url"), ("--extra-", "index"), ("work", "place"),
        ("AI as", "sistant"),
    )
]  # fmt: skip


def names_forbidden(text: str) -> list[str]:
    # a path counts where it begins, not inside a longer one such as ./benchmarks/wo.../
    begin = r"(?<![\w.~-])"
    return [w for w in FORBIDDEN if re.search((begin if w[0] == "/" else "") + re.escape(w), text, re.IGNORECASE)]


def test_no_file_names_the_place_it_was_written_at() -> None:
    for path in tracked():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            text = path.read_bytes().decode("latin-1")
            # in bytes that are no text a short word proves nothing
            assert not [w for w in names_forbidden(text) if len(w) > 8], path.relative_to(ROOT)
            continue
        assert names_forbidden(text) == [], f"{path.relative_to(ROOT)} holds {names_forbidden(text)}"


def test_forbidden_words_are_seen() -> None:
    assert names_forbidden("see " + "/wo" + "rk/main") == ["/wo" + "rk/"]
    assert names_forbidden("benchmarks/wo" + "rk/main") == []
    assert names_forbidden("https://files.python" + "hosted.org/x") == ["python" + "hosted"]
