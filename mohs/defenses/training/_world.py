"""One process or several: who this one is, its share of a batch, and sums over all.

Gradients are averaged by one collective over one flat tensor rather than by a wrapper around the model: an objective
may look at the model any number of times before its single backward, attacks see the bare model, and a process whose
share is empty simply adds zero.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mohs.errors import UsageError, gist


@dataclass(frozen=True)
class World:
    """Rank and size of this process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Is this the one that writes and reports?"""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """This process's part of a global batch; the parts differ by one row at most."""
        return index.tensor_split(self.size)[self.rank]

    def gather(self, part: Tensor, rows: int) -> Tensor:
        """The inverse of ``share`` for a tensor of so many rows; every process has the whole."""
        if self.size == 1:
            return part
        whole = part.new_zeros(rows, *part.shape[1:])
        self.share(whole).copy_(part)
        return self.sum(whole)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give everybody the main process's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def sum_gradients(self, parameters: list[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients over all processes, and answer the summed ``loss`` [1]; one collective."""
        if self.size == 1:
            return loss
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = self.sum(torch.cat([loss.to(parameters[0])] + [_grad(p).flatten() for p in parameters]))
        start = 1
        for p in parameters:
            _grad(p).copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()
        return flat[:1]


def _grad(p: nn.Parameter) -> Tensor:
    return p.grad if p.grad is not None else torch.zeros_like(p)


@contextmanager
def join(device: str | torch.device | None) -> Iterator[World]:
    """The world that torchrun describes in the environment, or this process alone.

    Raises:
        UsageError: The device asked for is not there.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0)
    if size == 1:
        yield World(0, 1, chosen)
        return
    started_here = not torch.distributed.is_initialized()
    if started_here:
        torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        if started_here:
            torch.distributed.destroy_process_group()


def _device(asked: str | torch.device | None, local: int) -> torch.device:
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"The device {asked!r} cannot be used ({gist(error)}). Allowed: 'cpu', or 'cuda' where present."
        ) from error
    return device
