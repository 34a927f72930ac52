"""A record as its readers see it: accuracies, the bracket, rows and stored points."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mohs.errors import RecordError
from mohs.records import _files, anytime, stats
from mohs.records.header import load_header
from mohs.records.ledger import CertificateRows, Ledger, Results
from mohs.records.rows import SCORE, Draws

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mohs.records.schema import Header, Verdict


class Record:
    """What a run found. For every example: certified <= truly robust <= survived.

    Counts and accuracies come from the rows of the ledger, never from the header, so that text and rows
    cannot disagree. Everything small is read at once; points and inputs are read from disk when asked for.

    Attributes:
        dir: the run directory.
        header: the content of ``record.json``.
        examples: one entry per example, by position.
        draws: fresh draws of a random model, one entry per attacked point that was asked again.
        temporary: whatever must live as long as this record, such as a temporary directory.
    """

    temporary: object = None

    def __init__(self, directory: Path, header: Header, ledger: Ledger) -> None:
        self.dir = directory
        self.header = header
        self.examples = ledger.examples()
        self._results = {attack: ledger.results(attack) for attack in ledger.attacks()}
        self._certificates = ledger.certificates()
        self.draws: Draws = ledger.draws()
        self._check_rows()

    @classmethod
    def load(cls, directory: str | Path) -> Record:
        """Read a run directory; it is not changed and may be read-only.

        Args:
            directory: what an evaluation wrote.

        Raises:
            RecordError: there is no record, or it is damaged.
        """
        directory = Path(directory)
        header = load_header(directory)
        with Ledger.open(directory / _files.LEDGER) as ledger:
            if ledger.identity != header.identity:
                raise RecordError(
                    f"{directory}: ledger and record.json belong to different runs. Restore the directory from a copy."
                )
            return cls(directory, header, ledger)

    def verify(self) -> None:
        """Compare the ledger with the digest written when the run ended.

        Raises:
            RecordError: the rows are not the ones the run wrote, or the run has not ended.
        """
        expected = self.header.ledger_digest
        if expected is None:
            raise RecordError(f"{self.dir} has no digest: its run has not ended. Issue its command again to go on.")
        with self._ledger() as ledger:
            found = ledger.digest()
        if found != expected:
            raise RecordError(
                f"{self.dir}: the ledger was changed after the run (digest {found[:12]}, "
                f"recorded {expected[:12]}). Restore it from a copy."
            )

    # ---- the bracket ---------------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.examples)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the model answers the unchanged input rightly, [N]."""
        right: NDArray[np.bool_] = self.examples.clean_label == self.examples.label
        return right

    @cached_property
    def breaker(self) -> NDArray[np.int64]:
        """Position in the plan of the first attack that broke each example, [N]; -1 where none did."""
        first = np.full(self.n, -1, dtype=np.int64)
        for attack in sorted(self._results, reverse=True):
            rows = self._results[attack]
            first[self._at(rows.example[rows.success])] = attack
        return first

    @cached_property
    def survived(self) -> NDArray[np.bool_]:
        """Whether each example was right and no attack broke it, [N]."""
        return self.correct & (self.breaker < 0)

    @cached_property
    def certified(self) -> NDArray[np.bool_] | None:
        """Whether some certificate proved each right answer, [N]; None when no certificate ran."""
        if not self._certificates:
            return None
        proved = np.zeros(self.n, dtype=bool)
        for rows in self._certificates.values():
            proved[self._at(rows.example[rows.holds])] = True
        return proved & self.correct

    @property
    def clean_accuracy(self) -> float:
        """Share of unchanged inputs answered rightly; NaN without examples."""
        return _share(self.correct)

    @property
    def robust_accuracy(self) -> float:
        """Share that survived every attack tried: an upper bound on the robust accuracy."""
        return _share(self.survived)

    @property
    def certified_accuracy(self) -> float | None:
        """Share proved right for every change the threat allows; None when no certificate ran."""
        return None if self.certified is None else _share(self.certified)

    @cached_property
    def scores(self) -> NDArray[np.float64] | None:
        """Of a random model, the share of fresh draws on which each example stays right at the strongest point found, [N]; None
        of another one, or before the end. The draws had no part in anything else."""
        rows = self.draws.attack == SCORE
        if self.n == 0 or int(rows.sum()) < self.n:
            return None
        return 1 - self.draws.wrong[rows] / self.draws.drawn[rows]

    @property
    def expected_accuracy(self) -> float | None:
        """Of a random model, the chance that one query at the strongest point found is answered rightly, over all examples: an
        upper bound on it for the strongest points there are. None of another model, or before the end."""
        return None if self.scores is None else float(self.scores.mean())

    def confirmation(self, attack: int, examples: Iterable[int]) -> NDArray[np.int64]:
        """Which confirmation at its example an attack's was, of a random model: 1 where no earlier attack had one."""
        earlier = self.draws.example[(self.draws.attack != SCORE) & (self.draws.attack < attack)]
        asked = np.bincount(earlier, minlength=int(self.examples.id.max(initial=0)) + 1)
        return 1 + asked[np.asarray(list(examples), dtype=np.int64)]

    def cost_curve(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Accuracy against cost: numbers of passes [M] at which examples broke, rising, and the accuracy from each on [M].

        The passes are those of one example: forwards and backwards of every attack up to the one that broke it.
        """
        spent = np.zeros(self.n, dtype=np.int64)
        breaker = self.breaker
        for attack, rows in self._results.items():
            at = self._at(rows.example)
            counted = (breaker[at] < 0) | (breaker[at] >= attack)  # not what the control subset got after it was broken
            np.add.at(spent, at[counted], (rows.forwards + rows.backwards)[counted])
        passes, fell = np.unique(spent[self.correct & (breaker >= 0)], return_counts=True)
        return passes, (self.correct.sum() - fell.cumsum()) / max(self.n, 1)

    @property
    def contradicted(self) -> NDArray[np.int64]:
        """Positions of examples that are certified and broken at once: none, if certificates are sound."""
        if self.certified is None:
            return np.zeros(0, dtype=np.int64)
        return np.asarray(self.examples.id[self.certified & ~self.survived], dtype=np.int64)

    @property
    def verdict(self) -> Verdict | None:
        """What the run says about the claim; None without a claim or before the end."""
        return self.header.verdict

    def interval(self, what: str = "survived", alpha: float = 0.05) -> tuple[float, float]:
        """Exact two-sided Clopper-Pearson interval of a share; of a run that may end early, one that is valid at any end.

        Args:
            what: survived, correct or certified.
            alpha: one minus the confidence.
        """
        chosen = {"survived": self.survived, "correct": self.correct, "certified": self.certified}.get(what)
        if chosen is None:
            raise RecordError(
                f"no interval for {what!r}: allowed are survived, correct and (after a certificate ran) certified."
            )
        bounds = anytime.confidence_sequence if self.header.until == "decided" else stats.clopper_pearson
        return bounds(int(chosen.sum()), self.n, alpha)

    def describe(self) -> str:
        """Say in a sentence what is known, with n, interval, threat and the words "upper bound"."""
        if self.n == 0:
            return f"The record {self.dir} holds no examples."
        if not self._results:
            text = f"No attack ran on these {self.n:,} examples, so nothing is known about robustness under "
            return f"{text}{self.header.threat_text} (clean accuracy {self.clean_accuracy:.1%})."
        k, (low, high) = int(self.survived.sum()), self.interval()
        text = (
            f"{self.robust_accuracy:.1%} of {self.n:,} examples survived every attack under "
            f"{self.header.threat_text}: an upper bound on robust accuracy "
            f"({k:,} of {self.n:,}, 95% interval {low:.1%} to {high:.1%}; "
            f"clean accuracy {self.clean_accuracy:.1%})"
        )
        if self.scores is not None:
            low, high = anytime.mean_bounds(self.scores)
            text += (
                "; an answer is the majority of the model's draws. A single draw at the strongest points found is right with a "
                f"chance of {self.expected_accuracy:.1%} (95% interval {low:.1%} to {high:.1%})"
            )
        if self.certified is not None:
            text += f"; {self.certified_accuracy:.1%} are certified"
        if self.header.status != "complete":
            text += f"; the run is {self.header.status}, not complete"
        return text + "."

    # ---- rows and points -----------------------------------------------------------------------------

    @property
    def attacks(self) -> list[int]:
        """Positions in the plan of the attacks that have rows."""
        return list(self._results)

    def results(self, attack: int) -> Results:
        """All rows of one attack, by example."""
        if attack not in self._results:
            raise RecordError(f"{self.dir} has no rows of attack {attack}; it has those of {self.attacks}.")
        return self._results[attack]

    def certificates(self) -> dict[str, CertificateRows]:
        """What each certificate proved, by name."""
        return dict(self._certificates)

    def points(self, attack: int, examples: Iterable[int] | None = None) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Adversarial inputs of an attack: positions [M] and points [M, ...], of all or of some examples."""
        with self._ledger() as ledger:
            return ledger.points(attack, examples)

    def inputs(self, examples: Iterable[int] | None = None) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Stored clean inputs: positions [M] and inputs [M, ...], of all or of some examples."""
        with self._ledger() as ledger:
            return ledger.inputs(examples)

    def traces(self) -> list[tuple[int, int, int, NDArray[Any]]]:
        """The objective after each step as (attack, example, restart, values [steps])."""
        with self._ledger() as ledger:
            return ledger.traces()

    def digest(self) -> str:
        """Hash all rows except the seconds."""
        with self._ledger() as ledger:
            return ledger.digest()

    def attack_name(self, attack: int) -> str:
        """Name of an attack by its position in the plan."""
        summaries = {s.index: s.name for s in self.header.attacks}
        steps = self.header.plan.steps
        return summaries.get(attack) or (steps[attack].name if attack < len(steps) else f"attack {attack}")

    def _ledger(self) -> Ledger:
        return Ledger.open(self.dir / _files.LEDGER, check=False)

    def _at(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.examples.id, ids)

    def _check_rows(self) -> None:
        known = set(self.examples.id.tolist())
        answers: list[Any] = [*self._results.values(), *self._certificates.values(), self.draws]
        for rows in answers:
            if set(rows.example.tolist()) - known:
                raise RecordError(
                    f"{self.dir}: the ledger holds results of examples it does not list; it is "
                    "damaged. Restore it from a copy, or run the evaluation again."
                )


def _share(flags: NDArray[np.bool_]) -> float:
    return float(flags.mean()) if len(flags) else float("nan")
