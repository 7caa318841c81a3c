"""The sizes of ``lite``, and how AdamW alone judges them."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from metaadamw_lite.experiments import NOISY, TASKS
from metaadamw_lite.experiments.records import RunKey, write_record
from metaadamw_lite.experiments.sizing import guess, late_fall, sizing_table
from metaadamw_lite.experiments.studies import SEARCH_SEEDS, search_runs
from metaadamw_lite.experiments.task import Data
from metaadamw_lite.experiments.training import run_settings
from metaadamw_lite.experiments.variants import LEARNING_RATES, at_learning_rate


@pytest.mark.parametrize("task", TASKS)
def test_the_lite_profile_is_the_paper_s_but_for_its_sizes(task):
    paper, lite = (TASKS[task].settings(profile) for profile in ("paper", "lite"))
    sizes = {
        name: getattr(paper, name)
        for name in ("epochs", "batch_size", "meta_every", "model", "data", "scheduled_epochs")
    }
    assert replace(lite, **sizes) == paper
    assert lite.batch_size <= paper.batch_size
    for name, size in paper.model.items():
        assert lite.model[name] == size if name in ("dropout", "heads") else lite.model[name] <= size


@pytest.mark.parametrize("task", TASKS)
def test_the_lite_profile_has_as_many_meta_updates_an_epoch_as_the_paper_s(task):
    lite = TASKS[task].settings("lite")
    samples = lite.data.get("train", 13_859)  # ETTh1 has all its hours
    steps = math.ceil(samples / lite.batch_size)
    assert steps // lite.meta_every == lite.meta_per_epoch


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("protocol", ["paper", "clean"])
def test_a_lite_model_takes_the_lite_data_and_is_smaller(task, protocol):
    lite, paper = (TASKS[task].settings(profile) for profile in ("lite", "paper"))
    data, whole = (TASKS[task].load(protocol, s, "synthetic") for s in (lite, paper))
    model = TASKS[task].build(lite, data)
    assert math.isfinite(TASKS[task].loss(model, tuple(x[:2] for x in data.train)).item())
    count, most = (sum(p.numel() for p in m.parameters()) for m in (model, TASKS[task].build(paper, whole)))
    assert count < most / 2


@pytest.mark.parametrize("task", NOISY)
def test_the_noisy_tasks_have_small_sizes_of_their_own(task):
    """Their records were made with these."""
    settings = NOISY[task].settings("lite")
    images = task.startswith("cifar10")
    assert settings.data["train"] == (4_000 if "longtail" in task else 2_000 if images else 1_920)
    assert {"size", "length", "words"}.isdisjoint(settings.data)
    assert (settings.batch_size, settings.meta_every) == ((64, 16) if images else (64, 3))
    hidden = {"widths": (16, 32, 64)} if images else {"embedding": 32, "hidden": 64, "layers": 2, "dropout": 0.2}
    assert settings.model == hidden


# ---------------------------------------------------------------- guesses


def test_the_most_frequent_class_of_the_training_part_is_guessed():
    labels = torch.tensor([1] * 6 + [0] * 4)
    others = torch.tensor([0] * 75 + [1] * 25)
    part = (torch.zeros(100, 3), others)
    found = guess(TASKS["cifar10"], Data((torch.zeros(10, 3), labels), part, None, "made"))
    assert found == pytest.approx((0.25, math.log(10)))


def test_the_test_part_counts_where_there_is_one():
    def labelled(*labels):
        return (torch.zeros(len(labels), 3), torch.tensor(labels))

    data = Data(labelled(1, 1, 0), labelled(1, 1, 1, 1), labelled(0, 0, 0, 1), "made")
    assert guess(TASKS["imdb"], data).metric == 0.25


def test_the_mean_of_the_training_part_is_guessed():
    train = (torch.zeros(4, 3), torch.tensor([[1.0], [3.0], [1.0], [3.0]]))
    val = (torch.zeros(2, 3), torch.tensor([[4.0], [2.0]]))
    assert guess(TASKS["etth1"], Data(train, val, None, "made")) == (2.0, 2.0)


@pytest.mark.parametrize("task", ["wikitext2", "multi30k"])
def test_word_frequencies_are_a_perplexity_over_the_words_that_are_predicted(task):
    """Of words that occur equally often each is a choice; padding is none, and predicted only by WikiText-2."""
    words = torch.arange(1, 9).repeat(200, 1)
    row = torch.cat([torch.zeros(200, 1, dtype=torch.long), words], dim=1).to(torch.int16)
    part = (row,) if task == "wikitext2" else (row, torch.cat([row, torch.zeros_like(row)], dim=1))
    found = guess(TASKS[task], Data(part, part, None, "made"))
    assert found.metric == pytest.approx(8, rel=2e-3)
    assert found.loss == pytest.approx(math.log(8), rel=1e-3)


# ---------------------------------------------------------------- the table


def test_the_late_fall_is_the_share_of_the_last_third():
    assert late_fall([6.0, 4.0, 3.0, 2.0, 1.0, 3.0], start=11.0) == pytest.approx(0.1)
    assert late_fall([6.0, 1.0, 3.0], start=11.0) == 0, "the best epoch is an early one"


def made(key, metric, results):
    """A record of a search: the loss halves in the first epoch, and falls no more."""
    best = {"epoch": 1, "val_loss": 0.3, "metric": metric}
    epochs = [{"epoch": k, "val_loss": loss, "seconds": k} for k, loss in ((1, 0.3), (2, 0.4), (3, 0.5))]
    samples = {"train": 48, "val": 400, "test": 0 if key.protocol == "paper" else 400}
    content = {
        "settings": asdict(run_settings(key)),
        "status": "stopped early",
        "data": "made",
        "environment": {},
        "samples": samples,
    }
    write_record(content | {"best": best, "test": None, "epochs": epochs}, key, results)


def test_the_table_says_whether_the_best_rate_is_inside_once_the_search_is_done(tmp_path):
    search = search_runs("imdb", "clean", "smoke")
    for key in search:
        if key.seed == SEARCH_SEEDS[0]:
            made(key, 0.9 - abs(run_settings(key).lr - LEARNING_RATES[2]), tmp_path)
    row = sizing_table(tmp_path, "smoke").loc[("imdb", "clean")]
    assert (row["runs"], row["best rate"], row["inside"]) == ("7/14", None, None)
    for key in search:
        if key.seed == SEARCH_SEEDS[1]:
            made(key, 0.9 - abs(run_settings(key).lr - LEARNING_RATES[2]), tmp_path)
    row = sizing_table(tmp_path, "smoke").loc[("imdb", "clean")]
    assert (row["runs"], row["best rate"], row["inside"]) == ("14/14", LEARNING_RATES[2], True)
    assert (row["epochs"], row["cap"]) == (3, 2)
    assert (row["late fall"], row["late fall, best"], row["metric"]) == (0, 0, 0.9 - abs(5e-4 - LEARNING_RATES[2]))


def test_a_rate_at_the_border_of_the_grid_is_not_inside(tmp_path):
    for key in search_runs("imdb", "paper", "smoke"):
        made(key, 0.5 + run_settings(key).lr, tmp_path)
    row = sizing_table(tmp_path, "smoke").loc[("imdb", "paper")]
    assert (row["best rate"], row["inside"]) == (LEARNING_RATES[-1], False)


def test_no_record_of_metaadamw_changes_the_table(tmp_path):
    for key in search_runs("imdb", "paper", "smoke"):
        made(key, 0.5 + run_settings(key).lr, tmp_path)
    before = sizing_table(tmp_path, "smoke")
    for seed in (0, *SEARCH_SEEDS):
        made(RunKey("imdb", "metaadamw", "paper", "smoke", seed), 1.0, tmp_path)
        if seed == 0:
            made(RunKey("imdb", at_learning_rate(5e-4), "paper", "smoke", seed), 1.0, tmp_path)
    assert sizing_table(tmp_path, "smoke").equals(before)
    assert sizing_table(tmp_path / "elsewhere", "smoke").empty
