"""Measure the cost of MetaAdamW beside torch's fused AdamW: ``python -m metaadamw_lite.experiments bench``.

Every number is a ratio of times (or of peak memory) that were measured in turns in one run: baseline, ours, baseline,
ours, … Leave the machine idle otherwise. Seconds depend on the machine and help to judge the ratios.

``--reference PATH`` adds the authors' released code, from a clone of it, on the same models in the same run.
"""

import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from metaadamw_lite import MetaAdamW, factors, optimizer
from metaadamw_lite.buckets import Bucket, gather
from metaadamw_lite.checks import check_not_negative
from metaadamw_lite.experiments import TASKS, etth1, imdb, multi30k, wikitext2
from metaadamw_lite.experiments.progress import progress_bar
from metaadamw_lite.experiments.published import released_class, their_arguments
from metaadamw_lite.experiments.records import environment, expanded, expanded_folder, repository, write_atomically
from metaadamw_lite.experiments.task import Batch, Task
from metaadamw_lite.experiments.training import pick_device

DEPTHS = (8, 16, 32, 64, 128)
"""Layers of Φ for which a step and a meta-update are timed."""
SIZES = (10**5, 10**6, 10**7, 10**8)
"""Parameters for which a step is timed."""


@dataclass(frozen=True)
class Row:
    """One measured ratio.

    Attributes:
        measure: name of the measurement and its model.
        who: "ours" or "released code".
        ratio: median time over the baseline's median time; for memory, peak over peak.
        low, high: quartiles of the ratios of single rounds.
        seconds, baseline_seconds: the two medians (bytes for memory).
        target: the largest ratio wanted; None without a target.
    """

    measure: str
    who: str
    ratio: float
    low: float
    high: float
    seconds: float
    baseline_seconds: float
    target: float | None = None


# ---------------------------------------------------------------- models and batches


class Perceptron(nn.Module):
    """About ``parameters`` parameters in eight square linear layers, to see how the cost grows."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        width = round((parameters / 8) ** 0.5)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        """Linear layers with ReLU between them, (N, width) to (N, width)."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class LargeTransformer(nn.Module):
    """A language model's 101 million parameters: an embedding and eleven encoder layers of width 768."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30_000, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 11, enable_nested_tensor=False)


def task_model(name: str) -> nn.Module:
    """The model of a task at the paper's size."""
    task = TASKS[name]
    data = task.load("paper", task.settings("smoke"), "synthetic")
    sizes = {
        "etth1": {"window": etth1.WINDOW},
        "wikitext2": {"block": wikitext2.BLOCK},
        "multi30k": {"source_words": multi30k.VOCABULARY},
        "imdb": {"words": imdb.VOCABULARY},
    }.get(name, {})
    return task.build(task.settings("paper"), replace(data, sizes={**data.sizes, **sizes}))


def task_batch(name: str) -> Batch:
    """Random numbers in the shape of a task's training batch at the paper's settings."""
    size = TASKS[name].settings("paper").batch_size

    def words(length: int, most: int) -> Tensor:
        return torch.randint(4, most, (size, length), dtype=torch.int16)

    if name == "etth1":
        return torch.randn(size, etth1.WINDOW), torch.randn(size, 1)
    if name == "wikitext2":
        return (words(wikitext2.BLOCK, wikitext2.VOCABULARY),)
    if name == "multi30k":  # sentences of 8 to 28 words, padded as the task's are
        lengths = torch.randint(8, 29, (size, 1))
        padding = torch.arange(multi30k.LENGTH) >= lengths
        return tuple(words(multi30k.LENGTH, multi30k.VOCABULARY).masked_fill(padding, 0) for _ in range(2))
    if name == "cifar10":
        return torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (size,))
    return words(imdb.LENGTH, imdb.VOCABULARY), torch.randint(0, 2, (size,)), torch.full((size,), imdb.LENGTH)


STEPS: Mapping[str, tuple[Callable[[], nn.Module], int, int, float]] = {
    "step, ETTh1 model, Φ 8×16": (lambda: task_model("etth1"), 8, 16, 3.0),
    "step, ResNet-18, Φ 64×64": (
        lambda: task_model("cifar10").to(memory_format=torch.contiguous_format),  # the released code knows no other
        64,
        64,
        2.0,
    ),
    "step, Transformer 4+4 of width 256, Φ 128×64": (
        lambda: nn.Transformer(256, 8, 4, 4, 1024, batch_first=True),
        128,
        64,
        3.0,
    ),
    "step, 101 M parameters, Φ 8×16": (LargeTransformer, 8, 16, 1.7),
}
"""Model, layers and width of Φ, and target ratio on a CPU, by row about steps."""
GPU_STEP_TARGET = 2.0
MEMORY_MODELS = {"etth1": "ETTh1 model", "perceptron": "8 linear layers, 2.9 M parameters, batch of 2"}
"""One model whose memory is activations, and one whose memory is parameters."""

PARTS = {"statistics": (factors, "measure"), "Φ": (factors.Factors, "of"), "kernel": (optimizer, "move")}
"""The function of each part of a step. Triton's kernels on a GPU call none of them."""


# ---------------------------------------------------------------- measuring


def wait_for(device: torch.device) -> None:
    """Wait until a GPU is idle; return at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    contestants: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Time each contestant in rounds, after two warm-up calls each.

    Each round has its own order, since the caches that one contestant leaves help or hinder the next.

    Args:
        contestants: functions by name.
        device: idle before the clock is read.
        seconds: time after which no further round begins.
        least: the fewest rounds, whatever their time.

    Returns:
        Seconds of each round, by name.
    """

    def once(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        wait_for(device)
        return time.perf_counter() - start

    for call in contestants.values():
        once(call)
        once(call)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    order, shuffle = list(contestants.items()), random.Random(0).shuffle
    while len(times[order[0][0]]) < least or time.perf_counter() < end:
        shuffle(order)
        for name, call in order:
            times[name].append(once(call))
    return times


def compared(
    measure: str, times: Mapping[str, Sequence[float]], baseline: str, target: float | None = None
) -> list[Row]:
    """Return a row for every contestant but the baseline, from the times of ``in_turns``."""
    rows = []
    for name, mine in times.items():
        if name != baseline:
            low, high = np.quantile(np.divide(mine, times[baseline]), [0.25, 0.75])
            ours, theirs = statistics.median(mine), statistics.median(times[baseline])
            goal = target if name == "ours" else None
            rows.append(Row(measure, name, ours / theirs, float(low), float(high), ours, theirs, goal))
    return rows


def give_gradients(model: nn.Module) -> None:
    """Set random gradients, in the memory order of the parameters."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def optimizers(model: nn.Module, reference: Path | None, **phi: Any) -> dict[str, torch.optim.Optimizer]:
    """Return fused AdamW, ours and the released code, each for its own copy of the model and its gradients."""
    twins = [copy.deepcopy(model) for _ in range(2 if reference is None else 3)]
    for twin in twins:
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone(memory_format=torch.preserve_format)
    made: dict[str, torch.optim.Optimizer] = {
        "AdamW": torch.optim.AdamW(twins[0].parameters(), lr=5e-4, fused=True),
        "ours": MetaAdamW(twins[1].named_parameters(), lr=5e-4, fused=True, **phi),
    }
    if reference is not None:
        made["released code"] = build_released(reference, twins[2], None, **phi)
    return made


def build_released(path: Path, model: nn.Module, batch: Any, **phi: int) -> Any:
    """Return the released optimizer for a model: WikiText-2's settings in Table 4, with another size of Φ.

    Raises:
        FileNotFoundError: if there is no such code at ``path``.
    """
    arguments = their_arguments({"attn_heads": 6, **phi})
    return released_class(path)(model.parameters(), lr=5e-4, model=model, val_loader=[batch], **arguments)


def measure_steps(device: torch.device, reference: Path | None, seconds: float) -> list[Row]:
    """Measure one optimizer step on models from 0.4 to 101 million parameters."""
    rows = []
    for measure, (make, layers, width, target) in progress_bar(STEPS.items(), desc="steps"):
        model = make().to(device)
        give_gradients(model)
        made = optimizers(model, reference, attn_layers=layers, attn_hidden_dim=width)
        times = in_turns({name: o.step for name, o in made.items()}, device, seconds)
        rows += compared(measure, times, "AdamW", target if device.type == "cpu" else GPU_STEP_TARGET)
    return rows


@dataclass(frozen=True)
class Trainer:
    """A task's model with an optimizer, and three batches: B₁, B₂ and a validation batch."""

    task: Task
    model: nn.Module
    optimizer: Any
    batches: list[Batch]

    def forward(self) -> Tensor:
        """Return the loss of B₁, a scalar."""
        return self.task.loss(self.model, self.batches[0])

    def gradients(self) -> None:
        """Compute the gradients on B₁: forward and backward."""
        self.optimizer.zero_grad()
        self.forward().backward()  # type: ignore[no-untyped-call]

    def train(self) -> None:
        """Take one training step: forward, backward, optimizer."""
        self.gradients()
        self.optimizer.step()

    def meta(self) -> None:
        """Make one meta-update."""
        one, two, val = self.batches
        if isinstance(self.optimizer, MetaAdamW):
            self.optimizer.update_attention(self.model, one, two, self.task.loss, val)
        else:
            self.optimizer.update_attention(self.model, one, two, self.task.loss)


def trainer(name: str, who: str, device: torch.device, reference: Path | None = None, **phi: Any) -> Trainer:
    """Return the trainer of a task at the paper's settings, or of the "perceptron", after one training step.

    Its optimizer is "AdamW", "ours" (with other arguments for Φ, if any) or the "released code" from ``reference``.
    """
    torch.manual_seed(0)
    if name == "perceptron":
        task = replace(TASKS["etth1"], settings=lambda _: replace(TASKS["etth1"].settings("paper"), metaadamw={}))
        model: nn.Module = Perceptron(8 * 600**2).to(device)
        batches: list[Batch] = [(torch.randn(2, 600, device=device),) * 2 for _ in range(3)]
    else:
        task = TASKS[name]
        model = task_model(name).to(device)
        batches = [tuple(x.to(device) for x in task_batch(name)) for _ in range(3)]
    optimizer: Any
    if who == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    elif who == "ours":
        settings = {**task.settings("paper").metaadamw, **phi}
        optimizer = MetaAdamW(model.named_parameters(), lr=5e-4, fused=True, **settings)
    else:
        assert reference is not None
        optimizer = build_released(reference, model, batches[2], attn_layers=8, attn_hidden_dim=16)
    made = Trainer(task, model, optimizer, batches)
    made.train()  # so that there are moments
    return made


def measure_meta_updates(device: torch.device, reference: Path | None, seconds: float) -> list[Row]:
    """Measure a meta-update on the ETTh1 model against a training step there, and peak memory."""
    whos = ["ours"] if reference is None else ["ours", "released code"]
    adamw = trainer("etth1", "AdamW", device)
    calls: dict[str, Callable[[], Any]] = {"training step": adamw.train}
    for who in whos:
        calls[who] = trainer("etth1", who, device, reference).meta
    times = in_turns({**calls, "forward": adamw.forward}, device, seconds)
    forward = {"training step": times["training step"], "AdamW": times.pop("forward")}
    rows = compared("meta-update / training step, ETTh1 model", times, "training step", 4.5)
    rows += compared("forward / training step, ETTh1 model", forward, "training step")
    for model, target in (("etth1", 1.25), ("perceptron", None)):
        base = peak_memory(trainer(model, "AdamW", device), meta=False)
        for who in whos if model == "etth1" else ["ours"]:
            peak = peak_memory(trainer(model, who, device, reference), meta=True)
            goal = target if who == "ours" else None
            measure = f"peak memory, meta-update / training step, {MEMORY_MODELS[model]}"
            rows.append(Row(measure, who, peak / base, peak / base, peak / base, peak, base, goal))
    return rows


def peak_memory(made: "Trainer", meta: bool) -> float:
    """Return the most bytes that tensors take during a training step or a meta-update."""
    call = made.meta if meta else made.train
    call()
    made.optimizer.zero_grad()
    states = [x for state in made.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    standing = sum(x.numel() * x.element_size() for x in (*made.model.parameters(), *states))
    device = next(made.model.parameters()).device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return float(standing + torch.cuda.max_memory_allocated(device) - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return float(standing + np.cumsum(changes).max())


def measure_epochs(device: torch.device, seconds: float) -> list[Row]:
    """Measure an epoch of each task as the sum of its parts: forward and backward, step, and 1/K_meta meta-updates.

    The parts are timed apart, since the noise of whole epochs would hide the difference of two steps.
    """
    rows = []
    for name in progress_bar(TASKS, desc="epochs"):
        every = TASKS[name].settings("paper").meta_every
        adamw, ours = trainer(name, "AdamW", device), trainer(name, "ours", device)
        for each in (adamw, ours):
            each.gradients()
        calls = {"gradients": adamw.gradients, "meta-update": ours.meta}
        long = in_turns(calls, device, seconds, least=3)
        short = in_turns({"AdamW": adamw.optimizer.step, "ours": ours.optimizer.step}, device, seconds / 3)
        step, adamw_step = (statistics.median(short[who]) for who in ("ours", "AdamW"))
        training = [gradients + adamw_step for gradients in long["gradients"]]
        rounds = zip(long["gradients"], long["meta-update"], strict=True)
        epoch = [gradients + step + update / every for gradients, update in rounds]
        measure = f"meta-update / training step, {TASKS[name].title}"
        rows += compared(measure, {"training": training, "ours": long["meta-update"]}, "training")
        on_cpu, on_gpu = (1.12, 1.15) if name == "imdb" else (1.02, 1.05)
        target = on_cpu if device.type == "cpu" else on_gpu
        measure = f"whole epoch, {TASKS[name].title} (K_meta = {every})"
        rows += compared(measure, {"AdamW": training, "ours": epoch}, "AdamW", target)
    return rows


def measure_growth(device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Measure a step by number of parameters (Φ 8×16), and a step and a meta-update by depth of Φ (ETTh1 model).

    Each point is a median with its quartiles.
    """
    points: list[dict[str, Any]] = []

    def add(kind: str, who: str, times: Sequence[float], **at: int) -> None:
        low, median, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
        points.append({"kind": kind, "who": who, **at, "seconds": median, "low": low, "high": high})

    for size in progress_bar(SIZES, desc="growth"):
        perceptron = Perceptron(size).to(device)
        give_gradients(perceptron)
        parameters = sum(p.numel() for p in perceptron.parameters())
        made = optimizers(perceptron, None, attn_layers=8, attn_hidden_dim=16)
        for who, times in in_turns({k: o.step for k, o in made.items()}, device, seconds).items():
            add("step", who, times, parameters=parameters)
    calls = {str(depth): trainer("etth1", "ours", device, attn_layers=depth).meta for depth in DEPTHS}
    for layers, times in in_turns(calls, device, 3 * seconds).items():
        add("meta-update", "ours", times, layers=int(layers))
    for depth in DEPTHS:
        model = task_model("etth1").to(device)
        give_gradients(model)
        made = optimizers(model, None, attn_layers=depth, attn_hidden_dim=64)
        for who, times in in_turns({k: o.step for k, o in made.items()}, device, seconds).items():
            add("step by depth", who, times, layers=depth)
    return points


@torch.no_grad()
def measure_parts(device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Time the parts of a step, inside whole steps that take turns with AdamW's."""
    rows = []
    for measure, (make, layers, width, _) in progress_bar(STEPS.items(), desc="parts"):
        model = make().to(device)
        give_gradients(model)
        made = optimizers(model, None, attn_layers=layers, attn_hidden_dim=width)
        ours = made["ours"]
        assert isinstance(ours, MetaAdamW)
        inside: dict[str, list[float]] = {part: [] for part in PARTS}
        with ExitStack() as stack:
            for part, (owner, name) in PARTS.items():
                call = record_times(getattr(owner, name), inside[part], device)
                stack.enter_context(patch.object(owner, name, call))
            whole = in_turns({name: o.step for name, o in made.items()}, device, seconds)
        buckets = gather(ours.param_groups, ours._members, ours.state)
        alone = in_turns({"⟨g, m⟩ alone": partial(read_once, buckets)}, device, seconds / 4)
        if steps := len(inside["Φ"]):
            inside["kernel"] = list(np.reshape(inside["kernel"], (steps, -1)).sum(axis=1))  # of all buckets
        timed_parts = {**inside, **whole, **alone}
        medians = {part: float(statistics.median(times)) for part, times in timed_parts.items() if times}
        rows += [{"measure": measure, "part": part, "seconds": t} for part, t in medians.items()]
    return rows


def record_times(call: Callable[..., Any], times: list[float], device: torch.device) -> Callable[..., Any]:
    """Wrap a function so that it appends the seconds of each call to ``times``.

    It waits for a GPU before and after each call, so parts add up to more than the whole.
    """

    def timed(*args: Any, **kwargs: Any) -> Any:
        wait_for(device)
        start = time.perf_counter()
        result = call(*args, **kwargs)
        wait_for(device)
        times.append(time.perf_counter() - start)
        return result

    return timed


def read_once(buckets: Sequence[Bucket]) -> None:
    """Compute ⟨g, m⟩ of every tensor: the least reading that the statistics of a step need."""
    for bucket in buckets:
        for g, m in zip(bucket.g, bucket.m, strict=True):
            torch.dot(g.view(-1), m.view(-1))


# ---------------------------------------------------------------- the command


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Format rows as text, with a column "result": the target is met, or missed by how much."""
    frame = pd.DataFrame([asdict(row) for row in rows])
    met = [
        "" if row.target is None else "met" if row.ratio <= row.target else f"missed by {row.ratio - row.target:.2f}"
        for row in rows
    ]
    return pd.DataFrame(
        {
            "measure": frame["measure"],
            "who": frame["who"],
            "ratio": frame["ratio"].map("{:.3g}".format),
            "quartiles": [f"{row.low:.3g} to {row.high:.3g}" for row in rows],
            "target": ["–" if row.target is None else f"≤ {row.target:g}" for row in rows],
            "result": met,
        }
    ).set_index("measure")


def bench_records() -> dict[str, dict[str, Any]]:
    """Read the measurements of ``bench``, by the names of their files.

    The latest have the kind of device as their name ("cpu", "cuda"), older ones device and commit ("h200-1470adc").

    Raises:
        FileNotFoundError: outside a checkout.
    """
    paths = sorted((repository() / "data" / "bench").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def bench_record(name: str = "cpu") -> dict[str, Any] | None:
    """Return one of ``bench_records``, or None where none has this name."""
    return bench_records().get(name)


def is_older(name: str) -> bool:
    """Tell an older measurement from the latest by its name (see ``bench_records``)."""
    return "-" in name


def heading(name: str, record: Mapping[str, Any]) -> str:
    """Return device and commit of a measurement, with "before" if it is an older one."""
    where = record["environment"]
    return f"{where['device']} ({'before: ' if is_older(name) else ''}{where['revision']})"


def side_by_side(records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Format our ratios with their quartiles as text, in a column for each measurement."""
    columns = []
    for name, record in records.items():
        ours = table([Row(**row) for row in record["rows"] if row["who"] == "ours"])
        columns.append((ours["ratio"] + " (" + ours["quartiles"] + ")").rename(heading(name, record)))
    return pd.concat(columns, axis=1).fillna("–")


def measure_all(device: torch.device, reference: Path | None, seconds: float) -> dict[str, Any]:
    """Measure everything, with ``seconds`` for each contest, and return the record."""
    rows = measure_steps(device, reference, seconds) + measure_meta_updates(device, reference, 3 * seconds)
    rows += measure_epochs(device, seconds)
    return {
        "environment": environment(device),
        "rows": [asdict(row) for row in rows],
        "growth": measure_growth(device, seconds / 2),
        "parts": measure_parts(device, seconds / 2),
    }


def run_bench(device: str, reference: str | None, json_file: str | None, seconds: float) -> None:
    """Measure, print the table and write the record.

    Args:
        device: as torch names it, or "auto".
        reference: folder of the authors' released code, as typed; None to do without.
        json_file: where the record goes, as typed; None for nowhere.
        seconds: length of each contest.

    Raises:
        ValueError: for a device, number of seconds or path that is not allowed, before anything is measured.
        OSError: if the record cannot be written there.
    """
    place = torch.device(pick_device(device))
    check_not_negative(seconds=seconds)
    released_code = None if reference is None else expanded_folder(reference, "--reference")
    path = None if json_file is None else expanded(json_file, "--json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; --json takes a file")
    record = measure_all(place, released_code, seconds)
    if path is not None:
        write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    print("\n", table([Row(**row) for row in record["rows"]]).to_string(), sep="")
