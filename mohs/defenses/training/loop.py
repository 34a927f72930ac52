"""The one loop that every training objective runs in.

Everything that happens is a function of the recipe: weights, data order, attacks and dropout draw from seeds of their
own, never from the global generators. The state after each epoch is one atomic file, so a run killed at any moment and
started again ends, on the same machine with as many threads, in bit-identical weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mohs.data import Dataset, load
from mohs.defenses.training import _world, checkpoint
from mohs.defenses.training._quiet import evaluating, mixed, modes_kept, number, seeded
from mohs.defenses.training.average import Average
from mohs.defenses.training.checkpoint import Position
from mohs.defenses.training.objective import Context, Perturb, Points, against, layers, prepares, pretrained_in
from mohs.defenses.training.recipe import Recipe
from mohs.defenses.training.room import Room
from mohs.defenses.training.turn import Turn, take
from mohs.defenses.training.watch import EarlyWarning, Watch
from mohs.errors import ModelError, UsageError
from mohs.models.weights import save_weights, weights_hash, write_atomically
from mohs.target import classify

CHECKPOINT, CURVE, WEIGHTS = "checkpoint.safetensors", "curve.jsonl", "weights.safetensors"
CHUNK = 16
"""Batches of the training set that are perturbed at a time, before the first step."""


@dataclass(frozen=True)
class Progress:
    """Told after every step: where the run is, the epoch's mean loss so far, and at its end what it brought.

    Args:
        step: steps done in the epoch under way, of ``steps``.
        row: the epoch's line of the learning curve, at its last step.
        warning: the early warning, at the last step of an epoch that gives one.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    row: dict[str, Any] | None = None
    warning: EarlyWarning | None = None


@dataclass(frozen=True)
class Trained:
    """What a training brought: the model in eval mode, where its weights lie, the learning curve, and warnings."""

    model: nn.Module
    weights: Path
    curve: list[dict[str, Any]]
    warnings: list[EarlyWarning]
    seconds: float


def train(
    recipe: Recipe,
    *,
    perturb: Perturb,
    out: str | Path,
    data: Dataset | None = None,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    resume: bool = True,
    checkpoint_every: int | None = None,
    watch: Watch | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train as the recipe says, or go on where an earlier call with the same ``out`` was interrupted.

    ``mohs.evaluation.training.train`` is the same with Mohs's own attacks plugged in. Under torchrun each process takes
    its share of every batch; the batches are the same for any number of processes (batch statistics are those of a share).

    Args:
        recipe: what to do.
        perturb: runs an attack to the end of its budget; the attack may come wrapped in ``Last``.
        out: directory for ``checkpoint.safetensors``, ``curve.jsonl`` (one line per epoch) and, at the end,
            ``weights.safetensors``.
        data: instead of the recipe's data.
        model: instead of the recipe's net: trained on from its present weights, in place; afterwards its modules are in
            the modes they came in.
        device: 'cpu', 'cuda', 'cuda:1' ...; None: a GPU where there is one.
        seed: instead of the recipe's.
        resume: go on from the checkpoint in ``out``; False: start anew and overwrite it.
        checkpoint_every: steps after which to write a checkpoint within an epoch, besides the one after it.
        watch: the attacks of the early warnings; needs a threat and a holdout.
        progress: called after every step, in the main process.

    Returns:
        A ``Trained``.

    Raises:
        ModelError: The loss or a weight is no longer finite; the last good checkpoint is kept.
        RecordError: The checkpoint in ``out`` is damaged or belongs to another run.
        UsageError, DataError: The recipe and its data do not fit; see the message.
    """
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise UsageError(f"checkpoint_every was {checkpoint_every}. Give a number of steps >= 1, or None.")
    data = data if data is not None else load(recipe.data, split="train")
    if len(data) - recipe.holdout < 1:
        raise UsageError(
            f"Recipe {recipe.name!r} holds out {recipe.holdout} examples, but {data.name or 'the data set'} has "
            f"{len(data)}. Make holdout smaller or give more data."
        )
    if model is not None and recipe.start is not None:
        raise UsageError(
            f"Recipe {recipe.name!r} starts from {recipe.start!r}, and a model was given to start from as well. Leave one out."
        )
    if model is None and recipe.start is None and prepares(recipe.objective):
        raise UsageError(
            f"Recipe {recipe.name!r}: {type(recipe.objective).__name__} goes on from a trained net. Name one in the recipe, such "
            "as start='bundled:fashion-natural', or give the model."
        )
    if model is None:
        with seeded(recipe.seed, "weights"):
            made = recipe.build_net()
        with _world.join(device) as world:
            run = _Run(recipe, perturb, Path(out), data, made, world, checkpoint_every, watch, progress)
            trained = run.run(resume)
        made.eval()
        return trained
    with modes_kept(model), _world.join(device) as world:
        return _Run(recipe, perturb, Path(out), data, model, world, checkpoint_every, watch, progress).run(resume)


class _Run:
    """One training run: its fixed parts, and the steps."""

    def __init__(
        self, recipe: Recipe, perturb: Perturb, out: Path, data: Dataset, model: nn.Module, world: _world.World,
        checkpoint_every: int | None, watch: Watch | None, progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        self.recipe, self.perturb, self.out, self.world = recipe, perturb, out, world
        self.checkpoint_every, self.progress = checkpoint_every, progress
        self.threat = recipe.parsed_threat
        watched = self.threat is not None and not self.threat.minimum and recipe.holdout > 0
        self.watch = watch if watched else None
        identity = f"{recipe.identity} {data.hash} {weights_hash(model)}"
        self.identity = f"{number(identity):016x}"
        self.model = model.to(world.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise UsageError("The model has no parameter with requires_grad=True, so there is nothing to train.")
        self.optimiser = recipe.optimiser.build(self.parameters)
        trained_on = len(data) - recipe.holdout
        self.x, self.y = data.x[:trained_on], data.y[:trained_on]
        self.held = (data.x[trained_on:].to(world.device), data.y[trained_on:].to(world.device))
        # the attack's physical batch: the same for every step, so its results do not depend on the last, smaller one
        self.shard = -(-recipe.batch // world.size)
        self.position = Position()
        self.memory: dict[str, Tensor] = {}  # of the objective
        self.average = Average(recipe.averaging, self.model) if recipe.averaging is not None else None

    @property
    def file(self) -> Path:
        return self.out / CHECKPOINT

    def run(self, resume: bool) -> Trained:
        """From the checkpoint, or from the start, to the last epoch."""
        self._begin()
        if resume and self.file.exists():
            self.position, more = checkpoint.restore(self.file, self.identity, self.model, self.optimiser)
            self.memory = {k: v.to(self.world.device) for k, v in more["memory"].items()}
            if self.average is not None:
                self.average.restore(more["average"])
        self.world.copy_from_main(self.model.state_dict().values())
        self.world.wait()  # nobody may overwrite the checkpoint before all have read it
        self.model.train()
        self.since, self.before = time.perf_counter(), self.position.seconds
        warnings = self._past_warnings()
        while self.position.epoch < self.recipe.epochs:
            warning = self._epoch()
            if warning is not None:
                warnings.append(warning)
        self.model.eval()
        if self.average is not None:
            self.model.load_state_dict(self.average.state)
        weights = self.out / WEIGHTS
        if self.world.main:
            facts = {"arch": self.recipe.net, "recipe": self.recipe.name, "settings": repr(self.recipe)}
            if (enemy := against(self.recipe.objective)) is not None:
                facts["against"] = self.model.__dict__["trained_against"] = enemy
            save_weights(self.model, weights, facts)
        self.world.wait()
        return Trained(self.model, weights, self.position.history, warnings, self.position.seconds)

    def _begin(self) -> None:
        """What is due once, with the net as it is before the first step: a resumed run does it again, with the same outcome."""
        objective, seed = self.recipe.objective, self.recipe.seed
        with seeded(seed, "check"):
            for net in pretrained_in(objective):
                net.check(self.model, self.x[:1].to(self.world.device))
        for layer in layers(objective):
            if callable(prepare := getattr(layer, "prepare", None)) and self.threat is not None:
                self.x = prepare(self.x, self._points_for_all, self.threat.box)

    def _points_for_all(self, attack: Any) -> Tensor:
        """The attack's points for the whole training set, at the full radius."""
        assert self.threat is not None
        eps, seed, device = self.threat.region.eps, number(self.recipe.seed, "prepare"), self.world.device
        found = []
        for rows in torch.arange(len(self.x)).split(CHUNK * self.recipe.batch):
            mine = self.world.share(rows)
            x, y = self.x[mine].to(device), self.y[mine].to(device)
            with seeded(seed, self.world.rank):
                points = self._points(attack, x, y, x.new_full((len(x),), eps), seed, self.shard)
            found.append(self.world.gather(points, len(rows)).to(self.x.device))
        return torch.cat(found)

    def _past_warnings(self) -> list[EarlyWarning]:
        if self.watch is None:
            return []
        past = self.position.history
        found = (self.watch.judge(past[: k + 1]) for k in range(len(past)))
        return [warning for warning in found if warning is not None]

    def _batches(self, epoch: int) -> list[Tensor]:
        """The global batches of an epoch, as positions in the data: a function of seed and epoch alone."""
        generator = torch.Generator().manual_seed(number(self.recipe.seed, "order", epoch))
        batches = list(torch.randperm(len(self.x), generator=generator).split(self.recipe.batch))
        if len(batches) > 1 and len(batches[-1]) == 1:
            last = batches.pop()  # a batch of one has no batch statistics
            batches[-1] = torch.cat([batches[-1], last])
        return batches

    def _epoch(self) -> EarlyWarning | None:
        at = self.position
        batches = self._batches(at.epoch)
        while at.step < len(batches):
            done = (at.epoch + at.step / len(batches)) / self.recipe.epochs
            at.loss_sum += self._step(batches[at.step], done)
            at.step += 1
            if self.average is not None:
                self.average.add(self.model, at.epoch * len(batches) + at.step)
            if at.step < len(batches):
                if self.checkpoint_every and at.step % self.checkpoint_every == 0:
                    self._save()
                self._tell(Progress(at.epoch + 1, self.recipe.epochs, at.step, len(batches), at.loss_sum / at.step))
        eps = self._eps(done)
        row: dict[str, Any] = {"epoch": at.epoch + 1, "loss": at.loss_sum / at.step, "lr": self._rate(done)}
        row["eps"] = eps if math.isfinite(eps) else None  # JSON knows no infinity
        if self.world.main:
            row |= self._measure()
        row["seconds"] = round(self._seconds(), 3)
        at.history.append(row)
        warning = self.watch.judge(at.history) if self.watch is not None else None
        at.epoch, at.step, at.loss_sum = at.epoch + 1, 0, 0.0
        self._save()
        self._tell(Progress(at.epoch, self.recipe.epochs, len(batches), len(batches), row["loss"], row, warning))
        return warning

    def _step(self, index: Tensor, done: float) -> float:
        """One step on a global batch; the batch's mean loss."""
        at, recipe, device = self.position, self.recipe, self.world.device
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(done)
        mine, eps = self.world.share(index), self._eps(done)
        seed = number(recipe.seed, "room", at.epoch, at.step)
        room = None if self.threat is None else Room(self.threat, eps, seed)
        turn = Turn(
            self.model, self.parameters, self.x[mine].to(device), self.y[mine].to(device), len(index),
            Context(self._perturb_with(done), eps, done, room, seed=seed), self.memory, self.optimiser, self.world,
            (recipe.seed, "step", at.epoch, at.step, self.world.rank), self._diverged,
        )  # fmt: skip
        with mixed(self.model, recipe.precision):
            return take(recipe.objective, turn)

    def _perturb_with(self, done: float) -> Points:
        threat, eps = self.threat, self._eps(done)
        # every step draws anew; within it a row is known by its content, so shards do not matter
        seed = number(self.recipe.seed, "attack", self.position.epoch, self.position.step)

        def perturb(
            attack: Any, x: Tensor, y: Tensor, *, of: nn.Module | None = None, radii: Tensor | None = None
        ) -> Tensor:
            if threat is None:
                raise UsageError(f"Recipe {self.recipe.name!r} has no threat, but its objective runs {attack!r}.")
            radii = x.new_full((len(x),), eps) if radii is None else radii
            return self._points(attack, x, y, radii, seed, self.shard, of)

        return perturb

    def _points(
        self, attack: Any, x: Tensor, y: Tensor, radii: Tensor, seed: int, batch: int, of: nn.Module | None = None
    ) -> Tensor:
        if self.threat is None:
            return x
        net = self.model if of is None else of
        with evaluating(net):
            return self.perturb(attack, net, x, y, self.threat, eps=radii, seed=seed, batch=batch).detach()

    def _rate(self, done: float) -> float:
        return self.recipe.optimiser.lr * self.recipe.schedule.factor(done)

    def _eps(self, done: float) -> float:
        """The present radius: linear over the warm-up, then the threat's."""
        if self.threat is None:
            return 0.0
        grown = 1.0
        if self.recipe.warmup > 0:
            grown = min(1.0, done * self.recipe.epochs / self.recipe.warmup)
        return self.threat.region.eps * grown

    def _measure(self) -> dict[str, Any]:
        """Accuracy on the held-out examples: clean, and under the two attacks of the watch at the full radius."""
        if not len(self.held[0]):
            return {}
        with self.average.worn(self.model) if self.average is not None else nullcontext():
            return self._measure_present()

    def _measure_present(self) -> dict[str, Any]:
        x, y = self.held
        points = {"clean": x}
        if self.watch is not None and self.threat is not None:
            for name, attack in self.watch.attacks(self.threat).items():
                seed = number(self.recipe.seed, "watch", name)
                radii = x.new_full((len(x),), self.threat.region.eps)
                points[name] = self._points(attack, x, y, radii, seed, min(256, len(x)))
        with evaluating(self.model), torch.no_grad(), seeded(self.recipe.seed, "measure"):
            right = {name: classify(self.model, p).argmax(1) == y for name, p in points.items()}
        shares = {name: float(withstood.double().mean()) for name, withstood in right.items()}
        if "search" in right:
            shares["missed"] = float((right["many_steps"] & ~right["search"]).double().mean())
        return {"watched": len(x), **shares}

    def _seconds(self) -> float:
        return self.before + time.perf_counter() - self.since

    def _save(self) -> None:
        """Checkpoint and curve, in the main process; refuses weights that are not finite."""
        if not all(bool(v.isfinite().all()) for v in self.model.state_dict().values() if v.is_floating_point()):
            raise self._diverged("weights became nan or infinite")
        self.position.seconds = self._seconds()
        if self.world.main:
            more = {"memory": self.memory, "average": self.average.state if self.average is not None else {}}
            checkpoint.save(self.file, self.identity, self.model, self.optimiser, self.position, more)
            lines = "".join(json.dumps(row) + "\n" for row in self.position.history)
            write_atomically(lines.encode(), self.out / CURVE)

    def _diverged(self, what: str) -> ModelError:
        at, recipe = self.position, self.recipe
        kept = (
            f"The last good state is kept in {self.file}." if self.file.exists() else "No checkpoint was written yet."
        )
        return ModelError(
            f"Training {recipe.name!r} diverged: {what} in step {at.step + 1} of epoch {at.epoch + 1}, at learning "
            f"rate {recipe.optimiser.lr:g} with batch {recipe.batch}. {kept} Lower the learning rate, or let it rise slowly "
            "(Cosine(rise=0.1)), and train into another directory."
        )

    def _tell(self, progress: Progress) -> None:
        if self.progress is not None and self.world.main:
            self.progress(progress)
