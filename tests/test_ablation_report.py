"""Table 3 again, and how far meta-learning moved the factors."""

import pandas as pd
import pytest
from made_records import made, made_ablations

from metaadamw_lite.experiments import TASKS, ablation_report, figures, frames
from metaadamw_lite.experiments.records import Records


def test_a_row_of_table_3_stands_beside_the_runs_that_it_is_paired_with():
    runs = [made("metaadamw", k, [1.0 + k], profile="lite") for k in range(5)]
    runs += [made("gating-off", k, [2.0 + k], profile="lite") for k in range(3)]
    given = Records.holding(runs)
    row = ablation_report.ablation_table(given, "etth1", "lite").set_index("variant").loc["gating-off"]
    assert (row["mean"], row["metaadamw"]) == (3.0, 2.0)


@pytest.mark.parametrize("task", TASKS)
def test_the_ablation_table_marks_what_is_the_baseline(task):
    runs = [made("metaadamw", seed, [1.0 + seed / 10], task, "lite") for seed in range(3)]
    given = Records.holding(runs)
    table = ablation_report.ablation_table(given, task, "lite")
    assert table["baseline"][table["paper"] == "baseline"].all(), "what the paper calls baseline is Table 4's setting"
    baseline = table[table["baseline"]]
    assert (baseline["mean"] == table.loc[("MetaAdamW", "MetaAdamW (baseline)"), "mean"]).all()
    assert all(d.mean == 0 for d in baseline["difference"])


def test_ablations_are_paired_with_metaadamw():
    given = Records.holding(made_ablations())
    table = ablation_report.ablation_table(given, "etth1", "lite")
    expected = [100 * (1 - (1.1 + k * k / 100) / (1.0 + k * k / 100)) for k in range(3)]
    difference = table.loc[("MetaAdamW", "AdamW"), "difference"]
    assert difference.seeds == 3
    assert difference.mean == pytest.approx(sum(expected) / 3)


def test_what_training_phi_brings_is_taken_against_the_same_phi_untrained():
    gains = {"metaadamw": 1.00, "updates-10": 0.90, "features-enhanced": 0.5, "metaadamw-frozen": 1.00}
    moves = {"metaadamw": [0.01, 0.02], "updates-10": [0.1, 0.4, 0.3], "features-enhanced": [0.9]}
    records = [
        made(variant, seed, [gain * (1 + seed / 10)], profile="lite")
        | {"meta_updates": [{"log_var": [], "alpha_moved": m * (1 + seed)} for m in moves.get(variant, [])]}
        for variant, gain in gains.items()
        for seed in range(4)
    ]
    refused = next(r for r in records if (r["run"]["variant"], r["run"]["seed"]) == ("updates-10", 2))
    refused["meta_updates"][1]["error"] = "the loss is nan"
    given = Records.holding(records)
    runs = ablation_report.movement_table(given, "etth1", "lite").set_index(["variant", "seed"])
    assert runs.loc[("updates-10", 3), "alpha_moved"] == pytest.approx(1.6)
    assert runs.loc[("updates-10", 3), "meta_updates"] == 3
    assert runs.loc[("updates-10", 2), "meta_updates"] == 2, "one was refused"
    assert len(runs) == 12, "the control does no meta-updates"
    table = ablation_report.more_meta_learning(given, "etth1", "lite")
    assert table.index.tolist() == ["MetaAdamW", "Meta-update frequency: Approx. 10 times per epoch"]
    assert table["difference"].map(lambda d: d.mean).tolist() == pytest.approx([0, 10])
    assert table["alpha_moved"].tolist() == pytest.approx([0.05, 1.0])
    assert ablation_report.more_meta_learning(given, "etth1", "paper").empty


def dots(ax):
    """Where the dots of a picture are along its horizontal axis."""
    return sorted(x for collection in ax.collections for x in collection.get_offsets()[:, 0])


def test_pictures_show_the_numbers_of_their_tables():
    pairs = pd.DataFrame({"task": "made", "improvement": [1.0, -2.0, 30.0], "paper": 4.0})
    assert set(dots(figures.plot_improvements(pairs).axes[0])) == {-2.0, 1.0, 4.0, 30.0}

    given = Records.holding(made_ablations())
    table = ablation_report.ablation_table(given, "etth1", "lite")
    tested = table[~table["baseline"] & table["difference"].map(lambda d: d.seeds >= 3)]
    assert len(tested) == 2
    means = figures.plot_ablations(table).axes[0].lines[0].get_xdata()
    assert list(means) == [d.mean for d in tested["difference"]]

    epochs = frames.epochs_frame(made("adamw", k, [3.0 + k, 2.0 - k / 10]) for k in range(3))
    band = figures.plot_curves(epochs, ["paper"], TASKS["etth1"]).axes[0].collections[0].get_paths()[0].vertices
    assert {(1.0, 3.0), (1.0, 5.0), (2.0, 1.8), (2.0, 2.0)} <= {(x, round(y, 9)) for x, y in band}, "lowest to highest"
