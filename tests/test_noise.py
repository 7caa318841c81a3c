"""Labels made wrong: exact shares, the right list, nothing but the seed decides; and finding them again."""

import io
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaadamw_lite import LiLAW, MetaAdamW
from metaadamw_lite.experiments import NOISY, cifar10, noise, training
from metaadamw_lite.experiments.datasets import DataError
from metaadamw_lite.experiments.mislabels import SampleHistory, detection
from metaadamw_lite.experiments.noise import (
    CIFAR10_PAIRS,
    asymmetric,
    corrupted,
    human_labels,
    imbalanced,
    instance_dependent,
    symmetric,
)
from metaadamw_lite.experiments.noisy import make_noisy
from metaadamw_lite.experiments.records import RunKey
from metaadamw_lite.experiments.studies import FEW_SEEDS, SENSITIVITY_TASK, TOGETHER, study_runs
from metaadamw_lite.experiments.task import Data
from metaadamw_lite.experiments.training import run

LABELS = np.random.default_rng(0).integers(0, 10, 1_000)
INPUTS = np.random.default_rng(1).integers(0, 256, (1_000, 3, 4, 4)).astype(np.uint8)

INJECTORS = {
    "symmetric": lambda labels, rate, seed: symmetric(labels, 10, rate, seed),
    "asymmetric": lambda labels, rate, seed: asymmetric(labels, CIFAR10_PAIRS, 10, rate, seed),
    "instance": lambda labels, rate, seed: instance_dependent(labels, INPUTS, 10, rate, seed, maps_seed=seed),
}


@pytest.mark.parametrize("kind", INJECTORS)
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2, 0.4, 1.0])
def test_the_share_that_becomes_wrong_is_exact(kind, rate):
    before = LABELS.copy()
    labels = INJECTORS[kind](LABELS, rate, 3)
    assert np.array_equal(LABELS, before), "the caller's labels are left alone"
    wrong = labels != LABELS
    assert labels.min() >= 0
    assert labels.max() <= 9
    if kind == "asymmetric":
        for source in CIFAR10_PAIRS:
            members = source == LABELS
            assert wrong[members].sum() == round(rate * members.sum())
        assert wrong.sum() == wrong[np.isin(LABELS, list(CIFAR10_PAIRS))].sum()
    else:
        assert wrong.sum() == round(rate * len(LABELS))


@pytest.mark.parametrize("kind", INJECTORS)
def test_the_seed_and_nothing_else_decides(kind):
    first, again, other = (INJECTORS[kind](LABELS, 0.4, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_symmetric_noise_has_no_favourite():
    many = np.random.default_rng(0).integers(0, 10, 50_000)
    shift = (symmetric(many, 10, 0.5, 0) - many) % 10
    assert np.abs(np.bincount(shift, minlength=10)[1:] / np.count_nonzero(shift) - 1 / 9).max() < 0.01


def test_asymmetric_noise_goes_to_the_partner():
    labels = asymmetric(LABELS, CIFAR10_PAIRS, 10, 0.4, 0)
    wrong = labels != LABELS
    assert {(int(a), int(b)) for a, b in zip(LABELS[wrong], labels[wrong], strict=True)} == set(CIFAR10_PAIRS.items())


def test_instance_dependent_noise_depends_on_the_instance():
    """Copies of one image of one class prefer some wrong classes, and other images of it prefer others."""
    same = np.zeros(4_000, dtype=np.int64)
    pictures = np.random.default_rng(5).integers(0, 256, (2, 3, 16, 16))
    inputs = np.concatenate([np.repeat(pictures[:1], 2_000, axis=0), np.repeat(pictures[1:], 2_000, axis=0)])
    labels = instance_dependent(same, inputs, 10, 1.0, 0, maps_seed=0)
    one, other = (np.bincount(part, minlength=10) / 2_000 for part in (labels[:2_000], labels[2_000:]))
    assert np.abs(one - other).max() > 0.1
    assert one[0] == other[0] == 0


@pytest.mark.parametrize("kind", INJECTORS)
@pytest.mark.parametrize(
    ("labels", "rate", "seed", "message"),
    [
        (LABELS, -0.1, 0, "rate is -0.1"),
        (LABELS, 1.1, 0, "rate is 1.1"),
        (LABELS, math.nan, 0, "rate is nan"),
        (LABELS, 0.5, -1, "seed is -1"),
        (LABELS + 5, 0.5, 0, "a label is 14"),
        (LABELS - 1, 0.5, 0, "a label is -1"),
        (LABELS, "0.1", 0, "rate is '0.1'"),
        (LABELS + 0.5, 0.5, 0, "labels are float64"),
        (LABELS == 1, 0.5, 0, "labels are bool"),
    ],
)
def test_bad_arguments_are_quoted(kind, labels, rate, seed, message):
    with pytest.raises(ValueError, match=message):
        INJECTORS[kind](labels, rate, seed)


def test_bad_pairs_and_inputs():
    with pytest.raises(ValueError, match="pair 3 → 3"):
        asymmetric(LABELS, {3: 3}, 10, 0.4, 0)
    with pytest.raises(ValueError, match="pair 3 → 10"):
        asymmetric(LABELS, {3: 10}, 10, 0.4, 0)
    with pytest.raises(ValueError, match="999 inputs for 1000 labels"):
        instance_dependent(LABELS, INPUTS[1:], 10, 0.4, 0, maps_seed=0)
    with pytest.raises(ValueError, match="classes is 1"):
        symmetric(np.zeros(3, dtype=np.int64), 1, 0.4, 0)
    with pytest.raises(ValueError, match="percent is 101"):
        make_noisy(cifar10.CIFAR10, "symmetric", {"kind": "symmetric"}, 101)


def parts(count=400):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Data((images, labels), (images[:100], labels[:100]), (images, labels), "synthetic")


@pytest.mark.parametrize("kind", ["symmetric", "instance"])
def test_training_and_validation_are_wrong_alike_and_the_test_part_is_right(kind):
    data = parts()
    noisy_data = corrupted(data, {"kind": kind, "rate": 0.25}, 10, 1)
    assert int((noisy_data.train[1] != data.train[1]).sum()) == 100
    assert int((noisy_data.val[1] != data.val[1]).sum()) == 25
    assert torch.equal(noisy_data.truth, data.train[1])
    assert torch.equal(noisy_data.test[1], data.test[1])
    assert torch.equal(noisy_data.train[0], data.train[0])
    with pytest.raises(ValueError, match="noise is 'fog'"):
        corrupted(data, {"kind": "fog"}, 10, 0)


def test_a_class_that_no_sample_has_may_be_a_wrong_label():
    labels = torch.arange(9).repeat_interleave(100)
    data = Data((labels, labels), (labels, labels), None, "synthetic")
    assert 9 in corrupted(data, {"kind": "symmetric", "rate": 0.5}, 10, 0).train[1]


def test_instance_dependent_noise_is_the_same_noise_in_both_parts():
    """Copies of one image of each class are mistaken for the same classes in training and in validation."""
    images = torch.randint(0, 256, (10, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(10).repeat_interleave(1_000)
    part = (images[labels], labels)
    wrong = corrupted(Data(part, part, None, "synthetic"), {"kind": "instance", "rate": 1.0}, 10, 1)
    assert not torch.equal(wrong.train[1], wrong.val[1])
    tables = [torch.bincount(10 * labels + p[1], minlength=100).double() for p in (wrong.train, wrong.val)]
    off_diagonal = torch.arange(100) % 11 != 0
    assert torch.corrcoef(torch.stack(tables)[:, off_diagonal])[0, 1] > 0.9


def test_a_long_tail():
    labels = torch.arange(10).repeat_interleave(100)
    data = Data((labels, labels), (labels, labels), (labels, labels), "synthetic")
    thinned = imbalanced(data, 10.0, 10)
    counts = torch.bincount(thinned.train[1])
    assert counts.tolist() == [round(100 * 10 ** (-c / 9)) for c in range(10)]
    assert len(thinned.test[1]) == 1_000
    lacking = imbalanced(replace(data, val=(labels[:-100], labels[:-100])), 10.0, 10)
    assert torch.bincount(lacking.val[1]).tolist() == counts.tolist()[:-1], "thinned alike, though a class is missing"
    for ratio in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"ratio is {ratio}"):
            imbalanced(data, ratio, 10)


def human_file(folder, **changes):
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 10, 50_000)
    tables = {name: np.where(rng.random(50_000) < 0.4, (clean + 1) % 10, clean) for name in noise.HUMAN_LABELS}
    tables |= {"clean_label": clean} | changes
    (folder / "cifar10n").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / noise.HUMAN_FILE, **tables)
    return tables


def test_labels_of_people(tmp_path, monkeypatch):
    monkeypatch.setenv("METAADAMW_DATA", str(tmp_path))
    tables = human_file(tmp_path)
    assert np.array_equal(human_labels("worse_label", tables["clean_label"]), tables["worse_label"])
    with pytest.raises(ValueError, match="human labels is 'best_label'"):
        human_labels("best_label", tables["clean_label"])
    with pytest.raises(DataError, match="not in the order"):
        human_labels("worse_label", tables["clean_label"][::-1])
    human_file(tmp_path, worse_label=tables["clean_label"])
    with pytest.raises(DataError, match="0 % are wrong; expected 9 to 40 %"):
        human_labels("worse_label", tables["clean_label"])
    human_file(tmp_path)
    whole = (tmp_path / noise.HUMAN_FILE).read_bytes()
    at = whole.index(b"worse_label.npy") + 5_000
    flipped = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
    for content in (b"not a file of arrays", b"", whole[: len(whole) // 2], flipped):
        (tmp_path / noise.HUMAN_FILE).write_bytes(content)
        with pytest.raises(DataError, match="is not the labels of CIFAR-10N"):
            human_labels("worse_label", tables["clean_label"])


def test_labels_of_people_are_downloaded_without_running_their_code(tmp_path, monkeypatch):
    monkeypatch.setenv("METAADAMW_DATA", str(tmp_path / "here"))
    tables = human_file(tmp_path)
    published = io.BytesIO()
    torch.save(tables, published)
    monkeypatch.setattr(noise.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(published.getvalue()))
    assert np.array_equal(human_labels("worse_label", tables["clean_label"]), tables["worse_label"])

    (tmp_path / "here" / noise.HUMAN_FILE).unlink()

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was run"), "w"))

    published = io.BytesIO()
    torch.save(tables | {"more": Evil()}, published)
    for content in (published.getvalue(), b"<html>not found</html>", b"", published.getvalue()[:500]):
        monkeypatch.setattr(noise.urllib.request, "urlopen", lambda *_, c=content, **__: io.BytesIO(c))
        with pytest.raises(DataError, match="is missing and could not be downloaded"):
            human_labels("worse_label", tables["clean_label"])
    assert not (tmp_path / "was run").exists()


def test_areas_of_a_ranking_with_ties():
    """Of six pairs of a wrong and a right label five are in order and one is a tie, which counts half."""
    areas = detection({"some": np.array([3.0, 2.0, 2.0, 1.0, 0.0])}, np.array([True, True, False, False, False]))
    assert areas["some"]["auroc"] == pytest.approx(5.5 / 6)
    assert areas["some"]["auprc"] == pytest.approx((1 + 2 / 3) / 2)
    broken = detection({"some": np.array([math.nan, 1.0, 2.0])}, np.array([True, False, False]))
    assert all(math.isnan(area) for area in broken["some"].values())


def test_every_method_finds_labels_that_a_model_contradicts_and_chance_finds_nothing():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (400,), generator=generator)
    observed = truth.clone()
    observed[:120] = (truth[:120] + 1) % 5
    history, lilaw = SampleHistory(observed, share=0.7), LiLAW()
    for epoch in range(6):
        noise_ = torch.randn(400, 5, generator=generator)
        history.add(noise_ + (1 + epoch) * torch.nn.functional.one_hot(truth, 5), lilaw)
    wrong = (observed != truth).numpy()
    found = detection(history.suspicion(weighted=True), wrong)
    assert {"loss, mean", "LiLAW, easy weight", "LiLAW, how often hard", "confident learning"} < set(found)
    for name, scores in found.items():
        if name == "entropy, mean":  # says how sure the model is, not of what
            continue
        assert scores["auroc"] > 0.9, name
        assert scores["auprc"] > 0.8, name
    shuffled = wrong[torch.randperm(400, generator=generator).numpy()]
    assert all(abs(s["auroc"] - 0.5) < 0.12 for s in detection(history.suspicion(weighted=True), shuffled).values())


def test_forgetting_events_are_counted():
    """Right, wrong, right, wrong: forgotten twice; always right: never; never right: worse than any."""
    labels = torch.zeros(3, dtype=torch.long)
    history = SampleHistory(labels, share=0.5)
    for epoch in range(4):
        first = [1.0, -1.0] if epoch % 2 == 0 else [-1.0, 1.0]
        history.add(torch.tensor([first, [1.0, -1.0], [-1.0, 1.0]]), None)
    assert history.suspicion(weighted=False)["forgetting events"].tolist() == [2.0, 0.0, 4.0]


def test_a_run_says_what_was_learned_by_heart_and_how_well_it_is_found(tmp_path):
    keys = {variant: RunKey("cifar10-symmetric40", variant, "clean", "smoke", 0) for variant in TOGETHER}
    records = {variant: run(key, tmp_path, progress=False) for variant, key in keys.items()}
    for variant, record in records.items():
        assert record["status"] == "finished"
        assert record["wrong_labels"] == round(0.4 * record["samples"]["train"])
        assert 0 <= record["epochs"][-1]["memorised"] <= 1
        assert 0 <= record["last"]["metric"] <= 1
        assert ("lilaw" in record) == variant.endswith("lilaw")
        assert ("LiLAW, easy weight" in record["detection"]) == variant.endswith("lilaw")
        assert ("groups" in record) == variant.startswith("meta")
    plain, weighted = records["adamw"]["epochs"], records["adamw-lilaw"]["epochs"]
    assert plain[0]["val_loss"] == weighted[0]["val_loss"], "the first epoch is the warm-up"
    assert plain[1]["val_loss"] != weighted[1]["val_loss"]
    assert records["adamw-lilaw"]["lilaw"][-1]["alpha"] < 10


def test_lilaw_learns_from_validation_batches_and_phi_is_judged_by_the_weighted_loss(tmp_path, monkeypatch):
    runs, stepped, judged = [], [], []
    make, meta_step, update = training._Run.make, LiLAW.meta_step, MetaAdamW.update_attention

    def watched(run, progress):
        runs.append(run)
        return make(run, progress)

    def stepping(lilaw, model, batch, each):
        stepped.append((lilaw, batch))
        return meta_step(lilaw, model, batch, each)

    def judging(optimizer, model, batch1, batch2, loss_fn, val_batch, **how):
        if stepped:
            lilaw, training_was = stepped[-1][0], model.training
            model.eval()  # the same numbers each time
            with torch.no_grad():
                inputs, labels = runs[0]._split(batch1)
                logits = model(*inputs)
                each = partial(F.cross_entropy, reduction="none")
                judged.append((loss_fn(model, batch1), lilaw.loss(logits, labels, each), each(logits, labels).mean()))
            model.train(training_was)
        return update(optimizer, model, batch1, batch2, loss_fn, val_batch, **how)

    monkeypatch.setattr(training._Run, "make", watched)
    monkeypatch.setattr(LiLAW, "meta_step", stepping)
    monkeypatch.setattr(MetaAdamW, "update_attention", judging)
    run(RunKey("cifar10-symmetric40", "metaadamw-lilaw", "clean", "smoke", 0), tmp_path, progress=False)
    data = runs[0].data
    (validation,), (trained,) = (runs[0]._split(part)[0] for part in (data.val, data.train))
    validation, trained = ({x.numpy().tobytes() for x in inputs} for inputs in (validation, trained))
    seen = {x.numpy().tobytes() for _, (inputs, *_) in stepped for x in inputs}
    assert seen
    assert seen <= validation
    assert not seen & trained
    assert judged
    for value, weighted, _ in judged:
        torch.testing.assert_close(value, weighted)
    assert not all(torch.isclose(value, plain) for value, _, plain in judged), "after the warm-up they differ"


def test_training_that_diverges_under_lilaw_is_recorded_as_without_it(tmp_path):
    settings = replace(NOISY["cifar10-symmetric40"].settings("smoke"), lr=1e30)
    keys = [RunKey("cifar10-symmetric40", v, "clean", "smoke", 0) for v in ("adamw", "adamw-lilaw", "metaadamw-lilaw")]
    records = [run(key, tmp_path, progress=False, settings=settings) for key in keys]
    assert [r["status"] for r in records] == ["diverged"] * 3
    assert [len(r["epochs"]) for r in records] == [1] * 3


def test_a_history_goes_on_from_a_checkpoint():
    labels = torch.tensor([0, 1, 1])
    logits = [torch.randn(3, 2, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    whole, first, second = (SampleHistory(labels, share=0.5) for _ in range(3))
    for k, z in enumerate(logits):
        whole.add(z, None)
        if k < 2:
            first.add(z, None)
    second.load_state_dict(first.state_dict())
    for z in logits[2:]:
        second.add(z, None)
    for name, scores in whole.suspicion(weighted=False).items():
        assert np.array_equal(scores, second.suspicion(weighted=False)[name]), name


def test_people_and_true_labels_stay_together_in_every_part():
    task = NOISY["cifar10-human40"]
    data = task.load("clean", task.settings("smoke"), "synthetic")
    whole = cifar10.pixels(cifar10.synthetic_images(60, 8, 1))
    known = {image.tobytes(): label for image, label in zip(*whole, strict=True)}
    assert [known[x.numpy().tobytes()] for x in data.train[0]] == data.truth.tolist()
    share = float((data.train[1] != data.truth).double().mean())
    assert 0.2 < share < 0.6


def test_tasks_with_wrong_labels_have_one_protocol(tmp_path):
    with pytest.raises(ValueError, match="'paper'; allowed are clean"):
        run(RunKey("imdb-symmetric40", "adamw", "paper", "smoke", 0), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_lilaw_needs_classes(tmp_path):
    with pytest.raises(ValueError, match="etth1 has no classes"):
        run(RunKey("etth1", "adamw-lilaw", "clean", "smoke", 0), tmp_path, progress=False)


def test_the_studies_are_paired_by_seed(tmp_path):
    runs = study_runs("lilaw/lite", tmp_path)
    for task in NOISY:
        seeds = {v: {k.seed for k in runs if k.task == task and k.variant == v} for v in ("adamw", "adamw-lilaw")}
        assert seeds["adamw"] == seeds["adamw-lilaw"] == set(FEW_SEEDS)
    assert all(k.protocol == "clean" for k in runs)
    together = study_runs("together/lite", tmp_path)
    assert {k.task for k in together} == {SENSITIVITY_TASK}
    assert len(together) == 5 * len(TOGETHER)
    with pytest.raises(ValueError, match="task is 'etth1'"):
        study_runs("lilaw/lite", tmp_path, ["etth1"])


def test_the_paper_profile_is_resnet_18_on_all_of_cifar10():
    settings = NOISY["cifar10-symmetric40"].settings("paper")
    assert settings.model == cifar10.settings("paper").model
    assert set(settings.data) == {"noise"}
    assert settings.patience == settings.epochs, "memorising comes late"
    assert replace(settings, data={}).batch_size == 128


class Oracle(nn.Module):
    """Its inputs are its logits; it has a weight that gets no gradient but from where the loss is asked for one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits):
        return logits * (1 + 0 * self.scale)


def told(part, sure=8.0):
    """Samples whose inputs are the logits of one who knows their labels."""
    return (sure * F.one_hot(part[1], 10).float(), part[1])


def test_what_is_said_of_wrong_labels_is_said_of_the_right_ones(tmp_path, monkeypatch):
    """One who knows all true labels learns no wrong one by heart, and finds them all."""
    task = NOISY["cifar10-symmetric40"]

    def load(protocol, settings, source):
        data = task.load(protocol, settings, source)
        nonsense = (told(data.test)[0].roll(1, dims=1), data.test[1])
        return replace(data, train=told(data.train), val=told(data.val), test=nonsense)

    stub = replace(task, load=load, build=lambda settings, data: Oracle())
    monkeypatch.setitem(NOISY, task.name, stub)
    for arm in ("adamw", "adamw-lilaw"):
        record = run(RunKey(task.name, arm, "clean", "smoke", 0), tmp_path, progress=False)
        assert [e["memorised"] for e in record["epochs"]] == [0, 0]
        assert [(e["recovered"], e["right_learned"]) for e in record["epochs"]] == [(1, 1)] * 2
        assert record["detection"]["loss, mean"]["auroc"] == 1
        assert (record["test"]["metric"], record["last"]["metric"]) == (0, 0), "of the test part"
        assert record["best"]["metric"] == pytest.approx(0.6, abs=0.1), "of validation labels that are wrong, too"
    assert record["detection"]["LiLAW, easy weight"]["auroc"] == 1


def test_a_training_logit_that_is_not_finite_is_divergence_in_every_arm(tmp_path, monkeypatch):
    """The training part in eval mode may show it where the validation part does not."""
    task = NOISY["cifar10-symmetric40"]

    class Fragile(Oracle):
        def forward(self, logits):
            if not self.training and logits.max() > 9:
                return logits * math.inf
            return super().forward(logits)

    def load(protocol, settings, source):
        data = task.load(protocol, settings, source)
        return replace(data, train=told(data.train, 10.0), val=told(data.val), test=told(data.test))

    monkeypatch.setitem(NOISY, task.name, replace(task, load=load, build=lambda settings, data: Fragile()))
    for arm in ("adamw", "adamw-lilaw"):
        record = run(RunKey(task.name, arm, "clean", "smoke", 0), tmp_path, progress=False)
        assert (record["status"], len(record["epochs"])) == ("diverged", 1)


def test_a_failure_is_recorded_though_the_search_for_wrong_labels_fails_too(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no ranking")

    monkeypatch.setattr(SampleHistory, "suspicion", fails)
    record = run(RunKey("cifar10-symmetric40", "adamw", "clean", "smoke", 0), tmp_path, progress=False)
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: no ranking")
    assert record["detection"] is None
    assert record["wrong_labels"] > 0


@pytest.mark.parametrize("name", NOISY)
def test_every_noisy_task_has_the_noise_of_its_name(name):
    task = NOISY[name]
    settings = task.settings("smoke")
    data = task.load("clean", settings, "synthetic")
    noisy_data = corrupted(data, settings.data["noise"], task.classes, 0)
    kind, percent = re.fullmatch(r"\w+-([a-z]+)(\d+)", name).groups()
    assert settings.data["noise"]["rate"] == int(percent) / 100
    assert task.augment is None
    assert settings.data["noise"]["kind"] == {"longtail": "symmetric"}.get(kind, kind)
    if kind == "human":
        assert settings.data["noise"]["labels"] == "worse_label"
        return
    truth, observed = noisy_data.truth, noisy_data.train[1]
    wrong = truth != observed
    pairs = {(int(a), int(b)) for a, b in zip(truth[wrong], observed[wrong], strict=True)}
    if kind == "asymmetric":
        assert pairs <= set(settings.data["noise"]["pairs"]), "each class is taken for its partner"
        assert pairs
    else:
        assert float(wrong.double().mean()) == pytest.approx(int(percent) / 100, abs=1 / len(wrong) + 0.02)
    if kind == "longtail":
        counts = torch.bincount(truth, minlength=10)
        assert counts[0] > 3 * counts[9], "the last class has a tenth of the first"
        assert len(truth) < len(data.train[1])
    else:
        assert torch.equal(truth, data.train[1])
