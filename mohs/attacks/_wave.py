"""A wave, and how a job that stands in the middle of one is saved and taken up again, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mohs._rows import Rows
from mohs.attacks._quiet import QuietGenerators
from mohs.problem import Problem

if TYPE_CHECKING:
    from mohs.attacks.run import Job

PROGRESS = ("waiting", "finished", "emitted", "answer", "owner", "cost", "success", "error", "score", "margin", "trace")
"""Tensors of a job that change while it runs. Its best points are saved where they are not yet the caller's."""


@dataclass
class Wave:
    """Rows at the same step.

    Args:
        batches: problem and state of each physical batch; the state is None before the first step.
        quiet: keeps the global generators out of it.
        k: the step they are at.
        at: the batch that takes it next.
    """

    batches: list[tuple[Problem, Any]]
    quiet: QuietGenerators
    k: int = 0
    at: int = 0


def save(job: Job) -> tuple[dict[str, Tensor], str]:
    """What a job knows at a pause of ``Job.run``: tensors by name, and a JSON text that says how they belong together.

    Raises:
        TypeError: the attack's state holds something else than tensors, plain values and ``Rows`` of these.
    """
    tensors: dict[str, Tensor] = {}
    kept = ((job.owner < job.rows) & ~job.emitted).nonzero().squeeze(1)
    head = {
        "spent": job.spent,
        "progress": _pack({name: getattr(job, name) for name in PROGRESS}, "job", tensors),
        "kept": _pack([kept, job.best[kept]], "kept", tensors),
        "ranking": _pack(job.ranking, "ranking", tensors),
        "ranked": job.ranked is not None,
        "wave": None,
    }
    if job.wave is not None:
        batches = [[p.example, p.number, p.found, p.warm, s] for p, s in job.wave.batches]
        head["wave"] = {
            "k": job.wave.k,
            "at": job.wave.at,
            "quiet": [job.wave.quiet.seed, job.wave.quiet.calls],
            "batches": _pack(batches, "wave", tensors),
        }
    # copies, of which no two share memory
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}, json.dumps(head)


def restore(job: Job, tensors: Mapping[str, Tensor], text: str) -> None:
    """Put what ``save`` gave into a job that was made with the same arguments and has not run.

    Raises:
        ValueError: it does not fit this job. The job is unchanged then.
    """
    try:
        head = json.loads(text)
        # copies: matrix products of memory that begins elsewhere than torch's own does are rounded otherwise
        here = {name: value.to(job.x.device, copy=True) for name, value in tensors.items()}
        progress = _unpack(head["progress"], here)
        for name in PROGRESS:
            _fits(name, progress[name], getattr(job, name), any_length=name == "waiting")
        _within("waiting examples", progress["waiting"][0], len(job.x))
        _within("waiting rows", progress["waiting"][1], job.rows)
        for name in ("answer", "owner"):
            _within(name, progress[name], job.rows + 1)
        kept, points = _unpack(head["kept"], here)
        best = job.best.clone()
        best[kept] = points.to(best)
        _within("kept", kept, len(job.x))
        spent, ranking = int(head["spent"]), _unpack(head["ranking"], here)
        if head["ranked"]:
            job.ranked = torch.cat(ranking)  # the rows of the wave have their aims from here
        wave = None if head["wave"] is None else _wave(job, head["wave"], here)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        job.ranked = None
        raise ValueError(f"what was saved does not fit the job ({error})") from error
    for name in PROGRESS:
        setattr(job, name, progress[name])
    job.best, job.ranking, job.wave, job.spent = best, ranking, wave, spent


def _wave(job: Job, head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Wave:
    quiet = QuietGenerators.again(*(int(v) for v in head["quiet"]))
    batches = []
    for example, number, found, warm, state in _unpack(head["batches"], tensors):
        if len(example) != job.batch or len(number) != job.batch:
            raise ValueError("its batches have another size")
        _within("examples", example, len(job.x))
        _within("rows", number, job.rows)
        problem = job.problem(example, number)
        for field in fields(found):
            _fits(field.name, getattr(found, field.name), getattr(problem.found, field.name))
        _fits("warm", warm, problem.warm)
        if state is not None:
            _fits("x", state.x, problem.x0)
            _counts(state, job.batch)
        problem.found, problem.warm = found, warm
        batches.append((problem, state))
    k, at = int(head["k"]), int(head["at"])
    if not (0 <= k <= job.attack.steps + 1 and 0 <= at <= len(batches)):
        raise ValueError(f"it stands at step {k}, batch {at}")
    return Wave(batches, quiet, k, at)


def _within(name: str, index: Tensor, below: int) -> None:
    if index.dtype != torch.int64 or (len(index) and not (0 <= int(index.min()) <= int(index.max()) < below)):
        raise ValueError(f"{name} are not all in 0 to {below - 1}")


def _counts(rows: Rows, batch: int) -> None:
    """Refuse rows of which a field has another number of entries."""
    for field in fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, Rows):
            _counts(value, batch)
        elif isinstance(value, Tensor) and value.shape[:1] != (batch,):
            raise ValueError(f"{field.name} has shape {tuple(value.shape)}, not {batch} rows")


def _fits(name: str, value: Any, wanted: Any, any_length: bool = False) -> None:
    if value is None or wanted is None:
        if value is not wanted:
            raise ValueError(f"{name} is there on one side only")
        return
    shapes = [tuple(v.shape[: 1 if any_length else None]) for v in (value, wanted)]
    if shapes[0] != shapes[1] or value.dtype != wanted.dtype:
        raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, not {wanted.dtype} {tuple(wanted.shape)}")


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; its tensors go into ``tensors`` under names that begin with ``name``."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Rows):
        inner = {f.name: getattr(value, f.name) for f in fields(value)}
        return {"rows": _named(type(value)), "fields": _pack(inner, name, tensors)["items"]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"items": {key: _pack(v, f"{name}.{key}", tensors) for key, v in value.items()}}
    if isinstance(value, list):
        return {"list": [_pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a {type(value).__name__} cannot be saved ({name}); a state holds tensors and plain values")


def _unpack(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "rows" in packed:
        # only what is already there is made again: a file cannot name code to import
        made = {_named(cls): cls for cls in _descendants(Rows)}[packed["rows"]]
        return made(**_unpack({"items": packed["fields"]}, tensors))
    if "items" in packed:
        return {key: _unpack(value, tensors) for key, value in packed["items"].items()}
    if "list" in packed:
        return [_unpack(value, tensors) for value in packed["list"]]
    return packed["value"]


def _named(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _descendants(cls: type) -> list[type]:
    return [found for child in list[type](cls.__subclasses__()) for found in (child, *_descendants(child))]
