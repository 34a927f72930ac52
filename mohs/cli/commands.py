"""The commands. Each reads its arguments, calls one public function, and shows what came back."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Group, Parameter

import mohs
from mohs.cli import screen, served
from mohs.errors import ModelError, ThreatError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from mohs.certificates.run import Method
    from mohs.data import Dataset
    from mohs.threat import Threat

app = App(
    name="mohs",
    version=mohs.__version__,
    help="""A hardness scale for neural networks.

    Takes a classifier, a threat and a claim; tries to refute the claim with attacks and to prove it with certificates;
    says which it managed, with evidence that anyone can replay. New here? Try `mohs demo`.""",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # its own answer would be silence
)

_what = Group("What is evaluated", sort_key=0)
_how = Group("How", sort_key=1)

Model = Annotated[
    str, Parameter(group=_what, help="bundled:NAME, package.module:factory, FILE.pt2, FILE.onnx or a URL")
]
Layers = Annotated[str, Parameter(group=_what, help="bundled:NAME, package.module:factory, FILE.pt2 or FILE.onnx")]
Data = Annotated[str, Parameter(group=_what, help="bundled:NAME, idx:DIR, cifar10:DIR, npz:FILE or folder:DIR")]
ThreatText = Annotated[
    str,
    Parameter(group=_what, help="such as linf:8/255, l2:0.5, l1:10, l0:20, patch:5, words:2, or 'linf:8 in [0, 255]'"),
]
Weights = Annotated[
    Path | None, Parameter(group=_what, help="weights for package.module:factory (.safetensors or a state dict)")
]
Count = Annotated[int | None, Parameter(name=["--n"], group=_what, help="only the first N examples")]
Split = Annotated[Literal["test", "train"], Parameter(group=_what, help="which part of the data set")]
Seed = Annotated[int, Parameter(group=_how, help="of all randomness")]
Batch = Annotated[
    int | None,
    Parameter(group=_how, help="physical batch size; equal sizes give identical results (256 at most)"),
]
AccessName = Annotated[
    Literal["label", "score", "logit", "gradient"],
    Parameter(
        name=["--access"], group=_what, help="what one look shows the adversary; with label, HopSkipJump alone works"
    ),
]
AnswersName = Literal["probabilities", "logits", "labels"] | None
Answers = Annotated[
    AnswersName,
    Parameter(group=_what, help="what the server of a URL answers; default: probabilities"),
]
Classes = Annotated[int | None, Parameter(group=_what, help="how many there are, for --answers labels")]
DefenseText = Annotated[
    list[str] | None,
    Parameter(
        name=["--defense"], group=_what,
        help="what stands before the model, such as jpeg:75 (mohs list defenses); once for each, in the order data pass through",
    ),
]  # fmt: skip
Queries = Annotated[
    int | None, Parameter(group=_what, help="looks per example the adversary may take; default: no limit")
]
Control = Annotated[
    int | None, Parameter(group=_how, help="examples that every attack is tried on, broken or not (default: 100)")
]
Adaptive = Annotated[
    Literal["declared", "blind", "off"],
    Parameter(
        group=_how,
        help="how to find gradients where the model hides them: with what defenses declare, without believing them, or not at all",
    ),
]
Needles = Annotated[
    int,
    Parameter(
        name=["--exam"], group=_how, help="on so many examples, whether the plan finds a point hidden there (0: none)"
    ),
]
Until = Annotated[
    Literal["end", "decided"],
    Parameter(group=_how, help="decided: end as soon as the claim is; the examples come in a random order then"),
]
Reject = Annotated[
    int | None,
    Parameter(
        group=_what,
        help="the logit by which the model rejects an input (-1: the last); default: as its defenses declare",
    ),
]
SealFile = Annotated[
    Path | None,
    Parameter(group=_what, help="evaluate the examples that mohs seal chose, and write the look down beside FILE"),
]
Stated = Annotated[float | None, Parameter(group=_how, help="clean accuracy the model is said to have, 0 to 1")]


def _load(
    model: str, data: str, weights: Path | None, split: str, n: int | None, answers: str | None = None,
    classes: int | None = None, defense: list[str] | None = None,
) -> tuple[nn.Module, Dataset]:  # fmt: skip
    from mohs import data as datasets

    net = _defended(served.connect(model, weights, answers, classes, trusted=True), defense)
    dataset = datasets.load(data, split=split, n=n)
    scheme, _, place = data.partition(":")
    if scheme != "bundled":  # so that the record says where it was, wherever it is read
        dataset = replace(dataset, name=f"{scheme}:{Path(place).expanduser().absolute()}")
    return net, dataset


def _defended(net: nn.Module, defense: list[str] | None) -> nn.Module:
    if not defense:
        return net
    from mohs import defenses

    return defenses.parse(defense)(net).eval()


def _threat(text: str, access: str, queries: int | None) -> Threat:
    from mohs.threat import Access, Knowledge, Threat

    granted = Access[access.upper()]
    # who knew the weights would take gradients of a copy
    known = Knowledge(weights=granted == Access.GRADIENT)
    return replace(Threat.parse(text), access=granted, queries=queries, knowledge=known)


def _spec(model: str, weights: Path | None, answers: str | None, classes: int | None, defense: list[str] | None) -> str:
    """How a record names the model; files with their whole path, as a replay may start elsewhere."""
    if defense:
        return f"{_spec(model, weights, answers, classes, None)} --defense {','.join(defense).replace(' ', '')}"
    from mohs.models import is_url

    if is_url(model):
        return served.spec(model, answers, classes)
    if Path(model).suffix and Path(model).is_file():
        model = str(Path(model).absolute())
    return model if weights is None else f"{model} --weights {weights.expanduser().absolute()}"


@app.command
def demo(*, out: Path = Path("runs/demo"), n: Count = 400) -> int:
    """See the whole in under a minute: two bundled nets, one claim, one report each.

    Parameters
    ----------
    out
        directory of the records and reports.
    """
    from mohs.cli.demo import demo as run_demo

    return run_demo(out, n)


@app.command(name="list")
def list_(what: Literal["attacks", "defenses", "models", "data", "plans"]) -> int:
    """List what there is: attacks, defenses, models, data or plans."""
    if what == "attacks":
        rows = [(name, (cls.__doc__ or "").strip().splitlines()[0]) for name, cls in mohs.attacks.REGISTRY.items()]
    elif what == "defenses":
        from mohs import defenses

        rows = [(name, (cls.__doc__ or "").strip().splitlines()[0]) for name, cls in defenses.REGISTRY.items()]
    elif what == "models":
        from mohs import models

        rows = models.available()
    elif what == "data":
        from mohs import data

        rows = data.available()
    else:
        from mohs.evaluation import available_plans, load_plan

        rows = [(name, load_plan(name).description) for name in available_plans()]
    screen.listing(what, rows)
    return 0


@app.command
def check(
    model: Model, data: Data, /, *, threat: ThreatText, access: AccessName = "gradient", queries: Queries = None,
    weights: Weights = None, defense: DefenseText = None, answers: Answers = None, classes: Classes = None,
    n: Count = None, split: Split = "test", stated_accuracy: Stated = None, seed: Seed = 0,
) -> int:  # fmt: skip
    """Look for what would make an evaluation worthless, before spending time on one.

    It takes 14 to 20 forwards for each example of a sample of 64.
    """
    from mohs.evaluation import check as run_checks

    parsed = _threat(threat, access, queries)
    served.refuse(model, access, answers)
    net, dataset = _load(model, data, weights, split, n, answers, classes, defense)
    findings = run_checks(net, dataset, parsed, stated_accuracy=stated_accuracy, seed=seed)
    screen.findings(findings)
    return 12 if any(f.severity == "block" for f in findings) else 0


@app.command
def run(
    model: Model, data: Data, /, *, threat: ThreatText, out: Annotated[Path, Parameter(group=_how)],
    plan: Annotated[str, Parameter(group=_how, help="a built-in plan (mohs list plans) or a TOML file")] = "standard",
    claim: Annotated[str | None, Parameter(group=_what, help="such as 'accuracy >= 0.6'")] = None,
    certify: Annotated[list[str] | None, Parameter(group=_how, help="certificates to try: ibp, crown")] = None,
    access: AccessName = "gradient", queries: Queries = None,
    weights: Weights = None, defense: DefenseText = None, answers: Answers = None, classes: Classes = None,
    n: Count = None, split: Split = "test", stated_accuracy: Stated = None,
    seed: Seed = 0, batch: Batch = None, control: Control = None, adaptive: Adaptive = "declared",
    exam: Needles = 0, until: Until = "end", reject: Reject = None, seal: SealFile = None,
) -> int:  # fmt: skip
    """Attack a model, record the evidence, and give a verdict on a claim.

    Issue the same command again to go on with an interrupted run. A model behind a URL needs --access score or logit, and
    an attack that takes no gradients; the environment variable MOHS_HTTP_AUTHORIZATION is sent to it as the header
    Authorization.

    Parameters
    ----------
    out
        directory of the record: new, empty, or an earlier part of this very run.
    """
    from mohs.errors import CertificateContradicted
    from mohs.evaluation import Claim, Seal, evaluate, load_plan
    from mohs.records import Record
    from mohs.reports import render

    parsed, chosen = _threat(threat, access, queries), load_plan(plan)  # refused before anything is loaded or written
    stated = Claim.parse(claim) if claim is not None else None
    if seal is not None and n is not None:
        raise UsageError("--seal says which examples are evaluated, so --n has no place beside it. Leave --n out.")
    proofs, sealed = [_certificate(name) for name in certify or []], None if seal is None else Seal.read(seal)
    served.refuse(model, access, answers)
    served.refuse_idle(model, chosen, parsed)
    if proofs:
        served.refuse_proof(model)
    net, dataset = _load(model, data, weights, split, n, answers, classes, defense)
    try:
        with screen.Progress() as progress:
            record = evaluate(
                net, dataset, parsed, plan=chosen, claim=stated, out=out, certificates=proofs, seed=seed,
                batch=batch, control=control, adaptive=adaptive, exam=exam, until=until, reject=reject, seal=sealed,
                stated_accuracy=stated_accuracy,
                subject=_spec(model, weights, answers, classes, defense), command=_command(),
                notify=progress.notify,
            )  # fmt: skip
    except CertificateContradicted:
        render(Record.load(out), out / "report.html")
        raise
    page = render(record, out / "report.html")
    screen.record(record)
    screen.next_steps([f"open {page}", f"mohs replay {shlex.quote(str(out))}"])
    return record.verdict.exit_code if record.verdict is not None else screen.blocked_code(record)


@app.command
def seal(data: Data, /, *, n: Annotated[int, Parameter(name=["--n"])], out: Path, split: Split = "test") -> int:
    """Choose examples at random and commit to them, for an evaluation that counts: mohs run --seal FILE.

    Parameters
    ----------
    n
        how many examples.
    out
        the file that opens the seal; keep it to yourself until then.
    """
    from mohs import data as datasets
    from mohs.evaluation import Seal

    made = Seal.of(datasets.load(data, split=split), n)
    made.write(out)
    screen.say(
        f"wrote {out}: {n} examples of {data}. Publish the commitment, and keep the file to yourself:\n{made.commitment}"
    )
    return 0


@app.command
def certify(
    model: Layers, data: Data, /, *, threat: ThreatText,
    method: Annotated[str, Parameter(group=_how, help="ibp or crown")] = "crown",
    weights: Weights = None, n: Count = None, split: Split = "test",
) -> int:  # fmt: skip
    """Prove, example by example, that no allowed change alters the answer."""
    from mohs.certificates import certify as prove
    from mohs.records import clopper_pearson
    from mohs.threat import Threat

    parsed, certificate = Threat.parse(threat), _certificate(method)
    served.refuse_proof(model)
    if parsed.minimum:
        raise ThreatError(
            f"A proof needs a finite radius; got {parsed}: under unbounded changes no answer is safe. Give one, such as "
            f"'{parsed.region.name}:0.1'."
        )
    net, dataset = _load(model, data, weights, split, n)
    proof = prove(certificate, net, dataset.x, dataset.y, parsed)
    count = int(proof.holds.sum())
    low, high = clopper_pearson(count, len(dataset))
    screen.say(
        f"{certificate!r} proves {count} of {len(dataset)} answers ({count / len(dataset):.1%}, 95% interval {low:.1%} to "
        f"{high:.1%}) right for every change under {parsed}: a lower bound on robust accuracy."
    )
    return 0


@app.command
def report(directory: Path, /, *, out: Path | None = None) -> int:
    """Rebuild the HTML report from a record alone.

    Parameters
    ----------
    directory
        what `mohs run` wrote.
    out
        the page to write; default: report.html in the directory.
    """
    from mohs import records, reports

    record = records.Record.load(directory)
    page = reports.render(record, out or directory / "report.html")
    screen.say(f"wrote {page}")
    return 0


@app.command
def replay(
    directory: Path, /, *, model: str | None = None, weights: Path | None = None,
    answers: AnswersName = None, classes: int | None = None,
) -> int:  # fmt: skip
    """Re-score the stored adversarial examples of a record without attacking.

    A recorded URL is asked without credentials, as records may come from anybody: MOHS_HTTP_AUTHORIZATION is sent only to
    the URL that --model gives.

    Parameters
    ----------
    directory
        what `mohs run` wrote.
    model
        the model, if it is not the recorded one.
    weights
        its weights.
    answers
        what the server of a URL answers, if it is not as recorded.
    classes
        how many there are, for labels.
    """
    from mohs import models, records
    from mohs.evaluation import replay as run_replay

    record = records.Record.load(directory)
    spec, defense = model or record.header.subject.spec, None
    if model is None and " --defense " in spec:
        spec, _, text = spec.rpartition(" --defense ")
        defense = [text]
    if model is None and models.is_url(spec):
        spec, answers, classes = served.recorded(spec, answers, classes)
    elif model is None and " --weights " in spec:
        spec, _, recorded = spec.partition(" --weights ")
        weights = weights or Path(recorded)
    try:
        net = _defended(served.connect(spec, weights, answers, classes, trusted=model is not None), defense)
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(
            f"The record calls its model {spec!r}, and that cannot be loaded: {error} Name it with --model (and "
            "--weights); a record made from Python knows only the class of its model."
        ) from error
    seen = run_replay(record, net)
    screen.replayed(record, seen)
    return 0 if seen.holds else 12


@app.command
def diff(before: Path, after: Path, /) -> int:
    """Compare two records example by example: newly broken, newly safe, exact McNemar test."""
    from mohs import records

    screen.difference(records.diff(records.Record.load(before), records.Record.load(after)))
    return 0


@app.command
def train(
    recipe: str, /, *, out: Path, data: str | None = None, epochs: int | None = None, seed: int | None = None,
    resume: bool = True,
) -> int:  # fmt: skip
    """Train a classifier by a recipe, natural or adversarial; an interrupted training goes on where it stopped.

    Parameters
    ----------
    recipe
        a recipe file (.toml is data, .py is a program: run only what you trust), or the name of one in recipes/.
    out
        directory of checkpoints, weights and learning curves.
    data
        the training data, if not the recipe's.
    epochs
        passes over the data, if not the recipe's.
    seed
        of all randomness, if not the recipe's.
    resume
        go on from the last checkpoint in the directory.
    """
    from mohs.cli.training import train_recipe

    return train_recipe(recipe, out, resume, data, epochs, seed)


def _certificate(name: str) -> Method:
    from mohs import certificates

    known = {"ibp": certificates.IBP, "crown": certificates.CROWN}
    if name.lower() not in known:
        raise UsageError(f"There is no certificate {name!r}. Allowed: {', '.join(known)}.")
    return known[name.lower()]()


def _command() -> str:
    return shlex.join(["mohs", *sys.argv[1:]])
