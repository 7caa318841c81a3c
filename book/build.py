"""Execute the notebooks and build the book.

``python book/build.py`` runs every notebook headlessly by papermill in ``_build/source`` and builds the HTML book from
the executed copies, at ``_build/html/index.html``. The checkout itself is not changed. A failing cell, an unknown
parameter or a warning of the builder fails the build.

``--parameters NAME=VALUE`` goes to the notebooks that have that parameter; ``--in-place`` writes the text outputs that
nbval compares back into ``notebooks/``.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import joblib
import nbformat
import papermill
import yaml
from nbval.plugin import coalesce_streams

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "_build"
SOURCE = BUILD / "source"


def execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook in its own folder, with those parameters that it has.

    Raises:
        papermill.exceptions.PapermillExecutionError: if a cell fails.
    """
    known = papermill.inspect_notebook(notebook)
    output.parent.mkdir(parents=True, exist_ok=True)
    for attempts_left in (2, 1, 0):
        try:
            papermill.execute_notebook(
                notebook,
                output,
                parameters={k: v for k, v in parameters.items() if k in known},
                cwd=NOTEBOOKS,
                kernel_name="python3",
                progress_bar=False,
            )
            break
        except RuntimeError as error:  # two kernels that start at the same moment may pick the same port
            if "Kernel died before replying" not in str(error) or not attempts_left:
                raise


def execute_all(folder: Path, parameters: dict[str, Any]) -> None:
    """Run all notebooks, two at a time, into a folder.

    Raises:
        ValueError: for a parameter that no notebook has.
    """
    notebooks = sorted(NOTEBOOKS.glob("*.ipynb"))
    known = {name for notebook in notebooks for name in papermill.inspect_notebook(notebook)}
    if unknown := sorted(parameters.keys() - known):
        raise ValueError(f"no notebook has a parameter {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    print(f"executing {len(notebooks)} notebooks, two at a time: some minutes", flush=True)
    parallel = joblib.Parallel(n_jobs=2, return_as="generator_unordered", batch_size=1)
    done = parallel(joblib.delayed(_timed)(n, folder / n.name, parameters) for n in notebooks)
    for number, (name, seconds) in enumerate(done, start=1):
        print(f"{number} of {len(notebooks)}: {name}, {seconds:.0f} s", flush=True)


def _timed(notebook: Path, output: Path, parameters: dict[str, Any]) -> tuple[str, float]:
    began = time.monotonic()
    execute(notebook, output, parameters)
    return notebook.name, time.monotonic() - began


def build() -> int:
    """Build the HTML book from ``_build/source`` and return the builder's exit code; warnings are failures."""
    print("building the HTML book: about a minute", flush=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, SOURCE / name)
    shutil.copy(ROOT / "README.md", SOURCE / "README.md")  # the first page includes a part of it
    shutil.copytree(
        ROOT / "book", SOURCE / "book", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "*.jinja")
    )
    command = ["jupyter-book", "build", str(SOURCE), "--path-output", str(ROOT), "-W", "--keep-going", "--all"]
    return subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=False).returncode


def keep_text_outputs(executed: Path, notebook: Path) -> None:
    """Store in ``notebook`` the outputs that nbval compares, and no others: figures differ between machines."""
    ran = {cell["id"]: cell for cell in nbformat.read(executed, as_version=4).cells}
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            checked = "nbval-check-output" in cell["metadata"].get("tags", [])
            cell["outputs"] = coalesce_streams(ran[cell["id"]]["outputs"]) if checked else []
            cell["execution_count"] = ran[cell["id"]]["execution_count"] if checked else None
            for output in cell["outputs"]:
                if isinstance(output.get("text"), str):
                    output["text"] = output["text"].splitlines(keepends=True)
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Execute and build; return the exit code."""
    parser = argparse.ArgumentParser(description="Execute the notebooks and build the book.")
    parser.add_argument(
        "--parameters", nargs="*", default=[], metavar="NAME=VALUE", help="for the notebooks that have it"
    )
    parser.add_argument("--in-place", action="store_true", help="store the outputs that nbval compares; build nothing")
    args = parser.parse_args(arguments)
    parameters = {name: yaml.safe_load(value) for name, _, value in (p.partition("=") for p in args.parameters)}
    shutil.rmtree(SOURCE, ignore_errors=True)
    try:
        execute_all(SOURCE / "notebooks", parameters)
    except (ValueError, papermill.exceptions.PapermillExecutionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.in_place:
        for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
            keep_text_outputs(SOURCE / "notebooks" / notebook.name, notebook)
        return 0
    return build()


if __name__ == "__main__":
    sys.exit(main())
