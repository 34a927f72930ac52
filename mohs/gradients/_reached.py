"""Where gradients get to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Node = torch.autograd.graph.Node


class Reached:
    """Does a gradient get from a value to one of these tensors? What was seen of the graph is remembered; more may be added to
    ``ends`` as long as no graph leads to them yet."""

    def __init__(self, *ends: Tensor) -> None:
        self.ends = list(ends)
        self.known: dict[Node, bool] = {}

    def by(self, value: Any) -> bool:
        """Walks the graph of ``value`` until it meets one of them."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return False
        if value.grad_fn is None:
            return any(value is end for end in self.ends)
        seen: set[Node] = set()
        waiting, found = [value.grad_fn], False
        while waiting and not found:
            node = waiting.pop()
            if node in seen or self.known.get(node) is False:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            found = node in self.known or any(leaf is end or node is end.grad_fn for end in self.ends)
            waiting += [parent for parent, _ in node.next_functions if parent is not None]
        self.known.update({value.grad_fn: True} if found else dict.fromkeys(seen, False))
        return found
