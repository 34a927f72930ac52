"""What the benchmark's numbers rest on: counting, replaying, scoring, and a run of it all without any peer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mohs
from benchmarks import __main__ as command
from benchmarks import overhead, subjects
from benchmarks.measure import Counted, Times, alternate, ratios, replay, score
from mohs.attacks import PGD, DeepFool


@pytest.fixture
def net() -> nn.Module:
    net = nn.Linear(2, 2, bias=False)
    net.weight.data.copy_(torch.eye(2))
    return net.eval()


def test_tape_holds_rows_and_backwards(net: nn.Module) -> None:
    counted = Counted(net)
    x = torch.rand(3, 2).requires_grad_(True)
    logits = counted(x)
    torch.autograd.grad(logits, x, torch.ones_like(logits), retain_graph=True)
    torch.autograd.grad(logits, x, torch.ones_like(logits))
    with torch.no_grad():
        counted(x[:2])
    assert counted.tape == [[3, 2], [2, 0]]
    assert (counted.forwards, counted.backwards) == (5, 6)


@pytest.mark.parametrize("attack", [PGD(5), DeepFool(5)])
def test_replay_repeats_a_tape(net: nn.Module, attack: mohs.attacks.Attack) -> None:
    x, y = torch.tensor([[0.9, 0.1]] * 6), torch.zeros(6, dtype=torch.int64)
    first, again = Counted(net), Counted(net)
    mohs.attack(attack, first, x, y, "l2:0.1", batch=4)
    replay(again, first.tape, x[:3])
    assert first.backwards > 0
    assert again.tape == first.tape
    assert all(p.grad is None for p in net.parameters())


def test_alternate_takes_turns_and_clears_between() -> None:
    order = ""

    def note(letter: str) -> None:
        nonlocal order
        order += letter

    times = alternate({"a": lambda: note("a"), "b": lambda: note("b")}, 3, lambda: note("."))
    assert order == ".a.b" * 3
    assert [len(t.seconds) for t in times.values()] == [3, 3]


def test_ratio_is_taken_round_by_round() -> None:
    ratio = ratios(Times((2.0, 6.0, 30.0)), Times((1.0, 2.0, 5.0)))
    assert ratio.seconds == (2.0, 3.0, 6.0)
    assert str(ratio) == "3.000 (2.000 to 6.000)"


def test_score_trusts_nobody(net: nn.Module) -> None:
    x0 = torch.tensor([[0.6, 0.4]]).repeat(6, 1)
    x = torch.tensor([[0.5, 0.55], [0.6, 0.4], [0.1, 0.9], [-0.1, 0.45], [math.nan, 0.4], [0.45, 0.55]])
    got = score(net, x0, x, torch.zeros(6, dtype=torch.int64), math.inf, 0.15)
    # found; unchanged; too far; out of the box; nan; on the edge
    assert got.success.tolist() == [True, False, False, False, False, True]
    assert got.cells(got.success) == ["2/6", "0.1500", "0.1500", "0.1500"]
    assert got.cells(got.success & False)[-1] == "-"


def test_overhead_refuses_an_unexpected_number_of_passes(monkeypatch: pytest.MonkeyPatch, net: nn.Module) -> None:
    monkeypatch.setattr(overhead, "STEPS", 3)
    assert overhead._row("net", net, torch.rand(5, 2), 4, 1.0, 1)[:4] == ["net", 5, 4, 8]
    real = mohs.attack
    monkeypatch.setattr(mohs, "attack", lambda *a, stop=None, **k: real(*a, **k))  # rows leave: fewer passes
    with pytest.raises(RuntimeError, match="expected 8 passes"):
        overhead._row("net", Flips(), torch.rand(5, 2), 4, 1.0, 1)


class Flips(nn.Module):
    """Answers 0 to the first call and 1 to all later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        lead = 1.0 if self.calls == 1 else -1.0
        return torch.stack([x[:, 0] * 0 + lead, x[:, 1] * 0], 1)


def test_whole_page_without_peers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    sizes = ["--quick", "--repeats", "1", "--rows", "12", "--peers", "", "--nets", "bundled:fashion-natural"]
    assert command.main(["pgd", "batches", *sizes, "--out", str(out)]) == 0
    page = capsys.readouterr().out
    assert page.strip() == out.read_text(encoding="utf-8").strip()
    assert "| mohs |" in page
    assert "repeats: 1," in page
    assert "{" not in page
    rows = [line for line in page.splitlines() if line.startswith("| bundled:fashion-natural | ")]
    assert len(rows) == 5
    assert all(row.endswith("| True | True | True |") for row in rows)


@pytest.mark.parametrize("wrong", [["speed"], ["--peers", "cleverhans"], ["--rows", "0"], ["--nets", "bundled:none"]])
def test_wrong_usage_says_what_there_is(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["pgd", "--rows", "3", "--peers", "", *wrong] if wrong != ["speed"] else wrong)
    assert stop.value.code == 2
    assert wrong[-1].removeprefix("bundled:") in capsys.readouterr().err


def test_seeded_nets_are_the_same_each_time() -> None:
    first, again = subjects.wide_net().state_dict(), subjects.wide_net().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
