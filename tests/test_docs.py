"""The documentation tells the truth: its code runs and prints what it says, its links lead somewhere, its lists are whole."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mohs
from mohs import errors
from mohs.cli import run, screen

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATED = ("attacks", "certificates", "training")
ALL = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
WRITTEN = [p for p in ALL if p.parent.name not in GENERATED and p.name not in ("cli.md", "README.zh.md")]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WIDTH = 100  # columns of the terminal that the pages show
NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- code blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", [p for p in WRITTEN if any(k in ("python", "console") for k, _ in blocks(p))], ids=name_of
)
def test_code_on_the_page_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(screen.out, "width", WIDTH)
    namespace: dict[str, object] = {"__name__": "page"}
    printed = ""
    for kind, content in blocks(page):
        if kind == "python":
            exec(compile(content, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif kind == "text" and printed:
            compare(content, printed, name_of(page))
            printed = ""
        elif kind == "console":
            console(content, capsys, name_of(page))
    assert torch.get_default_dtype() == torch.float32


def console(content: str, capsys: pytest.CaptureFixture[str], where: str) -> None:
    """Run the `$ mohs ...` lines; a nonzero exit code must be shown by `$ echo $?` right after."""
    code = 0
    for command, expected in commands(content):
        if command == "echo $?":
            assert code == int(expected), f"{where}: exit code {code}, the page says {expected.strip()}"
            code = 0
            continue
        assert code == 0, f"{where}: the command before `{command}` ended with {code}, which the page does not show"
        program, *arguments = shlex.split(command)
        assert program == "mohs", f"{where}: only mohs commands can be run here, not {command!r}"
        capsys.readouterr()
        code = run(arguments)
        seen = capsys.readouterr()
        compare(expected, seen.out + seen.err, f"{where}: {command}")
    assert code == 0, f"{where}: the last command ended with {code}, which the page does not show"


def commands(content: str) -> Iterator[tuple[str, str]]:
    """(command, what is shown below it); a backslash at the end of a line continues a command."""
    for part in re.split(r"^\$ ", content.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command.strip(), shown


def compare(shown: str, seen: str, where: str) -> None:
    """What a page shows must occur in what was seen, in order; `...` stands for anything left out.

    Line breaks, spaces and frames do not count. Numbers may differ by a tenth or by two, as rounding on another machine
    decides a few examples differently.
    """
    have = words(seen)
    at = 0
    for part in re.split(r"(?:^|\s)\.\.\.(?:\s|$)", shown):
        want = words(part)
        starts = range(at, len(have) - len(want) + 1)
        found = next((i for i in starts if all(map(alike, want, have[i : i + len(want)]))), None)
        assert found is not None, f"{where} shows\n\n{part}\nbut this was printed:\n\n{seen}"
        at = found + len(want)


def words(text: str) -> list[str]:
    return re.sub(r"[│╭╮╰╯─]", " ", text).split()


def alike(a: str, b: str) -> bool:
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    pairs = zip(NUMBER.findall(a), NUMBER.findall(b))
    return all(close(float(p.replace(",", "")), float(q.replace(",", ""))) for p, q in pairs)


def close(a: float, b: float) -> bool:
    small = max(a, b) < 1
    return abs(a - b) <= max(0.02 if small else 2, 0.1 * max(a, b))


def test_the_comparison_can_fail() -> None:
    compare("broke 12 ... Next: open x", "given 30 broke 13\nmore\nNext: open x", "here")
    for shown, seen in (("broke 12", "broke 40"), ("broke 12", "spared 12"), ("b ... a", "a b"), ("0.10", "0.15")):
        with pytest.raises(AssertionError):
            compare(shown, seen, "here")


def test_both_readmes_show_the_same_code() -> None:
    english, chinese = ([b for b in blocks(ROOT / n) if b[0] != "text"] for n in ("README.md", "README.zh.md"))
    strip = re.compile(r"\s*#.*$", re.MULTILINE)
    assert [(k, strip.sub("", c)) for k, c in english] == [(k, strip.sub("", c)) for k, c in chinese]


def modules() -> list[str]:
    names = (m.name for m in pkgutil.walk_packages(mohs.__path__, "mohs."))
    return ["mohs", *(n for n in names if not n.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0


# ---- generated pages --------------------------------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current() -> None:
    stale = set(generator().stale())
    pinned = re.search(r"^cyclopts==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned and importlib.metadata.version("cyclopts") != pinned[1]:
        stale -= {"cli.md"}  # another version may word its help otherwise
    assert not stale, "run `make docs`"


def test_a_changed_or_left_over_page_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = generator()
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert generate.main(check=True) == 1
    generate.main(check=False)
    assert generate.stale() == []
    (tmp_path / "attacks" / "pgd.md").write_text("nothing", encoding="utf-8")
    (tmp_path / "attacks" / "gone.md").write_text("nothing", encoding="utf-8")
    assert generate.stale() == ["attacks/gone.md", "attacks/pgd.md"]


@pytest.mark.parametrize("name", sorted(mohs.attacks.REGISTRY))
def test_an_attack_says_what_its_page_must(name: str) -> None:
    page = (DOCS / "attacks" / f"{name.lower()}.md").read_text(encoding="utf-8")
    for part in ("**Differs from the paper**", "**Source**", "**Cost", "## Arguments", "## Example"):
        assert part in page, f"the docstring of {name} has no {part}"


# ---- links and lists --------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.strip().lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(aim), f"{name_of(page)} links to {target}"


def test_every_error_and_exit_code_is_explained() -> None:
    page = (DOCS / "errors-and-exit-codes.md").read_text(encoding="utf-8")
    for name, cls in vars(errors).items():
        if inspect.isclass(cls) and issubclass(cls, errors.MohsError):
            row = re.search(rf"^\| `{name}` \| (\d+) \|", page, re.MULTILINE)
            assert row, f"{name} is not in the table"
            assert int(row[1]) == cls.exit_code
    codes = {int(c) for c in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes == {0, 1, 2, 10, 11, 12, 13, 130}


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("demo", "list", "check", "run", "report", "replay", "diff", "certify", "train"):
        assert f"mohs {command}" in text
