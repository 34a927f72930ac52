"""How numbers and threats are worded, the same in the page and in the text."""

from __future__ import annotations

import math
import re
from typing import Any

from mohs.records import Header, Record, Verdict

REGIONS = {
    "linf": "every value of the input may change by at most the radius",
    "l2": "the Euclidean length of the change is at most the radius",
    "l1": "the absolute changes add up to at most the radius",
    "l0": "at most so many positions may change, all channels of a position together, each to any valid value",
    "patch": "every pixel inside one square window may change to any valid value; the adversary chooses the window, and the radius "
    "is its side in pixels",
    "words": "at most so many words of the input may be replaced, each by one of the alternatives that the input lists for its place",
    "l0-features": "at most so many single values may change, each to any valid value",
}
ACCESS = {
    "NONE": "none: only a surrogate can be studied",
    "LABEL": "the answered class of each query",
    "SCORE": "the probabilities of each query",
    "LOGIT": "the logits of each query",
    "GRADIENT": "everything, gradients included (white box)",
}
RANDOM = (
    "its answer is the majority of its draws. While an attack runs, {draws} fresh draws score a point; what it reports counts as "
    "broken where an exact test on further draws says that more than half of all are wrong. Beside that stands the chance that a "
    "single draw, one query, is right at the strongest points found"
)
"""Both ways in which a random model is scored."""
ADAPTIVE = {
    "declared": "where gradients are missing or mislead, other ways to get them are tried, with what defenses declare",
    "blind": "where gradients are missing or mislead, other ways to get them are tried, without what defenses declare",
    "off": "not adaptive: gradients are taken as the model gives them, whatever hides them",
}
"""How gradients were sought."""
STANDING = {
    "refuted certified": "It speaks of the certificates that ran. Others may prove more of these examples.",
    "refuted detection": "Each input that the detector let pass is a success of the adversary, or it flags too many clean ones.",
    "certified": "Each proof holds for its example; the bound carries the share to what they were drawn from.",
    "refuted": "Refuting needs no trust in the attacks: each broken example is stored and can be replayed.",
    "upheld so far": "A stronger attack may still refute it. Absence of a successful attack is no proof.",
    "undecided": "More examples, stronger attacks or a certificate would decide it.",
    "blocked": "A check found a condition under which no number would mean anything. See the checks.",
}


def standing(header: Header) -> str:
    """What a verdict stands on."""
    if header.verdict is None:
        return ""
    kind = header.claim.kind if header.claim is not None else ""
    return STANDING.get(f"{header.verdict.word} {kind}") or STANDING.get(header.verdict.word, "")


def graded(verdict: Verdict) -> str:
    """The grade of what is upheld so far, to stand behind the word; '' where there is none."""
    return f", grade {verdict.grade}" if verdict.grade else ""


def claimed(header: Header) -> float | None:
    """The claimed share of right answers, which charts draw; None where the claim is another one."""
    return None if header.claim is None else header.claim.share


def percent(share: float | None, digits: int = 1) -> str:
    """Write a share in percent; a dash where there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.{digits}f}%"


def span(bounds: tuple[float, float]) -> str:
    """Write an interval in percent."""
    return f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}%"


def count(number: int | None) -> str:
    """Write a count with separators; a dash where there is none."""
    return "–" if number is None else f"{number:,}"


def seconds(value: float) -> str:
    """Write a duration in the unit that suits it."""
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"


def radius(eps: float, like: str = "") -> str:
    """Write a radius; in 255ths where the threat is.

    >>> radius(4 / 255, like="linf:8/255"), radius(0.25, like="l2:0.5")
    ('4/255', '0.25')
    """
    if "/255" in like and eps > 0:
        return f"{eps * 255:.3g}/255"
    return f"{eps:.3g}"


def class_name(header: Header, label: int) -> str:
    """Name a class, by number where it has no name."""
    names = header.data.class_names
    return names[label] if 0 <= label < len(names) else f"class {label}"


def radius_of(header: Header) -> float | None:
    """Radius of the threat, if it has a finite one."""
    value = header.threat.get("eps")
    if value is None and isinstance(header.threat.get("region"), dict):
        value = header.threat["region"].get("eps")
    try:
        eps = float(value) if value is not None else math.nan
    except (TypeError, ValueError):
        return None
    return eps if math.isfinite(eps) else None


def box_of(header: Header) -> tuple[float, float]:
    """Lowest and highest valid input value; infinite where there is no bound."""
    try:
        low, high = (float(v) for v in header.threat["box"])
    except (KeyError, TypeError, ValueError):
        return -math.inf, math.inf
    return low, high


def _region_text(region: str) -> str:
    if place := re.fullmatch(r"patch@(\d+),(\d+)", region):
        return (
            f"every pixel inside one square window may change to any valid value; it begins at row {place[1]}, column {place[2]} "
            "(counted from 0), and the radius is its side in pixels"
        )
    return REGIONS.get(region, f"the {region} size of the change is at most the radius")


def threat_rows(header: Header) -> list[tuple[str, str]]:
    """The threat as (what, how), in words; parts not known by name are shown as they are."""
    left = dict(header.threat)
    region, eps, box = left.pop("region", None), left.pop("eps", None), left.pop("box", None)
    rows = [("Short form", header.threat_text)]
    if isinstance(region, str):
        rows.append(("Allowed change", _region_text(region)))
    elif region is not None:
        rows.append(("Allowed change", _plain(region)))
    if eps is not None:
        rows.append(("Radius", _radius_text(eps, header.threat_text)))
    if box is not None:
        rows.append(("Valid inputs", f"from {_plain(box[0])} to {_plain(box[1])}" if len(box) == 2 else _plain(box)))
    if "access" in left:
        access = str(left.pop("access"))
        rows.append(("What it sees", ACCESS.get(access.upper(), access)))
    if "queries" in left:
        limit = left.pop("queries")
        rows.append(("Queries per example", "no limit" if limit is None else f"{limit:,}"))
    knowledge = left.pop("knowledge", None)
    if isinstance(knowledge, dict):
        rows.append(("What it knows", _knowledge(knowledge)))
    elif knowledge is not None:
        rows.append(("What it knows", _plain(knowledge)))
    if "draws" in left:
        draws = left.pop("draws")
        rows.append(("Randomness", RANDOM.format(draws=draws) if draws else "the model has none"))
    return rows + [(name.replace("_", " ").capitalize(), _plain(value)) for name, value in left.items()]


def headline(record: Record) -> tuple[str, str]:
    """The verdict as a headline, and the rest of its sentence."""
    verdict = record.verdict
    if verdict is None:
        if not record.attacks:
            return "No attack ran.", ""
        return f"At most {percent(record.robust_accuracy)} of the answers stay right.", ""
    first, _, rest = _split(verdict.sentence)
    first = re.sub(rf"^{re.escape(verdict.word)}\s*:\s*", "", first, flags=re.IGNORECASE)
    return first[:1].upper() + first[1:], rest


def tactics(header: Header) -> str:
    """Where the attacks took their gradients from, and what that gained; '' where nothing was suspect."""
    chosen = next((t for t in header.tactics if t.chosen), None)
    if chosen is None:
        return ""
    first = header.tactics[0]
    second = next((t for t in header.tactics if t.second), None)
    tried = (
        "" if second is None or not second.after else f", which broke {second.broken} of the {second.n} that were left"
    )
    more = "" if second is None else f" One more attack on the survivors took them {second.name}{tried}."
    if chosen == first:
        others = sum(t.steps == first.steps and not t.chosen and not t.second for t in header.tactics)
        return (
            f"The model's gradients were suspect. Of {others} other ways to get them, tried with a short attack, "
            f"none was worth more than the gradients as they are, which broke {first.broken} of {first.n} examples.{more}"
        )
    late = any(
        step.note.startswith("added after the plan") and chosen.name in step.config for step in header.plan.steps
    )
    who = "The attacks that were added after the plan" if late else "All attacks"
    left = f"the {chosen.n} examples that gradients {chosen.after} had left" if chosen.after else f"{chosen.n} examples"
    return (
        f"The model's gradients were suspect, so other ways to get them were tried with a short attack. {who} take them "
        f"{chosen.name}: that broke {chosen.broken} of {left}; the gradients as they are broke {first.broken} of {first.n}.{more}"
    )


def limits(record: Record) -> list[str]:
    """What the record does not say: true of every record, and of this one."""
    header = record.header
    said = list(header.limits)
    if header.status != "complete":
        said.append(f"The run is {header.status}: attacks that have not run could still break examples.")
    warned = [f.name for f in header.checks if f.severity in ("warn", "block")]
    if warned:
        said.append(f"These checks are not quiet, so the numbers deserve less trust: {', '.join(warned)}.")
    if record.attacks:
        said.append(
            "Survival is an upper bound. An example that survived these attacks at this budget may fall to others; "
            "only a certificate says that none exists."
        )
    if header.sealed is not None and header.sealed.look > 1:
        said.append(
            f"The examples were sealed ({header.sealed.commitment[:12]}), and this is look {header.sealed.look} at them: what "
            "an earlier one showed may have shaped this model, so the bounds no longer speak of unseen examples."
        )
    if record.certified is None:
        said.append("No certificate ran, so nothing is proved: the lower end of the bracket is zero.")
    said += [
        f"It speaks of {header.threat_text} and nothing else: not of larger changes, other norms, rotations, "
        "patches, other kinds of noise, or of privacy and poisoning.",
        f"It speaks of these {record.n:,} examples. The intervals carry over to others only if these were drawn "
        "independently from the same source and were not used to tune the model.",
        (
            "It speaks of the model as it answered in this run, with the preprocessing inside it. "
            if black_box(header)
            else "It speaks of the model with these weights, in this arithmetic, with the preprocessing inside it. "
        )
        + "Anything before the model, such as a camera or a file format, was not attacked.",
    ]
    return said


def black_box(header: Header) -> bool:
    """Was the model one of which only the answers are known, so that the hash of its weights is that of its name?"""
    return re.search(r"\b(BlackBox|Served)\(", header.subject.arch) is not None


def _split(sentence: str) -> tuple[str, str, str]:
    match = re.search(r"(?<=[.!?])\s+", sentence)
    return (sentence, "", "") if match is None else (sentence[: match.start()], " ", sentence[match.end() :])


def _radius_text(eps: Any, text: str) -> str:
    try:
        value = float(eps)
    except (TypeError, ValueError):
        return _plain(eps)
    if math.isinf(value):
        return "unbounded: the smallest change is sought"
    return f"{radius(value, text)} = {value:.5g}" if "/255" in text else f"{value:g}"


def _knowledge(parts: dict[str, Any]) -> str:
    known = [name.replace("_", " ") for name, value in parts.items() if value is True]
    hidden = [name.replace("_", " ") for name, value in parts.items() if value is False]
    other = [f"{name.replace('_', ' ')}: {value}" for name, value in parts.items() if not isinstance(value, bool)]
    return "; ".join(
        [", ".join(known)] * bool(known)
        + [f"not {', '.join(hidden)}"] * bool(hidden)
        + [", ".join(other)] * bool(other)
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
