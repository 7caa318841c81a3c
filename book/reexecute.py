"""Run every chapter with each choice of its parameters, and write down how that went.

``python book/reexecute.py`` takes the choices from the comments behind the parameters ("lite" or "paper"), one change
at a time, and a second seed. It puts executed notebooks into ``_build/execution``, with a page that has for each the
chapter, parameters, time, versions and outcome. Not run are live runs with the profile "paper", which take hours, and
the device "cuda" on a machine without one.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
import papermill
import torch
import yaml
from build import BUILD, NOTEBOOKS, execute

from metaadamw_lite.experiments.records import environment

OUT = BUILD / "execution"


def matrix(notebook: Path) -> Iterator[dict[str, Any]]:
    """The parameters of each run of a chapter: its defaults, then each documented choice, then another seed."""
    yield {}
    known = papermill.inspect_notebook(notebook)
    for name, parameter in known.items():
        default, words = yaml.safe_load(parameter["default"]), re.findall(r'"([\w:]+)"', parameter["help"])
        live = "smoke" in words
        for word in words:
            if word == default or (live and word == "paper") or (name == "device" and not _has(word)):
                continue
            yield {name: word}
            if live and "protocol" in known:
                yield {name: word, "protocol": "clean"}
    if "seed" in known:
        yield {"seed": 1}


def _has(device: str) -> bool:
    return device != "cuda" or torch.cuda.is_available()


def rerun(notebook: Path, parameters: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a chapter once; a row of the page."""
    name = "-".join([notebook.stem, *(f"{k}={v}" for k, v in parameters.items())]) + ".ipynb"
    began = time.monotonic()
    try:
        execute(notebook, folder / name, parameters)
        cells = nbformat.read(folder / name, as_version=4).cells
        pending = sum("not recorded yet: made by" in str(cell.get("outputs")) for cell in cells)
        outcome = f"passed; {pending} cells wait for records" if pending else "passed"
    except papermill.exceptions.PapermillExecutionError as error:
        outcome = f"failed: {error.ename}: {error.evalue}"
    except RuntimeError as error:  # a kernel that died
        outcome = f"failed: {error}"
    return {
        "chapter": notebook.stem,
        "parameters": ", ".join(f"{k} = {v}" for k, v in parameters.items()) or "defaults",
        "seconds": round(time.monotonic() - began),
        "outcome": outcome,
        "notebook": name,
    }


def write(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the page, as Markdown and as HTML with links to the executed notebooks."""
    where = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    versions = ", ".join(f"{name} {where[name]}" for name in ("python", "torch", "revision", "device"))
    failed = sum(row["outcome"].startswith("failed") for row in rows)
    head = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {versions}: {len(rows) - failed} of {len(rows)} runs passed."
    table = pd.DataFrame(rows)
    markdown = table.drop(columns="notebook").to_markdown(index=False, tablefmt="github")
    (folder / "status.md").write_text(f"# Execution status\n\n{head}\n\n{markdown}\n", encoding="utf-8")
    links = [f'<a href="{quote(name)}">{escape(name)}</a>' for name in table["notebook"]]
    html = table.map(lambda x: escape(str(x))).assign(notebook=links).to_html(index=False, escape=False)
    page = f"<!doctype html><meta charset='utf-8'><title>Execution status</title><h1>Execution status</h1><p>{head}</p>"
    (folder / "index.html").write_text(page + html + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run all, and return 1 if one failed."""
    parser = argparse.ArgumentParser(description="Run every chapter with each choice of its parameters.")
    parser.add_argument("--chapters", nargs="*", metavar="NN", help="only these, by number (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page and the executed notebooks")
    parser.add_argument("--list", action="store_true", help="say which runs there would be")
    args = parser.parse_args(arguments)
    notebooks = [n for n in sorted(NOTEBOOKS.glob("*.ipynb")) if args.chapters is None or n.name[:2] in args.chapters]
    runs = [(notebook, parameters) for notebook in notebooks for parameters in matrix(notebook)]
    if args.list:
        print("\n".join(f"{notebook.stem} {parameters}" for notebook, parameters in runs))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for notebook, parameters in runs:
        rows.append(rerun(notebook, parameters, args.out))
        write(rows, args.out)  # also of a job that is stopped at its time limit
        print(f"{len(rows)} of {len(runs)}: {rows[-1]['notebook']}: {rows[-1]['outcome']}", flush=True)
    return int(any(row["outcome"].startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
