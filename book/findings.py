"""Write the findings in README.md, which the book's first page shows, too, and draw their picture, from the records.

Numbers and verdicts come from here, the sentences from ``findings.md.jinja``. ``make findings`` runs this file when
there are new records; a test fails where README.md differs from what it writes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from metaadamw_lite.experiments import TASKS, figures, main_report, phi_report, released
from metaadamw_lite.experiments.paired import (
    ENOUGH_SEEDS,
    FEWEST_PAIRS,
    Estimate,
    PairedDifference,
    exact_share,
)
from metaadamw_lite.experiments.records import Records, paper_table
from metaadamw_lite.experiments.verdict import FAILS, HOLDS, NEVER, OPEN, SAME, judge_family

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PICTURES = {False: ROOT / "book" / "_static" / "tasks.png", True: ROOT / "book" / "_static" / "tasks-dark.png"}
"""For light and for dark pages."""

MAIN = "wikitext2"
"""The task that the released logs and the null test have most runs of."""

OUTPUT_LAYER = "other/deep/weight"
"""The modulation group that is the output layer's weight in the model of WikiText-2."""


def comparisons(records: Records) -> pd.DataFrame:
    """Every comparison of MetaAdamW with AdamW and with the control under the paper's protocol.

    Returns:
        A row for each task and profile with a pair: "task", "how" (it was tested), "planned" (pairs), "gain" over AdamW
        and "trained" over the control (each a ``PairedDifference``), their verdicts "gain_is" and "trained_is" after
        Holm's correction over the tasks of a profile, "power" for the paper's gain, and "improvements" (by seed).
    """
    parts = []
    for profile, how in main_report.TESTED.items():
        profiles = dict.fromkeys(TASKS, profile)
        main = main_report.table_of_tasks(records, profiles=profiles)
        control = main_report.table_of_tasks(records, baseline="metaadamw-frozen", profiles=profiles)["difference"]
        table = main[["profile", "planned", "power", "improvements"]].assign(
            task=main.index,
            how=how,
            gain=main["difference"],
            gain_is=judged(main["difference"]),
            trained=control,
            trained_is=judged(control),
        )
        parts.append(table[table["gain"].map(lambda d: d.pairs > 0)])
    return pd.concat(parts, ignore_index=True)


def judged(differences: "pd.Series[Any]") -> "list[str]":
    """Each difference in a word: "better", "worse", "equivalent" (±1 %), "open", or "untested" with too few pairs."""
    words = {HOLDS: "better", FAILS: "worse", SAME: "equivalent", OPEN: "open", NEVER: "untested"}
    return [words[verdict.kind] for verdict in judge_family(differences)]


def answers_about(rows: pd.DataFrame, kind: str) -> dict[str, Any]:
    """The verdicts on one difference of ``comparisons``.

    Args:
        rows: from ``comparisons``.
        kind: "gain" or "trained".

    Returns:
        How many are "tested", how many "better", "worse", "equivalent" and "open", and under "example" for each of
        these the comparison with the most pairs.
    """
    verdicts = rows[f"{kind}_is"]
    counts = {name: int((verdicts == name).sum()) for name in ("better", "worse", "equivalent", "open")}
    examples = {}
    for name in counts:
        of_it = rows[verdicts == name]
        if len(of_it):
            row = of_it.loc[of_it[kind].map(lambda d: d.seeds).idxmax()]
            examples[name] = {"task": short(row["task"]), "how": row["how"], "difference": row[kind]}
    return {**counts, "tested": sum(counts.values()), "example": examples}


def excluded_gain(rows: pd.DataFrame) -> dict[str, Any]:
    """The comparison with the most pairs among those whose interval lies below the paper's gain, if there is any."""
    if rows.empty:
        return {}
    row = rows.loc[rows["gain"].map(lambda d: d.seeds).idxmax()]
    return {"task": short(row["task"]), "difference": row["gain"]}


def short(task: str) -> str:
    """The name of a task's data."""
    return TASKS[task].title.split()[0]


def gains_with_alpha(records: Records) -> dict[str, Any] | None:
    """In how many pairs on WikiText-2 gain and loss go with the output layer's α, in the profile with most pairs."""
    table = main_report.alphas_and_gains(records, MAIN, "paper")
    table = table[table["group"] == OUTPUT_LAYER]
    if table.empty:
        return None
    profile = table["profile"].value_counts().reindex([*main_report.TESTED]).idxmax()
    pairs = table[table["profile"] == profile]
    count = int(((pairs["alpha"] > 1) == (pairs["gain"] > 0)).sum())
    return {
        "how": main_report.TESTED[str(profile)],
        "count": count,
        "pairs": len(pairs),
        "share": exact_share(count, len(pairs)),
    }


def random_phis(records: Records) -> dict[str, Any] | None:
    """Describe the gains of untrained Φ's on WikiText-2; None while fewer than ten have all their runs."""
    whole = phi_report.null_results(records, MAIN).dropna()
    if len(whole) < FEWEST_PAIRS:
        return None
    draws, found = phi_report.logged_runs(MAIN), phi_report.null_distribution(records, MAIN)
    return {"phis": len(whole), "share": found["share of Φ"], "draws": draws, "best": found[f"best of {draws}"]}


def logged_runs() -> dict[str, Any]:
    """How many of the released logs' runs of MetaAdamW do not reach the published AdamW, by task."""
    losing = {}
    for name, row in paper_table(2).iterrows():
        task, values = TASKS[str(name)], released.released_log(str(name))["value"].astype(float)
        below = values > row["adamw"] if task.lower_is_better else values < row["adamw"]
        losing[str(name)] = (int(below.sum()), len(values))
    mostly = {short(task): of for task, of in losing.items() if of[0] > of[1] / 2}
    return {"all": sum(runs for _, runs in losing.values()), "mostly": mostly, "main": losing[MAIN]}


def facts(records: Records, rows: pd.DataFrame) -> dict[str, Any]:
    """Collect the template's variables from ``comparisons`` and the records of the other studies."""
    tested = rows[rows["gain"].map(lambda d: d.seeds >= ENOUGH_SEEDS)]
    pairs = pd.concat([*tested["improvements"]]) if len(tested) else pd.Series(dtype=float)
    won = int((pairs > 0).sum())
    gained: Any = paper_table(2)["improvement_percent"]
    papers = rows["task"].isin(gained.index)
    trained = papers & (rows["trained_is"] == "better") & rows["trained"].map(lambda d: d.mean > 1)
    as_large = (rows["gain_is"] == "better") & (rows["gain"].map(lambda d: d.mean) >= rows["task"].map(gained))
    whole = rows[papers & (rows["gain"].map(lambda d: d.pairs) >= rows["planned"])]
    excluded = whole[whole["gain"].map(lambda d: d.t_high) < whole["task"].map(gained)]
    return {
        "excluded": excluded_gain(excluded) | {"count": len(excluded), "of": len(whole)},
        "rows": [row | {"title": short(row["task"])} for row in rows.to_dict("records")],
        "papers_gain": gained.to_dict(),
        "task": short(MAIN),
        "gain": answers_about(rows, "gain"),
        "trained": answers_about(rows, "trained"),
        "won": {"count": won, "pairs": len(pairs), "share": exact_share(won, len(pairs))} if len(pairs) else None,
        "alpha": gains_with_alpha(records),
        "null": random_phis(records),
        "log": logged_runs(),
        "refuted": {"trained": rows[trained]["task"].nunique(), "as_large": rows[as_large]["task"].nunique()},
    }


def rendered(facts: Mapping[str, Any]) -> str:
    """The findings (Markdown), each answer in one line."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "book"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # it is no HTML
    )
    environment.filters |= {"difference": written, "percent": main_report.percent, "estimate": in_percent}
    return re.sub(r"\n   (?=\S)", " ", environment.get_template("findings.md.jinja").render(facts))


def written(d: PairedDifference) -> str:
    """A mean with Student's interval, in percent."""
    return f"{d.mean_text} % {d.t_interval}" if d.seeds >= ENOUGH_SEEDS else f"{d.mean_text} %" if d.seeds else "–"


def in_percent(share: Estimate) -> str:
    """A share with its interval, in percent."""
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def updated(readme: str, findings: str) -> str:
    """README.md with these findings between its two markers."""
    head, tail = r"(<!-- findings.*?-->\n)", r"(<!-- end of findings -->)"
    text, count = re.subn(f"{head}.*?{tail}", lambda m: m[1] + findings.rstrip() + "\n" + m[2], readme, flags=re.DOTALL)
    assert count == 1, "README.md has not exactly one place for the findings"
    return text


def rows_of_picture(records: Records, rows: pd.DataFrame) -> pd.DataFrame:
    """``comparisons`` as ``figures.plot_gains`` takes them."""
    gained: Any = paper_table(2)["improvement_percent"]
    bands = [random_band(records, row["task"]) if row["profile"] == "lite" else None for row in rows.to_dict("records")]
    labels = [f"{short(row['task'])}\n{row['how']}" for row in rows.to_dict("records")]
    return rows.assign(label=labels, paper=rows["task"].map(gained), band=pd.Series(bands, dtype=object))


def random_band(records: Records, task: str) -> tuple[float, float] | None:
    """Compute the range that holds 95 % of the gains of random, untrained Φ's; None with fewer than ten Φ's."""
    gains = phi_report.null_gains(records, task)
    if len(gains) < FEWEST_PAIRS:
        return None
    low, high = np.nanpercentile(gains.to_numpy(dtype=float), [2.5, 97.5])
    return float(low), float(high)


def drawn(rows: pd.DataFrame) -> str:
    """The numbers in the picture; it carries them, so that a test sees whether it is the records'."""
    lines = [
        [row["label"].replace("\n", ", "), *row["improvements"], d.t_low, d.t_high, row["paper"], *(row["band"] or ())]
        for row, d in zip(rows.to_dict("records"), rows["gain"], strict=True)
    ]
    return "\n".join(",".join(x if isinstance(x, str) else f"{x:.3g}" for x in line) for line in lines)


if __name__ == "__main__":
    records = Records()
    rows = comparisons(records)
    README.write_text(updated(README.read_text(encoding="utf-8"), rendered(facts(records, rows))), encoding="utf-8")
    figures.use_style()
    shown = rows_of_picture(records, rows)
    for dark, path in PICTURES.items():
        figure = figures.plot_gains(shown, dark)
        figure.savefig(path, dpi=110, metadata={"Software": None, "Description": drawn(shown)})
