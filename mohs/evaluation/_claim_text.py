"""Claims as texts: reading them, and saying why a text is none."""

from __future__ import annotations

import math
import re

from mohs.errors import ClaimError
from mohs.evaluation._claim_kinds import FORMS, HERE, Accuracy, Certified, Claim, Detection, Median, Stability

_SHARES: dict[str, type[Accuracy] | type[Stability] | type[Certified]] = {
    "accuracy": Accuracy, "robust accuracy": Accuracy, "stability": Stability, "prediction stability": Stability,
    "certified": Certified, "certified accuracy": Certified,
}  # fmt: skip
_MEDIANS = ("median", "median distortion", "median distance", "median size")
_DETECTIONS = ("detection", "detection rate")
_FORM = re.compile(r"([a-z -]+?) ?(?:>=|≥|=>|at least) ?(.+)")
_NUMBER = r"([-+.\w]+?)( ?%)?"


def read(text: str) -> Claim:
    """Read a claim from its text, or say why it is none."""
    given = " ".join(str(text).split())
    match = _FORM.fullmatch(given.lower())
    subject = match[1] if match else ""
    # the name of a baseline keeps its capitals
    rest = (
        given[len(given) - len(match[2]) :]
        if match and len(given) == len(given.lower())
        else (match or ["", "", ""])[2]
    )
    if subject in _SHARES:
        number, _, here = rest.lower().partition(HERE)
        if not here and (tau := re.fullmatch(_NUMBER, number)):
            return _SHARES[subject](_share(text, tau), here=rest.lower().endswith(HERE))
    if subject in _MEDIANS and (size := re.fullmatch(r"([-+./\w]+?)(?: ?(?:x|times|\*) (\S.*))?", rest)):
        return Median(_size(text, size[1].lower()), of=size[2])
    if subject in _DETECTIONS:
        part = re.fullmatch(rf"{_NUMBER} at (?:an? )?(?:fpr|false[ -]positive rate)(?: of)? {_NUMBER}", rest.lower())
        if part is None:
            raise ClaimError(
                f"Cannot test the claim {text!r}: a detector that flags everything detects everything, so a detection rate "
                f"says something only at a false-positive rate. {FORMS}"
            )
        return Detection(_share(text, part), fpr=_share(text, part, 3))
    raise ClaimError(f"Cannot test the claim {text!r}: {_reason(given.lower())} {FORMS}")


def _share(text: str, match: re.Match[str], group: int = 1) -> float:
    tau, is_percent = _number(match[group]), match[group + 1] is not None
    if tau is None:
        raise ClaimError(f"Cannot test the claim {text!r}: {match[group]!r} is no number. {FORMS}")
    if not is_percent and tau > 1:
        raise ClaimError(
            f"Cannot test the claim {text!r}: a share above 1 is none. Was {tau:g}% meant? Then write the sign. {FORMS}"
        )
    # 60 / 100 and 0.6 must be the same number, hence through the text
    return float(f"{tau / 100:.15g}") if is_percent else tau


def _size(text: str, size: str) -> float:
    over, _, under = size.partition("/")
    numbers = [_number(over), _number(under) if under else 1.0]
    if numbers[0] is None or not numbers[1] or size.endswith("/"):
        raise ClaimError(f"Cannot test the claim {text!r}: {size!r} is no number. {FORMS}")
    return numbers[0] / numbers[1]


def _number(text: str) -> float | None:
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _reason(words: str) -> str:
    """Why a text is no claim, as far as can be told."""
    if "," in words:
        return "a decimal comma is ambiguous; write a point."
    if re.search(r"\b(all|any|every|unknown|arbitrary) (possible )?(attack|adversar|perturbation|change)", words):
        return "nobody can try all attacks; what the adversary may do is the threat, and the claim says how much it leaves."
    if not any(c.isdigit() for c in words):
        return "it names no number, so no experiment could refute it."
    if re.search(r"clean|natural|standard", words):
        return (
            "it speaks of the accuracy without an adversary, which needs no attack; give it as stated_accuracy instead."
        )
    if re.search(r"attack success|success rate|<|at most|below|≤|less", words):
        return "an upper limit, or a success rate of attacks, is no claim of a defender; say what stays right at least."
    if re.search(r">(?!=)|above|over|more than|greater", words):
        return "'more than' cannot be told from 'at least' by counting; write '>='."
    if re.search(r"about|around|roughly|approx|~|nearly|almost|±|\+-", words):
        return "'about' fixes no number that could be missed."
    if re.search(r"\b(mean|average) (distortion|distance|size|change)", words):
        return "a mean has no bounds where some changes are infinite, as where no attack found one; claim the median."
    if not re.search(r"accuracy|stability|certified|median|detection", words):
        return (
            "it does not say what is counted; only the share of answers that stay right (or the same) is, and the like."
        )
    return "it is not of a form that counting can decide."
