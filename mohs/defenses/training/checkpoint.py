"""Checkpoints without pickle: one safetensors file holds weights, optimiser state and, as JSON in its header, progress.

One file and one rename, so that weights, optimiser and position can never belong to different steps, whenever the
process is killed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mohs.errors import ModelError, RecordError
from mohs.models.weights import write_atomically

FORMAT = 1


@dataclass
class Position:
    """How far a run has come.

    Args:
        epoch: epochs finished.
        step: steps finished within the next one.
        loss_sum: sum of that epoch's losses so far.
        seconds: time spent so far, over all sessions of the run.
        history: one dictionary per finished epoch (the learning curve).
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def save(
    path: Path, identity: str, model: nn.Module, optimiser: torch.optim.Optimizer, position: Position,
    more: Mapping[str, Mapping[str, Tensor]],
) -> None:  # fmt: skip
    """Write the whole state of a run, atomically; ``more`` are further tensors by kind and name.

    Raises:
        ModelError: The model's state holds more than tensors, or weights are no longer finite.
    """
    from safetensors.torch import save as to_bytes

    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"cannot checkpoint {name!r} of the model: not a tensor. Keep such state out of state_dict()."
            )
        tensors[f"model/{name}"] = value
    for kind, known in more.items():
        tensors |= {f"{kind}/{name}": value for name, value in known.items()}
    for index, state in optimiser.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser/{index}/{name}"] = value
            elif value is not None:
                numbers[f"{index}/{name}"] = value
    text = json.dumps({"format": FORMAT, "identity": identity, "position": vars(position), "numbers": numbers})
    # copies: safetensors refuses tensors that share memory
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_atomically(to_bytes(plain, {"mohs": text}), path)


def restore(
    path: Path, identity: str, model: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[Position, dict[str, dict[str, Tensor]]]:
    """Put a saved state back, bit by bit; answers how far the run had come, and the further tensors by kind and name.

    Raises:
        RecordError: The file is damaged, or belongs to another recipe, data set or initial model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            head = json.loads((stream.metadata() or {})["mohs"])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118, it is no dict
        known, found = head["format"] == FORMAT, head["identity"]
        position = Position(**head["position"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"{path}: not a checkpoint that can be read ({error}). Delete it, or train with resume=False to begin anew."
        ) from error
    if not known or found != identity:
        raise RecordError(
            f"{path}: the checkpoint is of another run: recipe, data, initial weights or seed differ (its identity is "
            f"{found}, this run's {identity}). Train into another directory, or with resume=False to begin anew."
        )
    kinds: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        kinds[kind][name] = value
    model.load_state_dict(kinds.pop("model", {}))
    state: dict[int, dict[str, Any]] = {}
    for key, value in kinds.pop("optimiser", {}).items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = value
    for key, number in head["numbers"].items():
        index, name = key.split("/", 1)
        state.setdefault(int(index), {})[name] = number
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return position, kinds
