"""How detectors with weights of their own are trained: Adam over shuffled batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mohs.errors import ModelError


def descend(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[Tensor, torch.Generator], Tensor],
    n: int,
    *,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    """Minimise a mean loss over ``n`` examples; the weights' gradients are gone afterwards.

    Args:
        parameters: what is trained.
        loss: of the examples at these indices, int64 on the CPU; it takes its random numbers from the generator.
        n: number of examples, gone through ``epochs`` times in batches of about ``batch``, all of nearly the same size, as a
            batch of one has no batch statistics.
        lr: step size of Adam.
        seed: of the order and of the generator.

    Raises:
        ModelError: the loss is not finite.
    """
    trained = list(parameters)
    solver = torch.optim.Adam(trained, lr)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        for epoch in range(epochs):
            for rows in torch.randperm(n, generator=generator).tensor_split(max(1, n // batch)):
                value = loss(rows, generator)
                if not bool(value.isfinite()):
                    raise ModelError(
                        f"The loss became {float(value.detach()):g} in epoch {epoch + 1} of {epochs}. Use a smaller step size than "
                        f"lr={lr:g}, and look for inputs that are not finite."
                    )
                # not backward(), which would leave gradients in whatever else the loss depends on
                for p, g in zip(trained, torch.autograd.grad(value, trained), strict=True):
                    p.grad = g
                solver.step()
    for p in trained:
        p.grad = None
