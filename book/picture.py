"""Draw the README's picture, the ETTh1 result, from the committed records. ``make picture`` runs this file."""

from pathlib import Path

from metaadamw_lite.experiments import figures, report
from metaadamw_lite.experiments.records import read_records

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    figures.use_style()
    records = [r for r in read_records(ROOT / "data" / "results", "etth1") if r["run"]["profile"] == "paper"]
    outcome = report.outcomes(report.runs_frame(records))
    paper = report.paper_table(2).loc["etth1"]
    figure = figures.plot_pairs(
        outcome,
        {"paper": "best validation MSE (as published)", "clean": "test MSE, looked at once"},
        "ETTh1: MSE (squared std)",
        {arm: paper[arm] for arm in ("adamw", "metaadamw")},
    )
    figure.savefig(ROOT / "book" / "_static" / "etth1.png", dpi=110, metadata={"Software": None})
