"""Draw the README's picture, all pairs of runs on all tasks, from the committed records. ``make picture`` runs it."""

from pathlib import Path

from metaadamw_lite.experiments import figures, report

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    figures.use_style()
    figure = figures.plot_improvements(report.improvements_frame(report.table_of_tasks()))
    figure.savefig(ROOT / "book" / "_static" / "tasks.png", dpi=110, metadata={"Software": None})
