"""Descent in the latent space of a generator: the reparameterised attack."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.attacks._adam import Adam
from mohs.attacks._base import State
from mohs.attacks._searches import Weight, known, shortfall
from mohs.attacks._settings import check_least, check_positive, check_whole
from mohs.errors import ModelError, UsageError
from mohs.models.weights import weights_hash
from mohs.objectives import Objective, margin
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access

FADE = 0.05
"""Share of the first step length that is left at the end of a round."""


FINER = 0.6
"""How much shorter the first step of a round is than that of the one before, once a success is known."""

TRIAL = 0.01
"""How far, per number of the latent, a first step is tried that finds out how far the input moves with it."""


@dataclass(kw_only=True)
class LatentState(State):
    """``z`` [B, d]: the latent; ``adam``: its moments; ``search``: the weight of the goal, where the smallest change is asked for."""

    z: Tensor
    adam: Adam
    search: Weight | None = None


@dataclass(frozen=True)
class Latent:
    """Moves the latent of a generated input instead of the input: it stays among what the generator can make.

    From the latent z that makes the clean input best, Adam minimises

        fixed radius:     -J(x) + keep * |g(z) - x|^2,       x = project(g(z)) into region and box
        smallest change:  |g(z) - x0|^2 + c * f(x),          x = g(z) inside the box, c bisected in rounds

    with J the objective and f(x) the logits that the goal is missed by, 0 where it is met; gradients at x go back through g.
    For defenses that put an input back into the range of a generator (``mohs.defenses.DefenseGAN``): what lies there already,
    they leave as it is. It cannot find what the generator cannot make: at a fixed radius, give it one in which the generator
    can reach the clean inputs, or take the smallest change.

    Args:
        generator: module of latents [B, d] to inputs; d is its attribute ``latent`` unless ``size`` says it.
        size: numbers in a latent; None: ``generator.latent``.
        steps: gradient steps of all rounds together.
        rate: step length of Adam, in units of the latent.
        begin: steps of Adam that look for the latent of the clean input; restarts begin them at other random latents.
        keep: fixed radius: weight of the squared distance between what is made and what the threat allows, in units of the objective
            per squared unit of the input.
        inner: smallest change: steps of one round at most.
        objective: fixed radius: what to climb.

    Raises:
        UsageError: settings that cannot be, a generator in training mode, or one whose latent is not known.
        ModelError: the generator does not make inputs of the shape of the clean ones.

    Cost: steps + 1 forwards and steps backwards; and of the generator ``begin`` and as many again, and two forwards a step.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> x, y = torch.tensor([[0.6, 0.4]]), torch.tensor([0])
    >>> line = torch.nn.Linear(1, 2)
    >>> _ = line.weight.data.copy_(torch.tensor([[0.0], [1.0]])), line.bias.data.copy_(torch.tensor([0.6, 0.0]))
    >>> round(float(mohs.attack(Latent(line, size=1), net, x, y, "l2:inf").size), 2)  # only the second number can move
    0.2

    **Differs from the paper**: c is bisected per row, as Carlini and Wagner do; the paper looks at the smallest change, the fixed
    radius is added; the clean input's latent is found by Adam, from random starts of variance 1 / d.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
    sections 4.3 and 5.4.2.
    """

    generator: nn.Module = field(repr=False, compare=False)
    size: int | None = None
    steps: int = 300
    rate: float = 0.05
    begin: int = 200
    keep: float = 1.0
    inner: int = 50
    objective: Objective = margin
    weights: str = field(init=False)
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "lp")

    def __post_init__(self) -> None:
        check_whole(self, "steps", "inner")
        check_whole(self, "begin", least=0)
        check_positive(self, "rate")
        check_least(self, 0.0, "keep")
        if not isinstance(self.generator, nn.Module):
            raise UsageError(f"generator must be a torch module; got {type(self.generator).__name__}.")
        self._check_mode()
        if self.size is None:
            size = getattr(self.generator, "latent", None)
            if type(size) is not int:
                raise UsageError(
                    f"How long is the latent of this {type(self.generator).__name__}? It has no attribute latent; give size=..."
                )
            object.__setattr__(self, "size", size)
        check_whole(self, "size")
        object.__setattr__(self, "weights", weights_hash(self.generator)[:16])

    def _check_mode(self) -> None:
        for name, module in self.generator.named_modules():
            if module.training and isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd):
                raise UsageError(
                    f"The generator is in training mode ({name or 'generator'}: {type(module).__name__}), so what it makes depends on "
                    "the batch or on chance. Call generator.eval() first; Mohs does not flip modes behind your back."
                )

    def init(self, problem: Problem) -> LatentState:
        """At the latent of the clean input, or of where the caller says, as far as the generator can make it."""
        self._check_mode()  # it may have been trained on since
        wanted = problem.begin()
        draws = streams.normal(problem.key, (int(self.size or 0),), dtype=wanted.dtype)
        z, adam = draws / math.sqrt(draws.shape[1]), Adam.fresh(draws)
        for k in range(self.begin):
            made, back = self._decode(z, wanted)
            fade = FADE + (1 - FADE) * (1 + math.cos(math.pi * k / self.begin)) / 2
            change, adam = adam.move(back(2 * (made - wanted)), torch.full_like(problem.eps, 2 * self.rate * fade))
            z = z + change
        return LatentState(problem.project(self._decode(z, wanted)[0]), z=z, adam=Adam.fresh(z))

    def step(self, problem: Problem, state: LatentState, k: int) -> LatentState:
        """One step of Adam in the latent."""
        if problem.threat.minimum:
            return self._nearer(problem, state)
        made, back = self._decode(state.z, problem.x0)
        g = problem.gradient(state.x, self.objective)
        gradient = back(2 * self.keep * (made - state.x) - g)
        change, adam = state.adam.move(gradient, torch.full_like(problem.eps, self.rate))
        z = state.z + change
        x = problem.project(self._decode(z, problem.x0)[0])
        return replace(state, x=x, z=z, adam=adam)

    def _nearer(self, problem: Problem, state: LatentState) -> LatentState:
        """One step towards the smallest change; where it ends a round, the weight of the goal is bisected."""
        z, adam, search = state.z, state.adam, state.search
        made, back = self._decode(z, problem.x0)
        view = problem.linearize(state.x, margin)
        g = view.gradient()
        if search is None:
            f = shortfall(problem, view)  # a stand-in may take the goal for met where it is not
            search = self._first(z, made, back(g), torch.where(f > 0, f, view.value.abs()))
        search = search.saw(problem, view, g, z, state.x)
        r = made - problem.x0
        # not f > 0: where the gradients come from a stand-in, it may take its goal for met before the deployed model does
        gradient = back(2 * r - g * per_row(search.c * ~view.met, g))
        part = (1 + torch.cos(math.pi * adam.age / self.inner)) / 2
        change, adam = adam.move(gradient, search.rate * (FADE + (1 - FADE) * part))
        z = z + change
        ended = adam.age >= self.inner
        if bool(ended.any()):
            search, z = search.next_round(ended, z)
            # steps get finer once a weight is known that succeeds: the latent of the nearest success lies in a curved valley
            search = replace(search, rate=torch.where(ended & search.high.isfinite(), FINER * search.rate, search.rate))
            adam = adam.restart(ended)
        x = problem.project(self._decode(z, problem.x0)[0])
        return LatentState(x, z=z, adam=adam, search=search)

    def _first(self, z: Tensor, made: Tensor, slope: Tensor, f: Tensor) -> Weight:
        """The weight at which, were all linear, descent along the latent's gradient would just reach the boundary.

        A way t along the slope s gains t |s|^2 logits and moves the input by t |J s|; f logits are missed.
        """
        steep = slope.norm(dim=1)
        unit = slope / per_row(steep.clamp_min(torch.finfo(z.dtype).tiny), z)
        short = TRIAL * math.sqrt(z.shape[1])
        moved = (self._decode(z + short * unit, made)[0] - made).flatten(1).norm(dim=1) / short
        far = known(f / steep)
        rate = torch.where(far > 0, far / math.sqrt(z.shape[1]), self.rate).clamp_max(self.rate)
        return Weight.at(known(2 * f * (moved / steep).square()), rate)

    def _decode(self, z: Tensor, like: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What the latents make, and the way back: cotangents of it to gradients of the latents."""
        own = next((p for p in self.generator.parameters() if p.is_floating_point()), z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            made = self.generator(z.to(device=own.device, dtype=own.dtype))
        if made.shape != like.shape:
            raise ModelError(
                f"The generator makes {tuple(made.shape)} where inputs are {tuple(like.shape)}. Give one for such inputs, or wrap it "
                "in a module that reshapes."
            )

        def back(cotangent: Tensor) -> Tensor:
            return torch.autograd.grad(made, z, cotangent.to(made), retain_graph=True)[0]

        return made.detach().to(like), back
