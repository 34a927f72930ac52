"""Classifiers of sentences: normalised word embeddings, and after them an ordinary classifier of float tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mohs.errors import ModelError

AWAY = 100.0
"""Last number of the embedding where there is no word; 0 where there is one. Changes below half of it alter no length."""

_TINY = 1e-12  # added to a variance, which is zero where all words agree


class NormalisedEmbedding(nn.Module):
    """Word vectors with mean 0 and variance 1 over the text: each word counts as often as it occurs.

        vbar_k = (v_k - E v) / sqrt(Var v)        E and Var over the words, weighted by their frequency, for each number of v

    Without it a net would make itself robust against changes of a fixed size by making its embeddings large.

    The answer has one number more than the embedding: 0 for a word, ``AWAY`` for padding, so that whatever comes after the
    embedding knows where a sentence ends. No change of a size below AWAY / 2 can hide a word or make one out of padding.

    Args:
        counts: how often each token id occurs, such as ``Vocabulary.counts``; id 0 is padding and has count 0.
        size: numbers per word.
        dropout: share of the numbers that are dropped while training, after the normalisation and so before any perturbation.

    Raises:
        ModelError: counts that are no frequencies of at least two words.

    >>> embedding = NormalisedEmbedding([0, 3, 1], size=4)
    >>> e = embedding(torch.tensor([[1.0, 1.0, 1.0, 2.0, 0.0]]))
    >>> e.shape, bool(e[0, :4, :4].mean(0).abs().max() < 1e-6), e[0, :, 4].tolist()
    (torch.Size([1, 5, 5]), True, [0.0, 0.0, 0.0, 0.0, 100.0])

    **Differs from the paper**: the number that marks padding.
    **Source**: T. Miyato, A. Dai, I. Goodfellow, "Adversarial training methods for semi-supervised text classification", ICLR 2017,
    the section on the model.
    """

    frequency: Tensor

    def __init__(self, counts: Sequence[int] | Tensor, size: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        weights = torch.as_tensor(counts, dtype=torch.float64).reshape(-1).clone()
        good = len(weights) > 2 and bool((weights >= 0).all() and weights.isfinite().all())
        if not good or float(weights[0]) != 0 or int((weights > 0).sum()) < 2:
            raise ModelError(
                f"The counts of an embedding say how often each token id occurs: 0 for id 0, the padding, and above 0 for at least two "
                f"words; got {len(weights)} numbers. Give Vocabulary.counts."
            )
        self.weight = nn.Parameter(torch.randn(len(weights), size))
        self.register_buffer("frequency", (weights / weights.sum()).float())
        self.dropout = nn.Dropout(dropout)

    def __len__(self) -> int:
        """How many token ids it knows."""
        return len(self.weight)

    def vectors(self) -> Tensor:
        """The normalised vectors of all token ids, [V, size]; that of the padding is of no use."""
        mean = self.frequency @ self.weight
        spread = self.weight - mean
        return spread / (self.frequency @ spread.square() + _TINY).sqrt()

    def forward(self, ids: Tensor) -> Tensor:
        """[N, T, size + 1] of whole token ids [N, T], which may be floating-point numbers.

        Raises:
            ModelError: ids that are none.
        """
        known = (ids >= 0) & (ids < len(self.weight))
        if ids.dim() != 2 or not bool(known.all()):
            raise ModelError(
                f"This net reads token ids [N, T] from 0 to {len(self.weight) - 1}; got shape {tuple(ids.shape)}, values from "
                f"{float(ids.min()) if ids.numel() else 0:g} to {float(ids.max()) if ids.numel() else 0:g}. Encode the "
                "sentences with the vocabulary the net was made for."
            )
        index = ids.round().long()
        there = (index != 0).unsqueeze(2)
        words = self.dropout(self.vectors()[index]) * there
        return torch.cat([words, (~there).to(words) * AWAY], 2)


def words_in(e: Tensor) -> tuple[Tensor, Tensor]:
    """(the word vectors [N, T, D], zero where there is no word; where there is one, bool [N, T, 1]) of embedded sentences."""
    there = e[..., -1:] < AWAY / 2
    return torch.where(there, e[..., :-1], 0.0), there


class SentenceCNN(nn.Module):
    """One convolution over the words, the largest answer of each filter, and a linear layer: embedded sentences to logits.

    Args:
        size: numbers per word, without the one that marks padding.
        channels: filters.
        width: words that a filter sees, odd.
        classes: logits.
        dropout: of the linear layer's input, while training.

    **Source**: Y. Kim, "Convolutional neural networks for sentence classification", EMNLP 2014, the section on the model, with
    filters of one width.
    """

    def __init__(
        self, size: int = 64, channels: int = 64, width: int = 3, classes: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width < 1 or width % 2 == 0:
            raise ModelError(
                f"width of SentenceCNN must be odd, so that a filter has a word in its middle; got {width}."
            )
        self.filters = nn.Conv1d(size, channels, width, padding=width // 2)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, classes)

    def forward(self, e: Tensor) -> Tensor:
        """Logits [N, classes] of embedded sentences [N, T, size + 1]; what stands in padding plays no part."""
        words, there = words_in(e)
        found = self.filters(words.transpose(1, 2)).relu() * there.transpose(1, 2)
        return self.head(self.dropout(found.amax(2)))


class TextClassifier(nn.Module):
    """Token ids to logits in two parts, so that what lies between them can be attacked, and trained against.

        logits = classifier(embedding(ids))

    ``classifier`` is an ordinary classifier of float tensors [N, T, D + 1]: ``mohs.attack(attack, net.classifier, net.embedding(ids),
    y, "l2:5 in [-inf, inf]")`` changes the embedded sentence, and ``mohs.evaluate`` takes the pair too.

    Args:
        embedding: token ids [N, T] to float tensors.
        classifier: these to logits.

    >>> net = TextClassifier(NormalisedEmbedding([0, 3, 1, 2], size=8), SentenceCNN(size=8)).eval()
    >>> net(torch.tensor([[1.0, 3.0, 0.0]])).shape
    torch.Size([1, 2])
    """

    def __init__(self, embedding: NormalisedEmbedding, classifier: nn.Module) -> None:
        super().__init__()
        self.embedding, self.classifier = embedding, classifier

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [N, K] of token ids [N, T]."""
        logits: Tensor = self.classifier(self.embedding(ids))
        return logits


class WordChoices(nn.Module):
    """A sentence classifier that is told at each place which of several words stands there.

        e_t = sum over j of choice_tj * embedding(id_tj);        logits = classifier(e)

    Inputs are [N, 2, T, C], as ``choices`` makes them and the threat ``words:k`` changes them: at place t the first plane has the ids
    of the words that may stand there, the second a weight for each, one of them 1 and the others 0. The gradient for a weight
    is what the net expects of that word to first order.

    An id that no word has is taken for the nearest one: no attack changes ids, but whoever checks a model looks beside its inputs too.

    Args:
        model: its two parts.
    """

    def __init__(self, model: TextClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of choices [N, 2, T, C].

        Raises:
            ModelError: another shape.
        """
        _check_choices(x)
        _, _, places, words = x.shape
        ids = x[:, 0].flatten(1).clamp(0, len(self.model.embedding) - 1)
        e: Tensor = self.model.embedding(ids).unflatten(1, (places, words))
        # not a matrix product, whose bits may depend on the row's place in the batch
        logits: Tensor = self.model.classifier((x[:, 1].unsqueeze(3) * e).sum(2))
        return logits


def _check_choices(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] != 2:
        raise ModelError(
            f"Choices of words have shape [N, 2, T, C]; got {tuple(x.shape)}. mohs.models.text.choices makes them from token ids."
        )


def neighbours(embedding: NormalisedEmbedding, count: int) -> Tensor:
    """The ``count`` words nearest to each in Euclidean distance of their normalised vectors, nearest first, int64 [V, count].

    Padding and the unknown word (ids 0 and 1) are nobody's neighbours and have none: their rows repeat themselves.

    Raises:
        ModelError: more neighbours than there are other words.
    """
    with torch.no_grad():
        vectors = embedding.vectors()[2:]
    if not 1 <= count < len(vectors):
        raise ModelError(f"{len(vectors)} words have 1 to {len(vectors) - 1} neighbours each; got {count}.")
    found = [torch.arange(2, device=vectors.device).unsqueeze(1).expand(2, count)]
    for part in torch.arange(len(vectors), device=vectors.device).split(1024):
        apart = torch.cdist(vectors[part], vectors, compute_mode="donot_use_mm_for_euclid_dist")
        apart[torch.arange(len(part), device=part.device), part] = torch.inf
        found.append(apart.topk(count, largest=False).indices + 2)
    return torch.cat(found)


def choices(ids: Tensor, table: Tensor) -> Tensor:
    """Inputs of ``WordChoices``, [N, 2, T, 1 + M], from token ids [N, T]: the word that stands there, then its M alternatives.

    Args:
        ids: whole token ids.
        table: alternatives of each id, int64 [V, M], such as ``neighbours``; a word that is its own alternative has none there.

    Raises:
        ModelError: shapes or ids that do not fit.

    >>> x = choices(torch.tensor([[2.0, 0.0]]), torch.tensor([[0], [1], [3], [2]]))
    >>> x[0, 0].tolist(), x[0, 1].tolist()
    ([[2.0, 3.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
    """
    fits = ids.dim() == 2 and table.dim() == 2 and table.dtype == torch.int64
    if not fits or not bool(((ids >= 0) & (ids < len(table))).all()):
        raise ModelError(
            f"choices needs token ids [N, T] below the length of an int64 table [V, M]; got {tuple(ids.shape)} and "
            f"{tuple(table.shape)} {table.dtype}."
        )
    index = ids.round().long()
    words = torch.cat([index.unsqueeze(2), table[index]], 2).to(ids if ids.is_floating_point() else torch.float32)
    chosen = torch.zeros_like(words)
    chosen[..., 0] = 1
    return torch.stack([words, chosen], 1)


def chosen(x: Tensor) -> Tensor:
    """The token ids [N, T] that choices [N, 2, T, C] stand for."""
    _check_choices(x)
    return x[:, 0].gather(2, x[:, 1].argmax(2, keepdim=True)).squeeze(2)
