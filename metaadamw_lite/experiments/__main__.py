"""The command line: ``python -m metaadamw_lite.experiments run | sweep | status | sizing | bench``.

Without a command it lists the studies, with their missing runs and the time for these.
"""

import argparse
import os
import sys

from metaadamw_lite.experiments.extra import say_which_extra

with say_which_extra():
    from tabulate import tabulate

    from metaadamw_lite.experiments import NOISY, TASKS
    from metaadamw_lite.experiments.bench import run_bench
    from metaadamw_lite.experiments.command import run_command
    from metaadamw_lite.experiments.lope_study import ARMS, NOISE
    from metaadamw_lite.experiments.published import VARIABLE
    from metaadamw_lite.experiments.records import Records, RunKey, default_results, expanded, expanded_folder, strays
    from metaadamw_lite.experiments.sizing import sizing_table
    from metaadamw_lite.experiments.studies import (
        STUDIES,
        STUDIES_OF_PHI,
        STUDIES_OF_RELATIVES,
        STUDIES_OF_RIVALS,
        costs,
        count_endings,
        status,
        status_lines,
        study_runs,
        sweep,
    )
    from metaadamw_lite.experiments.task import PROFILES, PROTOCOLS, SOURCES
    from metaadamw_lite.experiments.training import run
    from metaadamw_lite.experiments.variants import VARIANTS

NAMES = (*VARIANTS, *ARMS)
"""The names of variants, and of an adaptation's arms."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the commands."""
    top = argparse.ArgumentParser(
        prog="python -m metaadamw_lite.experiments", description="Run the paper's experiments."
    )
    commands = top.add_subparsers(dest="command", help="without one: a table of the studies")

    one = commands.add_parser("run", help="one training run; writes one record")
    one.add_argument("task", choices=[*TASKS, *NOISY, *NOISE], metavar="TASK", help=", ".join([*TASKS, *NOISY, *NOISE]))
    one.add_argument("--optimizer", required=True, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    one.add_argument("--seed", type=int, default=0)
    one.add_argument(
        "--profile", choices=PROFILES, default="lite", help="smoke: seconds, synthetic data (default: lite)"
    )
    one.add_argument(
        "--protocol", choices=PROTOCOLS, default="paper", help="default: paper; noisy tasks have clean only"
    )
    one.add_argument("--data", choices=SOURCES, default="real", help="synthetic: a stand-in of the same shape")

    many = commands.add_parser("sweep", help="all runs of a study that have no record yet")
    studies = "; ".join(f"{name}: {what}" for name, what in STUDIES.items())
    many.add_argument("study", help=f"{studies}. With /paper or /lite for one profile")
    many.add_argument(
        "--task",
        action="append",
        choices=[*TASKS, *NOISY, *NOISE],
        metavar="TASK",
        help="only this task (may be repeated)",
    )
    many.add_argument(
        "--jobs", type=int, help="runs at a time (default: one for each core, or as many as fit on the GPU)"
    )
    many.add_argument("--scheduler", metavar="ADDRESS", help="send the runs to the Dask cluster at this address")

    state = commands.add_parser("status", help="what is recorded, what is missing")
    state.add_argument("study", nargs="?", help="one study in detail (default: how much there is of each)")
    sizes = commands.add_parser("sizing", help="whether lite is small and whole, from the records of baseline/lite")
    sizes.add_argument("--csv", metavar="FILE", help="write the table here, too")
    for command in (one, many):
        command.add_argument("--device", default="auto", help="as torch names it (default: a GPU where there is one)")
        command.add_argument(
            "--reference", metavar="PATH", help=f"a clone of the authors' released code (default: ${VARIABLE})"
        )
    for command in (one, many, state, sizes):
        command.add_argument(
            "--results",
            metavar="FOLDER",
            default=default_results(),
            help="folder of the records (default: data/results)",
        )

    bench = commands.add_parser("bench", help="what MetaAdamW costs beside torch's fused AdamW")
    bench.add_argument("--device", default="auto", help="as torch names it (default: a GPU where there is one)")
    bench.add_argument("--reference", metavar="PATH", help="a clone of the authors' released code")
    bench.add_argument("--json", metavar="FILE", help="write the record here")
    bench.add_argument("--seconds", type=float, default=6.0, help="how long each contest goes on (default: 6)")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 1 for a sweep with runs missing at its end, else as ``run_command``."""
    return run_command(
        lambda: _do(parser().parse_args(arguments)),
        "interrupted; the same command goes on from the last whole epoch (an adaptation and the bench begin again)",
    )


def _do(args: argparse.Namespace) -> int:
    if args.command is None:
        table = costs(default_results())
        table["about"] = [STUDIES[study.partition("/")[0]] for study in table.index]
        print(tabulate(table, headers="keys", tablefmt="plain", disable_numparse=True))
        print("\n`sweep STUDY` makes what is missing, `status STUDY` lists it, `--help` has the other commands.")
        return 0
    if args.command == "bench":
        run_bench(args.device, args.reference, args.json, args.seconds)
        return 0
    results = expanded_folder(args.results, "--results")
    if getattr(args, "reference", None) is not None:  # workers of a sweep inherit the environment
        os.environ[VARIABLE] = str(expanded_folder(args.reference, "--reference").resolve())
    if args.command != "run" and (passed := strays(results)):
        print(f"warning: passed over what is no record: {', '.join(map(str, passed))}", file=sys.stderr)
    if args.command == "run":
        key = RunKey(args.task, args.optimizer, args.protocol, args.profile, args.seed, args.data)
        record = run(key, results, args.device)
        best = record["best"]
        outcome = (
            "no finite epoch"
            if best is None
            else f"best {record['metric']} {best['metric']:.6g} in epoch {best['epoch']}"
        )
        why = f" ({record['error']})" if "error" in record else ""
        print(f"{key.path(results)}: {record['status']}{why}, {outcome}, data: {record['data']}")
    elif args.command == "sweep":
        failed = sweep(args.study, results, args.task, args.jobs, args.scheduler, args.device)
        ended = count_endings(study_runs(args.study, results, args.task), results)
        print(f"{args.study}: " + ", ".join(f"{n} {status}" for status, n in ended.items()))
        return 1 if failed else 0
    elif args.command == "sizing":
        table = sizing_table(results)
        print(table.to_string())
        if args.csv is not None:
            table.to_csv(expanded(args.csv, "--csv"), float_format="%.4g")
    elif args.study:
        print(status_lines(args.study, results))
    else:
        records = Records(results)
        others = (status(records, studies) for studies in (STUDIES_OF_PHI, STUDIES_OF_RIVALS))
        tables = [status(records), *others, status(records, STUDIES_OF_RELATIVES).T]
        print("\n\n".join(table.to_string() for table in (*tables, costs(records))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
