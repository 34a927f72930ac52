"""A net that learns to answer as the model does, where no net without the defense is at hand: its gradients are its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.evaluation._batches import padded
from mohs.models.nets import small_cnn
from mohs.target import classify
from mohs.threat import Access, Threat

ROWS, COPIES = 256, 4
"""Inputs it learns from at most, and how often each, the first time as it is, then with a random change of the region."""
EPOCHS, BATCH, RATE = 12, 64, 2e-3


def student(model: nn.Module, x: Tensor, threat: Threat, seed: int, batch: int) -> nn.Module:
    """Distil a small net from the model's answers on inputs x [N, ...] and on random points near them.

    The adversary's first substitute: what fools it often fools the model too, however that hides its gradients. Seeded by the
    content of the inputs. Cost: four forwards of the model for each of at most 256 inputs, and the training of a small net.

    **Differs from the paper**: random points of the region instead of points along the student's own gradients; probabilities are
    learned where the threat shows them.
    **Source**: N. Papernot et al., "Practical black-box attacks against machine learning", ASIA CCS 2017, section 4; G. Hinton,
    O. Vinyals, J. Dean, "Distilling the knowledge in a neural network", 2015.
    """
    keys = streams.derive(streams.content_keys(x), seed, streams.text_key("student"))
    chosen = keys.argsort(stable=True)[:ROWS]
    x, keys = x[chosen], keys[chosen]
    radius = x.new_full((len(x),), threat.region.eps)
    copies = [x, *(threat.region.start(x, radius, threat.box, streams.derive(keys, c)) for c in range(1, COPIES))]
    inputs = torch.cat(copies)
    with torch.no_grad():
        logits = torch.cat([classify(model, padded(part, batch))[: len(part)] for part in inputs.split(batch)])
    answers = (
        logits.softmax(1) if threat.access >= Access.SCORE else nn.functional.one_hot(logits.argmax(1), logits.shape[1])
    )
    dtype = torch.float32
    with torch.random.fork_rng([]):
        torch.manual_seed(int(keys.sum()) % (1 << 62))
        net = _fresh(x, logits.shape[1]).to(x.device, dtype)
        optimiser = torch.optim.Adam(net.parameters(), RATE)
        with torch.enable_grad():
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(inputs)).split(BATCH):
                    loss = nn.functional.cross_entropy(net(inputs[rows].to(dtype)), answers[rows].to(dtype))
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
    return net.to(x.dtype).eval().requires_grad_(False)


def _fresh(x: Tensor, classes: int) -> nn.Module:
    if x.dim() == 4 and x.shape[2] == x.shape[3] >= 8:
        return small_cnn(x.shape[1], classes, x.shape[2])
    return nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 128), nn.ReLU(), nn.Linear(128, classes))
