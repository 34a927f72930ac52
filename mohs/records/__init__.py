"""Records of evaluations: a header, a ledger of rows, and the statistics to read them.

A leaf of the package: needs neither torch nor anything else of Mohs but its errors, so that a record can be
read, compared and shown where nothing can be evaluated.
"""

from mohs.records._files import write_atomically
from mohs.records.anytime import confidence_sequence, finite_sequence, mean_bounds
from mohs.records.diff import Diff, diff
from mohs.records.header import load_header
from mohs.records.ledger import Ledger
from mohs.records.looks import Look, look, looks_of, read_looks
from mohs.records.record import Record
from mohs.records.rows import SCORE, CertificateRows, Draws, Examples, Results
from mohs.records.run import Run, open_run
from mohs.records.schema import (
    SCHEMA_VERSION,
    AttackSummary,
    CertificateSummary,
    Claim,
    CurvePoint,
    Data,
    Environment,
    Finding,
    Header,
    Plan,
    Sealed,
    Step,
    Subject,
    Tactic,
    Totals,
    Verdict,
    identity_of,
)
from mohs.records.stats import (
    clopper_pearson,
    finite_bounds,
    lower_bound,
    mcnemar,
    mcnemar_of,
    median_interval,
    upper_bound,
)

__all__ = [
    "SCHEMA_VERSION",
    "SCORE",
    "AttackSummary",
    "CertificateRows",
    "CertificateSummary",
    "Claim",
    "CurvePoint",
    "Data",
    "Diff",
    "Draws",
    "Environment",
    "Examples",
    "Finding",
    "Header",
    "Ledger",
    "Look",
    "Plan",
    "Record",
    "Results",
    "Run",
    "Sealed",
    "Step",
    "Subject",
    "Tactic",
    "Totals",
    "Verdict",
    "clopper_pearson",
    "confidence_sequence",
    "diff",
    "finite_bounds",
    "finite_sequence",
    "identity_of",
    "load_header",
    "look",
    "looks_of",
    "lower_bound",
    "mcnemar",
    "mcnemar_of",
    "mean_bounds",
    "median_interval",
    "open_run",
    "read_looks",
    "upper_bound",
    "write_atomically",
]
