"""Where an unfinished job stands, kept beside the ledger, so that a kill costs seconds of work and no wave."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mohs.attacks import Job
from mohs.attacks._wave import restore, save
from mohs.errors import MohsError
from mohs.records import Run

FORMAT = 1
EVERY = 5.0
"""Seconds of work between two bookmarks: what a kill may cost."""
SHARE = 0.02
"""Of the time at most so much goes into writing them: where one takes longer than a tenth of a second, they come less often."""


class Bookmark:
    """The one file of a run that says where its present job stands; it is gone when no job is under way.

    What cannot be read, or belongs to another run, stage or format, is passed over: it costs time only. Nothing in it is
    executed. It is trusted as the ledger beside it is: a replay scores every adversarial input again.

    Args:
        run: the open run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cost = 0.0
        self.latest = time.monotonic()

    def begin(self, stage: str, todo: Tensor, make: Callable[[Tensor], Job]) -> tuple[Job, Tensor]:
        """The job that ``make`` makes for the examples ``todo``, or the one that a killed sitting left in this stage, with its
        examples, standing where it stood."""
        self.latest = time.monotonic()
        if (saved := self._read(stage)) is not None:
            tensors, text = saved
            left = tensors.pop("todo").to(todo)
            try:
                job = make(left)
                restore(job, tensors, text)
            except (ValueError, IndexError, MohsError):
                pass
            else:
                return job, left
        return make(todo), todo

    def through(self, job: Job, stage: str, todo: Tensor) -> Iterator[Tensor]:
        """Run the job to its end, noting every few seconds where it stands; yields what ``Job.run`` does, if not empty."""
        for final in job.run():
            if len(final):
                yield final
            self._keep(job, stage, todo)
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
        head = {"format": FORMAT, "identity": self.run.header.identity, "stage": stage, "job": text}
        self.run.put_bookmark(to_bytes(tensors | {"todo": todo.cpu().clone()}, {"mohs": json.dumps(head)}))
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
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118, it is no dict
            if tensors["todo"].dtype != torch.int64 or tensors["todo"].dim() != 1:
                return None
            return tensors, str(head["job"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None
