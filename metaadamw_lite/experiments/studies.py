"""The runs of each study, and a sweep that makes the missing ones."""

import math
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import joblib
import pandas as pd
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tabulate import tabulate

from metaadamw_lite.checks import check_choice, check_count
from metaadamw_lite.experiments import NOISY, TASKS
from metaadamw_lite.experiments.budget import LEARNED, SEARCHES, searched_as
from metaadamw_lite.experiments.circularity import CIRCULARITY, UNREPLACED
from metaadamw_lite.experiments.departures import ALL, DEPARTURES, changes
from metaadamw_lite.experiments.dose import EVERYWHERE, TWINS
from metaadamw_lite.experiments.ladder import LADDER
from metaadamw_lite.experiments.lope_study import ARMS as LOPE_ARMS
from metaadamw_lite.experiments.lope_study import NOISE
from metaadamw_lite.experiments.null import PHI_SEEDS, frozen_phi, trained_phi
from metaadamw_lite.experiments.paired import improvements_by_seed, pairs_needed
from metaadamw_lite.experiments.peers import PEERS
from metaadamw_lite.experiments.progress import progress_bar
from metaadamw_lite.experiments.published import RELEASED, VARIABLE
from metaadamw_lite.experiments.records import Record, Records, RunKey, default_results, papers_gain, read_records
from metaadamw_lite.experiments.replay import ENDS, REPLAY, WITH_ENDS
from metaadamw_lite.experiments.task import PROTOCOLS
from metaadamw_lite.experiments.training import (
    RunInProgressError,
    abandoned,
    check_settings_match,
    forget_abandoned,
    pick_device,
    run,
    run_settings,
)
from metaadamw_lite.experiments.transfer import TRANSFER, TRANSFER_TASKS
from metaadamw_lite.experiments.variants import (
    ABLATIONS,
    ARMS,
    SEEDS,
    VARIANTS,
    WEIGHTED,
    at_learning_rate,
    changes_settings,
    equal_arm,
    learning_rates,
)

FEW_SEEDS = range(3)
"""Seeds of studies with many arms: ``lilaw``, ``lope``, ``dose`` and ``transfer``."""
NULL_SEEDS = range(2)
"""Seeds of ``null``, for each of its many Φ's."""
LADDER_SEEDS = range(10)
DEPARTURE_TASKS = ("wikitext2", "etth1")
"""The tasks with runs of every departure."""
SEARCH_SEEDS = range(100, 102)
"""Seeds of the searches for a learning rate, apart from those of all reported runs."""

STUDIES = {
    "main": "Table 2, Table 5 and figures 1 to 5: every task, arm and protocol",
    "baseline": "AdamW with a learning rate that was searched for",
    "ablation": "Table 3: every row that differs from MetaAdamW, under the paper's protocol",
    "null": "32 fresh Φ's that no other run has, never trained, and on WikiText-2 also trained",
    "ladder": "is the Transformer needed? One learned α, one for each group, an MLP, Φ",
    "dose": "Φ trained harder, one factor at a time, on WikiText-2; the most telling on all tasks",
    "replay": "AdamW with a recorded run's factors held constant, and with its mean schedule",
    "circularity": "MetaAdamW with the terms of its meta-loss replaced by fixed targets and by constants",
    "transfer": "a Φ that was trained on one task, frozen on another",
    "published": "the published code: each departure from the text, and the released optimizer itself",
    "budget": "equal searches for AdamW, the control and MetaAdamW, with and without a schedule, and peers",
    "lilaw": "AdamW with and without LiLAW on wrong labels, and LiLAW's own settings",
    "together": "AdamW and MetaAdamW, each with and without LiLAW, on wrong labels",
    "lope": "adapting a small GPT to noisy text, by LoPE, its parts, and LoRAs",
    "all": "every study above, one after the other",
    "smoke": "everything once, in seconds, on synthetic data",
}
STUDIES_OF_PAPER = ("main", "baseline", "ablation")
STUDIES_OF_PHI = ("null", "ladder", "dose", "replay", "circularity", "transfer")
"""Studies of random, constant and learned factors, in the profile "lite" only, under the paper's protocol."""
STUDIES_OF_RIVALS = ("published", "budget")
"""Studies of alternatives to MetaAdamW, in the profile "lite" only, under the paper's protocol."""
STUDIES_OF_RELATIVES = ("lilaw", "together", "lope")
SENSITIVITY_TASK = "cifar10-symmetric40"
TOGETHER = ("adamw", "metaadamw", "adamw-lilaw", "metaadamw-lilaw")
GPU_RUN_BYTES = 6 * 2**30
"""Memory of a GPU for one run, which limits the number of runs at a time."""


def study_runs(study: str, results: Path | Records, tasks: Sequence[str] | None = None) -> list[RunKey]:
    """Return the runs of a study, in the order of a sweep: whole comparisons first, seed by seed.

    Args:
        study: a name of ``STUDIES``, except for "smoke" also with "/paper" or "/lite" for one profile
            (``STUDIES_OF_PHI`` and ``STUDIES_OF_RIVALS`` have only "/lite").
        results: the records, or their folder. A complete search adds the runs at its best learning rate.
        tasks: only these; None for all.

    Raises:
        ValueError: for an unknown study, profile or task.
    """
    name, _, profile = study.partition("/")
    check_choice("study", study, [s for n in STUDIES for s in (n, *(f"{n}/{p}" for p in _profiles(n) if p != "smoke"))])
    known = tasks_of(name)
    tasks = known if tasks is None else list(dict.fromkeys(tasks))
    for task in tasks:
        check_choice("task", task, known)
    records = _records(results)
    return [key for p in ([profile] if profile else _profiles(name)) for key in _RUNS[name](p, tasks, records)]


def _profiles(name: str) -> list[str]:
    """Return the profiles of a study's runs."""
    lite_only = name in (*STUDIES_OF_PHI, *STUDIES_OF_RIVALS)
    return ["smoke"] if name == "smoke" else ["lite"] if lite_only else ["paper", "lite"]


def tasks_of(name: str) -> list[str]:
    """Return the tasks of a study's runs."""
    if name in ("all", "smoke"):
        return [*TASKS, *NOISY, *NOISE]
    few = {name: ["wikitext2", "etth1", "cifar10"] for name in ("null", "ladder", "circularity")}
    few |= {"lilaw": [*NOISY], "together": [SENSITIVITY_TASK], "lope": [*NOISE], "transfer": [*TRANSFER_TASKS]}
    return few.get(name, [*TASKS])


def _main(profile: str, tasks: Sequence[str], results: Records) -> Iterator[RunKey]:
    """Yield the first seeds of all tasks, then the further seeds of small runs by power, the cheapest task first."""
    for seed in SEEDS:
        for task in tasks:
            for protocol in PROTOCOLS:
                yield from (RunKey(task, arm, protocol, profile, seed) for arm in ARMS)
    if profile != "lite":
        return
    further = []
    for task in tasks:
        pairs = [[RunKey(task, arm, "paper", profile, seed) for arm in ARMS[1::-1]] for seed in SEEDS]
        records = [[_record_of(key, results) for key in pair] for pair in pairs]
        first = [[r for r in pair if r is not None] for pair in records]
        if all(len(pair) == 2 for pair in first):
            results_of = pd.DataFrame([[_metric(r) for r in pair] for pair in first], dtype=float)
            gains = improvements_by_seed(results_of[0], results_of[1], TASKS[task].lower_is_better)
            seconds = sum(epoch["seconds"] for pair in first for r in pair for epoch in r["epochs"])
            further.append((seconds, task, seeds_by_power(task, gains)))
    for _, task, planned in sorted(further, key=lambda f: f[0]):
        for seed in planned["paper"][len(SEEDS) :]:
            for protocol in PROTOCOLS:
                if seed in planned[protocol]:
                    yield from (RunKey(task, arm, protocol, profile, seed) for arm in ARMS)


def seeds_by_power(task: str, first: "pd.Series[float]") -> dict[str, range]:
    """Return the main study's seeds of small runs, which tell the paper's gain from none with a power of 80 %.

    Args:
        task: name.
        first: the gains of MetaAdamW over AdamW in percent in the pairs of the first five seeds, under ``paper``.

    Returns:
        By protocol: 10 to 40 seeds under ``paper``, half as many under ``clean``. The first five while one is missing,
        and for a task that the paper lacks.

    Raises:
        FileNotFoundError: outside a checkout, which has the paper's gain.
    """
    gain = papers_gain(task)
    if len(first) < len(SEEDS) or math.isnan(gain):
        return dict.fromkeys(PROTOCOLS, SEEDS)
    needed = pairs_needed(first, gain)
    return {"paper": range(needed), "clean": range(math.ceil(needed / 2))}


def _metric(record: dict[str, Any]) -> float:
    """Return the best validation metric of a run, or NaN for one that failed or has no finite epoch."""
    metric = None if record["status"] == "failed" or record["best"] is None else record["best"]["metric"]
    return math.nan if metric is None else float(metric)


def _baseline(profile: str, tasks: Sequence[str], results: Records) -> Iterator[RunKey]:
    """Yield each search, and after a complete one the runs at its best rate with the main study's seeds."""
    for protocol in reversed(PROTOCOLS):  # ``clean`` first, since its search cannot see the reported test part
        for task in tasks:
            search = search_runs(task, protocol, profile)
            yield from search
            best = best_variant(search, results)
            if best is not None:
                yield from (RunKey(task, best, protocol, profile, seed) for seed in SEEDS)


def search_runs(task: str, protocol: str, profile: str, arm: str = "adamw", schedule: str = "constant") -> list[RunKey]:
    """Return the runs that choose the learning rate of an arm with a schedule."""
    return [
        RunKey(task, searched_as(arm, schedule, lr), protocol, profile, seed)
        for seed in SEARCH_SEEDS
        for lr in learning_rates(profile)
    ]


def best_variant(search: Sequence[RunKey], results: Path | Records) -> str | None:
    """Return the variant with the best mean validation metric of a search, or None while a run has no record.

    A variant with a run that failed, or has no finite epoch, is not chosen.
    """
    better = min if TASKS[search[0].task].lower_is_better else max
    records = _records(results)
    metrics: dict[str, list[float]] = {}
    for key in search:
        record = _record_of(key, records)
        if record is None:
            return None
        metrics.setdefault(key.variant, []).append(_metric(record))
    means = {variant: fmean(of_it) for variant, of_it in metrics.items() if not any(map(math.isnan, of_it))}
    return better(means, key=lambda v: means[v]) if means else None


def _ablation(profile: str, tasks: Sequence[str], _: Records) -> Iterator[RunKey]:
    for seed in SEEDS:
        for task in tasks:
            for variant in (*ARMS[:2], *ABLATIONS):
                if variant in ARMS or changes_settings(TASKS[task].settings(profile), variant):
                    yield RunKey(task, variant, "paper", profile, seed)


def _null(profile: str, tasks: Sequence[str], _: Records) -> Iterator[RunKey]:
    """Yield the arms of ``main``, then Φ by Φ, so that the spread over Φ's shows before all are run."""
    for seed in NULL_SEEDS:
        yield from (RunKey(task, arm, "paper", profile, seed) for task in tasks for arm in ARMS)
    for phi in PHI_SEEDS:
        for task in tasks:
            kinds = (frozen_phi, trained_phi) if task == "wikitext2" else (frozen_phi,)
            yield from (RunKey(task, kind(phi), "paper", profile, seed) for seed in NULL_SEEDS for kind in kinds)


def _ladder(profile: str, tasks: Sequence[str], results: Records) -> Iterator[RunKey]:
    """Yield AdamW and the rungs, then AdamW at its best rate once ``baseline`` has found it."""
    for seed in LADDER_SEEDS:
        for task in tasks:
            yield from (RunKey(task, variant, "paper", profile, seed) for variant in ("adamw", *LADDER))
    for task in tasks:
        best = best_variant(search_runs(task, "paper", profile), results)
        if best not in (None, "adamw"):
            yield from (RunKey(task, best, "paper", profile, seed) for seed in LADDER_SEEDS)


def _dose(profile: str, tasks: Sequence[str], _: Records) -> Iterator[RunKey]:
    """Yield every variant and its untrained twin on WikiText-2, ``EVERYWHERE`` on other tasks, beside the arms."""
    for seed in FEW_SEEDS:
        for task in sorted(tasks, key=lambda t: t != "wikitext2"):
            chosen = TWINS if task == "wikitext2" else ("metaadamw", *EVERYWHERE)
            variants = dict.fromkeys(("adamw", *(v for variant in chosen for v in (TWINS[variant], variant))))
            here = [v for v in variants if equal_arm(TASKS[task].settings(profile), v) in (None, v)]
            yield from (RunKey(task, variant, "paper", profile, seed) for variant in here)


def _replay(profile: str, tasks: Sequence[str], results: Records) -> Iterator[RunKey]:
    """Yield the sources beside AdamW, and the replays of recorded sources."""
    runs = _sources_first(REPLAY, profile, tasks, results, SEEDS)
    return (key for key in runs if key.variant not in ENDS or key.task in WITH_ENDS)


def _transfer(profile: str, tasks: Sequence[str], results: Records) -> Iterator[RunKey]:
    """Yield Φ trained on each task, beside AdamW, then frozen on each."""
    return _sources_first(TRANSFER, profile, tasks, results, FEW_SEEDS)


def _sources_first(
    variants: Iterable[str], profile: str, tasks: Sequence[str], results: Records, seeds: Iterable[int]
) -> Iterator[RunKey]:
    """Yield AdamW, the sources of some variants, and the runs of these variants whose source has recorded factors."""
    seeds = list(seeds)
    runs = [RunKey(task, variant, "paper", profile, seed) for seed in seeds for task in tasks for variant in variants]
    sources = {key: _source(key) for key in runs}
    plain = (RunKey(task, "adamw", "paper", profile, seed) for seed in seeds for task in tasks)
    yield from dict.fromkeys([*plain, *(source for source in sources.values() if source.task in tasks)])
    usable = {source: bool((_record_of(source, results) or {}).get("trace")) for source in {*sources.values()}}
    yield from (key for key, source in sources.items() if usable[source])


def _source(key: RunKey) -> RunKey:
    source = VARIANTS[key.variant].source
    assert source is not None
    return source(key)


def _circularity(profile: str, tasks: Sequence[str], _: Records) -> Iterator[RunKey]:
    for seed in SEEDS:
        for task in tasks:
            variants = dict.fromkeys((*ARMS, *UNREPLACED.values(), *CIRCULARITY))
            yield from (RunKey(task, variant, "paper", profile, seed) for variant in variants)


def _published(profile: str, tasks: Sequence[str], _: Records) -> Iterator[RunKey]:
    """Yield the arms, departures on two tasks, U5 where it changes a run, then the released optimizer on all tasks."""
    for seed in SEEDS:
        for task in tasks:
            settings = TASKS[task].settings(profile)
            names = [f"departure-{d}" for d in DEPARTURES if changes(d, settings)] if task in DEPARTURE_TASKS else []
            names += [ALL] if names else ["departure-u5"] if changes("u5", settings) else []
            yield from (RunKey(task, variant, "paper", profile, seed) for variant in (*ARMS, *names))
    for seed in SEEDS:
        yield from (RunKey(task, variant, "paper", profile, seed) for task in tasks for variant in RELEASED)


def _budget(profile: str, tasks: Sequence[str], results: Records) -> Iterator[RunKey]:
    """Yield, task by task, the peers, the searches, and the best rate of each complete search with fresh seeds."""
    for task in tasks:
        yield from (RunKey(task, variant, "paper", profile, seed) for seed in SEEDS for variant in (*PEERS, LEARNED))
        for arm, schedule in SEARCHES:
            search = search_runs(task, "paper", profile, arm, schedule)
            yield from search
            best = best_variant(search, results)
            if best is not None:
                yield from (RunKey(task, best, "paper", profile, seed) for seed in SEEDS)


def _lilaw(profile: str, tasks: Sequence[str], _: Records) -> Iterator[RunKey]:
    for seed in FEW_SEEDS:
        for task in tasks:
            yield from (RunKey(task, arm, "clean", profile, seed) for arm in ("adamw", "adamw-lilaw"))
    if SENSITIVITY_TASK in tasks:
        variants = [v for v in WEIGHTED if v not in TOGETHER]
        yield from (RunKey(SENSITIVITY_TASK, v, "clean", profile, seed) for seed in FEW_SEEDS for v in variants)


def _together(profile: str, tasks: Sequence[str], _: Records) -> Iterator[RunKey]:
    for seed in SEEDS:
        for task in tasks:
            yield from (RunKey(task, arm, "clean", profile, seed) for arm in TOGETHER)


def _lope(profile: str, tasks: Sequence[str], _: Records) -> Iterator[RunKey]:
    for seed in FEW_SEEDS:
        for task in tasks:
            yield from (RunKey(task, arm, "clean", profile, seed) for arm in LOPE_ARMS)


def _all(profile: str, tasks: Sequence[str], results: Records) -> Iterator[RunKey]:
    """Yield every run once, those of the released optimizer only if its code is at hand."""
    studies = [name for name in _RUNS if name not in ("all", "smoke") and profile in _profiles(name)]
    wanted = ((name, [task for task in tasks if task in tasks_of(name)]) for name in studies)
    runs = dict.fromkeys(key for name, known in wanted for key in _RUNS[name](profile, known, results))
    yield from (key for key in runs if key.variant not in RELEASED or os.environ.get(VARIABLE))


def _smoke(profile: str, tasks: Sequence[str], results: Records) -> Iterator[RunKey]:
    of_the_paper, wrong = ([t for t in tasks if t in group] for group in (TASKS, NOISY))
    runs = [key for study in (_main, _ablation) for key in study(profile, of_the_paper, results)]
    runs += [
        RunKey(task, at_learning_rate(lr), "paper", profile, 0)
        for task in of_the_paper
        for lr in learning_rates(profile)
    ]
    runs += [
        *_lilaw(profile, wrong, results),
        *_together(profile, [t for t in wrong if t == SENSITIVITY_TASK], results),
    ]
    runs += _lope(profile, [t for t in tasks if t in NOISE], results)
    # Each variant of these studies once, on the task that has all of them.
    where = dict.fromkeys(STUDIES_OF_PHI, "wikitext2") | dict.fromkeys(STUDIES_OF_RIVALS, "etth1")
    for name, task in where.items():
        runs += _RUNS[name](profile, [task] if task in of_the_paper else [], results)
    more_phis = {kind(phi) for phi in PHI_SEEDS[1:] for kind in (frozen_phi, trained_phi)}
    left_out = more_phis if os.environ.get(VARIABLE) else more_phis.union(RELEASED)
    if "etth1" in of_the_paper:
        last = learning_rates(profile)[-1]
        runs += [
            RunKey("etth1", searched_as(*search, last), "paper", profile, 0)
            for search in SEARCHES
            if search[1] != "constant"
        ]
    runs = [key for key in runs if key.variant not in left_out]
    yield from dict.fromkeys(key for key in runs if key.seed == 0)


_RUNS = {
    "main": _main,
    "baseline": _baseline,
    "ablation": _ablation,
    "null": _null,
    "ladder": _ladder,
    "dose": _dose,
    "replay": _replay,
    "circularity": _circularity,
    "transfer": _transfer,
    "published": _published,
    "budget": _budget,
    "lilaw": _lilaw,
    "together": _together,
    "lope": _lope,
    "all": _all,
    "smoke": _smoke,
}


def missing(runs: Sequence[RunKey], results: Path | Records) -> list[RunKey]:
    """Return the runs without a record.

    Raises:
        RecordError: for a file that is no record.
        ValueError: for a record with other settings than those of its task and profile.
    """
    records = _records(results)
    return [key for key in runs if _record_of(key, records) is None]


def _records(results: Path | Records) -> Records:
    return results if isinstance(results, Records) else Records(results)


def _record_of(key: RunKey, records: Records) -> Record | None:
    record = records.get(key)
    return None if record is None else check_settings_match(run_settings(key), record, key.path(records.path))


def sweep(
    study: str,
    results: Path,
    tasks: Sequence[str] | None = None,
    jobs: int | None = None,
    scheduler: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> list[RunKey]:
    """Make all missing runs of a study, several at once, and return those that could not be made.

    After a kill at any moment the next call goes on from there. Several sweeps may work on one study: each leaves a run
    in progress to its process, and checks it at the end. A run that diverges or fails leaves a record with that status.

    Args:
        study, results, tasks: as ``study_runs`` takes them.
        jobs: runs at a time; by default one for each core, within the GPU's memory, or one for each thread of the
            cluster's workers.
        scheduler: address of a Dask scheduler to send the runs to, instead of processes on this machine. Its workers
            must see ``results`` under the same path.
        device: as ``run`` takes it; on a CPU each run has one thread.
        progress: show a bar over the runs of the study, with the remaining time.

    Raises:
        ValueError: for an unknown study, profile or task, for fewer jobs than one, or for a device that this machine
            does not have.
        RecordError: if a file in a record's place is no record.
        OSError: if ``results`` cannot be written to, the scheduler does not answer, or a worker is killed before it
            begins a run.
    """
    check_count(jobs=1 if jobs is None else jobs)
    if scheduler is None:  # else each worker picks its own
        device = pick_device(device)
    results = results.resolve()
    errors: dict[RunKey, str] = {}
    busy: set[RunKey] = set()
    unexplained = False
    runs = study_runs(study, results, tasks)
    todo = missing(runs, results)
    if todo:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):  # a read-only folder fails here, before any run
            pass
    with (
        _workers(scheduler, jobs, device) as outcomes,
        progress_bar(
            total=len(runs), initial=len(runs) - len(todo), desc=study, unit="run", disable=not progress, smoothing=0
        ) as bar,
    ):
        if todo and progress:
            at_a_time = jobs or (runs_at_a_time(device) if scheduler is None else 1)
            # Sources and searches add runs when they are done: as many as in the committed records.
            now = set(todo)
            later = missing([key for key in study_runs(study, default_results(), tasks) if key not in now], results)
            seconds = expected_seconds([*todo, *later], results)
            estimate = format_duration(seconds, at_a_time)
            bar.write(f"{study}: {len(todo)} runs to make now, {len(later)} later, {estimate}")
        while todo:
            for key in todo:
                forget_abandoned(key, results)  # of sweeps before this one
            try:
                for key, outcome in outcomes(todo, results, busy.issuperset(todo)):
                    if outcome is None and missing([key], results):
                        outcome = f"its worker left no record in {results}; is that folder on a disk that all see?"
                    if outcome is None:
                        bar.update()
                    elif outcome == _BUSY:
                        busy.add(key)
                    else:
                        errors[key] = outcome
                        bar.write(f"{key}: {outcome}")
            except TerminatedWorkerError as error:  # all workers end with one that is killed
                killed = [key for key in todo if key not in errors and abandoned(key, results)]
                if not killed and unexplained:
                    raise ChildProcessError("a worker was killed before it began a run (out of memory?)") from error
                unexplained = not killed  # or another sweep has taken its run in the meantime
                errors |= dict.fromkeys(killed, _KILLED)
                if killed:
                    bar.write(f"{_KILLED} (out of memory?) while these went on: {', '.join(map(str, killed))}")
            runs = study_runs(study, results, tasks)  # a search that is done has added runs
            todo = [key for key in missing(runs, results) if key not in errors]
            bar.total, bar.n = len(runs), len(runs) - len(todo) - len(errors)  # other sweeps make runs, too
            bar.refresh()
    return list(errors)


def expected_seconds(runs: Sequence[RunKey], results: Path) -> float | None:
    """Estimate the seconds of some runs, one after the other, each as long as the mean run of its task and profile.

    The means come from the folder, or from the committed records without a run there. None if one is in neither.
    """
    wanted = {(key.task, key.profile) for key in runs}
    seconds = recorded_seconds(results, {task for task, _ in wanted})
    lacking = {task for task, profile in wanted if (task, profile) not in seconds}
    seconds = recorded_seconds(default_results(), lacking) | seconds
    return sum(seconds[key.task, key.profile] for key in runs) if wanted <= seconds.keys() else None


def recorded_seconds(results: Path, tasks: Iterable[str]) -> dict[tuple[str, str], float]:
    """Return the mean seconds of recorded runs of some tasks, by task and profile."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for task in tasks:
        for record in read_records(results, task):
            of_one = sum(epoch.get("seconds", 0.0) for epoch in record["epochs"])
            seconds.setdefault((task, record["run"]["profile"]), []).append(of_one)
    return {where: fmean(of_runs) for where, of_runs in seconds.items()}


def format_duration(seconds: float | None, at_a_time: int) -> str:
    """Format an estimate of ``expected_seconds`` for a person."""
    if seconds is None:
        return "for how long is not known: not every task has a recorded run of this profile"
    return f"about {seconds / at_a_time / 3600:.1f} hours with {at_a_time} at a time, going by the recorded runs"


Outcome = tuple[RunKey, str | None]
"""A run, and its error, if any."""
_BUSY, _KILLED = "busy", "a worker was killed"


def _run_one(key: RunKey, results: Path, device: str, wait: bool) -> Outcome:
    """Make one run in a worker, and return its error, so that the other runs go on."""
    try:
        run(key, results, device, progress=False, wait=wait)
    except RunInProgressError:
        return key, _BUSY
    except Exception as error:
        return key, f"{type(error).__name__}: {error}"
    return key, None


def runs_at_a_time(device: str) -> int:
    """Return the number of usable cores, on a GPU within its free memory."""
    cores = int(joblib.cpu_count())
    if torch.device(device).type != "cuda":
        return cores
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return max(1, min(cores, int(free) // GPU_RUN_BYTES))


@contextmanager
def _workers(
    scheduler: str | None, jobs: int | None, device: str
) -> Iterator[Callable[[list[RunKey], Path, bool], Iterator[Outcome]]]:
    """Yield a function that executes runs, here or on a Dask cluster, and returns outcomes as they finish."""
    if scheduler is None:
        count = jobs or runs_at_a_time(device)

        def here(todo: list[RunKey], results: Path, wait: bool) -> Iterator[Outcome]:
            needed = min(count, len(todo))
            parallel = joblib.Parallel(  # with one worker joblib would make the runs in this process
                n_jobs=max(2, needed), pre_dispatch=needed, return_as="generator_unordered", batch_size=1
            )
            yield from parallel(joblib.delayed(_run_one)(key, results, device, wait) for key in todo)

        with joblib.parallel_config(backend="loky", initializer=_end_with, initargs=(os.getpid(),)):
            yield here
    else:
        from dask.distributed import Client

        with Client(scheduler) as client:  # type: ignore[no-untyped-call]
            client.wait_for_workers(1, timeout=60)
            yield lambda todo, results, wait: _run_on_cluster(client, jobs, todo, results, device, wait)


def _run_on_cluster(
    client: Any, jobs: int | None, todo: list[RunKey], results: Path, device: str, wait: bool
) -> Iterator[Outcome]:
    """Execute runs on a Dask cluster, and yield their outcomes; a run whose workers are killed repeatedly fails."""
    from dask.distributed import KilledWorker, as_completed

    waiting = list(reversed(todo))
    keys: dict[Any, RunKey] = {}
    running = as_completed()  # type: ignore[no-untyped-call]

    def fill() -> None:
        while waiting and len(keys) < (jobs or max(1, sum(client.nthreads().values()))):
            key = waiting.pop()
            future = client.submit(_run_one, key, results, device, wait, pure=False)
            keys[future] = key
            running.add(future)  # type: ignore[no-untyped-call]

    fill()
    for future in running:
        key = keys.pop(future)
        error = future.exception()
        what = f"{_KILLED} (out of memory?), " if isinstance(error, KilledWorker) else ""
        yield future.result() if error is None else (key, f"{what}{type(error).__name__}: {error}")
        fill()


def _end_with(parent: int) -> None:
    """End this worker once its parent process is gone; a thread checks that every second."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def count_endings(runs: Sequence[RunKey], results: Path | Records) -> "Counter[str]":
    """Count the endings of recorded runs: "finished", "stopped early", "diverged", "failed"."""
    records = _records(results)
    return Counter(record["status"] for key in runs if (record := _record_of(key, records)) is not None)


def status(results: Path | Records, studies: Sequence[str] = STUDIES_OF_PAPER) -> pd.DataFrame:
    """Count the recorded runs of some studies: a row for each study and profile, a column for each task.

    Args:
        results: the records, or their folder.
        studies: names of ``STUDIES``.
    """
    rows, records = {}, _records(results)
    for name in studies:
        for profile in _profiles(name):
            study = f"{name}/{profile}"
            keys = {task: study_runs(study, records, [task]) for task in tasks_of(name)}
            rows[study] = {t: f"{len(k) - len(missing(k, records))}/{len(k)}" for t, k in keys.items()}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("–")


def costs(results: Path | Records) -> pd.DataFrame:
    """Count the missing runs of every study, and the hours they would take: a row for each study and profile.

    The hours are of one run after the other, each as long as the mean recorded run of its task and profile; "2.5 + ?"
    where a task has no such run. A run that two studies share counts in both.
    """
    rows, records = {}, _records(results)
    seconds = recorded_seconds(records.path, tasks_of("smoke"))  # "smoke" has all tasks
    for name in STUDIES:
        for profile in _profiles(name):
            study = name if profile == "smoke" else f"{name}/{profile}"
            runs = study_runs(study, records)
            left = missing(runs, records)
            rows[study] = {
                "recorded": f"{len(runs) - len(left)}/{len(runs)}",
                "missing": len(left),
                "hours": _hours(left, seconds),
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename(columns={"hours": "hours, one run after the other"})


def _hours(runs: Sequence[RunKey], seconds: Mapping[tuple[str, str], float]) -> str:
    known = [seconds[key.task, key.profile] for key in runs if (key.task, key.profile) in seconds]
    hours = f"{sum(known) / 3600:.1f}"
    return hours if len(known) == len(runs) else f"{hours} + ?" if known else "?"


def status_lines(study: str, results: Path) -> str:
    """List the recorded and missing runs of a study, a line for each task, protocol and variant, and their cost."""
    rows, records = [], Records(results)
    runs = study_runs(study, records)
    for task, protocol, profile, variant in dict.fromkeys((k.task, k.protocol, k.profile, k.variant) for k in runs):
        keys = [k for k in runs if (k.task, k.protocol, k.profile, k.variant) == (task, protocol, profile, variant)]
        left = missing(keys, records)
        note = f"missing seeds {', '.join(str(k.seed) for k in left)}" if left else "complete"
        bad = [
            f"{n} {status}" for status, n in count_endings(keys, records).items() if status in ("diverged", "failed")
        ]
        rows.append((task, protocol, profile, variant, f"{len(keys) - len(left)}/{len(keys)}", "; ".join([note, *bad])))
    left = missing(runs, records)
    cost = f"{len(left)} of {len(runs)} runs are missing"
    if left:
        cost += f": {format_duration(expected_seconds(left, results), 1)}"
    return f"{tabulate(rows, tablefmt='plain', disable_numparse=True)}\n{cost}"
