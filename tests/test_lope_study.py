"""The study of LoPE: equal arms, noise where it belongs, and records that say what happened."""

import math
import random
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from torch import nn

from metaadamw_lite.experiments import lope_report, lope_study
from metaadamw_lite.experiments.lope_study import (
    ARMS,
    LABEL_WORDS,
    NOISE,
    ROUTED_SHARE,
    SmallGPT,
    Texts,
    loss_of,
    rows_of,
    settings,
    texts,
    with_noise,
)
from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.studies import missing, study_runs
from metaadamw_lite.experiments.training import run
from metaadamw_lite.lope import LoPE, LoPELinear, discrete_noise

SMOKE = settings("smoke")


def key(task="lope-noise20", arm="lope", seed=0):
    return RunKey(task, arm, "clean", "smoke", seed)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    return {arm: run(key(arm=arm), results, progress=False) for arm in ARMS}


def test_all_arms_have_equally_many_trainable_parameters(records):
    assert len({r["trainable"] for r in records.values()}) == 1
    assert {r["status"] for r in records.values()} == {"finished"}


def test_all_arms_start_from_the_same_model(records):
    first = {(r["epochs"][0]["perplexity"], r["epochs"][0]["accuracy"]) for r in records.values()}
    assert len(first) == 1
    second = {r["epochs"][2]["perplexity"] for r in records.values()}
    assert len(second) == len(ARMS) - 1, "and each goes its own way; two differ in the mask only"


def test_only_arms_with_a_poisoning_expert_are_masked_at_the_end(records):
    for name, arm in ARMS.items():
        stages = [e["stage"] for e in records[name]["epochs"]]
        assert stages == ["pretrained", "1", "2"] + ["masked"] * arm.poisoning


def test_compensation_makes_the_only_difference_to_the_arm_without_it(records):
    with_it, without = (records[name]["epochs"] for name in ("lope", "lope-without-compensation"))
    clocks = ("seconds",)
    for a, b in zip(with_it[:3], without[:3], strict=True):
        assert {k: v for k, v in a.items() if k not in clocks} == {k: v for k, v in b.items() if k not in clocks}
    assert with_it[3]["perplexity"] != without[3]["perplexity"]


@pytest.mark.parametrize(
    ("arm", "mask"), [("lope", "compensated"), ("lope-brief", "compensated"), ("lope-without-compensation", "plain")]
)
def test_the_last_test_is_of_a_model_that_is_masked_as_the_arm_says(arm, mask, tmp_path, monkeypatch):
    masks, tested = [], lope_study._test

    def looking(model, *args):
        masks.append({layer.mask for layer in model.modules() if isinstance(layer, LoPELinear)})
        return tested(model, *args)

    monkeypatch.setattr(lope_study, "_test", looking)
    monkeypatch.setattr(lope_study, "pretrained", lambda s, data, *_: SmallGPT(len(data.vocabulary), s))
    run(key(arm=arm), tmp_path, progress=False)
    assert masks == [set(), {None}, {None}, {mask}], "pretrained, two stages, masked"


def test_perplexity_and_accuracy_are_those_of_plain_python():
    names = ["<pad>", "<unk>", "it", "was", "bad", "good", "dull", "fine"]
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(7))  # accuracy differs a word away

    class BagOfWords(nn.Module):
        """Scores for the next word are the sum of a row for each word so far."""

        def forward(self, words):
            return table[words].cumsum(dim=1)

    rng = random.Random(0)
    reviews = [(rng.choices(["dull", "fine"], k=rng.randint(1, 9)), rng.randint(0, 1)) for _ in range(120)]
    rows, ends = rows_of(reviews, names, 14)
    found = lope_study._test(BagOfWords(), rows, ends, Texts([], [], reviews, names, "hand-made"))
    nats, right = [], 0
    for text, label in reviews:
        scores = [0.0] * len(names)
        numbers = [names.index(word) for word in (*text, "it", "was", LABEL_WORDS[label])]
        for word, following in pairwise(numbers):
            scores = [a + b for a, b in zip(scores, table[word].tolist(), strict=True)]
            nats.append(math.log(sum(map(math.exp, scores))) - scores[following])
        right += (scores[names.index("good")] > scores[names.index("bad")]) == bool(label)  # those after "was"
    assert found["perplexity"] == pytest.approx(math.exp(fmean(nats)), rel=1e-5)
    assert found["accuracy"] == right / len(reviews)


def test_router_use_is_the_mean_weight_at_the_places_of_each_kind_of_noise():
    reviews = [([f"r{i}w{k:02}" for k in range(12)], i % 2) for i in range(3)]
    noisy = [discrete_noise(text, ROUTED_SHARE, i).words for i, (text, _) in enumerate(reviews)]
    names = ["<pad>", "<unk>", "it", "was", *LABEL_WORDS, *{word for text in noisy for word in text}]

    class Places(nn.Module):
        """Two layers whose input tells the place in the batch, and nothing else."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3 * SMOKE.length, 4), nn.Linear(3 * SMOKE.length, 4)

        def forward(self, words):
            self.read = [[names[k] for k in row] for row in words]
            places = torch.eye(words.numel()).view(*words.shape, -1)
            return self.first(places) + self.second(places)

    lope = LoPE.wrap(model := Places(), ["first", "second"], scale=1.0)
    with torch.no_grad():
        for layer in lope.layers.values():
            layer.router.mul_(20)  # so that the places differ
    data = Texts([], [], reviews, names, "hand-made")
    use = lope_study._router_use(model, lope, data, SMOKE, torch.device("cpu"))
    weights = torch.stack([layer.router.T.softmax(dim=-1) for layer in lope.layers.values()]).mean(dim=0).tolist()
    found = {"clean": [], "shuffled": [], "inserted": [], "deleted": []}
    for i, (text, _) in enumerate(reviews):
        for k, (before, after) in enumerate(zip(text, model.read[i], strict=False)):
            same_length = "clean" if after == before else "shuffled"
            kind = {1: "inserted", -1: "deleted"}.get(len(after) - len(before), same_length)
            found[kind].append(weights[i * SMOKE.length + k])
    assert use.keys() == found.keys()
    for kind, at in found.items():
        assert use[kind] == pytest.approx([fmean(column) for column in zip(*at, strict=True)], abs=1e-5), kind


def test_the_routers_weights_are_shares(records):
    for name, arm in ARMS.items():
        use = records[name]["router"]
        assert (use is None) == (arm.experts == 0)
        for weights in (use or {}).values():
            assert len(weights) == arm.experts + arm.poisoning
            assert sum(weights) == pytest.approx(1, abs=1e-3)


def test_a_run_repeats_and_its_seed_matters(records, tmp_path):
    again = run(key(), tmp_path, progress=False)
    assert again["test"] == records["lope"]["test"]
    assert run(key(seed=1), tmp_path, progress=False)["test"] != again["test"]


def test_rows_end_with_the_label_and_the_test_reviews_are_clean():
    data = texts(SMOKE, "synthetic")
    rows, ends = rows_of(data.test, data.vocabulary, SMOKE.length)
    for row, end, (text, label) in zip(rows, ends, data.test, strict=True):
        words = [data.vocabulary[k] for k in row[: end + 1]]
        assert words[-3:] == ["it", "was", LABEL_WORDS[label]]
        assert [w if w in data.vocabulary else "<unk>" for w in text] == words[:-3]
        assert not row[end + 1 :].any()
        assert len(row) == SMOKE.length


def test_noise_is_in_the_share_of_words_that_the_task_names():
    data = texts(SMOKE, "synthetic")
    reviews = [([f"w{k % 60}" for k in range(40)], 1)] * 5
    clean, _ = rows_of(reviews, data.vocabulary, 43)
    noisy, ends = rows_of(with_noise(reviews, 0.2, 0), data.vocabulary, 43)
    expected = [discrete_noise(reviews[0][0], 0.2, i) for i in range(5)]
    for i, noise in enumerate(expected):
        changed = (clean[i] != noisy[i]).nonzero().flatten().tolist()
        assert changed == sorted([*noise.shuffled, *noise.inserted, *noise.deleted]), "the words are all different"
        assert len(noise.shuffled) + len(noise.inserted) + len(noise.deleted) == 8
        assert torch.equal(noisy[i, ends[i] - 2 :], clean[i, ends[i] - 2 :]), "the ending and the label stay"


@pytest.mark.parametrize("task", NOISE)
def test_every_task_trains_on_its_share_of_noise(task, tmp_path, monkeypatch):
    asked, made = [], []
    with_noise = lope_study.with_noise

    def noted(reviews, share, seed):
        asked.append(share)
        made.append(with_noise(reviews, share, seed))
        return made[-1]

    monkeypatch.setattr(lope_study, "with_noise", noted)
    monkeypatch.setattr(lope_study, "pretrained", lambda s, data, *_: SmallGPT(len(data.vocabulary), s))
    run(RunKey(task, "lope", "clean", "smoke", 0), tmp_path, progress=False)
    assert asked == [NOISE[task], SMOKE.share], "the text that is adapted to, and what stage I adds"
    clean = texts(SMOKE, "synthetic").train
    assert (made[0] == clean) == (NOISE[task] == 0)


def test_the_model_does_not_look_ahead_and_padding_does_not_count():
    torch.manual_seed(0)
    model = SmallGPT(80, SMOKE).eval()
    rows = torch.randint(2, 80, (2, 12))
    changed = rows.clone()
    changed[:, 8:] = 3
    torch.testing.assert_close(model(rows)[:, :8], model(changed)[:, :8])
    assert not torch.allclose(model(rows)[:, 8:], model(changed)[:, 8:])
    longer = torch.cat([rows, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(loss_of(model, longer), loss_of(model, rows))


def test_the_study_is_whole_and_paired(tmp_path):
    runs = study_runs("lope/lite", tmp_path)
    assert {(k.task, k.variant, k.seed) for k in runs} == {(t, a, s) for t in NOISE for a in ARMS for s in range(3)}
    with pytest.raises(ValueError, match="task is 'etth1'"):
        study_runs("lope/lite", tmp_path, ["etth1"])


def test_bad_arms_and_protocols_are_quoted(tmp_path):
    with pytest.raises(ValueError, match="'adamw'; allowed are lora"):
        run(key(arm="adamw"), tmp_path, progress=False)
    with pytest.raises(ValueError, match="'paper'; allowed are clean"):
        run(RunKey("lope-noise5", "lope", "paper", "smoke", 0), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_texts_name_their_source():
    assert isinstance(data := texts(SMOKE, "synthetic"), Texts)
    assert data.name == "synthetic"
    assert len(data.train) == SMOKE.reviews
    assert data.vocabulary[:2] == ["<pad>", "<unk>"]


@pytest.mark.parametrize(("arm", "first"), [("lope", 3), ("lope-brief", 1)])
def test_the_first_stage_has_its_share_of_the_steps(arm, first, tmp_path, monkeypatch):
    noisy, drawn, made = [], [], []
    loss_of, rows_of = lope_study.loss_of, lope_study.rows_of

    def counting(model, rows, noise=None):
        noisy.append(noise is not None)
        drawn.append({tuple(row) for row in rows.tolist()})
        return loss_of(model, rows, noise)

    def keeping(*args):
        rows, ends = rows_of(*args)
        made.append({tuple(row) for row in rows.tolist()})
        return rows, ends

    monkeypatch.setattr(lope_study, "loss_of", counting)
    monkeypatch.setattr(lope_study, "rows_of", keeping)
    monkeypatch.setattr(lope_study, "pretrained", lambda s, data, *_: SmallGPT(len(data.vocabulary), s))
    run(key(arm=arm), tmp_path, progress=False)
    assert noisy == [True] * first + [False] * (6 - first)
    _, original, with_noise = made[:3]
    assert len(original & with_noise) < len(original) / 2, "the noise can be seen"
    assert all(rows <= with_noise for rows in drawn[:first]), "stage I trains on the text with added noise"
    assert all(rows <= original for rows in drawn[first:]), "stage II on the text as it is"


def test_a_record_of_another_arm_or_noise_is_not_passed_off(records, tmp_path, monkeypatch):
    run(key(), tmp_path, progress=False)
    assert missing([key()], tmp_path) == []
    for table, name, value in ((ARMS, "lope", replace(ARMS["lope"], first=0.9)), (NOISE, "lope-noise20", 0.5)):
        with monkeypatch.context() as patch:
            patch.setitem(table, name, value)
            with pytest.raises(ValueError, match="made with other settings"):
                missing([key()], tmp_path)


def test_an_adaptation_that_fails_is_recorded_as_such_and_lost_to_its_pair(tmp_path, monkeypatch):
    def fails(model, rows, noise=None):
        raise RuntimeError("the matrix is singular")

    monkeypatch.setattr(lope_study, "loss_of", fails)
    monkeypatch.setattr(lope_study, "pretrained", lambda s, data, *_: SmallGPT(len(data.vocabulary), s))
    record = run(key(), tmp_path, progress=False)
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: the matrix is singular")
    assert record["best"] is None
    final = lope_report.adaptations_frame([record]).query("final")
    assert final["perplexity"].isna().all()
    assert len(final) == 1
