"""Claims and verdicts: a testable sentence, and what the counts of an evaluation say about it, with error rates."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mohs.errors import CertificateContradicted, ClaimError, UsageError
from mohs.records.schema import Verdict
from mohs.records.stats import lower_bound, upper_bound

_FORMS = "Allowed: 'accuracy >= 0.6', 'accuracy >= 60%', 'robust accuracy at least 0.6'."
_SUBJECTS = ("accuracy", "robust accuracy")
Word = Literal["refuted", "certified", "upheld so far", "undecided", "blocked"]
_EXIT: dict[Word, int] = {"upheld so far": 0, "certified": 0, "refuted": 10, "undecided": 11, "blocked": 12}


@dataclass(frozen=True)
class Claim:
    """At least the share ``tau`` of all answers stays right, whatever the adversary of the threat does.

    The share is of all inputs like those tested, not only of the tested ones: an input that is wrong to begin with does
    not stay right.

    Args:
        tau: the claimed share, above 0 and at most 1.
    """

    tau: float

    def __post_init__(self) -> None:
        if not (isinstance(self.tau, int | float) and 0 < self.tau <= 1):
            raise ClaimError(
                f"A claim needs a share above 0 and at most 1; got {self.tau!r}. At least 0 is always true. {_FORMS}"
            )

    @classmethod
    def parse(cls, text: str | Claim) -> Claim:
        """Read a claim; a ``Claim`` passes through.

        Raises:
            ClaimError: it is vague or not testable; the message says why, and lists the forms.

        >>> Claim.parse(" Robust accuracy at least 60 % ")
        Claim(tau=0.6)
        >>> str(Claim.parse("accuracy >= 0.6"))
        'accuracy >= 0.6'
        """
        if isinstance(text, Claim):
            return text
        words = " ".join(str(text).lower().split())
        match = re.fullmatch(r"([a-z -]+?) ?(>=|≥|=>|at least) ?([-+.\w]+?)( ?%)?", words)
        if match is None or match[1] not in _SUBJECTS:
            raise ClaimError(f"Cannot test the claim {text!r}: {_reason(words)} {_FORMS}")
        tau, percent = _number(match[3]), match[4] is not None
        if tau is None:
            raise ClaimError(f"Cannot test the claim {text!r}: {match[3]!r} is no number. {_FORMS}")
        if not percent and tau > 1:
            raise ClaimError(
                f"Cannot test the claim {text!r}: a share above 1 is none. Was {tau:g}% meant? Then write the sign. "
                f"{_FORMS}"
            )
        # 60 / 100 and 0.6 must be the same number, hence through the text
        return cls(float(f"{tau / 100:.15g}") if percent else tau)

    def __str__(self) -> str:
        return f"accuracy >= {self.tau!r}"


def _number(text: str) -> float | None:
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _reason(words: str) -> str:
    """Why a text is no claim, as far as can be told."""
    if "," in words:
        return "a decimal comma is ambiguous; write a point."
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
    if "accuracy" not in words:
        return "it does not say what is counted; only the share of answers that stay right is."
    return "it is not of a form that counting can decide."


def verdict(
    claim: Claim | str,
    n: int,
    survived: int,
    certified: int | None = None,
    blocked: Sequence[str] = (),
    *,
    threat: str,
    untried: Sequence[str] = (),
    alpha: float = 0.05,
    probabilistic_failure: float = 0.0,
) -> Verdict:
    """What the counts of an evaluation say about a claim.

    The truly robust are at least the certified and at most the survivors. So the upper bound of the survivors refutes
    whatever attacks were chosen, however, and on these very examples; the lower bound of the certified proves. Both are
    one-sided exact binomial bounds: a true claim is refuted, and a false one called certified, with probability at most
    alpha each. 'Upheld so far' has no such rate, as the attacks may have been too weak.

    ======================  =====================================================  =========
    word                    when (the first that fits)                             exit code
    ======================  =====================================================  =========
    blocked                 a check blocks                                         12
    refuted                 upper bound of survivors < tau                         10
    certified               lower bound of the certified share >= tau              0
    upheld so far           lower bound of survivors >= tau, and an attack ran     0
    undecided               otherwise                                              11
    ======================  =====================================================  =========

    Args:
        claim: what was claimed.
        n: examples, drawn independently from what the claim speaks of.
        survived: those still right after every attack.
        certified: those certified, None when no certificate ran.
        blocked: names of the checks that block.
        threat: short form, for the sentence.
        untried: why no attack of the plan could run, if none could: then nothing is upheld.
        alpha: error rate of each bound.
        probabilistic_failure: probability at which a certificate holds wrongly, per example; 0 for a deterministic one.
            With q the share that gets certified and p the truly robust one, q <= p + (1 - p) * failure; the lower
            bound of q is solved for p.

    Returns:
        A ``Verdict``: word, sentence, exit code, ``lower`` (from certificates, None without) and ``upper``; no bounds
        where a check blocks.

    Raises:
        UsageError: counts or probabilities that cannot be.
        CertificateContradicted: more certified than survivors, with a deterministic certificate.

    >>> verdict("accuracy >= 0.6", 1000, 512, threat="linf:8/255").word
    'refuted'

    **Source**: C. Clopper, E. Pearson, Biometrika 26 (1934), for the bounds.
    """
    claim = Claim.parse(claim)
    if not 0 <= probabilistic_failure < 1:
        raise UsageError(
            f"probabilistic_failure must lie in [0, 1), per example; got {probabilistic_failure!r}. Use 0 for a "
            "deterministic certificate."
        )
    low, high = lower_bound(survived, n, alpha), upper_bound(survived, n, alpha)
    proven = None
    if certified is not None:
        if certified > survived and probabilistic_failure == 0:
            raise CertificateContradicted(
                f"{certified} of {n} examples are certified under {threat}, but only {survived} survived the "
                "attacks. A deterministic certificate leaves no room for that: certificate or attack is wrong, or "
                "they were asked about different models."
            )
        share = lower_bound(certified, n, alpha)
        proven = max(0.0, (share - probabilistic_failure) / (1 - probabilistic_failure))
    word = _word(claim.tau, low, high, proven, bool(blocked))
    sentence = _sentence(word, claim, blocked)
    if untried and word in ("upheld so far", "undecided"):
        word = "undecided"
        sentence = (
            f"Undecided: no attack of the plan could run, so nothing was tried against the claimed "
            f"{_percent(claim.tau)} ({'; '.join(untried)}). "
        )
    if word == "blocked":
        # the counts of a broken set-up bound nothing
        return Verdict(word=word, sentence=f"{sentence}({threat}, n = {n})", exit_code=_EXIT[word], alpha=alpha)
    sentence += _evidence(n, survived, certified, low, high, proven, threat, alpha)
    return Verdict(word=word, sentence=sentence, exit_code=_EXIT[word], lower=proven, upper=high, alpha=alpha)


def _word(tau: float, low: float, high: float, proven: float | None, blocked: bool) -> Word:
    if blocked:
        return "blocked"
    if high < tau:
        return "refuted"
    if proven is not None and proven >= tau:
        return "certified"
    return "upheld so far" if low >= tau else "undecided"


def _sentence(word: Word, claim: Claim, blocked: Sequence[str]) -> str:
    share = _percent(claim.tau)
    return {
        "blocked": f"Blocked: no verdict on the claimed {share} before this is mended: {', '.join(blocked)} ",
        "refuted": f"Refuted: fewer than the claimed {share} of the answers stay right. ",
        "certified": f"Certified: at least the claimed {share} of the answers stay right, whatever the attack. ",
        "upheld so far": f"Upheld so far: no attack brought the accuracy below the claimed {share}; another might. ",
        "undecided": f"Undecided: the counts neither refute nor uphold that {share} of the answers stay right. ",
    }[word]


def _evidence(
    n: int, survived: int, certified: int | None, low: float, high: float, proven: float | None, threat: str,
    alpha: float,
) -> str:  # fmt: skip
    if n == 0:
        return f"No example was tested under {threat}."
    text = (
        f"Under {threat}, {survived} of n = {n} examples survived ({_percent(survived / n)}, an upper bound on the "
        f"robust accuracy; {_percent(1 - alpha)} one-sided bounds {_percent(low)} and {_percent(high)})"
    )
    if certified is None or proven is None:
        return f"{text}. No certificate ran."
    return f"{text}; {certified} are certified ({_percent(certified / n)}, lower bound {_percent(proven)})."


def _percent(share: float) -> str:
    """60%, 51.2%, 99.95%: as many digits as it takes, at most two after the point."""
    for digits in (0, 1):
        if abs(share * 100 - round(share * 100, digits)) < 1e-9:
            return f"{share * 100:.{digits}f}%"
    return f"{share * 100:.2f}%"
