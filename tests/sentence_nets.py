"""Small classifiers of sentences, and a grammar whose sentences have a right answer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mohs.data import Sentences, sentences
from mohs.models import NormalisedEmbedding, SentenceCNN, TextClassifier
from mohs.models.text import AWAY

COUNTS = [0, 3, 5, 4, 4, 3, 2, 2, 1, 1]
GOOD, BAD, PLAIN = ("fine", "warm", "funny"), ("dull", "cold", "weak"), ("film", "plot", "the", "a", "story")


def text_net(seed: int = 0, size: int = 5, dtype: torch.dtype = torch.float64) -> TextClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextClassifier(NormalisedEmbedding(COUNTS, size), SentenceCNN(size, 6, classes=3)).to(dtype).eval()


class LinearWords(nn.Module):
    """logits = W e + b over the words of embedded sentences [N, T, D + 1]; padding plays no part."""

    def __init__(self, places: int, size: int, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.2 * torch.randn(classes, places, size, generator=g, dtype=torch.float64))

    def forward(self, e: Tensor) -> Tensor:
        words = torch.where(e[..., -1:] < AWAY / 2, e[..., :-1], 0.0)
        return torch.einsum("ntd,ktd->nk", words, self.weight)


def some_ids(rows: int = 6, places: int = 5, seed: int = 0) -> Tensor:
    """Token ids; in every other row the last two places are padding."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, len(COUNTS), (rows, places), generator=g).float()
    ids[::2, -2:] = 0
    return ids


def grammar(folder: Path, rows: int = 120, seed: int = 0) -> Sentences:
    """Sentences of plain words around good or bad ones."""
    g = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=g))]

    lines = []
    for k in range(rows):
        telling = GOOD if k % 2 else BAD
        middle = [pick(telling), pick(PLAIN), pick(telling)][: 1 + 2 * (k % 3 == 0)]
        lines.append(f"{'good' if k % 2 else 'bad'}\t{' '.join([pick(PLAIN), *middle, pick(PLAIN)])}\n")
    file = folder / "grammar.txt"
    file.write_text("".join(lines), encoding="utf-8")
    return sentences(file, length=6)
