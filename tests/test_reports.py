"""Reports: complete, and right about every number, whatever the record."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from page_reader import Page
from record_builder import CHECKS, NAMES, build, examples, fill, header

from mohs.errors import RecordError
from mohs.records import Claim, Finding, Record, Verdict, open_run
from mohs.reports import charts, pictures, render, text, words


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


def test_the_cost_curve_falls_where_examples_broke(record: Record, content: str) -> None:
    passes, left = record.cost_curve()
    broken = record.correct & (record.breaker >= 0)
    spent = {int(i): 0 for i in record.examples.id[broken]}
    for attack in record.attacks:  # the same, example by example
        rows = record.results(attack)
        for i, cost in zip(rows.example.tolist(), (rows.forwards + rows.backwards).tolist()):
            if i in spent and attack <= record.breaker[np.searchsorted(record.examples.id, i)]:
                spent[i] += cost
    assert passes.tolist() == sorted(set(spent.values()))
    for cost, share in zip(passes.tolist(), left.tolist()):
        assert share == pytest.approx(record.clean_accuracy - sum(v <= cost for v in spent.values()) / record.n)
    assert left[-1] == pytest.approx(record.robust_accuracy)
    assert 'aria-label="Accuracy against cost.' in content
