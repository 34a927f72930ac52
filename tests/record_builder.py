"""A synthetic record for the tests of records and reports: no model, no attack, only plausible rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mohs.records import (
    AttackSummary,
    CertificateRows,
    CertificateSummary,
    Claim,
    CurvePoint,
    Data,
    Environment,
    Examples,
    Finding,
    Header,
    Plan,
    Results,
    Run,
    Step,
    Subject,
    Verdict,
    identity_of,
    open_run,
)

NAMES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
PLAN = [
    ("APGD", "APGD(steps=100, objective=cross_entropy)", "gradient", 5),
    ("APGD targeted", "APGD(steps=100, objective=margin, targets=9)", "gradient", 1),
    ("FAB", "FAB(steps=100)", "gradient", 1),
    ("Square", "Square(queries=5000)", "score", 1),
]


def header(n: int = 40, shape: tuple[int, ...] = (1, 12, 12), **fields: Any) -> Header:
    """A header whose identity follows from its seed, its weights and its threat."""
    content: dict[str, Any] = {
        "command": "mohs run bundled:plain --data bundled:fashion --threat linf:8/255 --out runs/demo",
        "seed": 0,
        "batch": 256,
        "subject": Subject(
            spec="bundled:plain",
            arch="Conv(1, 16) ReLU Conv(16, 32) ReLU Linear(1568, 100) ReLU Linear(100, 10)",
            weights_sha256="ab" * 32,
            code_sha256="ef" * 32,
            parameters=166_406,
            classes=10,
        ),
        "data": Data(spec="bundled:fashion", n=n, hash="cd" * 32, shape=list(shape), class_names=NAMES),
        "threat": {
            "region": "linf",
            "eps": 8 / 255,
            "box": [0.0, 1.0],
            "access": "GRADIENT",
            "queries": None,
            "knowledge": {"weights": True, "training_data": True, "randomness": "distribution"},
            "draws": 0,
        },
        "threat_text": "linf:8/255",
        "plan": Plan(name="standard", steps=[Step(name=a, config=c, restarts=r) for a, c, _, r in PLAN]),
        "claim": Claim(text="accuracy >= 0.6", tau=0.6),
        "environment": Environment(
            python="3.11.2", torch="2.13.0", numpy="2.4.6", mohs="0.1.0", platform="Linux x86_64", threads=2
        ),
    } | fields
    identity = identity_of({"m": content["subject"].weights_sha256, "t": content["threat"], "s": content["seed"]})
    return Header(**({"identity": identity} | content))


def examples(n: int = 40, seed: int = 0) -> Examples:
    """Examples of which about one in ten is answered wrongly."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 10, n)
    wrong = rng.random(n) < 0.1
    clean_label = np.where(wrong, (label + 1) % 10, label)
    margin = np.where(wrong, -1.0, 1.0) * rng.uniform(0.1, 8, n)
    return Examples(
        id=np.arange(n),
        hash=[f"{i:016x}" for i in range(n)],
        label=label,
        clean_label=clean_label,
        clean_margin=margin,
        clean_confidence=1 / (1 + np.exp(-np.abs(margin))),
        control=np.arange(n) < n // 4,
    )


def fill(
    run: Run,
    n: int = 40,
    shape: tuple[int, ...] = (1, 12, 12),
    seed: int = 0,
    batch: int = 10,
    stop: int | None = None,
) -> list[AttackSummary]:
    """Write what is not yet written, batch by batch; ``stop`` ends after so many batches, as a kill would."""
    listed = examples(n, seed)
    run.ledger.put_examples(listed)
    correct = listed.clean_label == listed.label
    alive, done, summaries = correct.copy(), 0, []
    for attack, (name, config, access, _) in enumerate(PLAN):
        won = np.random.default_rng(100 * seed + attack).random(n) < (0.35, 0.12, 0.03, 0.02)[attack]
        todo = (alive | (listed.control & correct)).nonzero()[0]
        answered = set(run.ledger.answered(attack).tolist())
        for start in range(0, len(todo), batch):
            ids = [int(i) for i in todo[start : start + batch] if int(i) not in answered]
            if not ids:
                continue
            if stop is not None and done >= stop:
                return summaries
            done += 1
            write_batch(run, listed, attack, ids, won, shape)
        for example in todo[:6]:
            for restart in range(4):
                steps = np.arange(40)
                rng = np.random.default_rng([attack, int(example), restart])
                level = listed.clean_margin[example]
                values = level * (rng.uniform(0.2, 1.2) * (1 - np.exp(-steps / rng.uniform(4, 12))) - 1)
                run.ledger.put_trace(attack, int(example), restart, values + rng.normal(0, 0.05, 40))
        given, broke = int(alive.sum()), int((alive & won).sum())
        control = listed.control & correct
        alive &= ~won
        summaries.append(
            AttackSummary(
                index=attack,
                name=name,
                config=config,
                access=access,
                given=given,
                broke=broke,
                accuracy_after=float(alive.mean()),
                alone_broke=int((won & control).sum()),
                alone_n=int(control.sum()),
                forwards=given * 100,
                backwards=given * 100 if access == "gradient" else 0,
                queries=given * 100,
                seconds=1.5 + attack,
            )
        )
    proved = alive & (listed.clean_margin > 3)
    if not len(run.ledger.certified_by("CROWN")):
        run.ledger.put_certificates("CROWN", CertificateRows(np.arange(n), proved, np.where(proved, 0.04, 0.01)))
    return summaries


def one_result(example: int = 0, success: bool = True, **changes: float) -> Results:
    """One row of results, to be changed at will."""
    row: dict[str, Any] = {
        "example": example,
        "success": success,
        "size": 0.03,
        "margin": -1.0,
        "restart": 0,
        "label_after": 1,
        "confidence_after": 0.9,
        "forwards": 10,
        "backwards": 10,
        "queries": 10,
    }
    return Results(**(row | changes))


def write_batch(
    run: Run, listed: Examples, attack: int, ids: list[int], won: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Write one batch of one attack, with points and inputs for its successes."""
    points, inputs = {}, {}
    for i in ids:
        if won[i]:
            inputs[i] = picture(i, int(listed.label[i]), shape)
            noise = np.sign(np.random.default_rng([attack, i]).normal(size=shape)).astype(np.float32)
            points[i] = np.clip(inputs[i] + np.float32(8 / 255) * noise, 0, 1)
    k = np.asarray(ids)
    run.ledger.put_results(
        attack,
        Results(
            example=k,
            success=won[k],
            size=np.where(won[k], 8 / 255, np.inf),
            margin=np.where(won[k], -0.5, listed.clean_margin[k] * 0.4),
            restart=k % 3,
            label_after=np.where(won[k], (listed.label[k] + 3) % 10, listed.label[k]),
            confidence_after=0.55 + 0.4 * (k % 7) / 7,
            forwards=np.full(len(k), 100),
            backwards=np.full(len(k), 100),
            queries=np.full(len(k), 100),
        ),
        points,
        inputs,
    )
    run.ledger.add_seconds(attack, 0.25)


def picture(i: int, label: int, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth picture that differs from class to class."""
    height, width = shape[-2:] if len(shape) == 3 else (1, int(np.prod(shape)))
    v, u = np.mgrid[0:height, 0:width] / max(height, width)
    wave = 0.5 + 0.5 * np.sin(6 * u * (1 + label % 4) + i) * np.cos(5 * v * (1 + label % 3))
    layers = [wave * (1 - 0.25 * c) for c in range(shape[0] if len(shape) == 3 else 1)]
    return np.stack(layers).reshape(shape).astype(np.float32)


def build(directory: Path, n: int = 40, shape: tuple[int, ...] = (1, 12, 12), seed: int = 0, **fields: Any) -> Path:
    """Make a complete record and return its directory."""
    with open_run(directory, header(n, shape, **({"seed": seed} | fields))) as run:
        attacks = fill(run, n, shape, seed)
        record = run.record()
        survived = int(record.survived.sum())
        curve = [
            CurvePoint(eps=8 / 255 * f, survived=round(n * (0.9 - 0.45 * f**0.7)), n=n, source="standard plan")
            for f in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
        ]
        curve += [
            CurvePoint(eps=8 / 255 * f, survived=round(n * 0.55 * max(0, 1 - f)), n=n, source="CROWN")
            for f in (0.25, 0.5, 0.75, 1.0)
        ]
        certified = record.certified
        run.finish(
            attacks=attacks,
            curve=curve,
            certificates=[
                CertificateSummary(name="CROWN", certified=int(certified.sum()), n=n, seconds=3.2, note="deterministic")
            ],
            checks=CHECKS,
            verdict=Verdict(
                word="undecided",
                sentence=f"{survived} of {n} examples survived; too few to decide 'accuracy >= 0.6'.",
                exit_code=11,
                lower=float(certified.mean()),
                upper=survived / n,
            ),
        )
    return directory


CHECKS = [
    Finding(id="A1", name="evaluation mode", severity="ok", saw="all 8 modules are in evaluation mode"),
    Finding(
        id="B1",
        name="zero gradient",
        severity="warn",
        saw="rows 3, 17 and 4 more have a gradient of exactly zero",
        means="an attack that follows the gradient stands still there",
        remedy="raise float precision, or add an objective on the logits",
    ),
    Finding(
        id="D4",
        name="random noise",
        severity="block",
        saw="10,000 random draws broke 2 examples that no gradient attack broke",
        means="the gradients mislead",
        remedy="declare the defense, so that an adaptive attack can be built",
    ),
    Finding(id="C4", name="restarts", severity="info", saw="the fifth restart broke 0.4% more"),
]
