"""Sentences from files, normalised embeddings beside their definition, and nets that do not see padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_nets import COUNTS, grammar, some_ids, text_net
from torch import Tensor

from mohs.data import Vocabulary, sentences
from mohs.errors import DataError, ModelError
from mohs.models import NormalisedEmbedding, SentenceCNN, WordChoices
from mohs.models.text import AWAY, choices, chosen, neighbours

# ---- files --------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, content: str | bytes) -> Path:
    file = tmp_path / "lines.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_names_become_classes_and_words_ids_by_frequency(tmp_path: Path) -> None:
    file = written(tmp_path, "\ufeffpos\tthe the film\r\n\r\nneg\tthe dull dull film .\r\n")
    data, vocabulary = sentences(file, length=4)
    assert data.classes == ("neg", "pos")
    assert data.y.tolist() == [1, 0]
    assert vocabulary.words == ("<pad>", "<unk>", "the", "dull", "film", ".")
    assert vocabulary.counts == (0, 0, 3, 2, 2, 1)
    assert data.x.tolist() == [[2, 2, 4, 0], [2, 3, 3, 4]]  # cut after four
    again, same = sentences(file, length=6, vocabulary=4)
    assert same.words == ("<pad>", "<unk>", "the", "dull")
    assert same.counts == (0, 3, 3, 2)
    assert again.x.tolist() == [[2, 2, 1, 0, 0, 0], [2, 3, 3, 1, 1, 0]]
    assert sentences(file, vocabulary=vocabulary).vocabulary is vocabulary


def test_scores_are_parted_by_a_threshold_and_the_undecided_left_out(tmp_path: Path) -> None:
    file = written(tmp_path, "a\t-2\tone\nb\t0.4\ttwo\nc\t0\tthree\nd\t3.5\tfour\n")
    data, _ = sentences(file, label=1, text=2, threshold=0.0)
    assert data.y.tolist() == [0, 1, 0, 1]
    data, vocabulary = sentences(file, label=1, text=2, threshold=0.0, margin=0.5)
    assert data.y.tolist() == [0, 1]
    assert vocabulary.decode(data.x) == ["one", "four"]


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"pos\tfilm \xff\n", {}, r"UTF-8 .*at byte 9"),
        ("pos\tfilm\nneg dull\n", {}, r"line 2 has 1 columns; column 0 must hold a label and column 1 a sentence"),
        ("pos\tfilm\n\t a\n", {}, "line 2"),
        ("pos\t \u3000 \n", {}, "line 1"),
        ("pos\tfilm\n", {"text": 5}, "line 1 has 2 columns"),
        ("1.5\tfilm\nnan\tplot\n", {"threshold": 0.0}, "line 2 is 'nan', no finite number"),
        ("1.5\tfilm\nx\tplot\n", {"threshold": 0.0}, "line 2 is 'x'"),
        ("0.1\tfilm\n", {"threshold": 0.0, "margin": 1.0}, "Lower the margin"),
        ("\n \n", {}, "holds no sentence"),
        ("".join(f"{k}\tfilm\n" for k in range(1001)), {}, r"1,001 different labels.*give a threshold"),
        ("pos\tfilm\n", {"label": -1}, "label is a column"),
        ("pos\tfilm\n", {"margin": 1.0}, "needs a threshold"),
        ("pos\tfilm\n", {"length": 0}, "length must be a whole number of tokens >= 1"),
        ("pos\tfilm\n", {"vocabulary": 2}, "most of a vocabulary must be a whole number >= 3"),
    ],
)
def test_files_that_are_none_are_refused_in_words(
    tmp_path: Path, content: str | bytes, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        sentences(written(tmp_path, content), **options)


def test_no_file_and_too_large_a_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="is not a file"):
        sentences(tmp_path / "absent.txt")
    monkeypatch.setattr("mohs.data.text._MAX_FILE", 10)
    with pytest.raises(DataError, match=r"more than the 10 that are read"):
        sentences(written(tmp_path, "pos\ta long film\n"))


@given(
    st.lists(st.lists(st.sampled_from(["film", "plot", "a", "don't"]), min_size=1, max_size=6), min_size=1, max_size=5)
)
def test_known_words_come_back(texts: list[list[str]]) -> None:
    vocabulary = Vocabulary.of(["film plot a don't"])
    lines = [" ".join(words) for words in texts]
    assert vocabulary.decode(vocabulary.encode(lines, 6)) == lines


def test_vocabularies_that_are_none_are_refused() -> None:
    for words, counts in ((("<pad>", "<unk>", "a", "a"), (0, 0, 1, 1)), (("<pad>", "<unk>", "a"), (0, 1)), ((), ())):
        with pytest.raises(DataError, match="A vocabulary needs"):
            Vocabulary(words, counts)
    with pytest.raises(DataError, match="whole token ids"):
        Vocabulary.of(["a"]).decode(torch.tensor([[7.0]]))


# ---- embeddings -----------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=4, max_size=9).filter(lambda c: sum(n > 0 for n in c) >= 2), st.integers(0, 99)
)
def test_every_occurrence_of_a_word_counts_once(counts: list[int], seed: int) -> None:
    embedding = NormalisedEmbedding([0, *counts], size=3).double()
    # frequencies are kept in single precision
    embedding.frequency.copy_(torch.tensor([0, *counts], dtype=torch.float64) / sum(counts))
    embedding.weight.data.copy_(torch.randn(len(counts) + 1, 3, generator=torch.Generator().manual_seed(seed)))
    text = torch.tensor([[k + 1 for k, n in enumerate(counts) for _ in range(n)]])  # every word as often as it occurs
    e = embedding(text.double())[0, :, :-1]
    assert torch.allclose(e.mean(0), torch.zeros(3, dtype=e.dtype), atol=1e-9)
    assert torch.allclose(e.var(0, unbiased=False), torch.ones(3, dtype=e.dtype), rtol=1e-6)
    raw = embedding.weight[text[0]]
    assert torch.allclose(e, (raw - raw.mean(0)) / raw.std(0, unbiased=False), rtol=1e-6)
    embedding.weight.data.mul_(7.0).add_(2.0)  # a net cannot outgrow a radius
    assert torch.allclose(embedding(text.double())[0, :, :-1], e, rtol=1e-6)


def test_padding_is_marked_and_plays_no_part() -> None:
    net, ids = text_net(), some_ids()
    e = net.embedding(ids)
    assert e[..., -1].tolist() == (AWAY * (ids == 0)).tolist()
    assert not e[..., :-1][ids == 0].any()
    noise = torch.randn(e.shape, generator=torch.Generator().manual_seed(1), dtype=e.dtype)
    noise *= (0.49 * AWAY / noise.norm()) * (ids == 0).unsqueeze(2)
    noisy = e + noise
    assert torch.equal(net.classifier(noisy), net.classifier(e))
    noisy.requires_grad_(True)
    (g,) = torch.autograd.grad(net.classifier(noisy)[:, 0].sum(), noisy)
    assert not g[ids == 0].any()
    assert g[ids > 0].any()
    longer = torch.cat([ids, torch.zeros(len(ids), 4)], 1)
    assert torch.allclose(net(longer), net(ids), atol=1e-12)


def test_dropout_comes_before_whatever_is_added() -> None:
    embedding = NormalisedEmbedding(COUNTS, size=50, dropout=0.5).train()
    e = embedding(torch.full((1, 40), 3.0))
    assert 0.4 < float((e[..., :-1] == 0).double().mean()) < 0.6
    assert not e[..., -1].any()
    assert not (embedding.eval()(torch.full((1, 40), 3.0))[..., :-1] == 0).any()


@pytest.mark.parametrize(
    "ids", [torch.full((1, 3), 10.0), torch.full((1, 3), -1.0), torch.ones(3), torch.full((1, 2), torch.nan)]
)
def test_ids_that_no_word_has_are_refused(ids: Tensor) -> None:
    with pytest.raises(ModelError, match=r"token ids \[N, T\] from 0 to 9"):
        text_net()(ids)


@pytest.mark.parametrize("counts", [[1, 2, 3], [0, 5], [0, 4, 0], [0, -1, 3, 4], [0, float("nan"), 3, 2]])
def test_counts_that_are_none_are_refused(counts: list[float]) -> None:
    with pytest.raises(ModelError, match="The counts of an embedding"):
        NormalisedEmbedding(torch.tensor(counts))


def test_an_even_filter_has_no_middle() -> None:
    with pytest.raises(ModelError, match="width of SentenceCNN must be odd"):
        SentenceCNN(4, width=2)


# ---- choices --------------------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_words() -> None:
    embedding = text_net().embedding
    table, vectors = neighbours(embedding, 3), embedding.vectors().detach()
    assert table[:2].tolist() == [[0] * 3, [1] * 3]
    for k in range(2, len(vectors)):
        others = sorted((float((vectors[k] - vectors[j]).norm()), j) for j in range(2, len(vectors)) if j != k)
        assert table[k].tolist() == [j for _, j in others[:3]]
    with pytest.raises(ModelError, match="8 words have 1 to 7 neighbours"):
        neighbours(embedding, 8)


def test_choosing_a_word_is_to_write_it() -> None:
    net, ids = text_net(), some_ids().double()
    x = choices(ids, neighbours(net.embedding, 3))
    model = WordChoices(net)
    assert torch.equal(chosen(x), ids)
    assert torch.allclose(model(x), net(ids), atol=1e-12)
    other = x.clone()
    other[1, 1, 2] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert int(chosen(other)[1, 2]) == int(x[1, 0, 2, 2])
    assert torch.allclose(model(other), net(chosen(other)), atol=1e-12)
    for bad in (x[:, :1], x[0]):
        with pytest.raises(ModelError, match=r"Choices of words have shape \[N, 2, T, C\]"):
            model(bad)
    with pytest.raises(ModelError, match="choices needs token ids"):
        choices(ids + 9, neighbours(net.embedding, 3))


def test_a_grammar_can_be_learnt_from_its_file(tmp_path: Path) -> None:
    data, vocabulary = grammar(tmp_path)
    assert data.classes == ("bad", "good")
    assert len(vocabulary) == 13
    assert data.x.shape == (120, 6)
