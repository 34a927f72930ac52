"""How a run treats the process it lives in: global generators stay as they were, memory is not handed back at every step."""

from __future__ import annotations

import torch

from mohs import streams


def keep_memory() -> None:
    """Free one large untouched block, from which glibc's allocator learns to keep what it has.

    Its threshold for giving memory back to the system is twice the largest block it has seen freed, up to 32 MiB. Below
    that every step of a small net returns its activations and faults them in again, a quarter of its time.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


class QuietGenerators:
    """Leaves the global generators as they were, and seeds them inside so that a random model is reproducible."""

    def __init__(self, seed: int, first: int, number: int) -> None:
        self.seed = streams.text_key(f"{seed} {first} {number}")
        self.calls = 0

    @classmethod
    def again(cls, seed: int, calls: int) -> QuietGenerators:
        """One that stands where another stood that had this ``seed`` and so many ``calls``."""
        quiet = cls(0, 0, 0)
        quiet.seed, quiet.calls = seed, calls
        return quiet

    @staticmethod
    def _generators() -> list[torch.Generator]:
        cuda = list(torch.cuda.default_generators) if torch.cuda.is_initialized() else []
        return [torch.default_generator, *cuda]

    def __enter__(self) -> None:
        self.calls += 1
        self.saved = [(g, g.get_state()) for g in self._generators()]
        for generator, _ in self.saved:
            generator.manual_seed((self.seed + self.calls) % (1 << 63))

    def __exit__(self, *exception: object) -> None:
        for generator, state in self.saved:
            generator.set_state(state)
