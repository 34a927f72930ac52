"""A training that is killed at any moment, or spread over processes, ends where an undisturbed one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent

# Each life is a fork of one process that has imported everything but computed nothing, so that eight lives cost one import.
LIVES = """
import os, random, signal, sys
import torch
import torch._dynamo  # every optimiser imports it, which takes seconds
torch.set_num_threads(1)
from mohs.attacks import FGSM, PGD
from mohs.defenses.training import Adam, Mixture, Watch, train
from training_problem import blobs, mixed_net, perturb, recipe

out = sys.argv[1]
plan = recipe(Mixture(PGD(steps=2)), threat="linf:0.1", epochs=3, warmup=2)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def live(where, steps=None, replaces=None):
    count = {"steps": 0, "replaces": 0}
    def progress(_):
        count["steps"] += 1
        if count["steps"] == steps:
            die()
    rename = os.replace
    def replace(source, target):
        count["replaces"] += 1
        if count["replaces"] == replaces and replaces % 2:
            die()
        rename(source, target)
        if count["replaces"] == replaces:
            die()
    pid = os.fork()
    if pid == 0:
        os.replace = replace
        try:
            train(plan, perturb=perturb, out=where, data=blobs(), model=mixed_net(), device="cpu", checkpoint_every=3,
                  watch=Watch(FGSM(), PGD(steps=2)), progress=progress)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

draw = random.Random(7)
ends = [live(out + "/killed", steps=draw.randint(1, 6)) for _ in range(3)]
ends += [live(out + "/killed", replaces=k) for k in (1, 2, 3)]
ends.append(live(out + "/killed"))
ends.append(live(out + "/whole"))
print(ends)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again_ends_in_the_same_bytes(tmp_path: Path) -> None:
    script = tmp_path / "lives.py"
    script.write_text(LIVES)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([9] * 6 + [0, 0]), done.stdout + done.stderr
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    state, expected = load_file(killed / "checkpoint.safetensors"), load_file(whole / "checkpoint.safetensors")
    assert state.keys() == expected.keys()
    assert any(name.startswith("optimiser/") for name in state)
    assert all(torch.equal(state[name], expected[name]) for name in state)

    def curve(folder: Path) -> list[str]:
        return [line.split(', "seconds"')[0] for line in (folder / "curve.jsonl").read_text().splitlines()]

    assert curve(killed) == curve(whole)
    assert len(curve(whole)) == 3


ABORTED = "terminate called without an active exception"
WORLD = """
import sys
import torch
torch.set_num_threads(1)
from mohs.attacks import FGSM, PGD
from mohs.defenses.training import (
    AWP, SGD, TRADES, VAT, Cascade, Ensemble, FineTune, Free, GaussianAugmentation, GradAlign, Mixture, Saddle,
    UnifiedEmbedding, train,
)
from training_problem import blobs, perturb, recipe

torch.manual_seed(0)
other = torch.nn.Linear(6, 3)
objective = eval(sys.argv[2])
start = recipe().build_net() if isinstance(objective, FineTune) else None
plan = recipe(objective, threat="linf:0.05", optimiser=SGD(lr=0.1), epochs=2, batch=15, start=start)
train(plan, perturb=perturb, out=sys.argv[1], data=blobs(), device="cpu")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize(
    "objective",
    [
        "Saddle(PGD(steps=2))", "Free(2)", "AWP(TRADES(steps=2), 0.1)", "GradAlign(Saddle(PGD(steps=1)))",
        "FineTune(PGD(steps=2), 2.0)", "Cascade(Ensemble(UnifiedEmbedding(FGSM()), other), PGD(steps=2), other)",
        "VAT(iterations=2)", "GaussianAugmentation(0.1, copies=2)",
    ],
)  # fmt: skip
def test_two_processes_train_as_one(tmp_path: Path, objective: str) -> None:
    script = tmp_path / "world.py"
    script.write_text(WORLD)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, str(script), str(tmp_path / name), objective]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        if (
            done.returncode and ABORTED in done.stderr
        ):  # gloo, now and then, as a process ends that has done all its work
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-5), key
