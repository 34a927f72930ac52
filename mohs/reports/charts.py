"""Charts as inline SVG: no script, no library, colours from the style sheet so that they follow light and dark.

Positions are in percent of the width and in pixels of the height. So a chart stretches with the page while its
lettering keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from mohs.records import CurvePoint, Record, clopper_pearson
from mohs.reports import words

BAR_TOP, BAR_HEIGHT = 44, 76
CURVE_HEIGHT, COST_HEIGHT, LOSS_HEIGHT = 280, 170, 130
PANELS = 6
LONGEST = 160  # points of a loss curve that are drawn


def bracket(record: Record) -> Markup:
    """Draw certified | unknown | broken | wrong as one bar, with claim, intervals and the bracket itself."""
    n = max(record.n, 1)
    survived, correct = int(record.survived.sum()), int(record.correct.sum())
    certified = 0 if record.certified is None else min(int(record.certified.sum()), survived)
    ends = [100 * k / n for k in (0, certified, survived, correct, record.n)]
    body = ['<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="7" height="7" class="unknown"/>'
            '<line x1="0" y1="0" x2="0" y2="7" class="hatch"/></pattern></defs>']  # fmt: skip
    for kind, name, left, right in zip(
        ("certified", "unknown", "broken", "wrong"),
        ("certified", "survived, not certified", "broken by an attack", "wrong without any attack"),
        ends,
        ends[1:],
    ):
        width = right - left
        if width <= 0:
            continue
        fill = 'fill="url(#hatch)"' if kind == "unknown" else f'class="{kind}"'
        body.append(
            f'<rect x="{left:.3f}%" y="{BAR_TOP}" width="{width:.3f}%" height="{BAR_HEIGHT}" {fill}>'
            f"<title>{name}: {words.percent(width / 100)}</title></rect>"
        )
        if width >= 12:
            middle = (left + right) / 2
            body.append(_text(middle, BAR_TOP + BAR_HEIGHT / 2 + 6, f"{width:.1f}%", f"share on-{kind}"))
    body += [f'<rect x="{end:.3f}%" y="{BAR_TOP}" width="1.5" height="{BAR_HEIGHT}" class="gap"/>' for end in ends[1:4]]
    body += _brace(ends[1], ends[2], bool(record.attacks))
    whiskers = [record.interval()] if record.attacks else []
    if record.certified is not None:
        whiskers.append(record.interval("certified"))
    body += [_whisker(100 * a, 100 * b, BAR_TOP + BAR_HEIGHT - 13 * (i + 1)) for i, (a, b) in enumerate(whiskers)]
    bottom = BAR_TOP + BAR_HEIGHT
    share = words.claimed(record.header)
    if share is not None:
        tau = 100 * share
        body.append(f'<line x1="{tau:.3f}%" x2="{tau:.3f}%" y1="{BAR_TOP - 8}" y2="{bottom + 14}" class="halo"/>')
        body.append(f'<line x1="{tau:.3f}%" x2="{tau:.3f}%" y1="{BAR_TOP - 8}" y2="{bottom + 14}" class="tau"/>')
        body.append(_text(tau, bottom + 29, f"claim: at least {words.percent(share, 0)}", "taulabel"))
    for tick in (0, 25, 50, 75, 100):
        body.append(_text(tick, bottom + 50, f"{tick}%", "tick"))
    said = (
        f"Of {record.n} examples {words.percent(certified / n)} are certified, {words.percent(survived / n)} survived "
        f"every attack, {words.percent((correct - survived) / n)} were broken and "
        f"{words.percent(1 - correct / n)} were wrong without any attack."
    )
    return _svg("bracket", bottom + 58, "The bracket", said, body)


def radius_curve(record: Record) -> Markup:
    """Draw the share that survives against the radius, one line per source, with exact intervals."""
    points = [p for p in record.header.curve if p.n > 0 and math.isfinite(p.eps)]
    sources = list(dict.fromkeys(p.source for p in points))
    here = words.radius_of(record.header)
    right = max([p.eps for p in points] + [here or 0.0]) or 1.0
    body = _grid([(100 * s / 100, f"{s:.0f}%") for s in (0, 25, 50, 75, 100)], CURVE_HEIGHT)
    for tick in _radii(right, record.header.threat_text):
        label = words.radius(tick, record.header.threat_text)
        body.append(_text(100 * tick / right, CURVE_HEIGHT + 20, label, "tick", margin=0))
    share = words.claimed(record.header)
    if share is not None:
        y = CURVE_HEIGHT * (1 - share)
        body.append(f'<line x1="0%" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="claimline"/>')
    if here is not None:
        at = 100 * here / right
        body.append(f'<line x1="{at:.3f}%" x2="{at:.3f}%" y1="0" y2="{CURVE_HEIGHT}" class="here"/>')
    for i, source in enumerate(sources):
        line = sorted((p for p in points if p.source == source), key=lambda p: p.eps)
        body += _curve(line, right, i, banded=i == 0)
    said = "; ".join(f"{s or 'survivors'}: {_listed(points, s, record)}" for s in sources)
    return _svg("curve", CURVE_HEIGHT + 30, "Accuracy against radius", said, body)


def cost_curve(record: Record) -> Markup:
    """Draw the accuracy left against the passes that broke an example, a staircase over a logarithmic scale; some must have."""
    passes, left = record.cost_curve()
    left_to = math.floor(math.log10(max(float(passes[0]), 1.0)))
    decades = max(math.ceil(math.log10(max(float(passes[-1]), 10.0))), left_to + 1) - left_to
    half = passes[np.argmax(left <= (record.clean_accuracy + record.robust_accuracy) / 2 + 1e-12)]
    body = _grid([(s, f"{s:.0f}%") for s in (0, 25, 50, 75, 100)], COST_HEIGHT)
    for k in range(decades + 1):
        body.append(_text(100 * k / decades, COST_HEIGHT + 20, f"{10 ** (left_to + k):,}", "tick", margin=0))
    share = words.claimed(record.header)
    if share is not None:
        y = COST_HEIGHT * (1 - share)
        body.append(f'<line x1="0%" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="claimline"/>')
    points, level = [(0.0, 100 * (1 - record.clean_accuracy))], 100 * (1 - record.clean_accuracy)
    for cost, share in zip(passes, left, strict=True):
        x = 100 * (math.log10(max(float(cost), 1.0)) - left_to) / decades
        points += [(x, level), (x, 100 * (1 - float(share)))]
        level = 100 * (1 - float(share))
    body.append(_stretched(COST_HEIGHT, f'<path d="{_path([*points, (100.0, level)])}" class="line line0"/>'))
    said = (
        f"From {words.percent(record.clean_accuracy)} without any attack to {words.percent(record.robust_accuracy)}; half of "
        f"those that broke had by {words.count(int(half))} passes."
    )
    return _svg("curve", COST_HEIGHT + 30, "Accuracy against cost", said, body)


def curve_key(record: Record) -> list[tuple[str, str]]:
    """Name the lines of `radius_curve` as (style class, source)."""
    sources = dict.fromkeys(p.source for p in record.header.curve)
    return [(f"line{i % 4}", source or "survivors") for i, source in enumerate(sources)]


def loss_panels(record: Record) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Draw the objective against the step, a panel per example and a line per restart, by attack."""
    by_attack: dict[int, dict[int, list[NDArray[np.floating]]]] = {}
    for attack, example, _, values in record.traces():
        by_attack.setdefault(attack, {}).setdefault(example, []).append(np.asarray(values, dtype=np.float64))
    drawn = []
    for attack, examples in by_attack.items():
        chosen = list(examples.items())[:PANELS]
        every = np.concatenate([v for _, lines in chosen for v in lines])
        every = every[np.isfinite(every)]
        if not len(every):
            continue
        low, high = float(every.min()), float(every.max())
        low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
        panels = [(_name(record, example), _losses(lines, low, high)) for example, lines in chosen]
        drawn.append((record.attack_name(attack), panels))
    return drawn


# ---- parts -----------------------------------------------------------------------------------------------


def _svg(kind: str, height: float, title: str, said: str, body: Iterable[str]) -> Markup:
    return Markup(
        f'<svg class="{kind}" width="100%" height="{height:.0f}" role="img" '
        f'aria-label="{escape(title)}. {escape(said)}">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, said: str, kind: str, margin: float = 8) -> str:
    """Letter a place; within `margin` percent of an edge the text is set inwards."""
    anchor = "start" if x < margin else "end" if x > 100 - margin else "middle"
    return f'<text x="{x:.3f}%" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(said)}</text>'


def _brace(left: float, right: float, attacked: bool) -> list[str]:
    if not attacked:
        return [_text(50, BAR_TOP - 18, "no attack ran: nothing is known", "bracelabel")]
    y = BAR_TOP - 12
    said = "robust accuracy lies in here" if right - left > 0 else "robust accuracy is known exactly here"
    middle = (left + right) / 2
    # The label is about 190 px wide: keep it inside a narrow page as well.
    x = 0.0 if middle < 30 else 100.0 if middle > 70 else middle
    return [
        f'<line x1="{left:.3f}%" x2="{right:.3f}%" y1="{y}" y2="{y}" class="brace"/>',
        f'<line x1="{left:.3f}%" x2="{left:.3f}%" y1="{y}" y2="{BAR_TOP - 3}" class="brace"/>',
        f'<line x1="{right:.3f}%" x2="{right:.3f}%" y1="{y}" y2="{BAR_TOP - 3}" class="brace"/>',
        _text(x, y - 9, said, "bracelabel"),
    ]


def _whisker(left: float, right: float, y: float) -> str:
    parts = []
    for kind in ("halo", "whisker"):
        parts.append(f'<line x1="{left:.3f}%" x2="{right:.3f}%" y1="{y}" y2="{y}" class="{kind}"/>')
        for end in (left, right):
            parts.append(f'<line x1="{end:.3f}%" x2="{end:.3f}%" y1="{y - 4}" y2="{y + 4}" class="{kind}"/>')
    return "".join(parts)


def _grid(ticks: Sequence[tuple[float, str]], height: float) -> list[str]:
    lines = []
    for share, label in ticks:
        y = height * (1 - share / 100)
        lines.append(f'<line x1="0%" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        lines.append(f'<text x="-10" y="{y + 4:.1f}" text-anchor="end" class="tick">{label}</text>')
    return lines


def _curve(line: list[CurvePoint], right: float, i: int, banded: bool) -> list[str]:
    x = [100 * p.eps / right for p in line]
    y = [100 * (1 - p.survived / p.n) for p in line]
    inner = ""
    if banded:
        bounds = [clopper_pearson(p.survived, p.n) for p in line]
        outline = [(a, 100 * (1 - hi)) for a, (_, hi) in zip(x, bounds)]
        outline += [(a, 100 * (1 - lo)) for a, (lo, _) in reversed(list(zip(x, bounds)))]
        inner = f'<path d="{_path(outline)}Z" class="band"/>'
    inner += f'<path d="{_path(zip(x, y))}" class="line line{i % 4}"/>'
    dots = [
        f'<circle cx="{a:.3f}%" cy="{b * CURVE_HEIGHT / 100:.1f}" r="4" class="dot line{i % 4}">'
        f"<title>{escape(p.source)}: {p.survived} of {p.n} at {p.eps:.4g}</title></circle>"
        for a, b, p in zip(x, y, line)
    ]
    return [_stretched(CURVE_HEIGHT, inner), *dots]


def _losses(lines: list[NDArray[np.floating]], low: float, high: float) -> Markup:
    longest = max(len(v) for v in lines)
    inner, body = "", []
    for values in lines:
        steps = np.unique(np.linspace(0, len(values) - 1, min(len(values), LONGEST)).astype(int))
        points = [(100 * k / max(longest - 1, 1), 100 * (high - values[k]) / (high - low)) for k in steps]
        inner += f'<path d="{_path(points)}" class="line loss"/>'
    if low < 0 < high:
        y = LOSS_HEIGHT * high / (high - low)
        body.append(f'<line x1="0%" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end" class="tick">0</text>')
    for value, y in ((high, 4), (low, LOSS_HEIGHT + 4)):
        if abs(LOSS_HEIGHT * (high - value) / (high - low) - LOSS_HEIGHT * high / (high - low)) > 14:
            body.append(f'<text x="-6" y="{y:.1f}" text-anchor="end" class="tick">{value:.2g}</text>')
    body.append(f'<line x1="0%" x2="100%" y1="{LOSS_HEIGHT}" y2="{LOSS_HEIGHT}" class="axis"/>')
    body.append(_stretched(LOSS_HEIGHT, inner))
    body.append(_text(0, LOSS_HEIGHT + 17, "step 0", "tick") + _text(100, LOSS_HEIGHT + 17, f"{longest - 1}", "tick"))
    ends = [v[np.isfinite(v)][-1] for v in lines if np.isfinite(v).any()]
    said = f"{len(lines)} restarts of {longest} steps end between {min(ends):.3g} and {max(ends):.3g}" if ends else ""
    return _svg("losses", LOSS_HEIGHT + 22, "Objective against step", said, body)


def _stretched(height: float, inner: str) -> str:
    return (
        f'<svg x="0" y="0" width="100%" height="{height}" viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'class="stretched">{inner}</svg>'
    )


def _path(points: Iterable[tuple[float, float]]) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if not math.isfinite(y):
            pen = "M"  # a gap where nothing was measured
            continue
        parts.append(f"{pen}{x:.2f} {y:.2f}")
        pen = "L"
    return "".join(parts)


def _radii(right: float, like: str) -> list[float]:
    unit = 1 / 255 if "/255" in like else 1.0
    rough = right / unit / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999) * unit
    return [k * step for k in range(int(right / step * 1.0001) + 1)]


def _listed(points: list[CurvePoint], source: str, record: Record) -> str:
    return ", ".join(
        f"{words.percent(p.survived / p.n)} at {words.radius(p.eps, record.header.threat_text)}"
        for p in points
        if p.source == source
    )


def _name(record: Record, example: int) -> str:
    at = int(np.searchsorted(record.examples.id, example))
    return f"example {example}, {words.class_name(record.header, int(record.examples.label[at]))}"
