"""The four tasks with data tables: what they make of their data, their models and their scores."""

import itertools
import math
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import assert_same
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torchvision.transforms.functional import normalize

from metaadamw_lite.experiments import TASKS, cifar10, etth1, imdb, multi30k, training, wikitext2
from metaadamw_lite.experiments.__main__ import main
from metaadamw_lite.experiments.datasets import DataError, Table, is_held_out, prepared, read_table
from metaadamw_lite.experiments.task import Score, accuracy, part_of, perplexity
from metaadamw_lite.experiments.text import encode, padded, trimmed, vocabulary
from metaadamw_lite.experiments.training import measure

MODULES = {"wikitext2": wikitext2, "multi30k": multi30k, "cifar10": cifar10, "imdb": imdb}


def load(task, protocol, **data):
    """A task's synthetic data, all of it, or that of its smoke profile if nothing is said about their size."""
    settings = TASKS[task].settings("smoke")
    return TASKS[task].load(protocol, replace(settings, data=data) if data else settings, "synthetic")


def model_of(task, protocol, dtype=torch.float64):
    """A model of the smoke profile in eval mode, and the data it is for."""
    data = load(task, protocol)
    torch.manual_seed(0)
    return TASKS[task].build(TASKS[task].settings("smoke"), data).to(dtype).eval(), data


def first(part, count):
    return tuple(x[:count] for x in part)


def rows(x):
    return {tuple(row) for row in x.flatten(1).tolist()}


def negative_log_likelihoods(scores, expected):
    """One for each term, by the definition."""
    scores = scores.double()
    chosen = scores.gather(-1, expected.long().unsqueeze(-1)).squeeze(-1)
    return scores.exp().sum(dim=-1).log() - chosen


# ---------------------------------------------------------------- what all tasks share


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_only_the_clean_protocol_has_a_test_part(task, protocol):
    data = load(task, protocol)
    assert (data.test is None) == (protocol == "paper")
    assert data.source == "synthetic"
    parts = [data.train, data.val, *([] if data.test is None else [data.test])]
    for part in parts:
        assert [x.dtype for x in part] == [x.dtype for x in data.train]
        assert [x.shape[1:] for x in part] == [x.shape[1:] for x in data.train]
        assert len({len(x) for x in part}) == 1, "every tensor of a part has the same samples"
    if task != "etth1":
        most = TASKS[task].settings("smoke").data
        assert len(data.train[0]) == most["train"]
        assert all(0 < len(part[0]) <= most[name] for name, part in zip(("train", "val", "test"), parts, strict=False))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_the_same_data_each_time(task, protocol):
    a, b = load(task, protocol), load(task, protocol)
    assert_same([a.train, a.val, a.test or (), list(a.words)], [b.train, b.val, b.test or (), list(b.words)])


@pytest.mark.parametrize("task", TASKS)
def test_unknown_protocols_and_sources_are_quoted(task):
    settings = TASKS[task].settings("smoke")
    with pytest.raises(ValueError, match="dirty"):
        TASKS[task].load("dirty", settings, "synthetic")
    with pytest.raises(ValueError, match="invented"):
        TASKS[task].load("paper", settings, "invented")
    with pytest.raises(ValueError, match="huge"):
        TASKS[task].settings("huge")


@pytest.mark.parametrize("task", list(TASKS))
def test_a_stand_in_can_be_asked_for_with_any_profile(task):
    """The message about missing data advises ``--data synthetic``, whatever the profile."""
    settings = TASKS[task].settings("lite")
    data = TASKS[task].load("paper", settings, "synthetic")
    assert data.source == "synthetic"
    assert len(data.train[0]) >= settings.batch_size


def test_a_part_of_the_samples_is_drawn_the_same_way_each_time():
    samples = (torch.arange(50), torch.arange(50) * 2)
    assert part_of(samples, None) is samples
    some = part_of(samples, 10)
    assert_same(some, part_of(samples, 10))
    assert len(set(some[0].tolist())) == 10
    assert torch.equal(some[1], 2 * some[0]), "the tensors of a sample stay together"
    assert_same(first(part_of(samples, 20), 10), some)


def test_metrics():
    assert perplexity(math.log(120.47), 0) == pytest.approx(120.47)
    assert perplexity(1e4, 0) == math.inf
    assert math.isnan(perplexity(math.nan, 0))
    assert accuracy(123.0, 0.75) == 0.75


def test_what_is_measured_is_the_mean_over_terms_whatever_the_batches(monkeypatch):
    model, data = model_of("multi30k", "clean")
    whole = measure(TASKS["multi30k"], model, data.val)
    monkeypatch.setattr(training, "EVALUATION_BATCH", 5)
    pieces = measure(TASKS["multi30k"], model, data.val)
    assert pieces == pytest.approx(whole, rel=1e-9)
    assert whole.metric == pytest.approx(math.exp(whole.loss))


def test_the_measured_accuracy_is_the_share_of_right_ones():
    model, data = model_of("imdb", "clean")
    words, labels, lengths = data.val
    right = model(words.long(), lengths).argmax(dim=1) == labels
    assert measure(TASKS["imdb"], model, data.val).metric == pytest.approx(right.double().mean().item())


# ---------------------------------------------------------------- words


def test_a_vocabulary_is_ordered_by_frequency_and_then_by_the_alphabet():
    texts = [["b", "a", "c", "a"], ["c", "d", "b", "<unk>", "<unk>", "<unk>"], ["a", "e"]]
    assert vocabulary(texts, ("<pad>", "<unk>"), 100) == ["<pad>", "<unk>", "a", "b", "c", "d", "e"]


def test_a_vocabulary_is_cut_off_by_size_and_by_frequency():
    texts = [["a", "a", "a", "b", "b", "c"]]
    assert vocabulary(texts, ("<pad>", "<unk>"), 4) == ["<pad>", "<unk>", "a", "b"]
    assert vocabulary(texts, ("<pad>", "<unk>"), 100, min_freq=2) == ["<pad>", "<unk>", "a", "b"]
    assert vocabulary(texts, ("<pad>", "<unk>"), 100, min_freq=4) == ["<pad>", "<unk>"]


def test_words_without_a_number_and_the_word_unk_itself_are_1():
    assert encode([["b", "zebra", "<unk>", "a"], []], ["<pad>", "<unk>", "a", "b"]) == [[3, 1, 1, 2], []]


def test_rows_are_cut_or_filled_with_zeros():
    array = padded([[5, 6, 7, 8], [9], []], 3)
    assert array.tolist() == [[5, 6, 7], [9, 0, 0], [0, 0, 0]]
    assert padded([[24_999]], 1).item() == 24_999, "int16 holds the largest vocabulary"


def test_trimming_drops_the_columns_that_are_padding_in_every_row():
    a = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]], dtype=torch.int16)
    (short,) = trimmed((a,))
    assert short.tolist() == [[5, 6], [7, 0]]
    assert short.dtype == torch.int64
    assert trimmed((torch.zeros(2, 4, dtype=torch.int16),))[0].shape == (2, 1)


# ---------------------------------------------------------------- WikiText-2


def test_wikitext2_blocks_come_from_single_lines():
    lengths = (127, 128, 129, 0, 300)
    lines = [" ".join(f"line{k}word{i}" for i in range(n)) for k, n in enumerate(lengths)]
    (blocks,) = wikitext2.blocks(pd.DataFrame({"text": lines}))
    words = vocabulary([line.split() for line in lines], ("<pad>", "<unk>"), wikitext2.VOCABULARY)
    texts = [[words[n] for n in block] for block in blocks]
    assert texts == [
        [f"line1word{i}" for i in range(128)],
        [f"line2word{i}" for i in range(128)],
        [f"line4word{i}" for i in range(128)],
        [f"line4word{i}" for i in range(128, 256)],
    ]
    assert blocks.dtype == np.int16


def test_wikitext2_numbers_are_those_of_the_training_text():
    train = pd.DataFrame({"text": [" ".join(["often"] * 100 + ["seldom"] * 20 + ["<unk>"] * 8)]})
    other = pd.DataFrame({"text": [" ".join(["seldom"] * 60 + ["new"] * 60 + ["<unk>"] * 8)]})
    a, b = wikitext2.blocks(train, other)
    assert a.tolist() == [[2] * 100 + [3] * 20 + [1] * 8]
    assert b.tolist() == [[3] * 60 + [1] * 68]


def test_wikitext2_keeps_10000_words():
    text = " ".join(f"w{i:05}" for i in range(10_240))
    (blocks,) = wikitext2.blocks(pd.DataFrame({"text": [text]}))
    expected = np.arange(2, 10_242).reshape(-1, 128)
    assert np.array_equal(blocks, np.where(expected < 10_000, expected, 1))


def test_wikitext2_clean_holds_out_the_last_tenth_of_the_training_blocks():
    paper, clean = (load("wikitext2", p, lines=60) for p in ("paper", "clean"))
    whole, train, val = paper.train[0], clean.train[0], clean.val[0]
    assert torch.equal(torch.cat([train, val]), whole)
    assert len(val) == len(whole) // 10
    assert whole.shape[1] == 128
    parts = [rows(x) for x in (train, val, clean.test[0], paper.val[0])]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(parts, 2))


@pytest.mark.parametrize("grad", [True, False])
def test_minigpt_does_not_look_ahead(grad):
    """Without gradients torch takes another path through its encoder layers."""
    model, data = model_of("wikitext2", "paper")
    words = data.train[0][:2].long()
    changed = words.clone()
    changed[:, 7] = (changed[:, 7] + 1) % wikitext2.VOCABULARY
    with torch.set_grad_enabled(grad):
        a, b = model(words), model(changed)
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-12)
    assert ((a[:, 7:] - b[:, 7:]).abs().amax(dim=(0, 2)) > 1e-9).all(), "and all that follows sees the change"


def test_minigpt_knows_positions_and_starts_at_chance():
    model, data = model_of("wikitext2", "paper")
    same = model(torch.full((1, 5), 7))
    assert (same[0, 1:] - same[0, :-1]).abs().amax(dim=1).min() > 1e-6
    assert model(data.train[0][:2, :-1].long()).shape == (2, 15, 10_000)
    assert wikitext2.score(model, data.train).loss.item() == pytest.approx(math.log(10_000), abs=0.1)


def test_wikitext2_loss():
    model, data = model_of("wikitext2", "paper")
    words = data.train[0][:3]
    score = wikitext2.score(model, (words,))
    expected = torch.stack([negative_log_likelihoods(model(w[None].long())[0, :-1], w[1:]).mean() for w in words])
    assert score.loss.item() == pytest.approx(expected.mean().item(), rel=1e-9)
    assert (score.terms, score.correct) == (3 * 15, None)


# ---------------------------------------------------------------- Multi30k


def sentences(numbers, words):
    return [" ".join(words[n] for n in row if n not in (0, 2, 3)) for row in numbers.tolist()]


def test_multi30k_paper_encodes_english_with_the_german_vocabulary():
    data = load("multi30k", "paper", pairs=150)
    german, english = data.train
    assert all(word[0] == "w" for word in data.words[4:]), "German words of the stand-in begin with w, English with t"
    assert list(data.words[:4]) == list(multi30k.SPECIALS)
    assert english.unique().tolist() == [0, 1, 2, 3]
    assert (german > 3).sum() > 0.9 * (german != 0).sum() - 2 * len(german)
    assert data.sizes == {"source_words": len(data.words), "target_words": 0}
    assert not data.references


def test_multi30k_paper_shares_what_both_languages_write_alike():
    train = pd.DataFrame({"de": ["der Mann in Berlin .", "der Hund in Berlin ."], "en": ["a man in Berlin .", "a ."]})
    parts, words, _ = multi30k.pairs("paper", train, train)
    assert words["en"] is words["de"]
    assert [words["de"][n] for n in parts[0][1][0]][:7] == ["<bos>", "<unk>", "<unk>", "in", "Berlin", ".", "<eos>"]
    assert "Mann" not in words["de"], "a word must occur twice"


def test_multi30k_clean_has_two_vocabularies():
    data = load("multi30k", "clean", pairs=150)
    pairs = multi30k.synthetic_pairs(150, 1)
    validates = is_held_out(pairs["en"])
    assert 0 < len(data.val[0]) == validates.sum() < 40
    assert all(word[0] == "t" for word in data.words[4:])
    assert data.sizes["target_words"] == len(data.words)
    assert sentences(data.train[1], data.words) == list(pairs["en"][~validates])
    assert sentences(data.val[1], data.words) == list(pairs["en"][validates])
    assert sentences(data.test[1], data.words) == list(data.references) == list(multi30k.synthetic_pairs(150, 2)["en"])


def test_multi30k_words_of_the_held_out_sentences_do_not_enter_the_vocabulary():
    texts = [f"s{i} s{i} ." for i in range(200)]
    train = pd.DataFrame({"de": texts, "en": texts})
    _, words, _ = multi30k.pairs("clean", train, train[:5])
    kept = [text.split()[0] for text, validates in zip(texts, is_held_out(texts), strict=True) if not validates]
    assert set(words["en"]) == {*multi30k.SPECIALS, ".", *kept}


def test_multi30k_clean_parts_are_disjoint_and_references_stay_with_their_pairs():
    data = load("multi30k", "clean")
    assert rows(torch.cat(data.train, dim=1)).isdisjoint(rows(torch.cat(data.val, dim=1)))
    assert sentences(data.test[1], data.words) == list(data.references)


def test_multi30k_sentences_begin_and_end_and_have_64_words_at_most():
    texts = ["a b", " ".join(["a"] * 62), " ".join(["b"] * 63), " ".join(["b"] * 200), ""]
    parts, words, _ = multi30k.pairs(
        "paper", pd.DataFrame({"de": texts, "en": texts}), pd.DataFrame(columns=["de", "en"])
    )
    a, b = words["de"].index("a"), words["de"].index("b")
    for numbers in parts[0]:
        assert numbers.shape == (5, 64)
        assert numbers.dtype == np.int16
        assert numbers[0].tolist() == [2, a, b, 3] + [0] * 60
        assert numbers[1].tolist() == [2] + [a] * 62 + [3]
        assert numbers[2].tolist() == numbers[3].tolist() == [2] + [b] * 62 + [3]
        assert numbers[4].tolist() == [2, 3] + [0] * 62


@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_multi30k_keeps_only_pairs_that_are_short_in_both_languages(protocol):
    """Their references, too; a sentence as long as the limit is short."""
    train = pd.DataFrame({"de": ["a a", "a a a", "a a", "a"] * 9, "en": ["b b", "b b", "b b b", "b"] * 9})
    other = pd.DataFrame({"de": ["a a a", "a a"], "en": ["b", "b b"]})
    parts, _, references = multi30k.pairs(protocol, train, other, longest=2)
    assert sum(len(part[0]) for part in parts[:-1]) == 18
    assert max(int((x != 0).sum(axis=1).max()) for part in parts for x in part if len(x)) == 4, "<bos> and <eos> count"
    assert len(parts[-1][0]) == 1
    assert references == ([] if protocol == "paper" else ["b b"])


def pairs_of_unlike_length(data):
    """Eight pairs, one of them much longer than the others."""
    source, target = (x[:8].clone() for x in data.train)
    for x in (source, target):
        x[0] = x[0, 1]
        x[0, 0], x[0, -1] = multi30k.BOS, multi30k.EOS
    return source, target


@pytest.mark.parametrize("grad", [True, False])
def test_multi30k_clean_does_not_see_padding(grad):
    model, data = model_of("multi30k", "clean")
    source, target = pairs_of_unlike_length(data)
    with torch.set_grad_enabled(grad):
        whole = multi30k.score(model, (source, target))
        single = [multi30k.score(model, (source[i : i + 1], target[i : i + 1])) for i in range(8)]
    assert whole.terms == sum(s.terms for s in single) == (target[:, 1:] != 0).sum()
    assert (whole.loss * whole.terms).item() == pytest.approx(sum((s.loss * s.terms).item() for s in single), rel=1e-9)


def test_multi30k_paper_sees_the_padding_of_the_source():
    model, data = model_of("multi30k", "paper")
    source, target = pairs_of_unlike_length(data)
    alone = negative_log_likelihoods(model(*(x[None, :5].long() for x in (source[1], target[1]))), target[1:2, :5])
    beside = negative_log_likelihoods(model(source[1:2].long(), target[1:2, :5].long()), target[1:2, :5])
    assert (alone - beside).abs().max() > 1e-4


@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_multi30k_loss(protocol):
    model, data = model_of("multi30k", protocol)
    source, target = (x[:6, : int((x[:6] != 0).any(dim=0).sum())].long() for x in data.train)
    each = negative_log_likelihoods(model(source, target[:, :-1]), target[:, 1:])
    score = multi30k.score(model, first(data.train, 6))
    counted = target[:, 1:] != 0
    assert score.loss.item() == pytest.approx(each[counted].mean().item(), rel=1e-9)
    assert score.terms == counted.sum()
    assert score.correct is None


def test_the_translator_does_not_look_ahead():
    model, data = model_of("multi30k", "clean")
    source, target = (x[:4, :6].long() for x in data.train)
    changed = target.clone()
    changed[:, 3] += 1
    a, b = model(source, target), model(source, changed)
    torch.testing.assert_close(a[:, :3], b[:, :3], rtol=0, atol=1e-12)
    assert (a[:, 3:] - b[:, 3:]).abs().max() > 1e-6


class Oracle(multi30k.Translator):
    """Knows the translation of every sentence; after the end it says "." for ever."""

    def __init__(self, source, target, dot):
        nn.Module.__init__(self)
        self.output = nn.Identity()
        self.answers, self.dot = {}, dot
        for s, t in zip(source.tolist(), target.tolist(), strict=True):
            self.answers[tuple(n for n in s if n)] = [n for n in t if n][1:]

    def encode(self, source):
        return source, None

    def decode(self, target, memory, padding):
        scores = torch.zeros(*target.shape, 200)
        for i, source in enumerate(memory.tolist()):
            answer = self.answers[tuple(n for n in source if n)]
            for t in range(target.shape[1]):
                scores[i, t, answer[t] if t < len(answer) else self.dot] = 1
        return scores


def test_a_perfect_translation_has_a_bleu_of_100():
    data = load("multi30k", "clean", pairs=130)
    assert multi30k.translate(Oracle(*data.test, dot=5), data) == {"bleu": pytest.approx(100)}
    source, target = data.test[0], data.test[1].clone()
    target[:, 3] = 5
    assert 0 < multi30k.translate(Oracle(source, target, dot=5), data)["bleu"] < 90


def test_translation_stops_when_all_have_ended():
    data = load("multi30k", "clean", pairs=130)
    source, target = (x.long() for x in first(data.test, 20))
    numbers = multi30k.greedy(Oracle(source, target, dot=5), source)
    longest = int((target != 0).sum(dim=1).max())
    assert numbers.shape == (20, longest - 1)
    for row, expected in zip(numbers.tolist(), target.tolist(), strict=True):
        sentence = [n for n in expected if n][1:]
        assert row == sentence + [5] * (longest - 1 - len(sentence))


def test_translation_without_an_end_stops_eight_words_after_the_source():
    source = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    endless = torch.full((2, 40), 6)
    assert multi30k.greedy(Oracle(source, endless, dot=6), source).shape == (2, 12)


def test_translation_is_greedy_and_does_not_depend_on_its_batch():
    model, data = model_of("multi30k", "clean")
    source = data.test[0]
    with torch.no_grad():
        together = multi30k.greedy(model, *trimmed((source[:8],)))
        for i in range(8):
            (alone,) = trimmed((source[i : i + 1],))
            so_far = torch.full((1, 1), multi30k.BOS)
            for _ in range(6):
                so_far = torch.cat([so_far, model(alone, so_far)[:, -1].argmax(dim=1, keepdim=True)], dim=1)
            assert together[i, :6].tolist() == so_far[0, 1:].tolist()


# ---------------------------------------------------------------- IMDB


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's GOOD, isn't it?", "it ' s good , isn ' t it ?"),
        ("A film (from 1999)... really!", "a film ( from 1999 ) . . . really !"),
        ('He said: "no; never"', "he said no never"),
        ('a 6"x4" one', "a 6x4 one"),
        ("one.<br /><br />Two", "one . two"),
        ("10/10 -- well-made & *great*", "10/10 -- well-made & *great*"),
        ("'\".<br />,()!?;:   Plain   Text  '\".<br />,()!?;:", "' . , ( ) ! ? plain text ' . , ( ) ! ?"),
        ("  \t\n ", ""),
    ],
)
def test_imdb_words_are_those_of_basic_english(text, expected):
    assert imdb.tokens(text) == expected.split()


def test_imdb_reviews_are_cut_to_256_words_and_rare_words_have_no_number():
    train = pd.DataFrame(
        {"text": [" ".join(["good"] * 300), "bad " * 5, "rare " * 4, ""], "label": [1, 0, 0, 1]}, index=[5, 6, 7, 8]
    )
    parts, words = imdb.reviews("paper", train, train[:1])
    assert words == ["<pad>", "<unk>", "good", "bad"]
    numbers, labels = parts[0]
    assert numbers.shape == (4, 256)
    assert (numbers[0] == 2).all()
    assert numbers[1].tolist() == [3] * 5 + [0] * 251
    assert numbers[2].tolist() == [1] * 4 + [0] * 252
    assert labels.tolist() == [1, 0, 0, 1]


def test_imdb_batches():
    data = load("imdb", "paper", reviews=50)
    words, labels, lengths = data.train
    assert words.dtype == torch.int16
    assert words.shape == (50, 256)
    assert set(labels.tolist()) == {0, 1}
    assert lengths.tolist() == (words != 0).sum(dim=1).tolist()
    reviews = imdb.synthetic_reviews(50, 1)
    assert labels.tolist() == reviews["label"].tolist()
    assert lengths.tolist() == [len(text.split()) for text in reviews["text"]]


def test_imdb_clean_splits_off_training_reviews():
    paper, clean = (load("imdb", p, reviews=200) for p in ("paper", "clean"))
    validates = torch.from_numpy(is_held_out(imdb.synthetic_reviews(200, 1)["text"]))
    assert 0 < len(clean.val[0]) == validates.sum() < 50
    for i in (1, 2):  # labels and lengths do not depend on the vocabulary, which is made from fewer reviews
        assert torch.equal(clean.train[i], paper.train[i][~validates])
        assert torch.equal(clean.val[i], paper.train[i][validates])
        assert torch.equal(clean.test[i], paper.val[i])
    assert rows(clean.train[0]).isdisjoint(rows(clean.val[0]))
    assert paper.sizes["packed"] is False
    assert clean.sizes["packed"] is True


def test_imdb_packed_reading_is_that_of_torch():
    model, data = model_of("imdb", "clean")
    words, lengths = data.train[0][:12].long(), data.train[2][:12].clone()
    words[0], lengths[0] = 5, 256
    lengths[1] = 1
    packed = pack_padded_sequence(model.embedding(words), lengths, batch_first=True, enforce_sorted=False)
    _, (states, _) = model.lstm(packed)
    expected = model.output(torch.cat([states[-2], states[-1]], dim=1))
    ours = model(words, lengths)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    weights = list(model.parameters())
    ours, expected = (torch.autograd.grad(x.square().sum(), weights) for x in (ours, expected))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_imdb_only_clean_ignores_what_comes_after_the_review(protocol):
    model, data = model_of("imdb", protocol)
    words, _, lengths = first(data.train, 6)
    words = words.long()
    other = torch.where(torch.arange(256) < lengths[:, None], words, 3)
    difference = (model(words, lengths) - model(other, lengths)).abs().amax(dim=1)
    shorter = (model(words, lengths) - model(words[:, :60], lengths)).abs().amax(dim=1)
    if protocol == "clean":
        assert difference.max() < 1e-12
        assert shorter.max() < 1e-12
    else:
        assert difference.min() > 1e-9
        assert shorter.min() > 1e-9


def test_imdb_reads_an_empty_review():
    train = pd.DataFrame({"text": ["good " * 9, ""], "label": [1, 0]})
    parts, words = imdb.reviews("paper", train, train)
    assert (parts[0][0][1] == 0).all()
    model = imdb.SentimentLSTM(len(words), True, 4, 4, 2, 0.0).eval()
    lengths = torch.from_numpy((parts[0][0] != 0).sum(axis=1).clip(1))
    assert model(torch.from_numpy(parts[0][0]).long(), lengths).isfinite().all()


@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_imdb_loss_and_right_ones(protocol):
    model, data = model_of("imdb", protocol)
    words, labels, lengths = batch = first(data.train, 20)
    scores = torch.cat([model(words[i : i + 1].long(), lengths[i : i + 1]) for i in range(20)])
    score = imdb.score(model, batch)
    assert isinstance(score, Score)
    assert score.loss.item() == pytest.approx(negative_log_likelihoods(scores, labels).mean().item(), rel=1e-9)
    assert score.terms == 20
    assert score.correct == sum(int(s[1] > s[0]) == y for s, y in zip(scores, labels.tolist(), strict=True))


# ---------------------------------------------------------------- CIFAR-10


def test_cifar10_pictures_come_through_their_files_unharmed():
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    shards = [cifar10.shard_of(images, np.arange(10), 3, k) for k in range(3)]
    assert [len(shard) for shard in shards] == [4, 3, 3]
    decoded, labels = cifar10.pixels(pd.concat(shards))
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, images.transpose(0, 3, 1, 2))
    assert labels.tolist() == list(range(10))


def test_cifar10_clean_holds_out_the_last_tenth_of_the_training_part():
    paper, clean = (load("cifar10", p, images=50, size=8) for p in ("paper", "clean"))
    assert paper.train[0].dtype == torch.uint8
    assert paper.train[0].shape == (50, 3, 8, 8)
    for i in range(2):
        assert torch.equal(clean.train[i], paper.train[i][:45])
        assert torch.equal(clean.val[i], paper.train[i][45:])
        assert torch.equal(clean.test[i], paper.val[i])
    parts = [rows(part[0]) for part in (clean.train, clean.val, clean.test)]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(parts, 2))


def test_cifar10_augmented_pictures_are_shifted_and_mirrored():
    """Each is exactly one of the 9 × 9 × 2 that there are, and between them they are many."""
    images = torch.randint(0, 256, (400, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    black = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    black[:, :, 4:12, 4:12] = images
    shifted = torch.stack([black[:, :, y : y + 8, x : x + 8] for y in range(9) for x in range(9)])
    allowed = torch.cat([shifted, shifted.flip(-1)])
    out, _ = cifar10.augment((images, torch.zeros(400)), torch.Generator().manual_seed(1))
    assert out.dtype == torch.uint8
    same = (allowed == out).flatten(2).all(dim=2)
    assert (same.sum(dim=0) == 1).all()
    kinds = same.int().argmax(dim=0)
    mirrored, y, x = kinds // 81, kinds % 81 // 9, kinds % 9
    assert 160 < mirrored.sum() < 240
    assert set(y.tolist()) == set(x.tolist()) == set(range(9))
    assert len(set(kinds.tolist())) > 120, "the three choices are independent: about 148 of the 162 are expected"


def test_cifar10_augmentation_follows_its_generator_alone():
    images, labels = load("cifar10", "paper", images=40, size=8).train
    before = images.clone()
    generator = torch.Generator().manual_seed(7)
    first_time, first_labels = cifar10.augment((images, labels), generator)
    second_time, _ = cifar10.augment((images, labels), generator)
    torch.manual_seed(99)
    again, _ = cifar10.augment((images, labels), torch.Generator().manual_seed(7))
    assert torch.equal(first_time, again)
    assert not torch.equal(first_time, second_time)
    assert torch.equal(first_labels, labels)
    assert torch.equal(images, before), "the data stay as they are"


def test_cifar10_model_normalises_and_drops_out_its_scores():
    torch.manual_seed(0)
    model = cifar10.ResNet18(dropout=0.5)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    model.eval()
    with torch.no_grad():
        expected = model.net(normalize(images / 255, cifar10.MEAN, cifar10.STD))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert expected.shape == (4, 10)
        model.train()
        dropped = torch.cat([model(images) == 0 for _ in range(5)])
    assert 0.35 < dropped.double().mean() < 0.65


def test_cifar10_model_is_the_resnet_18_for_small_pictures():
    model = cifar10.ResNet18(dropout=0.2)
    sizes = []
    model.net.layer1.register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[1:])))
    model.net.layer4.register_forward_hook(lambda m, i, o: sizes.append(tuple(o.shape[1:])))
    model.eval()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert sizes == [(64, 32, 32), (512, 4, 4)]
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


def test_cifar10_loss_and_right_ones():
    model, data = model_of("cifar10", "paper")
    images, labels = batch = first(data.train, 12)
    scores = torch.cat([model(images[i : i + 1]) for i in range(12)])
    score = cifar10.score(model, batch)
    assert score.loss.item() == pytest.approx(negative_log_likelihoods(scores, labels).mean().item(), rel=1e-6)
    assert score.terms == 12
    assert score.correct == sum(s.tolist().index(max(s.tolist())) == y for s, y in zip(scores, labels, strict=True))


# ---------------------------------------------------------------- data files


def tables_of(module):
    parts = [module.TRAIN, *(getattr(module, name) for name in ("VALIDATION", "TEST") if hasattr(module, name))]
    return [table for part in parts for table in (part if isinstance(part, tuple) else (part,))]


def frame_of(table, count):
    """Rows as the hub has them, with content of the right kind."""
    if "img" in table.columns:
        return cifar10.synthetic_images(count, 8, 0)
    return pd.DataFrame(
        {c: range(count) if c == "label" else [f"text {i}" for i in range(count)] for c in table.columns}
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of data, and a current directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAADAMW_DATA", str(tmp_path / "here"))
    return tmp_path / "here"


def write(folder, table, frame):
    path = folder / table.path
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path)
    return path


def no_network():
    raise OSError("no network")


@pytest.mark.parametrize("task", MODULES)
def test_truncated_tables_are_named(task, folder):
    for table in tables_of(MODULES[task]):
        path = write(folder, table, frame_of(table, 40))
        path.write_bytes(path.read_bytes()[:-20])
    path = folder / tables_of(MODULES[task])[0].path
    with pytest.raises(DataError, match=re.escape(str(path)) + " is not a whole parquet file .*delete it"):
        TASKS[task].load("paper", TASKS[task].settings("lite"), "real")


@pytest.mark.parametrize("task", MODULES)
def test_tables_with_too_few_rows_are_named(task, folder):
    for table in tables_of(MODULES[task]):
        write(folder, table, frame_of(table, 3))
    table = tables_of(MODULES[task])[0]
    expected = f"{folder / table.path} has 3 rows of {', '.join(table.columns)}, expected {table.rows:,} rows"
    with pytest.raises(DataError, match=re.escape(expected)):
        TASKS[task].load("clean", TASKS[task].settings("lite"), "real")


@pytest.mark.parametrize("task", MODULES)
def test_tables_with_other_columns_are_named(task, folder):
    table = replace(tables_of(MODULES[task])[0], rows=3)
    path = write(folder, table, frame_of(table, 3).rename(columns={table.columns[0]: "sentence"}))
    with pytest.raises(DataError, match=re.escape(str(path)) + " has 3 rows of .*sentence.*, expected 3 rows of"):
        read_table(table)


def test_a_missing_shard_of_cifar10_is_named_and_the_rest_is_kept(folder, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    shards = [cifar10.shard_of(images, np.arange(10), 3, k) for k in range(3)]
    tables = tuple(replace(t, rows=len(s), download=no_network) for t, s in zip(cifar10.TRAIN, shards, strict=True))
    monkeypatch.setattr(cifar10, "TRAIN", tables)
    monkeypatch.setattr(cifar10, "TEST", (replace(cifar10.TEST[0], rows=10, download=no_network),))
    write(folder, cifar10.TEST[0], cifar10.shard_of(images, np.arange(10), 1, 0))
    for k in (0, 2):
        write(folder, tables[k], shards[k])
    settings = replace(cifar10.settings("paper"), data={})
    with pytest.raises(DataError) as error:
        cifar10.load("paper", settings, "real")
    missing = str(folder / "cifar10" / "train-00001-of-00003.parquet")
    for part in (missing, "METAADAMW_DATA", "cifar10/train-00001-of-00003.parquet", tables[1].source, "no network"):
        assert part in str(error.value)
    left = sorted(p.name for p in (folder / "cifar10").iterdir())
    assert left == ["test-00000-of-00001.parquet", "train-00000-of-00003.parquet", "train-00002-of-00003.parquet"]

    write(folder, tables[1], shards[1])
    data = cifar10.load("paper", settings, "real")
    assert data.source == "CIFAR-10"
    assert data.train[1].tolist() == list(range(10)), "the shards in their order"
    assert np.array_equal(data.train[0].numpy(), images.transpose(0, 3, 1, 2))


def test_missing_tables_are_one_line_on_the_command_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(imdb, "TRAIN", replace(imdb.TRAIN, download=no_network))
    assert main(["run", "imdb", "--optimizer", "adamw", "--results", str(folder / "results")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in (str(folder / "imdb" / "train.parquet"), "METAADAMW_DATA", imdb.TRAIN.source, "--data synthetic"):
        assert part in err


def test_a_downloaded_table_lies_in_the_same_layout_and_is_read_back(folder):
    frame = frame_of(imdb.TRAIN, 5)
    downloads = []

    def download():
        downloads.append(1)
        return frame

    table = Table("imdb/train.parquet", 5, ("text", "label"), "somewhere", download)
    for _ in range(2):
        pd.testing.assert_frame_equal(read_table(table), frame)
    assert downloads == [1]
    assert [p.relative_to(folder).as_posix() for p in folder.rglob("*.*")] == ["imdb/train.parquet"]


def test_runs_that_begin_together_download_once_and_one_after_the_other(folder):
    """Parts of a data set may come in one archive, which two processes must not unpack at once."""
    under_way, seen = [], []

    def download():
        under_way.append(1)
        time.sleep(0.2)
        seen.append(len(under_way))
        under_way.pop()
        return frame_of(imdb.TRAIN, 5)

    tables = [Table(f"imdb/{part}.parquet", 5, ("text", "label"), "somewhere", download) for part in ("a", "a", "b")]
    with ThreadPoolExecutor(3) as pool:
        assert [len(frame) for frame in pool.map(read_table, tables)] == [5, 5, 5]
    assert seen == [1, 1]


def test_a_wrong_download_is_not_kept(folder):
    table = Table("imdb/train.parquet", 6, ("text", "label"), "the source", lambda: frame_of(imdb.TRAIN, 5))
    with pytest.raises(DataError) as error:
        read_table(table)
    for part in (str(folder / "imdb" / "train.parquet"), "5 rows of text, label, expected 6", "the source"):
        assert part in str(error.value)
    assert not list(folder.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("task", "name", "config", "splits"),
    [
        ("wikitext2", "Salesforce/wikitext", "wikitext-2-v1", ["train", "validation", "test"]),
        ("multi30k", "bentrevett/multi30k", None, ["train", "validation", "test"]),
        ("imdb", "stanfordnlp/imdb", None, ["train", "test"]),
    ],
)
def test_downloads_ask_the_hub_for_the_right_split(task, name, config, splits, monkeypatch):
    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        columns = {c: ["x"] for c in (*tables_of(MODULES[task])[0].columns, "something else")}
        return SimpleNamespace(to_pandas=lambda: pd.DataFrame(columns))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for table in tables_of(MODULES[task]):
        assert tuple(table.download().columns) == table.columns
        assert name in table.source
    assert asked == [(name, config, split) for split in splits]


def test_downloaded_cifar10_is_cut_into_the_same_shards(folder, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    asked = []

    def fake(root, train, download):
        asked.append(train)
        return SimpleNamespace(data=images, targets=list(range(10)))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    frames = [table.download() for table in (*cifar10.TRAIN, *cifar10.TEST)]
    assert asked == [True, True, True, False]
    assert [len(frame) for frame in frames] == [4, 3, 3, 10]
    for whole in (pd.concat(frames[:3]), frames[3]):
        pictures, labels = cifar10.pixels(whole)
        assert np.array_equal(pictures, images.transpose(0, 3, 1, 2))
        assert labels.tolist() == list(range(10))
    assert [table.rows for table in cifar10.TRAIN] == [len(x) for x in np.array_split(np.arange(50_000), 3)]


CALLS: list[str] = []


def make_something(what):
    CALLS.append(what)
    return np.arange(3), what


def make_something_else(what):
    CALLS.append(what)
    return what


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no pyarrow"), OSError(28, "No space left on device")])
def test_what_says_nothing_of_the_rows_is_not_taken_for_their_fault(folder, error):
    table = replace(imdb.TRAIN, rows=3)
    write(folder, table, frame_of(table, 3))

    def fails():
        raise error

    with pytest.raises(type(error)):
        prepared(fails, (table,))


def test_what_is_prepared_is_made_once_and_again_when_something_changes(folder):
    table = replace(imdb.TRAIN, rows=3)
    path = write(folder, table, frame_of(table, 3))
    CALLS.clear()
    for _ in range(2):
        numbers, what = prepared(make_something, (table,), "a")
        assert (numbers.tolist(), what) == ([0, 1, 2], "a")
    assert CALLS == ["a"]
    prepared(make_something, (table,), "b")
    assert CALLS == ["a", "b"], "another argument"
    assert prepared(make_something_else, (table,), "a") == "a"
    assert CALLS == ["a", "b", "a"], "another function"
    stamp = path.stat().st_mtime_ns
    os.utime(path, ns=(stamp, stamp + 10**9))
    prepared(make_something, (table,), "a")
    assert CALLS == ["a", "b", "a", "a"], "a newer file"
    frame_of(table, 30).to_parquet(path)
    os.utime(path, ns=(stamp, stamp))
    prepared(make_something, (table,), "a")
    assert CALLS == ["a", "b", "a", "a", "a"], "a file of another size"
    assert (Path("data/cache/prepared")).is_dir()


def test_copies_of_a_sample_are_held_out_together():
    texts = [f"review {i % 700}" for i in range(1_400)]
    chosen = is_held_out(texts)
    assert np.array_equal(chosen[:700], chosen[700:])
    assert 0.07 < chosen.mean() < 0.13
    order = np.random.default_rng(0).permutation(1_400)
    assert np.array_equal(is_held_out([texts[i] for i in order]), chosen[order]), "the order does not matter"


# ---------------------------------------------------------------- real data


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Loads a task's real data, with the paper's settings and a cache of the test's own, or skips the test."""

    def load_real(task, protocol):
        place = os.environ.get("METAADAMW_DATA")
        if not place or not all((Path(place) / table.path).exists() for table in tables_of(MODULES[task])):
            pytest.skip("METAADAMW_DATA is not set or lacks the files")
        monkeypatch.setenv("METAADAMW_DATA", str(Path(place).resolve()))
        monkeypatch.chdir(tmp_path)
        return TASKS[task].load(protocol, TASKS[task].settings("paper"), "real")

    yield load_real
    shutil.rmtree(tmp_path / "data", ignore_errors=True)


def steps(data, task):
    return math.ceil(len(data.train[0]) / TASKS[task].settings("paper").batch_size)


def test_real_wikitext2(real):
    data = real("wikitext2", "paper")
    assert steps(data, "wikitext2") == 123
    lines = [line.split() for line in read_table(wikitext2.TRAIN)["text"]]
    words = vocabulary(lines, ("<pad>", "<unk>"), wikitext2.VOCABULARY)
    assert len(words) == 10_000
    assert words[2:6] == ["the", ",", ".", "of"]
    numbers = data.train[0]
    assert (numbers.min(), numbers.max() < 10_000) == (1, True), "no padding"
    block = next(line for line in lines if len(line) >= 128)[:128]
    assert encode([block], words)[0] == numbers[0].tolist()
    clean = real("wikitext2", "clean")
    assert torch.equal(torch.cat([clean.train[0], clean.val[0]]), numbers)


def share_of_unknown(target):
    return ((target == 1).sum() / ((target == 1) | (target > 3)).sum()).item()


def test_real_multi30k(real):
    paper, clean = real("multi30k", "paper"), real("multi30k", "clean")
    assert steps(paper, "multi30k") == 454
    assert len(paper.val[0]) == 1_014
    assert share_of_unknown(paper.val[1]) == pytest.approx(0.67, abs=0.01)
    assert share_of_unknown(paper.val[0]) < 0.1
    assert share_of_unknown(clean.val[1]) < 0.05
    assert len(clean.train[0]) + len(clean.val[0]) == 29_000
    assert len(clean.val[0]) == pytest.approx(2_900, rel=0.05)
    assert len(clean.test[0]) == len(clean.references) == 1_000
    english = [set(sentences(part[1], clean.words)) for part in (clean.train, clean.val)]
    assert len(english[0] & english[1]) <= 5, "only such as differ in rare words alone"


@pytest.mark.slow
def test_real_imdb(real):
    data = real("imdb", "paper")
    assert steps(data, "imdb") == 391
    assert data.sizes["words"] == 25_000
    for words, labels, lengths in (data.train, data.val):
        assert (len(labels), labels.sum()) == (25_000, 12_500)
        assert (words.max() < 25_000, lengths.min() >= 1, lengths.max()) == (True, True, 256)
    train, test = (read_table(table) for table in (imdb.TRAIN, imdb.TEST))
    assert test["text"].isin(set(train["text"])).sum() == 123, "as chapter 10 says"


@pytest.mark.slow
def test_real_cifar10(real):
    data = real("cifar10", "paper")
    assert steps(data, "cifar10") == 391
    images, labels = data.train
    assert images.shape == (50_000, 3, 32, 32)
    assert labels.bincount().tolist() == [5_000] * 10
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], "the official order"
    assert data.val[1].bincount().tolist() == [1_000] * 10
    means = images.sum(dim=(0, 2, 3), dtype=torch.int64) / (50_000 * 1024 * 255)
    assert means.tolist() == pytest.approx(cifar10.MEAN, abs=2e-3)
    clean = real("cifar10", "clean")
    assert torch.equal(clean.val[1], labels[-5_000:])
    assert torch.equal(clean.test[0], data.val[0])


@pytest.mark.parametrize(
    ("task", "loop", "model"),
    [
        ("etth1", (8, 64, 2, 1e-4, 1), {"d_model": 128, "heads": 4, "layers": 2, "feed_forward": 512, "dropout": 0.2}),
        (
            "wikitext2",
            (15, 64, 2, 1e-3, 1),
            {"d_model": 128, "heads": 4, "layers": 2, "feed_forward": 512, "dropout": 0.2},
        ),
        (
            "multi30k",
            (25, 64, 2, 1e-3, 1),
            {"d_model": 256, "heads": 8, "layers": 4, "feed_forward": 1024, "dropout": 0.2},
        ),
        ("cifar10", (15, 128, 2, 1e-3, 1), {"dropout": 0.2}),
        ("imdb", (15, 64, 2, 1e-3, 1), {"embedding": 32, "hidden": 64, "layers": 2, "dropout": 0.2}),
    ],
)
def test_training_and_models_are_those_of_the_paper_and_the_released_code(task, loop, model):
    s = TASKS[task].settings("paper")
    assert (s.epochs, s.batch_size, s.patience, s.min_delta, s.warmup_epochs) == loop
    assert dict(s.model) == model


def test_the_order_of_hours_matters_and_layers_start_as_xavier_says():
    torch.manual_seed(0)
    model = etth1.TimeSeriesTransformer(**etth1.settings("paper").model).eval()
    hours = torch.randn(4, 96)
    earlier_reversed = torch.cat([hours[:, :95].flip(1), hours[:, 95:]], dim=1)
    with torch.no_grad():
        assert (model(hours) - model(earlier_reversed)).abs().min() > 1e-4
    code = etth1.sinusoidal_positions(64, 8)
    assert code[3, 2].item() == pytest.approx(math.sin(3 / 10000 ** (2 / 8)))
    assert code[3, 5].item() == pytest.approx(math.cos(3 / 10000 ** (4 / 8)))
    for layer in model.layers:
        weight = layer.linear1.weight.detach()
        assert weight.abs().max() <= math.sqrt(6 / (128 + 512))
        assert weight.std() == pytest.approx(math.sqrt(2 / (128 + 512)), rel=0.05)


def test_words_are_scaled_before_their_positions_and_norms_come_after():
    settings = TASKS["multi30k"].settings("smoke")
    data = load("multi30k", "clean")
    model = TASKS["multi30k"].build(settings, data).eval()
    layers = [*model.transformer.encoder.layers, *model.transformer.decoder.layers]
    assert not any(layer.norm_first for layer in layers)
    heard = []
    model.transformer.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    words = data.train[0][:4].long()
    model.encode(words)
    width = settings.model["d_model"]
    expected = model.embedding(words) * math.sqrt(width) + etth1.sinusoidal_positions(words.shape[1], width)
    assert torch.allclose(heard[0], expected, atol=1e-6)


def test_the_sentiment_model_drops_what_its_output_layer_reads():
    settings = TASKS["imdb"].settings("smoke")
    data = load("imdb", "clean")
    model = TASKS["imdb"].build(replace(settings, model={**settings.model, "dropout": 1.0}), data).train()
    words, _, lengths = (x[:4] for x in data.train)
    scores = model(words.long(), lengths)
    assert torch.allclose(scores, model.output.bias.expand_as(scores))
