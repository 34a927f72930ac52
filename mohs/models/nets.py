"""Small reference nets. Each takes inputs in [0, 1] and answers logits; weights come from torch's own generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mohs.errors import ModelError


def small_cnn(channels: int = 1, classes: int = 10, size: int = 28) -> nn.Sequential:
    """Two strided convolutions and two linear layers: the architecture of both bundled nets.

    Args:
        channels: Input channels.
        classes: Number of logits.
        size: Height and width of the input in pixels, at least 4.

    Returns:
        A net from [N, channels, size, size] to [N, classes].

    Raises:
        ModelError: The images are too small for two halvings.

    **Source**: E. Wong, L. Rice, J. Z. Kolter, "Fast is better than free: revisiting adversarial training",
    ICLR 2020, the net of its MNIST experiments.

    >>> small_cnn()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    if size < 4:
        raise ModelError(f"small_cnn halves the image twice, so size must be at least 4; got {size}.")
    side = size // 2 // 2
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def madry_cnn(width: int = 16, channels: int = 1, classes: int = 10, size: int = 28) -> nn.Sequential:
    """Two 5 x 5 convolutions with pooling and one hidden linear layer, of a width to choose: how robust a net can become hangs on it.

    Args:
        width: the convolutions have 2 and 4 times as many filters, the hidden layer 64 times as many units. 1 is the smallest
            net of the paper's capacities, 16 its net for MNIST.
        channels: Input channels.
        classes: Number of logits.
        size: Height and width of the input in pixels, at least 4.

    Returns:
        A net from [N, channels, size, size] to [N, classes].

    Raises:
        ModelError: No width, or images too small for two halvings.

    **Differs from the paper**: Weights start as torch draws them, where the published code draws them from a normal distribution
    with deviation 0.1.

    **Source**: A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards deep learning models resistant to adversarial
    attacks", ICLR 2018, section 4 (capacity) and the model of the authors' MNIST challenge.

    >>> madry_cnn(width=1)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    if size < 4 or width < 1:
        raise ModelError(
            f"madry_cnn needs a width of at least 1 and images of 4 pixels or more; got {width} and {size}."
        )
    side = size // 2 // 2
    return nn.Sequential(
        nn.Conv2d(channels, 2 * width, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width * side * side, 64 * width),
        nn.ReLU(),
        nn.Linear(64 * width, classes),
    )


def lenet(classes: int = 10) -> nn.Sequential:
    """LeNet for 28 x 28 grey images: two convolutions with pooling, one hidden linear layer.

    Returns:
        A net from [N, 1, 28, 28] to [N, classes].

    **Differs from the paper**: The paper names the net but gives no widths; these (20, 50, 500; the only ReLU after
    the hidden layer) are the common ones of the MNIST examples of that time.

    **Source**: S. Moosavi-Dezfooli, A. Fawzi, P. Frossard, "DeepFool", CVPR 2016, table 1, row "LeNet (MNIST)".
    """
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, classes),
    )


def fc_500_150_10() -> nn.Sequential:
    """Three linear layers for 28 x 28 grey images, 500, 150 and 10 wide.

    Returns:
        A net from [N, 1, 28, 28] (or [N, 784]) to [N, 10].

    **Differs from the paper**: Nothing known; the paper does not name the activation, ReLU is taken.

    **Source**: S. Moosavi-Dezfooli, A. Fawzi, P. Frossard, "DeepFool", CVPR 2016, table 1, row "FC500-150-10".
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 500),
        nn.ReLU(),
        nn.Linear(500, 150),
        nn.ReLU(),
        nn.Linear(150, 10),
    )


def linear(d: int = 784, k: int = 10) -> nn.Sequential:
    """One linear layer on the flattened input: its smallest adversarial change is known exactly.

    Args:
        d: Number of input features.
        k: Number of logits.

    Returns:
        A net from [N, ...] with d features to [N, k].
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(d, k))


NETS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"small_cnn": small_cnn, "madry_cnn": madry_cnn, "lenet": lenet, "fc_500_150_10": fc_500_150_10, "linear": linear}
)


class _Normalized(nn.Module):
    """Normalises its input before the net sees it."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the normalised input."""
        shape = (-1,) + (1,) * (x.dim() - 2)
        return self.net((x - self.mean.view(shape)) / self.std.view(shape))


def normalized(net: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]) -> nn.Module:
    """Put a normalisation inside the model, so that attacks work in the units of the image.

    Args:
        net: A net that expects normalised inputs.
        mean: What is subtracted: one number, or one per channel (per feature for [N, D]).
        std: What is divided by, in the same form; positive.

    Returns:
        A module on inputs as they are; it moves and saves with its two buffers, in the mode of ``net``.

    Raises:
        ModelError: Lengths differ, or std is not positive and finite.

    >>> net = normalized(nn.Identity(), mean=(0.5, 0.0), std=(0.25, 1.0))
    >>> net(torch.ones(1, 2)).tolist()
    [[2.0, 1.0]]
    """
    centre = torch.as_tensor(mean, dtype=torch.float32).reshape(-1).clone()
    spread = torch.as_tensor(std, dtype=torch.float32).reshape(-1).clone()
    if len(centre) == 0 or len(spread) == 0 or (len(centre) != len(spread) and 1 not in (len(centre), len(spread))):
        raise ModelError(
            f"normalized() got {len(centre)} means and {len(spread)} stds; give one each per channel, or one for all."
        )
    if not bool((spread > 0).all() and spread.isfinite().all() and centre.isfinite().all()):
        raise ModelError(f"normalized() needs a finite mean and a positive std; got mean {mean} and std {std}.")
    return _Normalized(net, centre, spread).train(net.training)
