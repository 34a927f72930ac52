"""Data sets: labelled inputs in the unit box, each example known by the hash of its content."""

from __future__ import annotations

from mohs.data.dataset import Dataset
from mohs.data.loading import available, load
from mohs.data.text import Sentences, Vocabulary, sentences

__all__ = ["Dataset", "Sentences", "Vocabulary", "available", "load", "sentences"]
