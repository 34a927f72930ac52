"""Models: small reference nets, loading from files without running what is in them, and black boxes, served ones among them."""

from __future__ import annotations

from mohs.models.blackbox import BlackBox
from mohs.models.code import code_hash
from mohs.models.loading import available, bundled_info, is_url, load, loading_notes, save_bundled
from mohs.models.nets import NETS, fc_500_150_10, lenet, linear, madry_cnn, normalized, small_cnn
from mohs.models.served import Served
from mohs.models.text import NormalisedEmbedding, SentenceCNN, TextClassifier, WordChoices
from mohs.models.weights import read_metadata, read_weights, save_weights, weights_hash

__all__ = [
    "BlackBox",
    "NETS",
    "NormalisedEmbedding",
    "SentenceCNN",
    "Served",
    "TextClassifier",
    "WordChoices",
    "available",
    "bundled_info",
    "code_hash",
    "fc_500_150_10",
    "is_url",
    "lenet",
    "linear",
    "madry_cnn",
    "load",
    "loading_notes",
    "normalized",
    "read_metadata",
    "read_weights",
    "save_bundled",
    "save_weights",
    "small_cnn",
    "weights_hash",
]
