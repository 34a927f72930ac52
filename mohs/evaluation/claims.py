"""Claims and verdicts: a testable sentence, what evidence says about it, with error rates, and when enough was seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mohs import records
from mohs.errors import ClaimError
from mohs.evaluation._claim_kinds import Accuracy, Certified, Claim, Detection, Median, Stability, Word
from mohs.evaluation.confirmation import ALPHA, needed
from mohs.evaluation.evidence import Counts, Evidence
from mohs.records.schema import Verdict

__all__ = [
    "Accuracy",
    "Certified",
    "Claim",
    "Detection",
    "Median",
    "Stability",
    "decided",
    "judge",
    "of_record",
    "require",
    "verdict",
]
EXIT: dict[Word, int] = {"upheld so far": 0, "certified": 0, "refuted": 10, "undecided": 11, "blocked": 12}
"""Exit codes of the command line."""


def judge(claim: Claim | str, evidence: Evidence) -> Verdict:
    """What evidence says about a claim. Numbers in, verdict out: nothing else is looked at.

    The truly robust are at least the certified and at most the survivors. So the upper bound of the survivors refutes
    whatever attacks were chosen, however, and on these very examples; the lower bound of the certified proves. Both are
    one-sided bounds: a true claim is refuted, and a false one called certified, with probability at most alpha each. Of a
    random model, a confirmed break may be an error itself, for which the upper bound allows (``Counts.kept``). 'Upheld
    so far' has no such rate, as the attacks may have been too weak; instead it has a grade, A where every check is quiet and B where
    some warn, if the evidence says what checks saw. The same holds for sizes of changes and detections.

    ======================  =====================================================  =========
    word                    when (the first that fits)                             exit code
    ======================  =====================================================  =========
    blocked                 a check blocks                                         12
    refuted                 upper bound of survivors < tau                         10
    certified               lower bound of the certified share >= tau              0
    upheld so far           lower bound of survivors >= tau, and an attack ran     0
                            (not one that should have adapted and did not)
    undecided               otherwise                                              11
    ======================  =====================================================  =========

    Args:
        claim: what was claimed.
        evidence: of a kind that the claim needs: ``Counts`` for shares, ``Scores`` for single draws of random models, ``Sizes``
            for medians, ``Detections`` for detectors.

    Numbers alone name no model: a verdict on them is a calculation. ``mohs.evaluate`` binds one to the hashes of weights, code and
    data, and a change of any of them makes another run.

    Returns:
        A ``Verdict``: word, sentence, exit code, grade, ``lower`` (from certificates, None without) and ``upper``; no bounds
        where a check blocks.

    Raises:
        ClaimError: the claim cannot be parsed, or needs other evidence.

    Cost: none to speak of.

    >>> judge("accuracy >= 0.6", Counts(threat="linf:8/255", n=1000, survived=512)).word
    'refuted'

    **Differs from the paper**: not of one.

    **Source**: C. Clopper, E. Pearson, Biometrika 26 (1934), for the bounds at a fixed size; ``confidence_sequence``,
    ``finite_bounds``, ``mean_bounds`` and ``median_interval`` name those of the others.
    """
    claim = Claim.parse(claim)
    weighed = claim.weigh(evidence)
    word: Word = "blocked" if evidence.blocked else weighed.word()
    sentence = claim.sentence(word)
    if word == "blocked":
        # the counts of a broken set-up bound nothing
        sentence += f"{', '.join(evidence.blocked)} ({evidence.threat}, n = {_n(evidence)})"
        return Verdict(word=word, sentence=sentence, exit_code=EXIT[word], alpha=evidence.alpha)
    if evidence.untried and word in ("upheld so far", "undecided"):
        word = "undecided"
        sentence = (
            "Undecided: no attack of the plan could run, so nothing was tried against the claimed "
            f"{claim.said} ({'; '.join(evidence.untried)}). "
        )
    if evidence.naive and word == "upheld so far":
        word = "undecided"
        sentence = (
            f"Undecided: the attacks were not adapted to the model ({evidence.naive}), so that none of them refuted the claimed "
            f"{claim.said} says nothing. "
        )
    grade, why = _graded(evidence) if word == "upheld so far" else ("", "")
    return Verdict(
        word=word, sentence=sentence + weighed.sentence + why, exit_code=EXIT[word], grade=grade, lower=weighed.proven,
        upper=weighed.high, alpha=evidence.alpha,
    )  # fmt: skip


def _graded(evidence: Evidence) -> tuple[Literal["", "A", "B"], str]:
    """How far the checks trust what is upheld, and the sentence that says so."""
    if evidence.warned is None:
        return "", ""
    names = list(dict.fromkeys(evidence.warned))
    if not names:
        return "A", " Grade A: every check that ran is quiet."
    return "B", f" Grade B: {'these checks warn' if len(names) > 1 else 'this check warns'}: {', '.join(names)}."


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
    error: float = 0.0,
) -> Verdict:
    """``judge`` on plain counts; see ``Counts`` for what they mean.

    >>> verdict("accuracy >= 0.6", 1000, 512, threat="linf:8/255").word
    'refuted'
    """
    counts = Counts(
        threat=threat, n=n, survived=survived, certified=certified, blocked=blocked, untried=untried, alpha=alpha,
        failure=probabilistic_failure, error=error,
    )  # fmt: skip
    return judge(claim, counts)


def decided(
    claim: Claim | str,
    n: int,
    survived: int,
    total: int | None = None,
    *,
    certified: int | None = None,
    alpha: float = 0.05,
    error: float = 0.0,
) -> bool:
    """Do the counts so far decide a claim, so that an evaluation may end early?

    The bounds allow looking after every example. What must hold: the examples come in an order that was fixed before any was
    attacked, those counted are the first n of it, and each of them has been through the whole plan (or been broken). The
    verdict must then be given with ``Counts(stopped=True)``, also where the run went on to the end.

    Args:
        claim: on a share: accuracy, stability or certified.
        n: examples seen.
        survived: those that no attack broke.
        total: size of the test set; needed if the claim is about it, and of no use otherwise.
        certified: those certified, None without certificates.
        alpha: error rate of each bound.
        error: probability at which an example of a random model is called broken wrongly; see ``Counts``.

    Raises:
        ClaimError: a claim on something else.

    >>> decided("accuracy >= 0.6", 40, 10), decided("accuracy >= 0.6", 40, 22)
    (True, False)
    >>> decided("accuracy >= 0.6 on these examples", 60, 19, total=100)  # 41 are broken, more than 40 would be allowed
    True
    """
    claim = Claim.parse(claim)
    here = getattr(claim, "here", None)
    if here is None:
        raise ClaimError(
            f"Only a claim on a share can be decided example by example; got '{claim}'. Allowed: accuracy, stability, certified."
        )
    if here and total is None:
        raise ClaimError(f"The claim '{claim}' is about one test set: give its size as total.")
    counts = Counts(
        threat="any",
        n=n,
        survived=survived,
        total=total if here else None,
        certified=certified,
        alpha=alpha,
        stopped=True,
        error=error,
    )
    return judge(claim, counts).word != "undecided"


def require(claim: Claim, certificates: Sequence[Any], *, rejects: bool = False) -> None:
    """Refuse a claim for which an evaluation finds no evidence, before it begins; ``rejects``: of a model that may reject.

    Raises:
        ClaimError: what it needs, and what to do instead.
    """
    if isinstance(claim, Stability) and rejects:
        raise ClaimError(
            f"The claim '{claim}' says that answers stay the same, and this model may reject an input instead, which is no success "
            "for an attack. Claim accuracy."
        )
    if isinstance(claim, Certified) and not certificates:
        raise ClaimError(
            f"The claim '{claim}' needs a certificate, and none was asked for. Give certificates=[mohs.certificates.CROWN()] "
            "(on the command line: --certify crown)."
        )
    if isinstance(claim, Median):
        raise ClaimError(
            f"The claim '{claim}' needs {claim.needs}, and an evaluation looks at one radius. Use mohs.minimum_norm and "
            "mohs.evaluation.judge(claim, Sizes(...)), or claim 'accuracy >= 0.5' at that radius, which is the same."
        )
    if isinstance(claim, Detection):
        raise ClaimError(
            f"The claim '{claim}' needs {claim.needs}, and an evaluation attacks classifiers only. Count them with an attack "
            "that knows the detector, and use mohs.evaluation.judge(claim, Detections(...))."
        )


def of_record(
    claim: Claim, record: records.Record, blocked: Sequence[str] = (), untried: Sequence[str] = (), *, naive: str = "",
    warned: Sequence[str] | None = None, stopped: bool = False, total: int | None = None,
) -> Verdict:  # fmt: skip
    """The verdict on what a record holds; for claims that ``require`` lets pass.

    For stability, an answer that was wrong to begin with may well stay the same: no attack was tried on it, so it refutes
    nothing and upholds nothing.

    Of a random model the majority vote is judged. An example is called broken by a confirmation of error rate ``ALPHA`` in all, and
    the upper bound allows for it. That an unchanged input is wrong was seen on few draws, the same that chose the examples to be
    attacked: for the upper bound it counts only where the draws of its score, which chose nothing, confirm it at that rate; else
    it refutes nothing and upholds nothing.

    Args:
        claim: what was claimed.
        record: of an evaluation, complete or not.
        blocked: names of the checks that block.
        untried: why no attack of the plan could run, if none could.
        naive: why attacks that did not adapt to the model uphold nothing.
        warned: names of the checks that warn, for the grade; None: no checks looked.
        stopped: was the number of examples chosen while looking at the answers? Also true of a run that might have ended
            early and did not.
        total: size of the test set, for a claim about it. Default: the examples of the record are all there are.

    Raises:
        ClaimError: the record does not say by hashes which weights and which code it is of.
    """
    subject = record.header.subject
    if not (subject.weights_sha256 and subject.code_sha256):
        raise ClaimError(
            f"The record {record.dir} holds no hash of the model's {'code' if subject.weights_sha256 else 'weights'}, so nothing "
            f"says of which model the claim '{claim}' is. Evaluate it again."
        )
    random = int(record.header.threat.get("draws") or 0) > 0
    if isinstance(claim, Stability):
        wrong = int((~record.correct).sum())
    else:
        wrong = int(_doubtful(record).sum()) if random else 0
    counts = Counts(
        threat=record.header.threat_text, n=record.n, survived=int(record.survived.sum()) + wrong, unattacked=wrong,
        certified=None if record.certified is None else int(record.certified.sum()), blocked=blocked, untried=untried,
        naive=naive, warned=warned, total=(total or record.n) if getattr(claim, "here", False) else None, stopped=stopped,
        error=ALPHA * random,
    )  # fmt: skip
    return judge(claim, counts)


def _doubtful(record: records.Record) -> NDArray[np.bool_]:
    """Which unchanged inputs of a random model were answered wrongly, but perhaps by luck, [N]."""
    doubtful = ~record.correct
    scored = record.draws.attack == records.SCORE
    rows = record.draws
    for example, drawn, wrong in zip(rows.example[scored], rows.drawn[scored], rows.wrong[scored]):
        doubtful[example] &= wrong < needed(int(drawn), ends=1)
    return doubtful


def _n(evidence: Evidence) -> int:
    return int(getattr(evidence, "n", 0))
