"""Every command end to end, with its exit code."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_problem import DATA, Shop, shop

import mohs
from mohs import attacks, cli, models, records
from mohs.certificates import IBP, Certificate
from mohs.cli import screen
from mohs.data import load
from mohs.records.ledger import Ledger

__all__ = ["shop"]


# ---- run, and what reads its record ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "word", "code"),
    [("accuracy >= 0.9", "refuted", 10), ("accuracy >= 0.1", "upheld so far", 0), ("accuracy >= 50%", "undecided", 11)],
)
def test_run_gives_a_verdict(claim: str, word: str, code: int, shop: Shop) -> None:
    ended, out, err = shop.run("--claim", claim)
    assert ended == code, err
    record = records.Record.load(shop.out)
    assert record.verdict is not None
    assert (record.verdict.word, record.verdict.exit_code) == (word, code)
    assert word.upper() in out
    assert record.verdict.sentence in out
    assert "an upper bound on the robust accuracy" in out
    for name in ("FGSM CE", "PGD-5 CE x2"):
        assert name in out
    assert f"Next: open {shop.out}/report.html mohs replay {shop.out}" in out
    assert record.header.subject.spec == f"linear --weights {shop.weights}"
    assert (shop.out / "report.html").read_text().lower().startswith("<!doctype html>")


def test_run_without_a_claim_says_what_is_known(shop: Shop) -> None:
    code, out, _ = shop.run()
    assert code == 0
    assert "NO CLAIM" in out
    assert records.Record.load(shop.out).describe().rstrip(".") in out


def test_run_certifies(shop: Shop) -> None:
    code, out, _ = shop.run("--certify", "ibp", "--certify", "CROWN", "--claim", "accuracy >= 0.1")
    record = records.Record.load(shop.out)
    assert code == 0
    assert [c.name for c in record.header.certificates] == ["CROWN", "IBP"]
    assert out.count("proven") == 2
    # a linear net: what survives a strong attack is what a certificate proves
    assert 0 < record.certified.sum() <= record.survived.sum()
    assert record.verdict.word == "certified"


def test_run_again_goes_on_and_says_the_same(shop: Shop) -> None:
    first = shop.run("--claim", "accuracy >= 0.9")
    digest = records.Record.load(shop.out).digest()
    again = shop.run("--claim", "accuracy >= 0.9")
    assert again[0] == first[0] == 10
    assert again[1] == first[1]
    assert records.Record.load(shop.out).digest() == digest


def test_report_rebuilds_the_page(shop: Shop) -> None:
    shop.run("--claim", "accuracy >= 0.9")
    page = (shop.out / "report.html").read_text()
    (shop.out / "report.html").unlink()
    code, out, _ = shop.do("report", shop.out)
    assert (code, out) == (0, f"wrote {shop.out}/report.html")
    assert (shop.out / "report.html").read_text() == page
    code, out, _ = shop.do("report", shop.out, "--out", shop.folder / "new" / "page.html")
    assert code == 0
    assert (shop.folder / "new" / "page.html").read_text() == page


def test_replay_confirms_and_denies(shop: Shop) -> None:
    shop.run()
    stored = sum(len(records.Record.load(shop.out).points(a)[0]) for a in (0, 1))
    assert shop.do("replay", shop.out) == (
        0,
        f"{stored} of {stored} stored adversarial examples confirmed under linf:0.02 on the recorded weights.",
        "",
    )
    other = models.linear()
    with torch.no_grad():
        # answers with the label it is asked about least: class 9 always
        other[1].weight.zero_()
        other[1].bias.copy_(torch.arange(10.0))
    models.save_weights(other, shop.folder / "nine.safetensors")
    code, out, _ = shop.do("replay", shop.out, "--model", "linear", "--weights", shop.folder / "nine.safetensors")
    nines = int((records.Record.load(shop.out).examples.label[records.Record.load(shop.out).points(0)[0]] == 9).sum())
    assert code == (12 if nines else 0)
    assert "on OTHER weights than the recorded ones" in out
    assert nines == 0 or "answered rightly: FGSM CE on example" in out


def test_replay_of_a_record_made_from_python_asks_for_the_model(shop: Shop) -> None:
    net = models.load("linear", weights=shop.weights)
    mohs.evaluate(net, load(DATA, n=8), "linf:0.02", plan="quick", out=shop.out)
    code, _, err = shop.do("replay", shop.out)
    assert code == 2
    assert "The record calls its model 'Sequential', and that cannot be loaded" in err
    assert "Name it with --model (and --weights)" in err
    assert shop.do("replay", shop.out, "--model", "linear", "--weights", shop.weights)[0] == 0


def test_a_record_names_files_by_their_whole_path(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = load(DATA, n=8)
    np.savez(shop.folder / "own.npz", x=x.numpy(), y=y.numpy())
    how = ["--weights", shop.weights.name, "--threat", "linf:0.02", "--plan", shop.plan, "--out", shop.out]
    code, _, err = shop.do("run", "linear", "npz:own.npz", *how)
    assert code == 0, err
    header = records.load_header(shop.out)
    assert header.subject.spec == f"linear --weights {shop.weights}"
    assert header.data.spec == f"npz:{shop.folder}/own.npz"
    monkeypatch.chdir("/")
    assert shop.do("replay", shop.out)[0] == 0


def test_access_and_queries(shop: Shop) -> None:
    code, out, _ = shop.run("--access", "label", "--claim", "accuracy >= 0.1")
    assert code == 11
    assert "UNDECIDED" in out
    assert "no attack of the plan could run" in out
    assert "note FGSM CE: FGSM needs access GRADIENT; the threat grants LABEL" in out
    assert records.load_header(shop.out).threat["access"] == "LABEL"
    other = shop.folder / "few"
    code, _, err = shop.do("run", *shop.model, *shop.how(out=other), "--queries", "6")
    assert code == 0, err
    assert records.load_header(other).threat["queries"] == 6
    assert records.Record.load(other).results(1).queries.max() <= 6
    code, said, _ = shop.do("run", *shop.model, *shop.how(out=shop.folder / "one"), "--queries", "1")
    assert code == 0
    assert "PGD makes 2 tries per example; the threat allows 1 queries" in " ".join(said.split())
    assert shop.do("check", *shop.model, "--threat", "linf:0.02", "--access", "logit", "--queries", "0")[0] == 2


def test_names_of_attacks_are_whole_in_80_columns(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "out", screen._Terminal(highlight=False, width=80))
    plan = shop.folder / "long.toml"
    plan.write_text(
        '[[attack]]\nuse = "PGD"\nwith = { steps = 10, objective = "margin" }\nrestarts = 2\naims = "all"\n'
    )
    assert shop.do("run", *shop.model, *shop.how(plan=plan))[0] == 0
    summary = records.load_header(shop.out).attacks[0]
    summary.forwards = summary.backwards = 123_456_789
    summary.given = summary.broke = 10_000
    monkeypatch.setattr(records.Record, "describe", lambda self: "")
    record = records.Record.load(shop.out)
    record.header.attacks[:] = [summary]
    shop._capfd.readouterr()
    screen.record(record)
    (row,) = (line for line in shop._capfd.readouterr().out.splitlines() if line.startswith("PGD"))
    assert row.startswith("PGD-10 margin all aims x2 ")
    assert "10000" in row
    assert row.count("123M") == 2
    assert "…" not in row


def test_demo_refuses_before_it_speaks(shop: Shop) -> None:
    assert "asked for 0 examples" in shop.refused("demo", "--out", shop.out, "--n", "0")


def test_certify_refuses_an_unbounded_change(shop: Shop) -> None:
    assert "A proof needs a finite radius; got linf:inf" in shop.refused("certify", *shop.model, "--threat", "linf:inf")


def test_replay_refuses_changed_rows(shop: Shop) -> None:
    import sqlite3

    shop.run()
    with sqlite3.connect(shop.out / "ledger.sqlite") as db:
        db.execute("UPDATE results SET margin = margin + 1 WHERE attack = 0")
    db.close()
    code, _, err = shop.do("replay", shop.out)
    assert code == 2
    assert "the ledger was changed after the run" in err


def test_diff_counts_what_changed(shop: Shop) -> None:
    shop.run()
    other = shop.folder / "single"
    plan = shop.folder / "single.toml"
    plan.write_text('[[attack]]\nuse = "FGSM"\n')
    shop.do("run", *shop.model, *shop.how(plan=plan, out=other))
    code, out, _ = shop.do("diff", other, shop.out)
    assert code == 0
    assert "Of 24 shared examples" in out
    assert "The headers differ in plan." in out
    code, out, _ = shop.do("diff", shop.out, shop.out)
    assert "0 newly broken, 0 newly safe (exact McNemar p = 1). The headers differ in nothing." in out


# ---- the other commands ----------------------------------------------------------------------------------


def test_check_is_quiet_about_a_healthy_model(shop: Shop) -> None:
    code, out, _ = shop.do("check", *shop.model, "--threat", "linf:0.02")
    assert code == 0
    assert out.startswith("ok training mode, inputs and box")


def test_check_and_run_block(shop: Shop) -> None:
    code, out, _ = shop.do("check", *shop.model, "--threat", "linf:0.02", "--stated-accuracy", "0.01")
    assert code == 12
    assert "block clean accuracy: " in out
    assert "This is not the model, the data or the preprocessing that the statement is about." in out
    code, out, _ = shop.run("--stated-accuracy", "0.01", "--claim", "accuracy >= 0.1")
    assert code == 12
    assert "BLOCKED" in out
    assert "no verdict on the claimed 10% before this is mended: clean accuracy" in out
    assert shop.run("--stated-accuracy", "0.01")[0] == 12
    # the same directory once the statement is mended
    assert shop.run("--claim", "accuracy >= 0.1")[0] == 0


def test_certify_counts_proofs(shop: Shop) -> None:
    code, out, _ = shop.do("certify", *shop.model, "--threat", "linf:0.01", "--method", "ibp")
    assert code == 0
    assert "proves " in out
    assert "of 24 answers" in out
    assert "a lower bound on robust accuracy." in out


@pytest.mark.parametrize("what", ["attacks", "models", "data", "plans"])
def test_list_names_everything(what: str, shop: Shop) -> None:
    code, out, _ = shop.do("list", what)
    names = {
        "attacks": list(attacks.REGISTRY),
        "models": [name for name, _ in models.available()],
        "data": [DATA, "idx:DIR", "npz:FILE"],
        "plans": ["quick", "standard"],
    }
    assert code == 0
    for name in names[what]:
        assert name in out


def test_demo_writes_two_reports(shop: Shop) -> None:
    if "fashion-pgd" not in "".join(name for name, _ in models.available()):
        pytest.skip("the bundled nets are not there")
    code, out, _ = shop.do("demo", "--out", shop.out, "--n", "16")
    assert code == 0
    for name in ("fashion-natural", "fashion-pgd"):
        assert f"bundled:{name}" in out
        assert (shop.out / name / "report.html").stat().st_size > 10_000
        assert records.Record.load(shop.out / name).header.status == "complete"


def test_train_then_run_its_weights(shop: Shop) -> None:
    x = np.random.default_rng(0).random((64, 1, 4, 4), dtype=np.float32)
    np.savez(shop.folder / "tiny.npz", x=x, y=(x.mean((1, 2, 3)) > 0.5).astype(np.int64))
    recipe = shop.folder / "tiny.toml"
    recipe.write_text(
        f'name = "tiny"\ndata = "npz:{shop.folder}/tiny.npz"\nnet = "linear"\nnet_options = {{d = 16, k = 2}}\n'
        'objective = "natural"\nepochs = 2\nbatch = 16\nholdout = 16\n'
    )
    code, out, err = shop.do("train", recipe, "--out", shop.folder / "trained")
    assert code == 0, err
    assert "Weights: " in out
    assert list((shop.folder / "trained").glob("*.safetensors"))


def test_help_and_version(shop: Shop) -> None:
    assert "Available commands" not in shop.do("--help")[1]
    for command in ("demo", "list", "check", "run", "certify", "report", "replay", "diff", "train"):
        assert command in shop.do("--help")[1]
        code, out, _ = shop.do(command, "--help")
        assert code == 0
        assert out.startswith(f"Usage: mohs {command}")
    assert shop.do("--version")[:2] == (0, "0.1.0")


# ---- wrong usage, contradiction, interruption ------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["frob"], 'Unknown command "frob". Available commands: demo'),
        (["list", "frob"], 'Invalid value "frob"'),
        (["run", "linear", DATA], "--threat requires an argument"),
        (["run", "linear", DATA, "--threat", "linf:0.1", "--out", "run", "--bogus", "1"], "Unknown option: --bogus"),
        (["run", "linear", DATA, "--threat", "linf:0.1", "--out", "run", "--n", "few"], 'unable to convert "few"'),
        (["run", "linear", DATA, "--threat", "linf:0.1", "--out", "run", "--split", "all"], 'Invalid value "all"'),
    ],
)
def test_wrong_usage(argv: list[str], said: str, shop: Shop) -> None:
    code, out, err = shop.do(*argv)
    assert code == 2
    assert out == ""
    assert said in err
    assert not shop.out.exists()


def test_contradicted_certificate(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def believe(self: IBP, model: object, x: torch.Tensor, y: torch.Tensor, *rest: object) -> Certificate:
        return Certificate(torch.ones_like(y, dtype=torch.bool), x.new_full(y.shape, 0.02), x.new_zeros(y.shape))

    monkeypatch.setattr(IBP, "prove", believe)
    code, _, err = shop.run("--certify", "ibp", "--claim", "accuracy >= 0.1")
    assert code == 13
    assert "A certificate declared row" in err
    assert f"please report the record {shop.out} with the model" in err
    assert "Traceback" not in err
    record = records.Record.load(shop.out)
    assert record.header.status == "complete"
    assert record.verdict is None
    assert (shop.out / "report.html").exists()


def test_bug_in_mohs_is_said_to_be_one(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "put_examples", lambda *_: 1 / 0)
    code, _, err = shop.run()
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "this is a bug in Mohs; please report it" in err


def test_ctrl_c_while_a_command_runs(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "put_trace", interrupt)
    code, _, err = shop.run()
    assert code == 130
    assert err.endswith("mohs: interrupted. Issue the same command again to go on where it stopped.")
    monkeypatch.undo()
    assert records.Record.load(shop.out).header.status == "interrupted"


def test_main_exits_with_the_code(shop: Shop) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(["report", "nowhere"])
    assert e.value.code == 2


# ---- as a process ----------------------------------------------------------------------------------------


def test_module_run_from_a_shell(shop: Shop) -> None:
    code, out, err = shop.finish(shop.start("run", *shop.model, *shop.how(), "--claim", "accuracy >= 0.9"))
    assert code == 10, err
    assert "REFUTED" in out
    header = records.load_header(shop.out)
    assert header.command.startswith("mohs run linear bundled:fashion-mnist --weights ")
    # the same bytes as in this process
    digest = header.ledger_digest
    here = shop.folder / "here"
    shop.do("run", *shop.model, *shop.how(out=here))
    assert records.load_header(here).ledger_digest == digest


def test_interrupt_from_a_shell_and_go_on(shop: Shop) -> None:
    slow = shop.folder / "slow.toml"
    slow.write_text('[[attack]]\nuse = "FGSM"\n[[attack]]\nuse = "PGD"\nwith = { steps = 100000 }\n')
    command = ["run", *shop.model, *shop.how(plan=slow)]
    process = shop.start(*command)
    ends = time.monotonic() + 60
    while not _has_rows(shop.out) and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, out, err = shop.finish(process)
    assert code == 130, err
    assert out == ""
    assert err.endswith("mohs: interrupted. Issue the same command again to go on where it stopped.")
    assert "Traceback" not in err
    assert records.load_header(shop.out).status == "interrupted"
    assert records.Record.load(shop.out).attacks == [0]


def _has_rows(directory: Path) -> bool:
    if not (directory / "record.json").exists():
        return False
    with Ledger.open(directory / "ledger.sqlite", check=False) as ledger:
        return ledger.attacks() == [0]


def test_reader_that_leaves_early_changes_no_exit_code(shop: Shop) -> None:
    for command, wanted in (
        (["list", "models"], 0),
        (["run", *shop.model, *shop.how(), "--claim", "accuracy >= 0.9"], 10),
    ):
        process = shop.start(*command)
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        code, _, err = shop.finish(process)
        assert (code, err) == (wanted, "")
