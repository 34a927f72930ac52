"""Random streams: the published generator, honest distributions, and numbers that depend on the key alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from mohs import streams

KEYS = torch.arange(512, dtype=torch.int64) * 1_000_003 - 77
MASK = (1 << 64) - 1


def reference(seed: int, count: int) -> list[int]:
    """SplitMix64 in Python integers, as published (OOPSLA 2014; the C form by S. Vigna is in the public domain)."""
    out = []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


@given(st.integers(0, MASK))
def test_mix_is_splitmix64(seed: int) -> None:
    counters = [streams._signed(seed + i * 0x9E3779B97F4A7C15) for i in range(1, 6)]
    got = streams.mix(torch.tensor(counters, dtype=torch.int64))
    assert [int(v) & MASK for v in got] == reference(seed, 5)


def test_known_outputs() -> None:
    # first outputs for seed 1234567, as listed by Rosetta Code and by the test vectors of several languages' libraries
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert reference(1234567, 5) == want
    assert reference(0, 1) == [0xE220A8397B1DCDAF]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_uniform(dtype: torch.dtype) -> None:
    u = streams.uniform(KEYS, (200,), dtype=dtype)
    assert u.dtype == dtype
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    flat = u.flatten().double().numpy()
    assert stats.kstest(flat, "uniform").pvalue > 1e-3
    assert stats.kstest(u[:, 0].double().numpy(), "uniform").pvalue > 1e-3  # across neighbouring keys too
    low = (streams.bits(KEYS, (200,)) & 1).double().mean()
    assert abs(float(low) - 0.5) < 4 * 0.5 / 320  # the lowest bit is as good as the rest


def test_uniform_uses_the_whole_mantissa() -> None:
    u = streams.uniform(KEYS, (200,), dtype=torch.float64)
    assert len(torch.unique((u * 2**53).long() % 4096)) == 4096
    assert len(torch.unique((streams.uniform(KEYS, (200,)) * 2**24).long() % 256)) == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_is_normal(dtype: torch.dtype) -> None:
    z = streams.normal(KEYS, (200,), dtype=dtype)
    assert z.dtype == dtype
    assert bool(z.isfinite().all())
    assert stats.kstest(z.flatten().double().numpy(), "norm").pvalue > 1e-3


def test_integers_are_uniform_and_in_range() -> None:
    n = streams.integers(KEYS, (200,), 7)
    assert int(n.min()) == 0
    assert int(n.max()) == 6
    assert stats.chisquare(np.bincount(n.flatten().numpy())).pvalue > 1e-3


def test_draws_keys_and_positions_are_independent() -> None:
    a, b = streams.uniform(KEYS, (200,)), streams.uniform(KEYS, (200,), draw=1)
    pairs = {
        "draws": (a, b),
        "neighbouring keys": (a[1:], a[:-1]),
        "neighbouring positions": (a[:, 1:], a[:, :-1]),
        "restarts": (a, streams.uniform(streams.derive(KEYS, 1), (200,))),
    }
    for what, (u, v) in pairs.items():
        r = np.corrcoef(u.flatten().numpy(), v.flatten().numpy())[0, 1]
        assert abs(r) < 4 / np.sqrt(u.numel()), what


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6, unique=True))
def test_derived_keys_differ_and_order_matters(parts: list[int]) -> None:
    key = torch.tensor([1], dtype=torch.int64)
    derived = [int(streams.derive(key, p)) for p in parts]
    assert len(set(derived)) == len(parts)
    if len(parts) > 1:
        assert int(streams.derive(key, *parts[:2])) != int(streams.derive(key, *parts[1::-1]))
    tensor = streams.derive(key, torch.tensor(parts[:1], dtype=torch.int64))
    assert int(tensor) == derived[0]  # a number and a tensor of it are the same part


@pytest.mark.parametrize("make", [streams.uniform, streams.normal, streams.bits])
@pytest.mark.parametrize("shape", [(37,), (1, 13, 11), (3, 32, 32)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_gets_its_numbers_in_any_batch(make: Callable[..., Tensor], shape: tuple[int, ...], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = make(KEYS[:40], shape)
        for index in ([0], [39], [5, 3, 17], list(range(39, -1, -1)), list(range(7))):
            part = make(KEYS[torch.tensor(index)], shape)
            assert torch.equal(part, whole[torch.tensor(index)])
    finally:
        torch.set_num_threads(before)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert torch.equal(streams.bits(KEYS, (10,)), streams.bits(KEYS, (50,))[:, :10])


def test_global_generators_are_untouched() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = streams.normal(KEYS, (9,))
    torch.manual_seed(3)
    assert torch.equal(first, streams.normal(KEYS, (9,)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()


def test_examples_are_known_by_their_content() -> None:
    x = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0))
    keys = streams.content_keys(x)
    assert len(keys.unique()) == 6
    assert torch.equal(streams.content_keys(x.flip(0)), keys.flip(0))
    assert torch.equal(
        streams.content_keys(x.transpose(1, 2).contiguous().transpose(1, 2)), keys
    )  # layout is no content
    changed = x.clone()
    changed[2, 0, 0] = torch.nextafter(changed[2, 0, 0], torch.tensor(2.0))
    assert (streams.content_keys(changed) != keys).tolist() == [False, False, True, False, False, False]
    assert streams.content_keys(x[:0]).shape == (0,)
    assert len(streams.content_keys(torch.zeros(2, 0))) == 2
