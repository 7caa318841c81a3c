"""Multi30k: translate German captions of pictures into English.

Data → model → loss → metric → configuration. Section 4.1 and Appendix B of the paper. The released code fills their
gaps (one vocabulary for both languages, no mask on the source's padding, epochs, early stopping).
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments.datasets import hub_table, is_held_out, prepared, read_table
from metaadamw_lite.experiments.etth1 import sinusoidal_positions
from metaadamw_lite.experiments.task import (
    PROFILES,
    PROTOCOLS,
    SOURCES,
    Batch,
    Data,
    Score,
    Settings,
    Task,
    part_of,
    perplexity,
)
from metaadamw_lite.experiments.text import PAD, encode, made_up_sentences, padded, trimmed, vocabulary

# ---------------------------------------------------------------- data

TRAIN, VALIDATION, TEST = (
    hub_table(f"multi30k/{split}.parquet", rows, ("en", "de"), "bentrevett/multi30k", split)
    for split, rows in (("train", 29_000), ("validation", 1_014), ("test", 1_000))
)
LENGTH = 64
VOCABULARY = 10_000
MIN_FREQ = 2
"""Words in a sentence, "<bos>" and "<eos>" included; words in a vocabulary, unless the settings' data have another
number under "words"; and how often a word of it must occur. With "longest", only pairs of so many words are kept."""
SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
BOS, EOS = 2, 3


def synthetic_pairs(pairs: int, seed: int) -> pd.DataFrame:
    """Make a stand-in with the columns of Multi30k: the "translation" has the words in reverse, with new names."""
    german = made_up_sentences(pairs, 12, np.random.default_rng(seed))
    english = [" ".join(f"t{word}" for word in reversed(words)) for words in german]
    return pd.DataFrame({"en": english, "de": [" ".join(words) for words in german]})


def load(protocol: str, settings: Settings, source: str) -> Data:
    """Load sentences as word numbers, split at white space.

    ``paper``: one vocabulary, made from the German side, encodes both languages, so that most English words become
    "<unk>". The official validation part validates and is reported. ``clean``: each language has a vocabulary, about a
    tenth of the training pairs validates, and the official test part (2016) is the test part.

    Returns:
        Batches (source, target), each of shape (N, 64), int16, beginning with "<bos>" and ending with "<eos>".

    Raises:
        ValueError: for an unknown protocol or source.
        DataError: if the real data are missing and cannot be downloaded, or fail their check.
        ImportError: without sacrebleu, under ``clean``.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    check_choice("data", source, SOURCES)
    if protocol == "clean":
        import sacrebleu  # noqa: F401 (BLEU comes last: fail before hours of training, not after)
    sizes = settings.data.get("words", VOCABULARY), settings.data.get("longest")
    if source == "real":
        parts, words, references = prepared(pairs_of_the_tables, (TRAIN, VALIDATION, TEST), protocol, *sizes)
    else:
        count = settings.data.get("pairs", 2_000)
        parts, words, references = pairs(protocol, synthetic_pairs(count, 1), synthetic_pairs(count, 2), *sizes)
    samples = [
        part_of((torch.from_numpy(de), torch.from_numpy(en)), settings.data.get(name))
        for name, (de, en) in zip(("train", "val", "test"), parts, strict=False)
    ]
    kept = part_of((torch.arange(len(references)),), settings.data.get("test"))[0].tolist()
    return Data(
        train=samples[0],
        val=samples[1],
        test=samples[2] if protocol == "clean" else None,
        source="Multi30k" if source == "real" else "synthetic",
        sizes={"source_words": len(words["de"]), "target_words": len(words["en"]) if protocol == "clean" else 0},
        words=words["en"],
        references=[references[i] for i in kept],
    )


def pairs_of_the_tables(
    protocol: str, size: int, longest: int | None
) -> tuple[list[Any], dict[str, list[str]], list[str]]:
    """Encode the pairs of the real data, as ``pairs`` does."""
    return pairs(protocol, read_table(TRAIN), read_table(VALIDATION if protocol == "paper" else TEST), size, longest)


def pairs(
    protocol: str, train: pd.DataFrame, other: pd.DataFrame, size: int = VOCABULARY, longest: int | None = None
) -> tuple[list[Any], dict[str, list[str]], list[str]]:
    """Encode the parts of a protocol; return arrays, both vocabularies, and the test part's English sentences.

    Args:
        protocol: "paper", where ``other`` is the validation part, or "clean", where it is the test part.
        train: the training part, which ``clean`` divides into training and validation.
        other: the official held-out part.
        size: at most so many words in a vocabulary.
        longest: only pairs with at most so many words in either language; None for all.
    """
    if longest is not None:
        train, other = (f[(f.map(lambda text: len(text.split())) <= longest).all(axis=1)] for f in (train, other))
    if protocol == "paper":
        frames = [train, other]
    else:
        validates = is_held_out(train["en"])
        frames = [train[~validates], train[validates], other]
    words = {
        language: vocabulary((text.split() for text in frames[0][language]), SPECIALS, size, MIN_FREQ)
        for language in ("de", "en" if protocol == "clean" else "de")
    }
    words.setdefault("en", words["de"])

    def numbers(texts: "pd.Series[str]", language: str) -> Any:
        rows = encode((text.split() for text in texts), words[language])
        return padded([[BOS, *row[: LENGTH - 2], EOS] for row in rows], LENGTH)

    parts = [tuple(numbers(frame[language], language) for language in ("de", "en")) for frame in frames]
    return parts, words, [] if protocol == "paper" else list(other["en"])


# ---------------------------------------------------------------- model


class Translator(nn.Module):
    """The Transformer of Vaswani et al. (2017), post-norm, with sinusoidal positions.

    Args:
        source_words: size of the source vocabulary.
        target_words: size of the target vocabulary; 0 if both languages share the source's vocabulary and embedding,
            as in the released code. Then the padding of the source is not masked, either.
    """

    positions: Tensor

    def __init__(
        self,
        source_words: int,
        target_words: int,
        d_model: int,
        heads: int,
        layers: int,
        feed_forward: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.mask_padding = target_words > 0
        self.embedding = nn.Embedding(source_words, d_model)
        self.target_embedding = nn.Embedding(target_words, d_model) if target_words else None
        self.register_buffer("positions", sinusoidal_positions(LENGTH, d_model), persistent=False)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(d_model, heads, feed_forward, dropout, batch_first=True)
        self.transformer = nn.Transformer(
            d_model,
            heads,
            num_decoder_layers=layers,
            dim_feedforward=feed_forward,
            dropout=dropout,
            batch_first=True,
            custom_encoder=nn.TransformerEncoder(layer, layers, nn.LayerNorm(d_model), enable_nested_tensor=False),
        )
        self.output = nn.Linear(d_model, target_words or source_words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return scores (N, T, target words) of the word after each target word (N, T), given the source (N, S)."""
        memory, padding = self.encode(source)
        scores: Tensor = self.output(self.decode(target, memory, padding))
        return scores

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode the source (N, S) as (N, S, d), and return it with the mask of its padding, if that is masked."""
        padding = source == PAD if self.mask_padding else None
        h = self._embedded(source, self.embedding)
        return self.transformer.encoder(h, src_key_padding_mask=padding), padding

    def decode(self, target: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        """Return the decoder's output (N, T, d) for the beginning of the target (N, T)."""
        h = self._embedded(target, self.target_embedding or self.embedding)
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        decoded: Tensor = self.transformer.decoder(
            h, memory, tgt_mask=mask, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return decoded

    def _embedded(self, words: Tensor, embedding: nn.Embedding) -> Tensor:
        scaled = embedding(words) * math.sqrt(embedding.embedding_dim) + self.positions[: words.shape[1]]
        embedded: Tensor = self.dropout(scaled)
        return embedded


def build(settings: Settings, data: Data) -> nn.Module:
    """Build a freshly initialised model."""
    return Translator(**data.sizes, **settings.model)


# ---------------------------------------------------------------- loss, metric and translation


def score(model: nn.Module, batch: Batch) -> Score:
    """Return the mean cross-entropy in nats of each target word, given those before. The metric is its exponential."""
    source, target = trimmed(batch)
    expected = target[:, 1:].flatten()
    loss = F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), expected, ignore_index=PAD)
    return Score(loss, (expected != PAD).sum())


@torch.no_grad()
def translate(model: nn.Module, data: Data) -> dict[str, float]:
    """Compute BLEU (sacrebleu's default, 0 to 100) of greedy translations of the test part, which only ``clean`` has.

    Returns:
        ``{"bleu": …}``.
    """
    from sacrebleu import corpus_bleu

    assert isinstance(model, Translator)
    assert data.test is not None
    model.eval()
    source = data.test[0]
    order = (source != PAD).sum(dim=1).argsort().tolist()  # batches of like length waste no time on padding
    translations = [""] * len(source)
    for start in range(0, len(order), 100):
        chosen = order[start : start + 100]
        for i, numbers in zip(chosen, greedy(model, *trimmed((source[chosen],))).tolist(), strict=True):
            end = numbers.index(EOS) if EOS in numbers else len(numbers)
            translations[i] = " ".join(data.words[n] for n in numbers[:end])
    return {"bleu": corpus_bleu(translations, [list(data.references)]).score}


def greedy(model: Translator, source: Tensor) -> Tensor:
    """Translate sources (N, S) by the likeliest next word, again and again: word numbers (N, T) without "<bos>".

    A translation ends with "<eos>", or when it is eight words longer than the longest source.
    """
    memory, padding = model.encode(source)
    target = torch.full((len(source), 1), BOS, device=source.device)
    for _ in range(min(LENGTH - 1, source.shape[1] + 8)):
        last = model.output(model.decode(target, memory, padding)[:, -1]).argmax(dim=1, keepdim=True)
        target = torch.cat([target, last], dim=1)
        if bool((target == EOS).any(dim=1).all()):
            break
    return target[:, 1:]


# ---------------------------------------------------------------- configuration


def settings(profile: str) -> Settings:
    """``paper``: Tables 1 and 4. ``smoke``: a narrow model, made-up words.

    ``lite``: a quarter of the paper's width, one layer instead of four on each side, 4,000 words, and 1,600 pairs of at
    most ten words for training. With fewer words nearly all that ``paper`` predicts is "<unk>", and guessing is as
    good. A step has 32 pairs instead of 64, so that an epoch has 50 steps. Runs at the paper's
    learning rate or a higher one take fewer than 20 epochs.

    Raises:
        ValueError: for an unknown profile.
    """
    check_choice("profile", profile, PROFILES)
    epochs, batch_size, meta_every, width, layers, data = {
        "paper": (25, 64, 454, 256, 4, {}),
        "lite": (20, 32, 50, 64, 1, {"words": 4_000, "longest": 10, "train": 1_600, "val": 1_014, "test": 1_000}),
        "smoke": (2, 8, 3, 16, 1, {"pairs": 80, "train": 48, "val": 16, "test": 16}),
    }[profile]
    return Settings(
        epochs=epochs,
        batch_size=batch_size,
        meta_every=meta_every,
        metaadamw={
            "attn_layers": 128,
            "attn_hidden_dim": 64,
            "attn_heads": 6,
            "feature_version": "basic",
            "use_feature_gating": False,
            "huw_priorities": (2.0, 5.0, 1.0),
        },
        model={"d_model": width, "heads": 8, "layers": layers, "feed_forward": 4 * width, "dropout": 0.2},
        data=data,
        scheduled_epochs=17 if profile == "lite" else None,
    )


MULTI30K = Task(
    name="multi30k",
    title="Multi30k translation",
    metric="perplexity",
    unit="perplexity",
    lower_is_better=True,
    settings=settings,
    load=load,
    build=build,
    score=score,
    metric_of=perplexity,
    translate=translate,
)
