"""A net for MNIST trained against PGD at Linf 0.3: the classic problem of robust training.

    python recipes/mnist_pgd.py FOLDER            # MNIST's four files; trains into runs/mnist-pgd, then evaluates

Forty epochs of Adam, each image replaced by where ten steps of PGD end; the radius grows over the first eight epochs, and
the average of the weights is what is kept. A run that was stopped goes on.

Then 'standard' on the first 1,000 test images says what is left. Not yet measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mohs.attacks import PGD
from mohs.defenses.training import Adam, Cosine, Recipe, Saddle

RECIPE = Recipe(
    name="mnist-pgd",
    data="idx:mnist",
    net="small_cnn",
    objective=Saddle(PGD(steps=10, step_size=0.06)),
    threat="linf:0.3",
    epochs=40,
    batch=128,
    optimiser=Adam(lr=2e-3),
    schedule=Cosine(rise=0.02),
    warmup=8,
    holdout=200,
    averaging=0.999,
    seed=0,
)


def main() -> None:
    """Train, and evaluate with the plan 'standard'."""
    import mohs
    from mohs.data import load
    from mohs.evaluation.training import train

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="the folder of MNIST's four files")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist-pgd"))
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--n", type=int, default=1000, help="test images of the evaluation")
    given = parser.parse_args()
    recipe = replace(RECIPE, data=f"idx:{given.data}", epochs=given.epochs, warmup=min(RECIPE.warmup, given.epochs / 4))
    trained = train(recipe, out=given.out, device="cpu", progress=lambda p: p.row and print(p.row, flush=True))
    found = mohs.evaluate(trained.model, load(recipe.data, n=given.n), "linf:0.3", claim="accuracy >= 0.88")
    print(mohs.reports.text(found))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
