"""Claims: sentences that an experiment can refute. Each knows what evidence it needs and how that weighs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import numpy as np

from mohs.errors import ClaimError
from mohs.evaluation.evidence import Counts, Detections, Evidence, Scores, Sizes
from mohs.records.stats import clopper_pearson

FORMS = (
    "Allowed: 'accuracy >= 0.6', 'accuracy >= 60%', 'robust accuracy at least 0.6'; likewise 'stability >= 0.6' and "
    "'certified >= 0.5', each also with 'on these examples'; 'median >= 0.3', 'median >= 2 x NAME' and "
    "'detection >= 0.9 at fpr 0.05'."
)
HERE = " on these examples"
Kind = TypeVar("Kind", bound=Evidence)
Word = Literal["refuted", "certified", "upheld so far", "undecided", "blocked"]


@dataclass(frozen=True)
class Weighed:
    """What evidence says in numbers: bounds on the true value, and what they are held against.

    Args:
        low: what the attacks left standing, from below; says something only if one trusts the attacks.
        high: from above; needs no trust.
        proven: from below, by proof; None without.
        refuted_below: the claim is refuted where ``high`` is below this.
        kept_from: it is proven or upheld where the lower bound is at least this.
        sentence: the numbers in words.
    """

    low: float
    high: float
    proven: float | None
    refuted_below: float
    kept_from: float
    sentence: str

    def word(self) -> Word:
        """The first that fits."""
        if self.high < self.refuted_below:
            return "refuted"
        if self.proven is not None and self.proven >= self.kept_from:
            return "certified"
        # where a baseline has no end, nothing is known to be as much
        return "upheld so far" if self.low >= self.kept_from < math.inf else "undecided"


@dataclass(frozen=True)
class Claim(ABC):
    """At least so much holds, whatever the adversary of the threat does. ``Claim.parse`` reads one from a text.

    Args:
        tau: the claimed number.
    """

    tau: float
    kind: ClassVar[Literal["accuracy", "stability", "certified", "median", "detection"]]
    evidence: ClassVar[tuple[type[Evidence], ...]]
    needs: ClassVar[str]
    """What it needs, in words."""

    def __post_init__(self) -> None:
        _share(self.tau)

    @classmethod
    def parse(cls, text: str | Claim) -> Claim:
        """Read a claim; a ``Claim`` passes through.

        Raises:
            ClaimError: it is vague or not testable; the message says why, and lists the forms.

        >>> Claim.parse(" Robust accuracy at least 60 % ")
        Accuracy(tau=0.6, here=False)
        >>> str(Claim.parse("detection rate at least 90% at fpr 5%"))
        'detection >= 0.9 at fpr 0.05'
        """
        from mohs.evaluation._claim_text import read

        return text if isinstance(text, Claim) else read(text)

    @property
    def said(self) -> str:
        """The claimed number as sentences name it."""
        return percent(self.tau)

    @abstractmethod
    def weigh(self, evidence: Evidence) -> Weighed:
        """Turn evidence of one of the kinds in ``evidence`` into bounds."""

    @abstractmethod
    def sentence(self, word: Word) -> str:
        """What a verdict of that word says of this claim."""


@dataclass(frozen=True)
class _Share(Claim):
    """A share of all inputs like those tested; an input that fails to begin with is none of them.

    Args:
        tau: the claimed share, above 0 and at most 1.
        here: of the examples of one test set, and not of what they were drawn from. Where all of them were evaluated, no
            statistics are left; the test set is refuted as soon as more than (1 - tau) of it are broken (of a random model: as
            soon as so many are that errors of the confirmation do not explain them).
    """

    here: bool = False
    evidence: ClassVar[tuple[type[Evidence], ...]] = (Counts,)
    subject: ClassVar[str]
    stays: ClassVar[str]
    upheld: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.subject} >= {self.tau!r}{HERE * self.here}"

    def weigh(self, evidence: Evidence) -> Weighed:
        """Bounds on the share: from the survivors from above, from the certified from below."""
        counts = self._counts(evidence)
        low, _ = counts.bounds(counts.survived - counts.unattacked)
        high = counts.kept
        text = _counted(counts, low, high, counts.proven, self.quantity)
        return Weighed(low, high, counts.proven, self.tau, self.tau, text)

    def _counts(self, evidence: Evidence) -> Counts:
        counts = _given(self, evidence, Counts)
        if self.here != (counts.total is not None):
            raise ClaimError(
                f"The claim '{self}' is about {'one test set' if self.here else 'all inputs like those tested'}, so the "
                f"counts {'need' if self.here else 'must not have'} the size of a test set (total); got {counts.total}."
            )
        return counts

    @property
    def quantity(self) -> str:
        """What is counted, as a noun."""
        return "robust accuracy"

    def sentence(self, word: Word) -> str:
        """What a verdict of that word says of this claim."""
        stays = self.stays.replace("the answers", "the answers on these examples") if self.here else self.stays
        return {
            "blocked": f"Blocked: no verdict on the claimed {self.said} before this is mended: ",
            "refuted": f"Refuted: fewer than the claimed {self.said} {stays}. ",
            "certified": f"Certified: at least the claimed {self.said} {stays}, whatever the attack. ",
            "upheld so far": f"Upheld so far: no attack {self.upheld} the claimed {self.said}; another might. ",
            "undecided": f"Undecided: the counts neither refute nor uphold that {self.said} {stays}. ",
        }[word]


@dataclass(frozen=True)
class Accuracy(_Share):
    """At least the share ``tau`` of all answers stays right; an input that is wrong to begin with does not stay right.

    Of a model with randomness of its own, an answer is the majority of its draws, and the evidence are ``Counts`` whose
    ``error`` is that of a confirmed break; so an evaluation judges it. With ``Scores`` as evidence, accuracy is the mean chance
    that a single draw is right. A record holds these scores: ``judge(claim, Scores(threat=..., scores=record.scores))``.
    """

    kind = "accuracy"
    evidence = (Counts, Scores)
    needs = (
        "how many examples were tested and survived (Counts), or the scores of single draws of a random model (Scores)"
    )
    subject = "accuracy"
    stays = "of the answers stay right"
    upheld = "brought the accuracy below"

    def weigh(self, evidence: Evidence) -> Weighed:
        """Bounds on the share that stays right."""
        if not isinstance(evidence, Scores):
            return super().weigh(evidence)
        if self.here:
            raise ClaimError(
                f"The claim '{self}' is about one test set; scores carry over to others. Leave {HERE!r} out."
            )
        low, high = evidence.bounds()
        if not evidence.n:
            return Weighed(low, high, None, self.tau, self.tau, f"No example was tested under {evidence.threat}.")
        mean = float(np.asarray(evidence.scores, dtype=float).mean())
        text = (
            f"Under {evidence.threat}, n = {evidence.n} examples stayed right on {percent(mean)} of the fresh draws (an upper "
            f"bound on the robust accuracy; {percent(1 - evidence.alpha)} one-sided bounds on the mean, by betting, "
            f"{percent(low)} and {percent(high)})."
        )
        return Weighed(low, high, None, self.tau, self.tau, text)


@dataclass(frozen=True)
class Stability(_Share):
    """At least the share ``tau`` of all answers stays what it is, right or wrong."""

    kind = "stability"
    needs = "how many answers no attack changed (Counts); answers that were not attacked are 'unattacked'"
    subject = "stability"
    stays = "of the answers stay the same"
    upheld = "brought the share that stays the same below"

    @property
    def quantity(self) -> str:
        """What is counted, as a noun."""
        return "stability"


@dataclass(frozen=True)
class Certified(_Share):
    """At least the share ``tau`` of all answers is right and certified, by the certificates of the run.

    A count of proofs, so it is never 'upheld so far'. Where it is refuted, other certificates may prove more.
    """

    kind = "certified"
    needs = "how many examples were certified (Counts, with certified)"
    subject = "certified"
    stays = "of the answers are certified"
    upheld = ""

    def weigh(self, evidence: Evidence) -> Weighed:
        """Bounds on the share that these certificates prove."""
        counts = self._counts(evidence)
        if counts.certified is None:
            raise ClaimError(f"The claim '{self}' needs {self.needs}, but no certificate ran.")
        high, proven = counts.bounds(counts.certified)[1], counts.proven or 0.0
        text = _counted(counts, counts.bounds(counts.survived)[0], counts.kept, proven, self.quantity)
        text += f" These certificates prove {percent(high)} at most." if counts.n else ""
        return Weighed(0.0, high, proven, self.tau, self.tau, text)


@dataclass(frozen=True)
class Median(Claim):
    """Half of all inputs need a change of at least ``tau`` before the answer is wrong (or ``tau`` times that of a baseline).

    The smallest changes found bound the true ones from above, so a median of them below ``tau`` refutes without any trust.
    Against a baseline, refuting needs certified radii of the baseline: its own attacks may have missed smaller changes. The
    error rate is then shared between both medians.

    Args:
        tau: size of a change in the units of the threat; a factor, if there is a baseline.
        of: the name of the baseline.
    """

    of: str | None = None
    kind = "median"
    evidence = (Sizes,)
    needs = "sizes of the smallest changes found, as mohs.minimum_norm gives them (Sizes)"

    def __post_init__(self) -> None:
        if not (isinstance(self.tau, int | float) and 0 < self.tau < math.inf):
            raise ClaimError(f"A claim on the median needs a finite size or factor above 0; got {self.tau!r}. {FORMS}")

    @property
    def said(self) -> str:
        """The claimed size, or how many times that of the baseline."""
        return f"{self.tau:g}" if self.of is None else f"{self.tau:g} times that of {self.of}"

    def __str__(self) -> str:
        return f"median >= {self.tau!r}" + (f" x {self.of}" if self.of is not None else "")

    def weigh(self, evidence: Evidence) -> Weighed:
        """Bounds on the median, or on both medians."""
        sizes = _given(self, evidence, Sizes)
        base = sizes.baseline
        if (self.of is None) != (base is None):
            raise ClaimError(
                f"The claim '{self}' {'needs a' if base is None else 'has no'} baseline. Give Sizes(baseline=...) for "
                "'median >= 2 x NAME', and only for that."
            )
        alpha = sizes.alpha / (1 if base is None else 2)
        (low, high), proven = sizes.found(alpha), sizes.proven(alpha)
        text = _sized(sizes, low, high, proven, alpha)
        if base is None:
            return Weighed(low, high, proven, self.tau, self.tau, text)
        _, base_high = base.found(alpha)
        base_proven = base.proven(alpha) or 0.0
        text += f" Of {self.of}: {_sized(base, *base.found(alpha), base.proven(alpha), alpha)}"
        if base_proven < high / self.tau < base.found(alpha)[0]:
            text += (
                " It would be refuted if the attacks had found the smallest changes of the baseline; only certificates of "
                "the baseline can say so."
            )
        return Weighed(low, high, proven, self.tau * base_proven, self.tau * base_high, text)

    def sentence(self, word: Word) -> str:
        """What a verdict of that word says of this claim."""
        return {
            "blocked": f"Blocked: no verdict on the claimed median {self.said} before this is mended: ",
            "refuted": f"Refuted: the median of the smallest changes is below the claimed {self.said}. ",
            "certified": f"Certified: the median of the smallest changes is at least the claimed {self.said}. ",
            "upheld so far": f"Upheld so far: no attack brought the median change below the claimed {self.said}; another might. ",
            "undecided": f"Undecided: the sizes neither refute nor uphold a median of {self.said}. ",
        }[word]


@dataclass(frozen=True)
class Detection(Claim):
    """A detector flags at least the share ``tau`` of adversarial inputs while it flags at most ``fpr`` of the clean ones.

    Two statements in one: either can be refuted, at half of the error rate each; both must be upheld.

    Args:
        tau: the claimed detection rate.
        fpr: the largest share of clean inputs that is flagged.
    """

    fpr: float
    kind = "detection"
    evidence = (Detections,)
    needs = "how many adversarial and how many clean inputs were flagged at one threshold (Detections)"

    def __post_init__(self) -> None:
        _share(self.tau)
        if not (isinstance(self.fpr, int | float) and 0 < self.fpr < 1):
            raise ClaimError(
                f"A false-positive rate must lie between 0 and 1; got {self.fpr!r}. A rate of exactly 0 cannot be upheld by "
                f"counting. {FORMS}"
            )

    def __str__(self) -> str:
        return f"detection >= {self.tau!r} at fpr {self.fpr!r}"

    def weigh(self, evidence: Evidence) -> Weighed:
        """Bounds on both rates; the one that decides stands for the detection rate."""
        seen = _given(self, evidence, Detections)
        half = seen.alpha / 2
        high = clopper_pearson(seen.detected, seen.attacked, half, 1)[1]
        low = clopper_pearson(seen.detected, seen.attacked, seen.alpha, 1)[0]
        alarms = clopper_pearson(seen.flagged, seen.clean, half, 1)[0]
        quiet = clopper_pearson(seen.flagged, seen.clean, seen.alpha, 1)[1]
        text = (
            f"Under {seen.threat}, {seen.detected} of n = {seen.attacked} adversarial inputs were flagged "
            f"({percent(low)} to {percent(high)}, an upper bound on the detection rate) and {seen.flagged} of "
            f"{seen.clean} clean ones ({percent(alarms)} to {percent(quiet)})."
        )
        if alarms > self.fpr:  # then it does not work at that rate, whatever it detects
            return Weighed(0.0, high, None, math.inf, math.inf, text)
        return Weighed(low if quiet <= self.fpr else 0.0, high, None, self.tau, self.tau, text)

    def sentence(self, word: Word) -> str:
        """What a verdict of that word says of this claim."""
        both = f"{self.said} of adversarial inputs are flagged at a false-positive rate of {percent(self.fpr)}"
        return {
            "blocked": f"Blocked: no verdict on the claimed {self.said} before this is mended: ",
            "refuted": f"Refuted: not at least {both}. ",
            "certified": f"Certified: at least {both}. ",
            "upheld so far": f"Upheld so far: at least {both}; another attack might pass. ",
            "undecided": f"Undecided: the counts neither refute nor uphold that {both}. ",
        }[word]


def _share(tau: float) -> None:
    if not (isinstance(tau, int | float) and 0 < tau <= 1):
        raise ClaimError(
            f"A claim needs a share above 0 and at most 1; got {tau!r}. At least 0 is always true. {FORMS}"
        )


def _given(claim: Claim, evidence: Evidence, kind: type[Kind]) -> Kind:
    if not isinstance(evidence, kind):
        raise ClaimError(f"The claim '{claim}' needs {claim.needs}; got {type(evidence).__name__}.")
    return evidence


def _counted(counts: Counts, low: float, high: float, proven: float | None, quantity: str) -> str:
    if counts.n == 0:
        return f"No example was tested under {counts.threat}."
    how = "one-sided bounds" if counts.total is None else f"one-sided bounds for all {counts.total}"
    how += ", valid whenever one stops," * counts.stopped
    bounds = f"{percent(1 - counts.alpha)} {how} {percent(low)} and {percent(high)}"
    if counts.n == counts.total:
        bounds = "these are all there are" + f"; {percent(1 - counts.alpha)} upper bound {percent(high)}" * (
            counts.error > 0
        )
    text = (
        f"Under {counts.threat}, {counts.survived} of n = {counts.n} examples survived "
        f"({percent(counts.survived / counts.n)}, an upper bound on the {quantity}; {bounds})"
    )
    if counts.unattacked:
        text += f", {counts.unattacked} of which no attack was tried on"
    drawn = (
        " An answer is the majority vote of a random model's draws, and a break is a confirmed one (error rate "
        f"{counts.error:g} per example, for which the upper bound allows)."
    ) * (counts.error > 0)
    if counts.certified is None or proven is None:
        return f"{text}. No certificate ran.{drawn}"
    share = percent(counts.certified / counts.n)
    return f"{text}; {counts.certified} are certified ({share}, lower bound {percent(proven)}).{drawn}"


def _sized(sizes: Sizes, low: float, high: float, proven: float | None, alpha: float) -> str:
    if not sizes.n:
        return f"No example was tested under {sizes.threat}."
    text = (
        f"Under {sizes.threat}, n = {sizes.n} examples have a median change between {low:.4g} and {high:.4g} as found "
        f"({percent(1 - alpha)} one-sided bounds; the found ones bound the smallest from above)"
    )
    return f"{text}. No certificate ran." if proven is None else f"{text}; by certificates it is at least {proven:.4g}."


def percent(share: float) -> str:
    """60%, 51.2%, 99.95%: as many digits as it takes, at most two after the point."""
    for digits in (0, 1):
        if abs(share * 100 - round(share * 100, digits)) < 1e-9:
            return f"{share * 100:.{digits}f}%"
    return f"{share * 100:.2f}%"
