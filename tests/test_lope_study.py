"""The study of LoPE: equal arms, noise where it belongs, and records that say what happened."""

from dataclasses import replace

import pytest
import torch

from metaadamw_lite.experiments import lope_study, relatives
from metaadamw_lite.experiments.lope_study import (
    ARMS,
    LABEL_WORDS,
    NOISE,
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
from metaadamw_lite.lope import discrete_noise

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
        assert set(changed) <= {*noise.shuffled, *noise.inserted, *noise.deleted}
        assert len(noise.shuffled) + len(noise.inserted) + len(noise.deleted) == 8
        assert torch.equal(noisy[i, ends[i] - 2 :], clean[i, ends[i] - 2 :]), "the ending and the label stay"


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
    final = relatives.adaptations_frame([record]).query("final")
    assert final["perplexity"].isna().all()
    assert len(final) == 1
