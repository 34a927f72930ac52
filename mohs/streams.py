"""Random numbers as a function of (seed, example, attack, restart, draw): nothing is stored, so nothing depends on order.

A row carries one 64-bit key. A draw hashes key and counter with SplitMix64, so the same row gets the same numbers in any
batch, shard, order or resumed run, and the global generators of torch, numpy and Python are never touched.

**Source**: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (the finaliser and
its constants); counter-based use as in J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_xor_(z: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic; the mask turns them into the logical ones SplitMix64 asks for
    return z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit integers that scatters neighbouring counters.

    >>> int(mix(torch.tensor([_GAMMA]))[0]) == _signed(0xE220A8397B1DCDAF)  # first output for seed 0
    True
    """
    z = _shift_xor_(z.clone(), 30).mul_(_MIX_1)
    z = _shift_xor_(z, 27).mul_(_MIX_2)
    return _shift_xor_(z, 31)


def content_keys(x: Tensor) -> Tensor:
    """One int64 per example, [N], from the bytes of its content: how randomness knows an example by what it is."""
    rows = x.detach().cpu().contiguous().numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    keys = [int.from_bytes(d, "little", signed=True) for d in digests]
    return torch.tensor(keys, dtype=torch.int64, device=x.device)


def point_keys(x: Tensor) -> Tensor:
    """One int64 per row, [B], from its values, without leaving the device: for noise that belongs to a point.

    Not as strong a hash as ``content_keys``, and many times faster.

    >>> a, b = point_keys(torch.tensor([[0.1, 0.2], [0.2, 0.1]]))
    >>> int(a) != int(b)
    True
    """
    flat = x.detach().flatten(1).double().view(torch.int64)
    place = torch.arange(1, flat.shape[1] + 1, dtype=torch.int64, device=x.device).mul_(_GAMMA)
    return mix(((flat ^ place) * _MIX_1).bitwise_xor_(place).sum(1))


def text_key(text: str) -> int:
    """One int64 from a text, the same on every machine.

    >>> text_key("PGD") == text_key("PGD") != text_key("BIM")
    True
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def derive(key: Tensor, *parts: Tensor | int) -> Tensor:
    """New keys from old ones and further integers or int64 tensors of the same shape; order matters."""
    for part in parts:
        key = mix(key + _GAMMA) ^ (part if isinstance(part, Tensor) else _signed(part))
    return mix(key + _GAMMA)


def bits(key: Tensor, shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """int64 [N, *shape] of independent uniform bits for keys [N]; ``draw`` numbers the draws of a row."""
    count = math.prod(shape)
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=key.device).mul_(_GAMMA)
    z = derive(key, draw).unsqueeze(1) + counter
    z = _shift_xor_(z, 30).mul_(_MIX_1)
    z = _shift_xor_(z, 27).mul_(_MIX_2)
    return _shift_xor_(z, 31).view(len(key), *shape)


def uniform(key: Tensor, shape: tuple[int, ...], draw: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform on [0, 1), [N, *shape], with the full mantissa of float32 (24 bits) or float64 (53 bits).

    >>> u = uniform(torch.tensor([7]), (1000,))
    >>> bool((u >= 0).all() and (u < 1).all() and abs(u.mean() - 0.5) < 0.05)
    True
    """
    digits = 53 if dtype == torch.float64 else 24
    top = (bits(key, shape, draw) >> (64 - digits)).bitwise_and_((1 << digits) - 1)
    return top.to(dtype).mul_(2.0**-digits)


def normal(key: Tensor, shape: tuple[int, ...], draw: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal, [N, *shape], by the Box-Muller transform in float64."""
    u = uniform(key, (2, *shape), draw, torch.float64)
    radius = u[:, 0].neg_().log1p_().mul_(-2).sqrt_()  # log1p(-u): u may be 0, never 1
    return radius.mul_(u[:, 1].mul_(2 * math.pi).cos_()).to(dtype)


def integers(key: Tensor, shape: tuple[int, ...], high: int, draw: int = 0) -> Tensor:
    """Integers in [0, high), int64 [N, *shape]; ``high`` up to 2**31 (multiply-shift, bias below 2**-32)."""
    top = (bits(key, shape, draw) >> 32).bitwise_and_((1 << 32) - 1)
    return (top * high) >> 32
