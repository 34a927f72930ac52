"""Image quilting."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from mohs.defenses._base import Defense
from mohs.defenses._settings import images, number
from mohs.errors import ModelError, UsageError


@dataclass(frozen=True)
class Quilting(Defense):
    """Builds each image anew from patches of other, clean images: what no clean image shows cannot appear.

        for each place, in reading order: take one of the ``neighbours`` bank patches nearest to x there, and join it to what
        lies already along the path of least squared difference through the overlap

    Random and without a gradient; the identity going back, averaged over draws, breaks it.

    Args:
        bank: clean patches [N, C, size, size]; ``Quilting.of(images)`` draws them.
        overlap: pixels that neighbouring patches share, at least 1 and below the patch's size.
        neighbours: how many of the nearest patches the choice is among; 1: no chance.

    Raises:
        UsageError: other numbers, or a bank of another shape.
        ModelError: at the first call, on inputs that are no images of as many channels, or smaller than a patch.

    Cost: (H W / (size - overlap)^2) searches of the whole bank per image.

    >>> x = torch.rand(20, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    >>> defense = Quilting.of(x, patches=500, neighbours=1)
    >>> defense.transform(x).shape
    torch.Size([20, 1, 12, 12])

    **Differs from the paper**: the bank is as large as it is given (the paper: a million patches); the last patches of a row or
    column overlap more, where the side is no multiple.
    **Source**: C. Guo, M. Rana, M. Cisse, L. van der Maaten, "Countering adversarial images using input transformations",
    ICLR 2018, section 3.4; A. Efros, W. Freeman, "Image quilting for texture synthesis and transfer", SIGGRAPH 2001, section 2.
    """

    bank: Tensor = field(repr=False, compare=False)
    overlap: int = 2
    neighbours: int = 10
    digest: str = field(init=False)
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        bank = self.bank
        if (
            not isinstance(bank, Tensor)
            or bank.dim() != 4
            or bank.shape[2] != bank.shape[3]
            or not bank.is_floating_point()
        ):
            what = f"{tuple(bank.shape)} {bank.dtype}" if isinstance(bank, Tensor) else repr(bank)
            raise UsageError(
                f"bank must be floating-point patches [N, C, size, size]; got {what}. Quilting.of(images) draws them from images."
            )
        number(self.overlap, "overlap", 1, bank.shape[2] - 1, whole=True)
        number(self.neighbours, "neighbours", 1, len(bank), whole=True)
        content = bank.detach().cpu().contiguous().numpy().tobytes()
        object.__setattr__(self, "digest", hashlib.blake2b(content, digest_size=8).hexdigest())

    @classmethod
    def of(
        cls, x: Tensor, patches: int = 10_000, size: int = 5, overlap: int = 2, neighbours: int = 10, seed: int = 0
    ) -> Self:
        """With a bank of random patches of ``size`` x ``size`` pixels from images [N, C, H, W]."""
        number(patches, "patches", 1, whole=True)
        number(size, "size", 2, min(images(x, "Quilting").shape[2:]), whole=True)
        generator = torch.Generator().manual_seed(seed)
        which, top, left = (
            torch.randint(high, (patches, 1, 1), generator=generator)
            for high in (len(x), x.shape[2] - size + 1, x.shape[3] - size + 1)
        )
        reach = torch.arange(size)
        bank = x.detach().cpu()[which, :, top + reach.view(-1, 1), left + reach]  # [patches, size, size, C]
        return cls(bank.permute(0, 3, 1, 2).contiguous(), overlap, neighbours)

    def transform(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W], quilted."""
        bank, size = self.bank.to(x), self.bank.shape[2]
        if images(x, "Quilting").shape[1] != bank.shape[1] or min(x.shape[2:]) < size:
            raise ModelError(
                f"The bank has patches {tuple(bank.shape[1:])}; they do not fit into images {tuple(x.shape[1:])}. "
                "Draw the bank from images of the same kind."
            )
        out = torch.zeros_like(x)
        if not len(x):
            return out
        norms = bank.flatten(1).square().sum(1)
        rows, columns = _places(x.shape[2], size, self.overlap), _places(x.shape[3], size, self.overlap)
        for above, top in zip([None, *rows[:-1]], rows, strict=True):
            wanted = torch.stack([x[..., top : top + size, left : left + size].flatten(1) for left in columns])
            distance = norms - 2 * wanted @ bank.flatten(1).T
            nearest = distance.topk(self.neighbours, dim=2, largest=False).indices
            drawn = torch.randint(self.neighbours, (*nearest.shape[:2], 1), device=x.device)
            chosen = bank[nearest.gather(2, drawn).squeeze(2)]
            for before, left, new in zip([None, *columns[:-1]], columns, chosen, strict=True):
                here = (..., slice(top, top + size), slice(left, left + size))
                old = out[here]
                difference = (new - old).square().sum(1)
                across = 0 if before is None else before + size - left
                down = 0 if above is None else above + size - top
                out[here] = torch.where(_taken(difference, across, down).unsqueeze(1), new, old)
        return out


def _places(side: int, size: int, overlap: int) -> list[int]:
    """Where patches begin along a side; the last one ends with it."""
    return [*range(0, side - size, size - overlap), side - size]


def _taken(difference: Tensor, across: int, down: int) -> Tensor:
    """Where a patch [B, size, size] lies over what is there, which it shares with its left neighbour in the first ``across`` columns
    and with its upper one in the first ``down`` rows."""
    take = torch.ones_like(difference, dtype=torch.bool)
    columns, rows = difference[:, :, :across], difference[:, :down].transpose(1, 2)
    if across and across == down:  # both cuts in one go
        left, above = _beyond(torch.cat([columns, rows])).chunk(2)
    else:
        left, above = (_beyond(strip) if strip.shape[2] else strip > 0 for strip in (columns, rows))
    take[:, :, :across] = left
    take[:, :down] &= above.transpose(1, 2)
    return take


def _beyond(difference: Tensor) -> Tensor:
    """Which pixels [B, L, W] lie on or right of the path of least total ``difference`` that runs down the strip."""
    gains = (-difference).unbind(1)
    total = [gains[0]]
    for line in gains[1:]:
        total.append(line + max_pool1d(total[-1], 3, 1, 1))  # the best of the three above
    place = torch.arange(difference.shape[2], device=difference.device)
    at = total[-1].argmax(1, keepdim=True)
    cut = [at]
    for line in total[-2::-1]:
        at = line.masked_fill((place - at).abs() > 1, -torch.inf).argmax(1, keepdim=True)
        cut.append(at)
    return place >= torch.stack(cut[::-1], 1)
