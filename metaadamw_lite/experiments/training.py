"""One run, from the seed to the record.

All arms of a comparison are paired by seed: with the same seed they start from the same weights, see the same batches
in the same order and draw the same dropout masks. Three things ensure this. Every source of randomness is seeded from
the run's seed alone (with epoch and purpose, if it is used repeatedly). A meta-update leaves the random number
generators as it found them. A run computes on one CPU thread, since the number of threads decides the order of sums.
So a killed run also goes on to the same result, from the checkpoint of its last whole epoch.
"""

import contextlib
import copy
import io
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from tqdm import tqdm

from metaadamw_lite import LiLAW, MetaAdamW
from metaadamw_lite.checks import NotFiniteError, check_choice
from metaadamw_lite.experiments import NOISY, TASKS, lope_study
from metaadamw_lite.experiments.lope_study import LoPESettings
from metaadamw_lite.experiments.mislabels import SampleHistory, detection
from metaadamw_lite.experiments.noise import corrupted
from metaadamw_lite.experiments.progress import progress_bar
from metaadamw_lite.experiments.records import (
    RunKey,
    default_results,
    environment,
    is_the_machines_fault,
    peak_memory_mib,
    read_record,
    reset_peak_memory,
    write_atomically,
    write_record,
)
from metaadamw_lite.experiments.task import SCHEDULES, Batch, Measured, Score, Settings, Task
from metaadamw_lite.experiments.variants import VARIANTS, apply_variant

EVALUATION_BATCH = 256
LOOKS_PER_EPOCH = 10
_SAMPLE_LOSSES = partial(F.cross_entropy, reduction="none")
_ONE_RUN = threading.Lock()
"""torch has one random number generator a process; two runs in its threads would draw from it in turns."""


class RunInProgressError(RuntimeError):
    """Another process is making the same run."""


def run(
    key: RunKey,
    results: Path | None = None,
    device: str = "auto",
    progress: bool = True,
    settings: Settings | LoPESettings | None = None,
    wait: bool = False,
) -> dict[str, Any]:
    """Make one run and write its record, or read the record if there is one.

    Args:
        key: the run.
        results: folder of the records; None for ``default_results()``.
        device: as torch names it, or "auto": a GPU if there is one, else the CPU.
        progress: show a progress bar.
        settings: the task's, in place of the key's profile, for trials with another ``results``. Those of an adaptation
            (tasks "lope-…") are ``LoPESettings``.
        wait: wait for another process that makes this run.

    Returns:
        The record. Its status is "finished", "stopped early", "diverged" (a loss was not finite) or "failed" (training
        raised an error that is not the machine's fault).

    Raises:
        ValueError: for an unknown task, variant or device, settings of another kind of task, a variant that does not
            fit the task or its protocol, settings other than those of the record, or a variant whose source has no
            record.
        RunInProgressError: if another process makes this run.
        RecordError: if a file in the record's place is no record.
        DataError: if the data are missing and cannot be downloaded, or fail their check.
        ImportError: if a package of the run is not installed.
        OSError: if a file cannot be read or written. Faults of the machine, like this one, leave no record.
    """
    mine = run_settings(key, settings)
    folder = default_results() if results is None else results

    def make(device: torch.device) -> dict[str, Any]:
        if isinstance(mine, LoPESettings):  # adaptations have training of their own
            return lope_study.make(key, mine, device, progress)
        return _Run(_task(key), key, mine, folder, device, *_source(key, folder, settings)).make(progress)

    return check_settings_match(mine, _read_or_make(key, folder, device, wait, make), key.path(folder))


def run_settings(key: RunKey, settings: Settings | LoPESettings | None = None) -> Settings | LoPESettings:
    """Return the settings of a run: those of its task and profile, or the given ones, with its variant's change.

    Raises:
        ValueError: for an unknown task or variant, settings of another kind of task, or a variant that does not fit the
            task or its protocol.
    """
    check_choice("task", key.task, (*TASKS, *NOISY, *lope_study.NOISE))
    if key.task in lope_study.NOISE:
        lope_study.check(key)
        how = lope_study.settings(key.profile) if settings is None else settings
        if not isinstance(how, LoPESettings):
            raise ValueError(f"settings are {type(how).__name__}; {key.task} needs LoPESettings")
        return how
    task = _task(key)
    if key.task in NOISY:
        check_choice("protocol (of a task with wrong labels)", key.protocol, ("clean",))
    if isinstance(settings, LoPESettings):
        raise ValueError(f"settings are LoPESettings; {key.task} needs Settings")
    mine = apply_variant(settings or task.settings(key.profile), key.variant)
    if mine.lilaw is not None and task.inputs_and_labels is None:
        raise ValueError(f"optimizer is {key.variant!r}, but {key.task} has no classes, which LiLAW needs")
    return mine


def _source(key: RunKey, results: Path, settings: Settings | LoPESettings | None) -> list[dict[str, Any]]:
    """Return the record that a run's optimizer is made from, in a list; an empty one for a variant without source.

    Raises:
        ValueError: if the source has no record, or one with other settings.
    """
    source = VARIANTS[key.variant].source
    if source is None:
        return []
    other = source(key)
    path = other.path(results)
    if not path.is_file():
        raise ValueError(f"{key} needs the record of {other}, which {results} does not have; make that run first")
    return [
        check_settings_match(run_settings(other, settings if other.task == key.task else None), read_record(path), path)
    ]


def _task(key: RunKey) -> Task:
    return TASKS.get(key.task) or NOISY[key.task]


def check_settings_match(settings: Settings | LoPESettings, record: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the record if it was made with these settings; a record without a newer setting has its default.

    Raises:
        ValueError: if it was made with other settings.
    """
    asked = _as_json(asdict(settings))
    key = RunKey(**record["run"])
    if key.task in lope_study.NOISE:
        asked |= lope_study.circumstances(key)
    defaults = {field.name: _as_json(field.default) for field in fields(settings) if field.default is not MISSING}
    made = {name: record["settings"].get(name, defaults.get(name, asked[name])) for name in asked}
    other = [name for name in asked if made[name] != asked[name]]
    if other:
        raise ValueError(
            f"{path} was made with other settings ("
            + ", ".join(f"{name} {made[name]!r} instead of {asked[name]!r}" for name in other)
            + "); use another folder of results"
        )
    return record


def pick_device(name: str) -> str:
    """Return the device of this name; for "auto" a GPU if there is one, else the CPU.

    Raises:
        ValueError: for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=name).item()  # fails on a device of shapes only ("meta")
    except (RuntimeError, AssertionError) as error:  # AssertionError from a torch built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which cannot be used here ({reason})") from error
    return name


def _read_or_make(
    key: RunKey, results: Path, device: str, wait: bool, make: Callable[[torch.device], dict[str, Any]]
) -> dict[str, Any]:
    """Read the record of a run, after making the run if there is none."""
    path = key.path(results)
    if path.is_file():
        return read_record(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, in the place of a record")
    place = torch.device(pick_device(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(key.path(results, ".lock"))
    try:
        with lock.acquire(blocking=wait):
            try:
                for leftover in path.parent.glob(f"{key.stem}.*.part"):  # of a process that was killed while it wrote
                    leftover.unlink()
                if not path.exists():  # another process may have finished it meanwhile
                    with _ONE_RUN, _one_cpu_thread():
                        record = make(place)
                    write_record(record, key, results)
                    key.path(results, ".ckpt").unlink(missing_ok=True)
            finally:
                # A killed process leaves the lock, which ``abandoned`` detects. A new file of that name is safe for
                # waiting processes, since filelock checks that the file it has locked is still there.
                key.path(results, ".lock").unlink(missing_ok=True)
    except Timeout:
        raise RunInProgressError(f"{key} is being made by another process (lock {lock.lock_file})") from None
    return read_record(path)


@contextmanager
def _one_cpu_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


ENDING_SECONDS = 2
"""The longest time that a killed process takes to end."""


def abandoned(key: RunKey, results: Path) -> bool:
    """Tell whether a process began this run and is gone: a lock that no process holds, and no record."""
    path = key.path(results, ".lock")
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=ENDING_SECONDS):
            return not key.path(results).exists()
    except Timeout:
        return False


def forget_abandoned(key: RunKey, results: Path) -> None:
    """Remove the lock of a process that is gone."""
    path = key.path(results, ".lock")
    if path.exists():
        with contextlib.suppress(Timeout), FileLock(path).acquire(blocking=False):
            path.unlink(missing_ok=True)


def make_optimizer(
    variant: str, model: nn.Module, settings: Settings, total_steps: int, seed: int, *source: dict[str, Any]
) -> torch.optim.Optimizer:
    """Make the optimizer of a variant. Φ's random start follows the run's seed, unless the variant has its own.

    Args:
        variant: one of ``VARIANTS``.
        model, settings, total_steps, seed: of the run; the settings include the variant's change.
        source: the record that the optimizer is made from, if the variant has a source.
    """
    return VARIANTS[variant].make(model, settings, total_steps, seed, *source)


WARM_UP = 0.3
"""Share of a run's steps in which the learning rate rises, in a schedule with a warm-up."""


def schedule_of(optimizer: torch.optim.Optimizer, name: str, steps: int) -> CosineAnnealingLR | LambdaLR | None:
    """Make the schedule of the learning rate over ``steps`` steps; None for a constant one.

    Raises:
        ValueError: for an unknown name.
    """
    check_choice("schedule", name, SCHEDULES)
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    if name == "warmup-linear":
        top = WARM_UP * steps
        return LambdaLR(optimizer, lambda t: min((t + 1) / top, max(0.0, (steps - t) / (steps - top)), 1.0))
    return None


def switch_weights(optimizer: torch.optim.Optimizer, training: bool) -> None:
    """Switch an optimizer with two sets of weights (Schedule-Free) to those for training, or for evaluation."""
    switch = getattr(optimizer, "train" if training else "eval", None)
    if switch is not None:
        switch()


def derived_seed(seed: int, epoch: int, purpose: str) -> int:
    """Derive a seed for each purpose in each epoch of a run."""
    return int(np.random.SeedSequence([seed, epoch, *purpose.encode()]).generate_state(1)[0])


def shuffled_batches(samples: Batch, size: int, seed: int) -> list[Tensor]:
    """Shuffle an epoch's sample numbers by ``seed`` alone, and split them into batches; the last may be short."""
    order = torch.randperm(len(samples[0]), generator=torch.Generator().manual_seed(seed))
    return list(torch.split(order.to(samples[0].device), size))


def pick(samples: Batch, numbers: Tensor) -> Batch:
    """Return the samples with these numbers."""
    return tuple(x[numbers] for x in samples)


@torch.no_grad()
def measure(task: Task, model: nn.Module, samples: Batch) -> Measured:
    """Measure the task's loss in eval mode, averaged over all terms of some samples, and its metric."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=samples[0].device)
    terms, correct = torch.zeros_like(loss), torch.zeros_like(loss)
    for numbers in torch.split(torch.arange(len(samples[0]), device=samples[0].device), EVALUATION_BATCH):
        score = task.score(model, pick(samples, numbers))
        loss += score.loss.double() * score.terms
        terms += score.terms
        correct += 0 if score.correct is None else score.correct
    mean = float(loss / terms)
    metric = task.metric_of(mean, float(correct / terms)) if math.isfinite(mean) else math.nan
    return Measured(mean, metric)  # a model whose loss is not finite has no accuracy, either


class _Stopwatch:
    """Sum of the seconds of many short pieces of work on a device, measured without making the device wait."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pieces: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def running(self) -> Iterator[None]:
        begin = self._now()
        yield
        self._pieces.append((begin, self._now()))

    def seconds(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
            return float(sum(begin.elapsed_time(end) for begin, end in self._pieces)) / 1000
        return float(sum(end - begin for begin, end in self._pieces))


class _Run:
    """The state of a run between its epochs, as a checkpoint holds it."""

    def __init__(
        self,
        task: Task,
        key: RunKey,
        settings: Settings,
        results: Path,
        device: torch.device,
        *source: dict[str, Any],
    ) -> None:
        self.task, self.key, self.settings, self.device = task, key, settings, device
        self.checkpoint = key.path(results, ".ckpt")
        data = task.load(key.protocol, settings, key.source)
        if "noise" in settings.data:
            assert task.classes is not None
            data = corrupted(data, settings.data["noise"], task.classes, key.seed)
        self.data = data.to(device)
        torch.manual_seed(derived_seed(key.seed, 0, "weights"))
        self.model = task.build(settings, data).to(device)
        self.steps_per_epoch = math.ceil(len(self.data.train[0]) / settings.batch_size)
        self.optimizer = make_optimizer(
            key.variant, self.model, settings, settings.epochs * self.steps_per_epoch, key.seed, *source
        )
        self.sources = [{"run": record["run"], "digest": record["digest"]} for record in source]
        self.phi_at_start = copy.deepcopy(self.optimizer.modulator) if isinstance(self.optimizer, MetaAdamW) else None
        self.schedule = schedule_of(self.optimizer, settings.schedule, settings.epochs * self.steps_per_epoch)
        self.lilaw: LiLAW | None = None
        if settings.lilaw is not None:  # LiLAW warms up for one epoch
            self.lilaw = LiLAW(**settings.lilaw, warmup_steps=self.steps_per_epoch).to(device)
        self.samples: SampleHistory | None = None
        if self.data.truth is not None:
            labels, truth = self.data.train[1], self.data.truth
            right = float((labels == truth).double().mean())
            self.samples = SampleHistory(labels, right)
        self.best_weights: dict[str, Tensor] = {}
        self.meta_updates = 0
        self.history: dict[str, list[dict[str, Any]]] = {"epochs": [], "meta_updates": [], "trace": [], "lilaw": []}
        self.environments = [environment(device)]  # of the processes of the run, as long as they differ

    def make(self, progress: bool) -> dict[str, Any]:
        """Train until the last epoch, an early stop or a loss that is not finite; return the record."""
        reset_peak_memory(self.device)
        self._resume()
        with progress_bar(
            total=self.settings.epochs * self.steps_per_epoch,
            initial=len(self.history["epochs"]) * self.steps_per_epoch,
            desc=str(self.key),
            unit="step",
            disable=not progress,
        ) as bar:
            try:
                while (status := self._status()) == "running":
                    self._epoch(len(self.history["epochs"]) + 1, bar)
                    self._save()
                return self._record(status)
            except Exception as error:
                if is_the_machines_fault(error):
                    raise
                return self._record("failed") | {"error": f"{type(error).__name__}: {error}"}

    def _status(self) -> str:
        """Return "running", "finished" (all epochs), "stopped early" or "diverged"."""
        epochs = self.history["epochs"]
        if epochs and not all(math.isfinite(epochs[-1][k]) for k in ("train_loss", "val_loss")):
            return "diverged"
        best, waited = math.inf, 0
        for epoch in epochs:
            improved = epoch["val_loss"] < best - self.settings.min_delta
            best, waited = (epoch["val_loss"], 0) if improved else (best, waited + 1)
        if self.settings.patience is not None and waited >= self.settings.patience:
            return "stopped early"
        return "finished" if len(epochs) == self.settings.epochs else "running"

    def _epoch(self, epoch: int, bar: "tqdm[Any]") -> None:
        settings, seed = self.settings, self.key.seed
        batches = self._training_batches(epoch, "order")
        meta_batches = self._meta_batches(epoch)
        torch.manual_seed(derived_seed(seed, epoch, "dropout"))
        self.model.train()
        switch_weights(self.optimizer, training=True)
        started, cpu_started = time.perf_counter(), time.process_time()
        in_step, in_meta = _Stopwatch(self.device), _Stopwatch(self.device)
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        terms = torch.zeros_like(summed)
        look_every = max(1, self.steps_per_epoch // LOOKS_PER_EPOCH)
        for t, batch in enumerate(batches, start=(epoch - 1) * self.steps_per_epoch + 1):
            score = self._training_score(self.model, batch)
            self.optimizer.zero_grad()
            score.loss.backward()  # type: ignore[no-untyped-call]
            with in_step.running():
                self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            if self.lilaw is not None:
                with in_meta.running():
                    self._update_lilaw(t, self.lilaw, looking=t % look_every == 0)
            summed += score.loss.detach().double() * score.terms
            terms += score.terms

            # Reading the loss makes a GPU wait for Python, so only a few steps an epoch do it.
            looking = t % look_every == 0
            if looking and not math.isfinite(value := score.loss.item()):
                break
            if isinstance(self.optimizer, MetaAdamW):
                if looking:
                    self._trace(t, self.optimizer)
                due = epoch >= settings.warmup_epochs and t % settings.meta_every == 0
                if VARIANTS[self.key.variant].updates and due:
                    with in_meta.running():
                        self._meta_update(t, self.optimizer, meta_batches)
            bar.update()
            if looking:
                bar.set_postfix(self._progress_figures(value), refresh=False)

        train_loss = float(summed / terms)
        switch_weights(self.optimizer, training=False)
        train_seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        val, seen = Measured(math.nan, math.nan), None
        if math.isfinite(train_loss):
            val = measure(self.task, self.model, self.data.val)
        if self.samples is not None and math.isfinite(val.loss):
            seen = self._look_at_samples(self.samples)
            if seen is None:
                val = Measured(math.nan, math.nan)
        if val.loss < min((e["val_loss"] for e in self.history["epochs"]), default=math.inf):
            self.best_weights = {k: x.detach().cpu().clone() for k, x in self.model.state_dict().items()}
        self.history["epochs"].append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "val_loss": val.loss,
                "metric": val.metric,
                "seconds": round(time.perf_counter() - started, 3),
                "train_seconds": round(train_seconds, 3),
                "cpu_seconds": round(cpu_seconds, 3),  # of training, whatever other processes do
                "step_seconds": round(in_step.seconds(), 3),
                "meta_seconds": round(in_meta.seconds(), 3),
            }
            | (seen or {})
        )

    def _training_batches(self, epoch: int, purpose: str) -> Iterator[Batch]:
        """Yield the batches of a pass over the training data, ordered and augmented by seed and purpose alone."""
        seed = derived_seed(self.key.seed, epoch, purpose)
        generator = torch.Generator().manual_seed(derived_seed(self.key.seed, epoch, f"augment {purpose}"))
        for numbers in shuffled_batches(self.data.train, self.settings.batch_size, seed):
            batch = pick(self.data.train, numbers)
            yield batch if self.task.augment is None else self.task.augment(batch, generator)

    def _progress_figures(self, loss: float) -> dict[str, str]:
        """Return the figures beside the progress bar."""
        figures = {"loss": f"{loss:.4g}"}
        if self.history["epochs"]:
            figures["val"] = f"{self.history['epochs'][-1]['metric']:.4g}"
            best = (min if self.task.lower_is_better else max)(e["metric"] for e in self.history["epochs"])
            figures["best"] = f"{best:.4g}"
        if isinstance(self.optimizer, MetaAdamW):
            figures["α"] = f"{self.optimizer.alpha.min():.2f}–{self.optimizer.alpha.max():.2f}"
        return figures

    # ------------------------------------------------------------ weights of samples, and wrong labels

    def _training_score(self, model: nn.Module, batch: Batch) -> Score:
        """Score a training batch, with LiLAW by the weighted loss."""
        if self.lilaw is None:
            return self.task.score(model, batch)
        inputs, labels = self._split(batch)
        logits = model(*inputs)
        if not torch.isfinite(logits).all():  # LiLAW refuses them, and training diverges
            return Score(logits.sum() * math.nan, len(labels))
        return Score(self.lilaw.loss(logits, labels, _SAMPLE_LOSSES), len(labels))

    def _split(self, batch: Batch) -> tuple[Batch, Tensor]:
        assert self.task.inputs_and_labels is not None  # checked by ``run_settings``
        return self.task.inputs_and_labels(batch)

    def _update_lilaw(self, t: int, lilaw: LiLAW, looking: bool) -> None:
        """Take a step of α, δ and β on the next validation batch."""
        inputs, labels = self._split(self._val_batch(t))
        with contextlib.suppress(NotFiniteError):  # skip this update; the training loss decides whether to stop
            lilaw.meta_step(self.model, (*inputs, labels), _SAMPLE_LOSSES)
        if looking:
            scalars = {name: round(getattr(lilaw, name).item(), 5) for name in ("alpha", "delta", "beta")}
            self.history["lilaw"].append({"step": t, **scalars})

    @torch.no_grad()
    def _look_at_samples(self, samples: SampleHistory) -> dict[str, float | None] | None:
        """Return the shares of wrong labels memorised and recovered, and of right ones learned; None without samples.

        The result is None if a logit is not finite: then training diverges, whatever the validation loss.
        """
        self.model.eval()
        parts = torch.split(torch.arange(len(self.data.train[0]), device=self.device), EVALUATION_BATCH)
        logits = torch.cat([self.model(*self._split(pick(self.data.train, part))[0]) for part in parts])
        if not torch.isfinite(logits).all():
            return None
        samples.add(logits, self.lilaw)
        (_, observed), truth, said = self._split(self.data.train), self.data.truth, logits.argmax(dim=1)
        assert truth is not None
        wrong = observed != truth

        def share(hit: Tensor) -> float | None:
            return round(float(hit.double().mean()), 5) if len(hit) else None

        return {
            "memorised": share((said == observed)[wrong]),
            "recovered": share((said == truth)[wrong]),
            "right_learned": share((said == truth)[~wrong]),
        }

    # ------------------------------------------------------------ meta-updates

    def _meta_batches(self, epoch: int) -> Iterator[tuple[Batch, Batch]]:
        """Yield B₁ and B₂ from two shuffles of the training data, fresh in every epoch."""
        while True:
            yield from zip(self._training_batches(epoch, "B1"), self._training_batches(epoch, "B2"), strict=True)

    def _val_batch(self, k: int) -> Batch:
        """Return the k-th validation batch, in order, beginning again after the last."""
        numbers = torch.split(torch.arange(len(self.data.val[0]), device=self.device), self.settings.batch_size)
        return pick(self.data.val, numbers[k % len(numbers)])

    def _meta_update(self, t: int, optimizer: MetaAdamW, batches: Iterator[tuple[Batch, Batch]]) -> None:
        batch1, batch2 = next(batches)
        entry: dict[str, Any] = {"step": t}
        try:
            val_batch = self._val_batch(self.meta_updates)
            losses = optimizer.update_attention(self.model, batch1, batch2, self._training_loss, val_batch)
            entry |= losses._asdict()
        except NotFiniteError as error:  # the record keeps it
            entry["error"] = str(error)
        self.meta_updates += 1
        entry |= self._movement(optimizer)
        self.history["meta_updates"].append(entry)

    def _training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._training_score(model, batch).loss

    def _movement(self, optimizer: MetaAdamW) -> dict[str, Any]:
        """Measure the distance of Φ from its random start, in weights and factors, and return log σ².

        The distance in weights is relative to the norm of the start, and infinite if that is zero.
        """
        assert self.phi_at_start is not None
        with torch.no_grad():
            now, start = (
                nn.utils.parameters_to_vector(m.parameters()) for m in (optimizer.modulator, self.phi_at_start)
            )
            features = optimizer.features()
            new, old = optimizer.modulator(features), self.phi_at_start(features)
        return {
            "phi_moved": float((now - start).norm() / start.norm()),
            "log_var": [] if optimizer.huw is None else optimizer.huw.log_var.tolist(),
            "alpha_moved": float((new.alpha - old.alpha).abs().max()),
            "beta_moved": float((new.beta - old.beta).abs().max()),
        }

    def _trace(self, t: int, optimizer: MetaAdamW) -> None:
        def rounded(x: Tensor) -> list[float]:
            return [float(f"{value:.6g}") for value in x.tolist()]  # factors on a log scale may be tiny

        self.history["trace"].append({"step": t, "alpha": rounded(optimizer.alpha), "beta": rounded(optimizer.beta)})

    # ------------------------------------------------------------ checkpoint and record

    def _save(self) -> None:
        buffer = io.BytesIO()
        torch.save(
            {
                "run": asdict(self.key),
                "settings": _as_json(asdict(self.settings)),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "best_weights": self.best_weights,
                "meta_updates": self.meta_updates,
                "history": self.history,
                "lilaw": None if self.lilaw is None else self.lilaw.state_dict(),
                "samples": None if self.samples is None else self.samples.state_dict(),
                "environments": self.environments,
            },
            buffer,
        )
        write_atomically(self.checkpoint, buffer.getvalue())

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ValueError: if the checkpoint is broken, of another run, or of one with other settings.
        """
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            run, settings = state["run"], state["settings"]
        except Exception as error:  # torch raises errors of any kind for a broken file
            if is_the_machines_fault(error):
                raise
            raise ValueError(
                f"{self.checkpoint} is not a checkpoint ({error!r}); delete it to start the run afresh"
            ) from error
        if run != asdict(self.key):
            raise ValueError(f"{self.checkpoint} is of the run {RunKey(**run)}; delete it to start this one afresh")
        if settings != _as_json(asdict(self.settings)):
            raise ValueError(f"{self.checkpoint} is of a run with other settings; delete it to start this one afresh")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.best_weights, self.meta_updates = state["best_weights"], state["meta_updates"]
        self.history = state["history"]
        before = state["environments"]
        self.environments = before if self.environments[0] == before[-1] else before + self.environments
        if self.lilaw is not None:
            self.lilaw.load_state_dict(state["lilaw"])
        if self.samples is not None:
            self.samples.load_state_dict(state["samples"])

    def _record(self, status: str) -> dict[str, Any]:
        epochs = self.history["epochs"]
        finite = [e for e in epochs if math.isfinite(e["val_loss"]) and math.isfinite(e["metric"])]
        direction = 1 if self.task.lower_is_better else -1
        best = min(finite, key=lambda e: direction * e["metric"], default=None)
        record: dict[str, Any] = {
            "status": status,
            "metric": self.task.metric,
            "data": self.data.source,
            "samples": {
                "train": len(self.data.train[0]),
                "val": len(self.data.val[0]),
                "test": 0 if self.data.test is None else len(self.data.test[0]),
            },
            "settings": _as_json(asdict(self.settings)),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "best": None if best is None else {k: best[k] for k in ("epoch", "val_loss", "metric")},
            "test": None,
            "epochs": epochs,
            "peak_memory_mib": peak_memory_mib(self.device),
            "environment": self.environments[-1],
        }
        if len(self.environments) > 1:
            record["earlier_environments"] = self.environments[:-1]
        if self.sources:
            (record["source"],) = self.sources
        if self.samples is not None:
            record |= self._detection(None if status == "failed" else self.samples)
        if self.lilaw is not None:
            record["lilaw"] = self.history["lilaw"]
        if self.data.test is not None and finite and status != "failed":  # a failed run may fail again here
            if self.samples is not None:  # memorising shows in the last epoch, not in the best
                record["last"] = measure(self.task, self.model, self.data.test)._asdict()
            self.model.load_state_dict(self.best_weights)
            test = measure(self.task, self.model, self.data.test)
            epoch = min(finite, key=lambda e: e["val_loss"])["epoch"]
            record["test"] = {"epoch": epoch, "loss": test.loss, "metric": test.metric}
            if self.task.translate is not None:
                record["test"] |= self.task.translate(self.model, self.data)
        if isinstance(self.optimizer, MetaAdamW):
            record["groups"] = [
                {"name": g.name, "parameters": sum(p.numel() for p in g.params)} for g in self.optimizer.groups
            ]
            record["meta_updates"] = self.history["meta_updates"]
            record["trace"] = self.history["trace"]
            if VARIANTS[self.key.variant].keeps_phi:
                phi = nn.utils.parameters_to_vector(self.optimizer.modulator.parameters())
                record["phi"] = [float(f"{value:.8g}") for value in phi.tolist()]
        return record

    def _detection(self, samples: SampleHistory | None) -> dict[str, Any]:
        """Count the wrong labels, and measure how well each method finds them, unless ``samples`` is None."""
        assert self.data.truth is not None
        wrong = (self.data.train[1] != self.data.truth).cpu().numpy()
        found: dict[str, Any] = {"wrong_labels": int(wrong.sum()), "detection": None}
        if samples is not None and samples.epochs and wrong.any() and not wrong.all():
            scores = detection(samples.suspicion(self.lilaw is not None), wrong)
            found["detection"] = {name: {k: round(x, 5) for k, x in s.items()} for name, s in scores.items()}
        return found


def _as_json(x: Any) -> Any:
    """Turn settings into JSON's types, so that a stored copy compares equal."""
    if isinstance(x, dict):
        return {k: _as_json(y) for k, y in x.items()}
    return [_as_json(y) for y in x] if isinstance(x, Sequence) and not isinstance(x, str) else x
