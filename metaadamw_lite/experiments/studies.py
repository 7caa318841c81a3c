"""Which runs belong together, and making all that have no record yet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import joblib
import torch
from tqdm import tqdm

from metaadamw_lite.experiments import TASKS
from metaadamw_lite.experiments.records import RunKey, read_record
from metaadamw_lite.experiments.task import PROFILES, PROTOCOLS
from metaadamw_lite.experiments.training import VARIANTS, RunInProgressError, run

SEEDS = 5
STUDIES = ("main", "smoke")


def study_runs(study: str) -> list[RunKey]:
    """The runs of a study, in the order in which they are wanted: whole pairs first, seed by seed.

    Args:
        study: "main" (Table 2: every task, arm and protocol, five seeds, profiles ``paper`` and ``lite``),
            "main/paper" or "main/lite" for one profile, or "smoke".

    Raises:
        ValueError: for an unknown study or profile.
    """
    name, _, profile = study.partition("/")
    if name not in STUDIES or (profile and (name != "main" or profile not in PROFILES)):
        allowed = ["main", *(f"main/{p}" for p in PROFILES if p != "smoke"), "smoke"]
        raise ValueError(f"study is {study!r}; allowed are {', '.join(allowed)}")
    profiles = ["smoke"] if name == "smoke" else [profile] if profile else ["paper", "lite"]
    seeds = 1 if name == "smoke" else SEEDS
    return [
        RunKey(task, variant, protocol, p, seed)
        for p in profiles
        for seed in range(seeds)
        for protocol in PROTOCOLS
        for task in TASKS
        for variant in VARIANTS
    ]


def missing(runs: list[RunKey], results: Path) -> list[RunKey]:
    """Those that have no record. A file that is no record raises a ``RecordError``."""
    return [key for key in runs if not _done(key, results)]


def _done(key: RunKey, results: Path) -> bool:
    path = key.path(results)
    if path.exists():
        read_record(path)
        return True
    return False


def sweep(
    study: str,
    results: Path,
    jobs: int | None = None,
    scheduler: str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> list[RunKey]:
    """Make all runs of a study that have no record, several at once, and return those that failed.

    Killed at any moment, the next call goes on where this one was. Several sweeps may work on one study: a run that
    another process is at is left to it.

    Args:
        study: as ``study_runs`` takes it.
        results: folder of the records.
        jobs: runs at a time; by default one for each core, or all workers of the cluster.
        scheduler: address of a Dask scheduler to send the runs to, instead of processes on this machine.
        device: where the runs compute.
        progress: show a bar over the runs.
    """
    todo = missing(study_runs(study), results)
    with _workers(scheduler, jobs) as workers:
        outcomes = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)(
            joblib.delayed(_one)(key, results.resolve(), device, None if scheduler else workers) for key in todo
        )
        failed = []
        for key, error in tqdm(outcomes, total=len(todo), desc=study, unit="run", disable=not progress):
            if error:
                failed.append(key)
                tqdm.write(f"{key}: {error}")
    return failed


def _one(key: RunKey, results: Path, device: str, sharing: int | None) -> tuple[RunKey, str | None]:
    """One run in a worker: its key and what went wrong, if anything. A failure must not end the other runs."""
    if sharing:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // sharing))
    try:
        run(key, results, device, progress=False)
    except RunInProgressError:
        return key, None
    except Exception as error:
        return key, f"{type(error).__name__}: {error}"
    return key, None


@contextmanager
def _workers(scheduler: str | None, jobs: int | None) -> Iterator[int]:
    """joblib on local processes, or on a Dask cluster; yields the number of runs at a time."""
    if scheduler is None:
        with joblib.parallel_config(backend="loky"):
            yield jobs or os.cpu_count() or 1
    else:
        from dask.distributed import Client

        with Client(scheduler), joblib.parallel_config(backend="dask"):  # type: ignore[no-untyped-call]
            yield jobs or -1


def status_lines(results: Path) -> Iterator[str]:
    """What is recorded and what is missing, a line for each profile, task, protocol and arm of the main study."""
    for profile in ("paper", "lite"):
        runs = study_runs(f"main/{profile}")
        for task in TASKS:
            for protocol in PROTOCOLS:
                for variant in VARIANTS:
                    keys = [k for k in runs if (k.task, k.protocol, k.variant) == (task, protocol, variant)]
                    left = missing(keys, results)
                    note = f"missing seeds {', '.join(str(k.seed) for k in left)}" if left else "complete"
                    done = f"{len(keys) - len(left)}/{len(keys)}"
                    yield f"main/{profile:<6} {task:<10} {protocol:<6} {variant:<17} {done}  {note}"
