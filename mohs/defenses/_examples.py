"""The examples that a detector learns from: checked, dealt out, and given noisy twins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mohs import streams
from mohs.defenses._detector import least
from mohs.errors import DataError


@dataclass(frozen=True)
class Shares:
    """Which examples serve what, as indices; no example serves twice.

    Args:
        kept: those that tell what is usual.
        taught: those that teach the difference: adversarial indeed.
        held: those that only set the threshold.
    """

    kept: Tensor
    taught: Tensor
    held: Tensor


def deal(name: str, x: Tensor, changed: Tensor, broken: Tensor | None, kept: int, fpr: float, seed: int) -> Shares:
    """Draw which of the examples are ``kept``; of the rest one half teaches and the other is held for the threshold.

    Raises:
        DataError: shapes that differ, flags that are not bool, too few examples, or none of them adversarial.
    """
    broken = torch.ones(len(x), dtype=torch.bool, device=x.device) if broken is None else broken
    if broken.dtype != torch.bool:
        raise DataError(
            f"broken must be bool, one flag per example; got {broken.dtype}. Give a tensor such as mohs.attack(...).success, or "
            "broken.bool()."
        )
    if changed.shape != x.shape or broken.shape != x.shape[:1]:
        raise DataError(
            f"{name} needs one changed input, and one flag, for each of the {len(x)} clean ones; got shapes {tuple(x.shape)}, "
            f"{tuple(changed.shape)} and {tuple(broken.shape)}."
        )
    rest, fewest = len(x) - kept, 2 * least(fpr)
    if rest < fewest:
        what = f"its {kept} references and " if kept else ""
        raise DataError(
            f"{name} needs {what}at least {fewest} further examples, one half of them for a threshold at a false-positive rate of "
            f"{fpr:g}; got {len(x)}. Give more, {'fewer references, ' if kept else ''}or a higher rate."
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    taught = order[kept : kept + rest // 2]
    shares = Shares(order[:kept], taught[broken[taught]], order[kept + rest // 2 :])
    if not len(shares.taught):
        raise DataError(
            f"None of the {rest // 2} examples to learn from is adversarial. Give a stronger attack, or a larger radius."
        )
    return shares


def labelled(name: str, x: Tensor, y: Tensor) -> None:
    """Refuse labels that are not one class per input.

    Raises:
        DataError: they are not.
    """
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise DataError(
            f"{name} needs one label, int64, for each of the {len(x)} inputs; got {y.dtype} of shape {tuple(y.shape)}."
        )


def noisy(clean: Tensor, changed: Tensor, seed: int) -> Tensor:
    """``clean`` with Gaussian noise as long, in the Euclidean norm, as the change of each example."""
    noise = streams.normal(streams.derive(streams.content_keys(clean), seed), tuple(clean.shape[1:]), dtype=clean.dtype)
    length = (changed - clean).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    return clean + noise * length.view(-1, *[1] * (clean.dim() - 1))
