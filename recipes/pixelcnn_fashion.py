"""A small gated PixelCNN of Fashion-MNIST, the density behind PixelDefend. It is fashion-pixelcnn among the generative nets.

    python recipes/pixelcnn_fashion.py            # trains, measures, prints the figures
    python recipes/pixelcnn_fashion.py --bundle   # and puts weights and figures into the package

700 steps of Adam, of 16 of the 59,500 first training images each; the other 500 were watched and not trained on.

Measured on the first 1,000 test images, with the weights rounded to float16: 3.263 bits per dim.

Training took 120 s of one core (9 minutes of the clock, on a busy machine).

Data: Fashion-MNIST, copyright (c) 2017 Zalando SE, MIT licence; Debian's package dataset-fashion-mnist puts the four idx
files under /usr/share/datasets/fashion-mnist.
"""

from __future__ import annotations

import math
import time

import torch
from _generative import DATA, images, main
from torch import Tensor

from mohs.data import load
from mohs.models.pixelcnn import PixelCNN, bits_per_dim

NAME = "fashion-pixelcnn"
SUMMARY = "Gated PixelCNN of Fashion-MNIST, 5 logistics a pixel, 700 steps: the density behind PixelDefend."
SETTINGS = {"width": 24, "mixtures": 5}
STEPS, BATCH, RATE, RISE = 700, 16, 5e-3, 50


def bits(net: PixelCNN, x: Tensor) -> float:
    """Mean bits per dim of images."""
    with torch.no_grad():
        found = torch.cat([net.log_likelihood(part) for part in x.split(100)])
    return float(bits_per_dim(found.double(), x[0].numel()).mean())


def train(steps: int) -> PixelCNN:
    """The trained net, its weights rounded to float16."""
    torch.manual_seed(0)
    x, watched = images()
    net = PixelCNN(**SETTINGS)
    adam = torch.optim.Adam(net.parameters(), RATE, betas=(0.9, 0.99))
    order = torch.cat([torch.randperm(len(x)) for _ in range(1 + steps * BATCH // len(x))])
    began = time.process_time()
    for step in range(steps):
        share = min(1.0, (step + 1) / RISE) * (1 + math.cos(math.pi * step / steps)) / 2
        adam.param_groups[0]["lr"] = RATE * share
        loss = bits_per_dim(net.log_likelihood(x[order[step * BATCH : (step + 1) * BATCH]]), x[0].numel()).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        if step % 100 == 0 or step == steps - 1:
            seen, spent = bits(net, watched[:100]), time.process_time() - began
            print(f"step {step}: {float(loss.detach()):.3f} bits, watched {seen:.3f}, {spent:.0f} s", flush=True)
    return net.half().float().eval()


def made(steps: int) -> tuple[PixelCNN, dict[str, float]]:
    """The trained net, and its figures on the first 1,000 test images."""
    net, tested = train(steps), load(DATA).x[:1000]
    return net, {"examples": len(tested), "bits_per_dim": round(bits(net, tested), 4)}


if __name__ == "__main__":
    main(__doc__, STEPS, made, NAME, "pixelcnn", SETTINGS, SUMMARY)
