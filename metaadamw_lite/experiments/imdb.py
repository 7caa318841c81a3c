"""IMDB: is a film review positive or negative? A bidirectional LSTM reads it.

Data → model → loss → metric → configuration. Section 4.1 and Appendix B of the paper. The released code fills their
gaps (tokenisation, vocabulary, padding, epochs, early stopping).
"""

import re
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments.datasets import hub_table, is_held_out, prepared, read_table
from metaadamw_lite.experiments.task import (
    PROFILES,
    PROTOCOLS,
    SOURCES,
    Batch,
    Data,
    Score,
    Settings,
    Task,
    accuracy,
    classification_score,
    part_of,
)
from metaadamw_lite.experiments.text import PAD, encode, made_up_sentences, padded, vocabulary

# ---------------------------------------------------------------- data

TRAIN, TEST = (
    hub_table(f"imdb/{split}.parquet", 25_000, ("text", "label"), "stanfordnlp/imdb", split)
    for split in ("train", "test")
)
LENGTH = 256
VOCABULARY = 25_000
MIN_FREQ = 5
"""Words read of a review and words in the vocabulary, unless the settings' data have other numbers under "length" and
"words"; and how often a word of the vocabulary must occur."""


def synthetic_reviews(reviews: int, seed: int) -> pd.DataFrame:
    """Make a stand-in with the columns of IMDB: made-up sentences in which every seventh word gives the label away."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, reviews)
    texts = [
        " ".join(f"{('bad', 'good')[label]} {word}" if k % 7 == 0 else word for k, word in enumerate(words))
        for label, words in zip(labels, made_up_sentences(reviews, 40, rng), strict=True)
    ]
    return pd.DataFrame({"text": texts, "label": labels})


def load(protocol: str, settings: Settings, source: str) -> Data:
    """Load the first words of reviews (256 in the paper) as numbers.

    ``paper``: the training part trains. The official test part validates and is reported. ``clean``: about a tenth of
    the training reviews validates, and the official test part is the test part.

    Returns:
        Batches (words, label, length): words of shape (N, length), int16; labels of shape (N,), 0 negative and 1
        positive; lengths of shape (N,), without padding.

    Raises:
        ValueError: for an unknown protocol or source.
        DataError: if the real data are missing and cannot be downloaded, or fail their check.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    check_choice("data", source, SOURCES)
    sizes = settings.data.get("words", VOCABULARY), settings.data.get("length", LENGTH)
    if source == "real":
        parts, words = prepared(reviews_of_the_tables, (TRAIN, TEST), protocol, *sizes)
    else:
        count = settings.data.get("reviews", 4_000)
        parts, words = reviews(protocol, synthetic_reviews(count, 1), synthetic_reviews(count, 2), *sizes)
    samples = []
    for name, (numbers, labels) in zip(("train", "val", "test"), parts, strict=False):
        lengths = (numbers != PAD).sum(axis=1).clip(1)
        tensors = tuple(torch.from_numpy(x) for x in (numbers, labels, lengths))
        samples.append(part_of(tensors, settings.data.get(name)))
    test = samples[2] if protocol == "clean" else None
    of_the_model = {"words": len(words), "packed": protocol == "clean"}
    return Data(samples[0], samples[1], test, "IMDB" if source == "real" else "synthetic", of_the_model)


def reviews_of_the_tables(protocol: str, size: int, length: int) -> tuple[list[Any], list[str]]:
    """Encode the reviews of the real data, as ``reviews`` does."""
    return reviews(protocol, read_table(TRAIN), read_table(TEST), size, length)


def reviews(
    protocol: str, train: pd.DataFrame, test: pd.DataFrame, size: int = VOCABULARY, length: int = LENGTH
) -> tuple[list[Any], list[str]]:
    """Encode the parts of a protocol as arrays (words, labels), and return them with the vocabulary.

    Args:
        protocol: "paper" or "clean".
        train: the training part, which ``clean`` divides into training and validation.
        test: the official test part.
        size: at most so many words in the vocabulary.
        length: words read of a review.
    """
    if protocol == "paper":
        frames = [train, test]
    else:
        validates = is_held_out(train["text"])
        frames = [train[~validates], train[validates], test]
    texts = [[tokens(text) for text in frame["text"]] for frame in frames]
    words = vocabulary(texts[0], ("<pad>", "<unk>"), size, MIN_FREQ)
    return [
        (padded(encode(part, words), length), np.array(frame["label"], dtype=np.int64))
        for part, frame in zip(texts, frames, strict=True)
    ], words


def tokens(text: str) -> list[str]:
    """Split text into words as torchtext's "basic_english" does.

    Words are in lower case. The characters .,()!? stand apart, and so does an apostrophe with the rest of its word.
    Double quotes, colons, semicolons and line breaks go.
    """
    text = text.lower().replace("<br />", " ").replace('"', "").replace("'", " '  ")
    return re.sub(r"([.,()!?])", r" \1 ", re.sub(r"[;:]", " ", text)).split()


# ---------------------------------------------------------------- model


class SentimentLSTM(nn.Module):
    """Embedding, a bidirectional LSTM, and a linear layer on the last states of both directions.

    Args:
        words: size of the vocabulary.
        packed: stop reading where the padding begins; the released code reads the padding.
        embedding, hidden, layers, dropout: sizes and dropout of the layers.
    """

    def __init__(self, words: int, packed: bool, embedding: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.packed = packed
        self.embedding = nn.Embedding(words, embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=dropout, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * hidden, 2)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Return scores (N, 2), negative and positive, from words (N, T) with ``lengths`` (N,) before the padding."""
        h = self.embedding(words)
        if self.packed:
            last = self._read_packed(h, lengths)
        else:
            _, (states, _) = self.lstm(h)
            last = torch.cat([states[-2], states[-1]], dim=1)
        scores: Tensor = self.output(self.dropout(last))
        return scores

    def _read_packed(self, h: Tensor, lengths: Tensor) -> Tensor:
        """Return the last states of both directions, (N, 2·hidden), eight times as fast as a packed sequence on a CPU.

        The padding follows the words. Reversing each row's words alone makes that true for the backward direction, too.
        """
        rows, positions = torch.arange(len(h), device=h.device), torch.arange(h.shape[1], device=h.device)
        turned = torch.where(positions < lengths[:, None], lengths[:, None] - 1 - positions, positions)
        zeros = h.new_zeros(1, len(h), self.lstm.hidden_size)
        last: list[Tensor] = []
        for layer in range(self.lstm.num_layers):
            if layer:
                h = F.dropout(h, self.lstm.dropout, self.training)
            both = []
            for direction in ("", "_reverse"):
                weights = [getattr(self.lstm, f"{name}_l{layer}{direction}") for name in _LSTM_WEIGHTS]
                x = h[rows[:, None], turned] if direction else h
                out, _, _ = torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, self.training, False, True)
                last.append(out[rows, lengths - 1])
                both.append(out[rows[:, None], turned] if direction else out)
            h = torch.cat(both, dim=2)
        return torch.cat(last[-2:], dim=1)


_LSTM_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def build(settings: Settings, data: Data) -> nn.Module:
    """Build a freshly initialised model."""
    return SentimentLSTM(**data.sizes, **settings.model)


# ---------------------------------------------------------------- loss and metric


def inputs_and_labels(batch: Batch) -> tuple[Batch, Tensor]:
    """Split a batch into the model's inputs and the labels (N,)."""
    words, labels, lengths = batch
    return (words.long(), lengths), labels


def score(model: nn.Module, batch: Batch) -> Score:
    """Return the mean cross-entropy in nats, and the number of right labels. The metric is their share."""
    inputs, labels = inputs_and_labels(batch)
    return classification_score(model(*inputs), labels)


# ---------------------------------------------------------------- configuration


def settings(profile: str) -> Settings:
    """``paper``: Tables 1 and 4. ``smoke``: a narrow model, made-up words.

    ``lite``: a quarter of the paper's hidden width, 5,000 words, and the first 48 words of 10,000 reviews: with 4,000
    the loss hardly falls. At the paper's learning rate 9 % of the loss's fall come in the last third of the
    epochs; at the best ones, 8e-3 to 3.2e-2, none do. Runs at the paper's rate or a higher one take fewer than 20
    epochs.

    Raises:
        ValueError: for an unknown profile.
    """
    check_choice("profile", profile, PROFILES)
    epochs, batch_size, meta_every, embedding, hidden, data = {
        "paper": (15, 64, 39, 32, 64, {}),
        "lite": (20, 64, 15, 32, 16, {"words": 5_000, "length": 48, "train": 10_000, "val": 2_000, "test": 5_000}),
        "smoke": (2, 8, 3, 32, 8, {"reviews": 80, "train": 48, "val": 16, "test": 16}),
    }[profile]
    return Settings(
        epochs=epochs,
        batch_size=batch_size,
        meta_every=meta_every,
        meta_per_epoch=10,
        metaadamw={
            "attn_layers": 64,
            "attn_hidden_dim": 64,
            "attn_heads": 11,
            "feature_version": "basic_plus",
            "use_feature_gating": True,
            "huw_priorities": (1.0, 3.0, 5.0),
        },
        model={"embedding": embedding, "hidden": hidden, "layers": 2, "dropout": 0.2},
        data=data,
        scheduled_epochs=6 if profile == "lite" else None,
    )


IMDB = Task(
    name="imdb",
    title="IMDB sentiment",
    metric="accuracy",
    unit="accuracy (share of reviews)",
    lower_is_better=False,
    settings=settings,
    load=load,
    build=build,
    score=score,
    metric_of=accuracy,
    classes=2,
    inputs_and_labels=inputs_and_labels,
)
