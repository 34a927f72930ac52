"""Report pages: escaped, accessible, silent on the network, and free of torch."""

from __future__ import annotations

import base64
import hashlib
import http.server
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from page_reader import Page
from record_builder import build, header

from mohs.records import Data, Record
from mohs.reports import render

TESTS = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return Record.load(build(tmp_path_factory.mktemp("reports") / "run"))


@pytest.fixture(scope="module")
def content(record: Record, tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(record, tmp_path_factory.mktemp("page") / "new" / "report.html").read_text(encoding="utf-8")


# ---- safe and accessible ---------------------------------------------------------------------------------

EVIL = "<script>document.title='owned'</script>"


def evil_record(directory: Path, address: str = "http://127.0.0.1:9") -> Record:
    """Every place a stranger can write to tries to run a script or to ask the network."""
    image = f"\"'><img src={address}/x onerror=alert(1)>"
    style = f"</style><style>@import '{address}/y';</style>"
    first = header(20)
    return Record.load(
        build(
            directory,
            n=20,
            data=Data(
                spec=image, n=20, hash="cd" * 32, shape=[1, 12, 12], class_names=[EVIL + str(i) for i in range(10)]
            ),
            subject=first.subject.model_copy(update={"spec": style, "arch": f"</svg>{EVIL}"}),
            command=f"mohs run {image} </code></pre>{EVIL}",
            threat_text=f"</title>{EVIL}",
            threat={"region": EVIL, "eps": 0.03, "box": [0, 1], f"{image}": EVIL},
            limits=[f"</li>{EVIL}", f"{{{{ {EVIL} }}}}"],
        )
    )


def test_labels_cannot_become_markup(tmp_path: Path) -> None:
    content = render(evil_record(tmp_path / "run"), tmp_path / "evil.html").read_text(encoding="utf-8")
    page = Page(content)
    assert page.all("script") == []
    assert len(page.all("style")) == 1
    assert all((a["src"] or "").startswith("data:image/png;base64,") for a in page.all("img"))
    assert EVIL in page.text  # shown as text, not dropped
    assert content.count("onerror=alert(1)>") == 0


def test_nothing_is_asked_from_the_network(content: str) -> None:
    page = Page(content)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#"))
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    style = re.search(r"<style>(.*?)</style>", content, re.S)
    assert style is not None
    assert "@import" not in style[1]
    assert "url(" not in style[1]
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_the_page_can_be_heard_and_walked(content: str) -> None:
    page = Page(content)
    assert page.open == []
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert len(page.all("main")) == 1
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for section in page.all("section"):
        assert section["aria-labelledby"] in ids
    for link in page.all("a"):
        assert (link["href"] or "").removeprefix("#") in ids
    assert all(a.get("alt") for a in page.all("img"))
    outer = [a for a in page.all("svg") if a.get("class") != "stretched"]
    assert all(a.get("aria-hidden") == "true" or (a.get("role") == "img" and a.get("aria-label")) for a in outer)
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(a.get("tabindex") == "0" for a in page.all("pre"))


def luminance(colour: str) -> float:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(a: str, b: str) -> float:
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_can_be_told_apart(content: str, scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", content, re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", blocks[scheme]))
    colours = {k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in colours.items()}
    for text_colour in ("ink", "soft", "accent", "warn", "bad"):
        for ground in ("paper", "raised"):
            assert contrast(colours[text_colour], colours[ground]) >= 4.5, (text_colour, ground)
    for part in ("certified", "unknown", "broken", "wrong"):
        assert contrast(colours[f"on-{part}"], colours[part]) >= 4.5, part
    # Told apart without colour vision: neighbours in the bar differ in lightness.
    assert contrast(colours["certified"], colours["unknown"]) >= 3
    assert contrast(colours["unknown"], colours["broken"]) >= 2


def test_reduced_motion_and_print_are_provided_for(content: str) -> None:
    for query in ("prefers-color-scheme: dark", "prefers-reduced-motion: reduce", "@media print"):
        assert query in content


# ---- without torch, in a browser -------------------------------------------------------------------------


def test_a_page_is_rebuilt_where_torch_cannot_be_imported(record: Record, content: str, tmp_path: Path) -> None:
    code = (
        "import sys, types\n"
        "sys.modules['torch'] = None\n"
        "face = sys.modules['mohs'] = types.ModuleType('mohs')\n"  # the face may need torch, the leaf may not
        "face.__path__ = ['mohs']\n"
        "from mohs.records import Record\n"
        "from mohs.reports import render, text\n"
        "render(Record.load(sys.argv[1]), sys.argv[2])\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] == 'mohs'))\n"
    )
    target = tmp_path / "again.html"
    done = subprocess.run(
        [sys.executable, "-c", code, str(record.dir), str(target)],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert target.read_text(encoding="utf-8") == content
    allowed = ("mohs.records", "mohs.reports")
    assert all(m in ("mohs", "mohs.errors") or m.startswith(allowed) for m in eval(done.stdout))


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server that notes every request; a correct page makes none."""
    heard: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", heard
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
def test_a_real_browser_shows_it_silently(tmp_path: Path, listener: tuple[str, list[str]]) -> None:
    address, heard = listener
    page = render(evil_record(tmp_path / "run", address), tmp_path / "evil.html")
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --window-size=1280,2400"
    )
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr  # neither a script error nor anything the policy had to stop
    assert heard == []
    seen = Page(done.stdout)
    assert seen.all("script") == []
    assert EVIL in seen.text
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title is not None
    assert "Mohs" in title[1]
    assert len(seen.all("svg")) > 8
    assert seen.all("img")
