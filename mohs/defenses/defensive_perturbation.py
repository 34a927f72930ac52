"""A fixed perturbation that the defender adds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mohs.defenses._base import Defense
from mohs.errors import ModelError, UsageError


@dataclass(frozen=True)
class DefensivePerturbation(Defense):
    """Adds one fixed tensor to every input: the defender's own perturbation, made so that answers get surer.

        x -> clip(x + delta, box)

    Differentiable, and known to the attacker. Without a box nothing is clipped and the net behind it is only shifted; what
    helps on clean inputs need not help against an attack that knows it.

    Args:
        delta: of the shape of one input, or one that broadcasts to it; in units of the input.
        box: lowest and highest value handed on; None: no clipping.

    Raises:
        UsageError: delta is no finite floating-point tensor, or the box is empty.
        ModelError: at the first call, where delta does not fit the inputs.

    Cost: one addition.

    >>> import torch
    >>> DefensivePerturbation(torch.tensor([0.5, -0.5])).transform(torch.tensor([[0.75, 0.75]])).tolist()
    [[1.0, 0.25]]

    **Differs from the paper**: how delta is made is left open; it acts on pixels and not on objects in the world.
    **Source**: H. Salman, A. Ilyas, L. Engstrom, S. Vemprala, A. Madry, A. Kapoor, "Unadversarial examples: designing objects for
    robust vision", NeurIPS 2021, section 2.
    """

    delta: Tensor = field(repr=False, compare=False)
    box: tuple[float, float] | None = (0.0, 1.0)
    digest: str = field(init=False)
    smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        delta = self.delta
        if not isinstance(delta, Tensor) or not delta.is_floating_point() or not bool(delta.isfinite().all()):
            what = f"a {delta.dtype} tensor" if isinstance(delta, Tensor) else repr(delta)
            raise UsageError(
                f"delta must be a finite floating-point tensor of the shape of one input; got {what} or values that are not finite."
            )
        if self.box is not None and not self.box[0] < self.box[1]:
            raise UsageError(f"box must be (lowest, highest) or None; got {self.box!r}.")
        content = delta.detach().cpu().contiguous().numpy().tobytes()
        object.__setattr__(self, "digest", hashlib.blake2b(content, digest_size=8).hexdigest())

    def transform(self, x: Tensor) -> Tensor:
        """Inputs [B, ...], perturbed."""
        delta = self.delta.detach().to(x)
        if delta.dim() > x.dim() - 1 or any(a not in (1, b) for a, b in zip(delta.shape[::-1], x.shape[::-1])):
            raise ModelError(
                f"delta of shape {tuple(delta.shape)} does not fit inputs of shape {tuple(x.shape[1:])}. Give one of their shape."
            )
        x = x + delta
        return x if self.box is None else x.clamp(*self.box)
