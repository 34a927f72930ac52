"""What a verdict rests on: counts, scores, sizes of changes, detections. Plain numbers, so that verdicts can be simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mohs.errors import CertificateContradicted, ClaimError, UsageError
from mohs.records.anytime import confidence_sequence, finite_sequence, mean_bounds
from mohs.records.stats import checked_alpha, checked_counts, clopper_pearson, finite_bounds, median_interval

Bounds = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What all evidence says of itself.

    Args:
        threat: short form of what the adversary may do.
        blocked: names of the checks that block.
        untried: why no attack of the plan could run, if none could: then nothing is upheld.
        naive: why the attacks, which did not adapt to the model, uphold nothing; empty if they adapted or had no need to.
        warned: names of the checks that warn, for the grade of what is upheld; None where no checks looked: then there is none.
        alpha: error rate of each bound.
    """

    threat: str
    blocked: Sequence[str] = ()
    untried: Sequence[str] = ()
    naive: str = ""
    warned: Sequence[str] | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not self.threat.strip():
            raise ClaimError(
                "A claim is tested against a threat, and none was named: without one, no number says what was tried. "
                "Name it, such as 'linf:8/255'."
            )
        checked_alpha(self.alpha)


@dataclass(frozen=True, kw_only=True)
class Counts(Evidence):
    """Examples counted: n were tested, of which so many survived every attack and so many were certified.

    Args:
        n: examples, drawn independently from what the claim speaks of (or, with ``total``, at random from the test set).
        survived: those that no attack broke.
        certified: those certified, None when no certificate ran.
        failure: probability at which a certificate holds wrongly, per example; 0 for a deterministic one.
        unattacked: those among the survivors that no attack was tried on; they refute nothing and uphold nothing.
        total: size of the test set, if the claim is about that set alone.
        stopped: was n chosen while looking at the counts? Then the bounds are those that allow it.
        error: probability at most at which an example is called broken though it is not, per example; 0 for a model whose
            answers are certain. Of a random one that of ``mohs.evaluation.confirm``; ``kept`` allows for it.
    """

    n: int
    survived: int
    certified: int | None = None
    failure: float = 0.0
    unattacked: int = 0
    total: int | None = None
    stopped: bool = False
    error: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_counts(self.survived, self.n, "survived", "n")
        checked_counts(self.unattacked, self.survived, "unattacked", "survived")
        if self.total is not None:
            checked_counts(self.n, self.total, "n", "total")
        if not 0 <= self.failure < 1:
            raise UsageError(
                f"probabilistic_failure must lie in [0, 1), per example; got {self.failure!r}. Use 0 for a "
                "deterministic certificate."
            )
        if not 0 <= self.error < 1:
            raise UsageError(
                f"error must lie in [0, 1), per example; got {self.error!r}. Use 0 for a model whose answers are certain."
            )
        if self.certified is None:
            return
        checked_counts(self.certified, self.n, "certified", "n")
        if self.certified > self.survived and self.failure == 0:
            raise CertificateContradicted(
                f"{self.certified} of {self.n} examples are certified under {self.threat}, but only {self.survived} "
                "survived the attacks. A deterministic certificate leaves no room for that: certificate or attack is "
                "wrong, or they were asked about different models."
            )

    def bounds(self, k: int) -> Bounds:
        """One-sided lower and upper bound, at ``alpha`` each, on the share of which k among n are a sample."""
        if self.total is None:
            of = confidence_sequence if self.stopped else clopper_pearson
            return of(k, self.n, self.alpha, 1)
        if self.total == 0:
            return 0.0, 1.0
        if self.stopped:
            low, high = finite_sequence(k, self.n, self.total, self.alpha)
        else:
            low, high = finite_bounds(k, self.n, self.total, self.alpha, 1)
        return low / self.total, high / self.total

    @property
    def kept(self) -> float:
        """One-sided upper bound, at ``alpha``, on the share that truly withstands, from those that survived.

        Let e be ``error``. Whatever happened to other examples, one that truly withstands survives with probability 1 - e at
        least, as the draws that judge it are its own.

        Of all inputs: where the share p withstands, an example survives with probability ``s >= p (1 - e)``, given all before
        it. The number of survivors is then stochastically at least binomial with ``p (1 - e)``, and the evidence of a
        confidence sequence against a larger ``s`` a supermartingale. So ``bounds`` hold for ``p (1 - e)``, at a fixed size and
        at any time, and divided by 1 - e for p.

        Of one test set: let K' be how many of its ``total`` members survive if all are asked; at least binomially many of the K
        that withstand, ``Bin(K, 1 - e)``. With probability ``1 - alpha / 2`` K' is at most U, the bound of ``bounds`` at
        ``alpha / 2``, and with ``1 - alpha / 2`` K is at most the largest number under which ``P(Bin(K, 1 - e) <= K') > alpha /
        2``, which grows with K'. So this number at U bounds K but for alpha. Where all members were asked, K' is known, and all
        of alpha goes into the second step.

        Both need errors that are independent from example to example. They are, for any model whose noise comes from the global
        generators: a point is confirmed one row at a time, from a seed of its own, so that two examples share no draw even where
        a model draws once per batch.
        """
        if not self.error:
            return self.bounds(self.survived)[1]
        if self.total is None:
            return min(1.0, self.bounds(self.survived)[1] / (1 - self.error))
        if self.total == 0:
            return 1.0
        from scipy.special import bdtr

        known = self.n == self.total
        tail = self.alpha / (1 if known else 2)
        most = self.survived if known else round(replace(self, alpha=tail).bounds(self.survived)[1] * self.total)
        many = np.arange(most, self.total + 1)
        return float(many[bdtr(most, many, 1 - self.error) > tail].max(initial=most)) / self.total

    @property
    def proven(self) -> float | None:
        """Lower bound on the share that is truly robust, from the certificates; None without.

        With q the share that gets certified and p the truly robust one, q <= p + (1 - p) * failure; the lower bound of q is
        solved for p.
        """
        if self.certified is None:
            return None
        share = self.bounds(self.certified)[0]
        return max(0.0, (share - self.failure) / (1 - self.failure))


@dataclass(frozen=True, kw_only=True)
class Scores(Evidence):
    """Of a model with randomness of its own: each example's share of fresh draws on which it stays right.

    Args:
        scores: [N], in an order that does not depend on them; the draws must not be those that chose the attacked point.
    """

    scores: ArrayLike = field(default=())

    @property
    def n(self) -> int:
        """How many examples."""
        return int(np.size(self.scores))

    def bounds(self) -> Bounds:
        """One-sided bounds on the mean score, at any time."""
        return mean_bounds(self.scores, self.alpha, 1)


@dataclass(frozen=True, kw_only=True)
class Sizes(Evidence):
    """Sizes of the smallest changes that were found: upper bounds on the distances to the decision boundary.

    Args:
        sizes: [N]; 0 where the model is wrong to begin with, inf where nothing was found.
        reach: the largest change that was looked for; what was not found may lie just beyond.
        radii: [N], certified radii: lower bounds on the same distances; None when no certificate ran.
        baseline: the same of the model it is compared with, for a claim on the ratio.
    """

    sizes: ArrayLike = field(default=())
    reach: float = math.inf
    radii: ArrayLike | None = None
    baseline: Sizes | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        found = np.asarray(self.sizes, float)
        if not self.reach > 0 or found.ndim != 1 or not (found >= 0).all():
            raise UsageError(
                f"sizes must be a list of numbers >= 0 (inf: none found) and reach positive; got {found.shape} and {self.reach}."
            )
        if self.radii is None:
            return
        proven = np.asarray(self.radii, float)
        if proven.shape != found.shape or not (proven >= 0).all():
            raise UsageError(
                f"radii must be one number >= 0 per size; got shapes {proven.shape} and {found.shape}. Give 0 where nothing "
                "was certified."
            )
        wrong = int((proven > found * (1 + 1e-6)).sum())
        if wrong:
            raise CertificateContradicted(
                f"{wrong} of {self.n} examples are certified up to a radius at which they were broken under {self.threat}: "
                "certificate or attack is wrong, or they were asked about different models."
            )

    @property
    def n(self) -> int:
        """How many examples."""
        return int(np.size(self.sizes))

    def found(self, alpha: float) -> Bounds:
        """One-sided bounds on the median of what attacks find; the upper one bounds the true median too."""
        tried: NDArray[np.float64] = np.asarray(self.sizes, float)
        low = median_interval(np.where(np.isinf(tried), self.reach, tried), alpha, 1)[0]
        return max(0.0, low), median_interval(tried, alpha, 1)[1]

    def proven(self, alpha: float) -> float | None:
        """One-sided lower bound on the true median, from certificates; None without."""
        return None if self.radii is None else max(0.0, median_interval(self.radii, alpha, 1)[0])


@dataclass(frozen=True, kw_only=True)
class Detections(Evidence):
    """How many adversarial inputs a detector flagged, and how many clean ones, at one threshold.

    The threshold must have been chosen on other data, and the attack must know the detector: then each adversarial input it
    lets pass is a success of the adversary, and the share that is flagged bounds the detection rate from above.

    Args:
        attacked: adversarial inputs, one per example.
        detected: those flagged.
        clean: unchanged inputs.
        flagged: those flagged.
    """

    attacked: int
    detected: int
    clean: int
    flagged: int

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_counts(self.detected, self.attacked, "detected", "attacked")
        checked_counts(self.flagged, self.clean, "flagged", "clean")

    @property
    def n(self) -> int:
        """How many adversarial inputs."""
        return self.attacked
