"""Where an unfinished job stands, kept beside the ledger, so that a kill costs a second of work and no wave."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mohs.attacks import Job
from mohs.attacks._wave import restore, save
from mohs.errors import MohsError, RecordError
from mohs.records import Run

FORMAT = 1
EVERY = 1.0
"""Seconds of work between two bookmarks: what a kill may cost."""
SHARE = 0.02
"""Of the time at most so much goes into writing them: where one takes longer than a fiftieth of a second, they come less often."""
LARGEST = 1 << 30
"""Bytes of the largest bookmark that is written: of larger jobs a kill loses the wave."""


class Bookmark:
    """The one file of a run that says where its present job stands; it is gone when no job is under way.

    What is damaged, or belongs to another run, stage or format, is passed over: it costs time only. So does one that does
    not fit the rows of the ledger, as when one of the two came back from a copy. Nothing in it is executed. It is trusted as
    the ledger beside it is: a replay scores every adversarial input again.

    Args:
        run: the open run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cost = 0.0
        self.latest = time.monotonic()

    def begin(
        self, stage: str, todo: Tensor, make: Callable[[Tensor], Job], portion: Tensor | None = None
    ) -> tuple[Job, Tensor]:
        """The job that ``make`` makes for the examples ``todo``, or the one that a killed sitting left in this stage, with its
        examples, standing where it stood.

        ``portion``: the examples of a stage whose answers are written down one by one; those not in ``todo`` are.
        """
        self.latest, self.cost = time.monotonic(), 0.0
        if (saved := self._read(stage)) is not None:
            tensors, text = saved
            left = tensors.pop("todo").to(todo)
            try:
                if not _belongs(left, todo, portion):
                    raise ValueError("it is of other examples")
                job = make(left)
                restore(job, tensors, text)
                if portion is not None and bool(torch.isin(left[job.emitted], todo).any()):
                    raise ValueError("its answers are not in the ledger")
            except (ValueError, IndexError, MohsError):
                pass
            else:
                return job, left
        return make(todo), todo

    def through(self, job: Job, stage: str, todo: Tensor) -> Iterator[Tensor]:
        """Run the job to its end, noting every second or so where it stands; yields what ``Job.run`` does, if not empty."""
        for final in job.run():
            if len(final):
                yield final
            self._keep(job, stage, todo)

    def drop(self) -> None:
        """Remove it: what the job found is written down."""
        self.run.put_bookmark(None)

    def _keep(self, job: Job, stage: str, todo: Tensor) -> None:
        began = time.monotonic()
        if began - self.latest < max(EVERY, self.cost / SHARE):
            return
        from safetensors.torch import save as to_bytes

        self.latest = began
        try:
            tensors, text = save(job)
        except TypeError:  # an attack of somebody else's making, whose state holds more than tensors
            self.cost = math.inf
            return
        tensors["todo"] = todo.to("cpu", copy=True)
        if sum(value.nbytes for value in tensors.values()) > LARGEST:
            self.cost = math.inf
            return
        head = {"format": FORMAT, "identity": self.run.header.identity, "stage": stage, "job": text}
        head["sum"] = _sum(tensors, text)
        try:
            self.run.put_bookmark(to_bytes(tensors, {"mohs": json.dumps(head)}))
        except RecordError as error:
            if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
                raise
            self.cost = math.inf  # what room there is belongs to the ledger
            self.drop()
            return
        self.latest = time.monotonic()
        self.cost = self.latest - began

    def _read(self, stage: str) -> tuple[dict[str, Tensor], str] | None:
        from safetensors import SafetensorError, safe_open

        if not self.run.bookmark.is_file():
            return None
        wanted = {"format": FORMAT, "identity": self.run.header.identity, "stage": stage}
        try:
            with safe_open(self.run.bookmark, framework="pt") as stream:
                head = json.loads((stream.metadata() or {})["mohs"])
                if any(head[key] != value for key, value in wanted.items()):
                    return None
                # copies, as the file is mapped and is to be replaced
                tensors = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118, it is no dict
            text = str(head["job"])
            if head["sum"] != _sum(tensors, text) or tensors["todo"].dtype != torch.int64 or tensors["todo"].dim() != 1:
                return None
            return tensors, text
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError):
            return None


def _belongs(left: Tensor, todo: Tensor, portion: Tensor | None) -> bool:
    """May a job on the examples ``left`` stand for one on ``todo``?"""
    if portion is None:
        return torch.equal(left, todo)
    return (
        len(left.unique()) == len(left) and bool(torch.isin(left, portion).all()) and bool(torch.isin(todo, left).all())
    )


def _sum(tensors: Mapping[str, Tensor], text: str) -> str:
    """A hash of all that a bookmark holds."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        sha.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
