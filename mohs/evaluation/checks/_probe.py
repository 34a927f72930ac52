"""What the checks share: a small sample and what the model says about it, each computed once and only if asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.errors import DataError, ModelError, gist, rows_text
from mohs.objectives import margin, plain_cross_entropy
from mohs.problem import Goal
from mohs.target import classify
from mohs.threat import Threat

SAMPLE = 64
"""Rows most checks look at."""
FEW = 16
"""Rows that are enough where a look is dear."""
MANY = 256
"""Rows the clean accuracy is measured on."""


class Probe:
    """A model, data and a threat under examination.

    Args:
        model: the classifier, in whatever mode it came.
        x, y: all inputs [N, ...] and labels [N].
        threat: region, box and access.
        stated_accuracy: what somebody says the clean accuracy is, or None.
        seed: picks the sample and the small noise.
        batch: physical batch size; every pass is padded to it. None: passes as large as what is asked.
        reject: the logit by which the model rejects an input.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        stated_accuracy: float | None = None,
        seed: int = 0,
        batch: int | None = None,
        reject: int | None = None,
    ) -> None:
        self.reject = reject
        self.model, self.threat, self.stated_accuracy, self.batch = model, threat, stated_accuracy, batch
        self.all_x = x
        # the labels of real data are often sorted, so the first rows would not do
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:MANY].to(x.device)
        self.rows, self.many_x, self.many_y = order, x[order].detach(), y[order]
        self.x, self.y = self.many_x[:SAMPLE], self.many_y[:SAMPLE]
        self.key = streams.derive(streams.content_keys(self.x), seed)
        self.was_training = [(n, m) for n, m in model.named_modules() if m.training]

    def forward(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """Logits [B, K] without gradients, in physical batches; of a ``model`` other than the one examined."""
        with torch.no_grad():
            parts = [
                self._padded(partial(classify, model or self.model), part)
                for part in x.split(self.batch or max(len(x), 1))
            ]
            logits = torch.cat(parts)
        return logits.clone()

    def alone(self, row: int) -> Tensor:
        """Logits [K] of one sample row with no other input in its batch (copies of it fill a fixed batch)."""
        return self.forward(self.x[row : row + 1])[0]

    def _padded(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.batch is None or len(x) == self.batch:
            return function(x)
        index = torch.arange(self.batch, device=x.device).clamp_max(len(x) - 1)
        return function(x[index])[: len(x)]

    @cached_property
    def logits(self) -> Tensor:
        """Of the sample, [n, K]."""
        logits = self.forward(self.x)
        high = self.rows[self.many_y >= logits.shape[1]].sort().values.tolist()
        if high:
            raise DataError(
                f"Labels must be below the model's {logits.shape[1]} classes; in a sample of {len(self.many_y)} "
                f"examples, {rows_text(high)} reach up to {int(self.many_y.max())}. Check that model and data belong "
                "together."
            )
        return logits

    @cached_property
    def many_logits(self) -> Tensor:
        """Of the larger sample, [m, K]."""
        rest = self.many_x[SAMPLE:]
        return torch.cat([self.logits, self.forward(rest)]) if len(rest) else self.logits

    @cached_property
    def noisy(self) -> Tensor:
        """The sample with small uniform noise, inside the box: randomness may sleep on clean inputs."""
        lo, hi = self.threat.box
        spread = float(self.x.max() - self.x.min()) or 1.0
        noise = streams.uniform(self.key, tuple(self.x.shape[1:]), dtype=self.x.dtype).sub_(0.5)
        return (self.x + 0.05 * spread * noise).clamp_(lo, hi)

    @cached_property
    def noisy_logits(self) -> Tensor:
        """Of the sample with small noise, [n, K]."""
        return self.forward(self.noisy)

    @cached_property
    def spread(self) -> tuple[float, float, int]:
        """How repeated passes disagree: (largest relative change of a logit, that on noisy inputs, rows that flip)."""
        again = [self.forward(self.x) for _ in range(3)]
        change = max(relative(self.logits, z) for z in again)
        flips = torch.stack([z.argmax(1) != self.logits.argmax(1) for z in again]).any(0)
        first, second = self.noisy_logits, self.forward(self.noisy)
        flips |= first.argmax(1) != second.argmax(1)
        return change, relative(first, second), int(flips.sum())

    @property
    def random(self) -> bool:
        """Do repeated passes disagree beyond rounding?"""
        return max(self.spread[:2]) > 1e-5

    @cached_property
    def lead(self) -> Tensor:
        """Highest logit minus the second, [n]."""
        top = self.logits.topk(2, dim=1).values
        return top[:, 0] - top[:, 1]

    @cached_property
    def graph_error(self) -> str:
        """Why there is no input gradient, or '' if there is one."""
        try:
            _ = self.gradients
        except _NoGradientError as error:
            return str(error)
        return ""

    @cached_property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """Input gradients of (logit margin, plain cross-entropy) of the model's own answers, [n, D] each."""
        return self.slopes()

    def slopes(self, x: Tensor | None = None, guide: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """The same, taken anew: for a random model, those of another draw; at other inputs, or of a ``guide`` of the model."""
        x = self.x if x is None else x
        pieces = [self._gradient_pair(part, guide or self.model) for part in x.split(self.batch or len(x))]
        own, likelihood = zip(*pieces)
        return torch.cat(own), torch.cat(likelihood)

    @cached_property
    def logit_slopes(self) -> tuple[Tensor, Tensor]:
        """Lengths of the input gradients of the highest logit and of the second, [min(n, 16)] each."""
        pieces = []
        for part in self.x[:FEW].split(self.batch or FEW):
            rows = len(part)
            if self.batch is not None:
                part = part[torch.arange(self.batch, device=part.device).clamp_max(rows - 1)]
            x = part.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                graph = classify(self.model, x)
                top = graph.gather(1, graph.detach().topk(2, dim=1).indices).sum(0)
            first, second = (torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in top)
            pieces.append((first[:rows].flatten(1).norm(dim=1), second[:rows].flatten(1).norm(dim=1)))
        one, two = zip(*pieces)
        return torch.cat(one), torch.cat(two)

    def _gradient_pair(self, part: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
        rows = len(part)
        if self.batch is not None:
            part = part[torch.arange(self.batch, device=part.device).clamp_max(rows - 1)]
        x = part.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            graph = classify(model, x)
        if not graph.requires_grad:
            raise _NoGradientError("the logits are detached from the input")
        logits = graph.detach()
        goal = Goal.leave(logits.argmax(1))
        found = []
        for objective in (margin, plain_cross_entropy):
            _, cotangent = objective(logits, goal)
            try:
                (g,) = torch.autograd.grad(graph, x, cotangent, retain_graph=objective is margin)
            except RuntimeError as error:
                raise _NoGradientError(gist(error)) from error
            found.append(g[:rows].flatten(1))
        return found[0], found[1]

    def cut(self) -> str:
        """Name the first module that loses the gradient, by one pass with hooks; '' if unknown."""
        seen: list[tuple[str, bool, bool]] = []

        def note(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
            def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
                seen.append((name or type(module).__name__, _requires(inputs), _requires((output,))))

            return hook

        leaves = [(n, m) for n, m in self.model.named_modules() if not list(m.children())]
        handles = [m.register_forward_hook(note(n)) for n, m in leaves]
        try:
            # with the parameters' own gradients in play a later layer would hide the cut
            x = self.x[:1].detach().clone().requires_grad_(True)
            x = x[torch.zeros(self.batch or 1, dtype=torch.int64, device=x.device)]
            with torch.enable_grad(), frozen(self.model):
                classify(self.model, x)
        finally:
            for handle in handles:
                handle.remove()
        for name, before, after in seen:
            if not before:
                return f"before layer {name}"
            if not after:
                return f"in layer {name}"
        return f"after layer {seen[-1][0]}" if seen else ""


class _NoGradientError(ModelError):
    """The model cannot be differentiated; becomes a finding."""


def relative(a: Tensor, b: Tensor) -> float:
    """Largest change of a logit relative to 1 + the largest logit of its row; nan against nan is no change."""
    change = (a - b).abs().amax(1) / (1 + torch.maximum(a.abs(), b.abs()).amax(1))
    same = torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all(1)
    return float(change.nan_to_num(nan=float("inf")).masked_fill(same, 0.0).max()) if len(a) else 0.0


def _requires(values: tuple[object, ...]) -> bool:
    return any(isinstance(v, Tensor) and v.requires_grad for v in values)


class frozen:  # noqa: N801  (a context manager reads as a verb)
    """Parameters without gradients inside, as before afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.asked = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for p in self.asked:
            p.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        for p in self.asked:
            p.requires_grad_(True)
