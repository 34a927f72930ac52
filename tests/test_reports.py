"""Reports: complete, escaped, accessible, silent on the network, and free of torch."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from record_builder import CHECKS, NAMES, build, examples, fill, header

from mohs.errors import RecordError
from mohs.records import Claim, Data, Finding, Record, Verdict, open_run
from mohs.reports import charts, pictures, render, text, words

TESTS = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks that elements close in order, and keeps what the tests ask for."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return Record.load(build(tmp_path_factory.mktemp("reports") / "run"))


@pytest.fixture(scope="module")
def content(record: Record, tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(record, tmp_path_factory.mktemp("page") / "new" / "report.html").read_text(encoding="utf-8")


def page_of(record: Record, tmp_path: Path) -> Page:
    return Page(render(record, tmp_path / "report.html").read_text(encoding="utf-8"))


# ---- content ---------------------------------------------------------------------------------------------


def test_every_number_stands_with_its_n_interval_threat_and_upper_bound(record: Record, content: str) -> None:
    page = Page(content)
    low, high = record.interval()
    assert record.describe() in page.text
    for part in ("upper bound", f"{low:.1%} to {high:.1%}", "linf:8/255", f"of {record.n}", "undecided"):
        assert part in page.text
    for attack in record.header.attacks:
        assert attack.name in page.text
        assert attack.config in page.text
        assert f"{attack.alone_broke}/{attack.alone_n}" in page.text
        assert f"{attack.forwards:,}" in page.text
    for finding in CHECKS:
        for part in (finding.name, finding.saw, finding.means, finding.remedy):
            assert part in page.text
    for part in (record.header.identity, record.header.ledger_digest, record.header.subject.weights_sha256):
        assert part is not None
        assert part in page.text
    assert record.header.command in page.text
    for title in ("The threat", "What was broken", "Accuracy against radius", "Loss against step", "does not say"):
        assert title in page.text


def test_the_bar_is_as_long_as_the_counts(record: Record) -> None:
    drawn = str(charts.bracket(record))
    widths = [float(w) for w in re.findall(r'<rect x="[\d.]+%" y="44" width="([\d.]+)%"', drawn)]
    assert record.certified is not None
    certified, survived, correct = (int(v.sum()) for v in (record.certified, record.survived, record.correct))
    expected = [certified, survived - certified, correct - survived, record.n - correct]
    assert widths == pytest.approx([100 * k / record.n for k in expected if k], abs=1e-3)
    assert re.search(r'x1="60.000%".*class="tau"', drawn)


def test_the_curve_goes_through_its_points(record: Record) -> None:
    drawn = str(charts.radius_curve(record))
    first = [p for p in record.header.curve if p.source == "standard plan"]
    largest = max(p.eps for p in record.header.curve)
    for p in first:
        x, y = 100 * p.eps / largest, charts.CURVE_HEIGHT * (1 - p.survived / p.n)
        assert f'cx="{x:.3f}%" cy="{y:.1f}"' in drawn


def test_ticks_are_round_and_cover_the_axis() -> None:
    assert [round(t * 255, 6) for t in charts._radii(16 / 255, "linf:8/255")] == [0, 5, 10, 15]
    assert charts._radii(1.0, "l2:0.5") == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts._radii(40.0, "l0:20") == pytest.approx([0, 10, 20, 30, 40])


def test_losses_with_gaps_and_constants_are_drawn(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", header(4)) as run:
        run.ledger.put_examples(examples(4))
        run.ledger.put_trace(0, 1, 0, [0.5, np.nan, 0.75, 1.0])
        run.ledger.put_trace(0, 1, 1, [np.nan] * 4)
        run.ledger.put_trace(1, 2, 0, [0.25] * 4)
        panels = charts.loss_panels(run.record())
    assert [name for name, _ in panels] == ["APGD", "APGD targeted"]
    first, second = str(panels[0][1][0][1]), str(panels[1][1][0][1])
    assert "nan" not in first + second
    assert first.count("M") >= 2  # the line is interrupted where nothing was measured
    assert "example 1" in panels[0][1][0][0]


# ---- the gallery -----------------------------------------------------------------------------------------


def pixels(uri: str) -> np.ndarray:
    from PIL import Image

    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 8, 10)])
def test_pictures_show_the_stored_points(tmp_path: Path, shape: tuple[int, ...]) -> None:
    record = Record.load(build(tmp_path / "run", n=24, shape=shape))
    shown, why_not = pictures.exhibits(record)
    assert why_not == ""
    assert 0 < len(shown) <= pictures.MOST
    assert len({e.example for e in shown}) == len(shown)
    for e in shown[:4]:
        attack = record.breaker[e.example]
        x0, x = record.inputs([e.example])[1][0], record.points(int(attack), [e.example])[1][0]
        flat = np.moveaxis(x0, 0, -1).squeeze()
        assert pixels(e.clean) == pytest.approx(255 * flat, abs=0.51)
        assert pixels(e.adversarial).shape[:2] == shape[1:]
        assert pixels(e.difference).shape == (*shape[1:], 3)
        assert e.factor == pytest.approx(1 / np.abs(x - x0).max(), rel=1e-4)
        assert e.label == NAMES[record.examples.label[e.example]]
        assert e.attack == record.attack_name(int(attack))


def test_raised_and_lowered_have_two_colours() -> None:
    drawn = pictures._tinted(np.array([[[1.0, -1.0, 0.0]]]))
    raised, lowered, same = drawn[0].astype(int)
    assert raised[0] > raised[2] + 100  # orange
    assert lowered[2] > lowered[0] + 60  # blue
    assert np.ptp(same) == 0


def test_every_attack_has_its_turn(record: Record) -> None:
    shown, _ = pictures.exhibits(record, most=4)
    broke = {record.attack_name(int(a)) for a in np.unique(record.breaker) if a >= 0}
    assert {e.attack for e in shown} == broke if len(broke) <= 4 else broke


def test_inputs_that_are_no_images_are_skipped_with_a_sentence(tmp_path: Path) -> None:
    record = Record.load(build(tmp_path / "run", n=20, shape=(7,)))
    page = page_of(record, tmp_path)
    assert "not grey or colour images" in page.text
    assert page.all("img") == []


# ---- unusual records -------------------------------------------------------------------------------------


def test_blocked_and_attackless_records_claim_nothing(tmp_path: Path) -> None:
    block = Finding(id="A1", name="training mode", severity="block", saw="dropout is active")
    verdict = Verdict(word="blocked", sentence="Blocked: no verdict before this is mended: mode", exit_code=12)
    with open_run(tmp_path / "run", header(6, checks=[block], claim=Claim(text="accuracy >= 0", tau=0.0))) as run:
        run.ledger.put_examples(examples(6))
        run.finish(verdict=verdict)
    record = Record.load(tmp_path / "run")
    page = page_of(record, tmp_path)
    for part in ("No attack ran", "nothing is known", "dropout is active", "Nothing is proved", "see the checks"):
        assert part in page.text
    assert "upper bound" not in page.text.replace("their share an upper bound", "")
    assert "BLOCKED" in text(record)


def test_interrupted_runs_say_so(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", header(20)) as run:
        fill(run, 20, stop=2)
    record = Record.load(tmp_path / "run")
    page = page_of(record, tmp_path)
    assert "This run is interrupted" in page.text
    assert "written when the run ends" in page.text
    assert "interrupted" in text(record)


def test_empty_records_have_a_page(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", header(0, claim=None)) as run:
        run.finish()
    record = Record.load(tmp_path / "run")
    assert "holds no examples" in page_of(record, tmp_path).text
    assert "holds no examples" in text(record)


@pytest.mark.parametrize(
    ("threat", "short", "says"),
    [
        ({"region": "l2", "eps": "inf", "box": ["-inf", "inf"]}, "l2:inf", "the smallest change is sought"),
        ({"region": "l0", "eps": 20, "queries": 5000}, "l0:20", "5,000"),
        ({"region": {"kind": "patch", "size": 3}, "odd_thing": [1, 2]}, "patch:3", "Odd thing"),
        ({}, "unknown", "unknown"),
    ],
)
def test_any_threat_is_shown(tmp_path: Path, threat: dict, short: str, says: str) -> None:
    record = Record.load(build(tmp_path / "run", n=12, threat=threat, threat_text=short))
    assert says in page_of(record, tmp_path).text


def test_a_page_appears_complete_or_not_at_all(record: Record, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.mkdir()
    with pytest.raises(RecordError, match=r"report\.html"):
        render(record, target)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_numbers_are_worded() -> None:
    assert words.percent(0.5278) == "52.8%"
    assert words.percent(None) == words.percent(float("nan")) == "–"
    assert (words.seconds(1.23), words.seconds(300), words.seconds(7200)) == ("1.2 s", "5.0 min", "2.0 h")
    assert words.headline.__doc__


def test_text_has_verdict_bracket_attacks_and_loud_checks(record: Record) -> None:
    said = text(record)
    assert said.startswith("UNDECIDED")
    assert record.describe() in said
    bar = re.search(r"0% \[(#+)(\?+)(x+)(\.+)\] 100%", said)
    assert bar is not None
    assert sum(map(len, bar.groups())) == 60
    for part in ("APGD targeted", "BLOCK", "zero gradient", "linf:8/255", record.header.command):
        assert part in said
    assert "evaluation mode" not in said  # that check is quiet
    assert max(map(len, said.splitlines()[3:4])) < 400


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
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('mohs', 'plotly')))\n"
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
