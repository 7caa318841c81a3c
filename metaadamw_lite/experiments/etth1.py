"""ETTh1: forecast the next hour's oil temperature of a transformer station from the last 96 hours.

Data → model → loss → metric → configuration. Section 4.1 and Appendix B of the paper. The released code fills their
gaps (batch size, epochs, initialisation, early stopping, one variable instead of seven).
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaadamw_lite.checks import check_choice
from metaadamw_lite.experiments.datasets import DataFile, fetch
from metaadamw_lite.experiments.task import (
    PROFILES,
    PROTOCOLS,
    SOURCES,
    Batch,
    Data,
    Score,
    Settings,
    Task,
    mean_squared_error,
)

# ---------------------------------------------------------------- data

FILE = DataFile(
    path="etth1/ETTh1.csv",
    url="https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
    size=2_589_657,
    sha256="f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
)
HOURS = 17_420
WINDOW = 96
"""Hours in a window, unless the settings' data have another number under "window"."""


def synthetic_series() -> pd.DataFrame:
    """Make a stand-in with the columns of ETTh1.csv: daily and yearly cycles, slow drift, noise, the same each time."""
    rng = np.random.default_rng(20260410)
    t = np.arange(HOURS)
    cycles = 8 * np.sin(2 * np.pi * t / 8766) + 3 * np.sin(2 * np.pi * t / 24)
    drift = np.convolve(rng.normal(size=HOURS + 47), np.full(48, 48**-0.5), mode="valid")
    frame: dict[str, Any] = {"date": pd.date_range("2016-07-01", periods=HOURS, freq="h").astype(str)}
    for load in ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL"):
        frame[load] = rng.normal(size=HOURS) + np.sin(2 * np.pi * t / 24 + rng.uniform(0, 6))
    frame["OT"] = 15 + cycles + 2 * drift + 0.3 * rng.normal(size=HOURS)
    return pd.DataFrame(frame)


def load(protocol: str, settings: Settings, source: str) -> Data:
    """Load windows of hours (96 in the paper) and the hour after each, standardised.

    ``paper``: mean and deviation are those of the whole series. The first 80 % of the windows train and the last 20 %
    validate, without a test part. ``clean``: the same last 20 % are the test part, the last eighth of the rest
    validates, and mean and deviation come from the hours that training may see.

    Returns:
        Batches (x, y) with x of shape (N, window) and y of shape (N, 1), in standard deviations.

    Raises:
        ValueError: for an unknown protocol or source.
        DataError: if the real data are missing and cannot be downloaded, or fail their check.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    check_choice("data", source, SOURCES)
    frame = pd.read_csv(fetch(FILE), usecols=["OT"]) if source == "real" else synthetic_series()
    series = frame["OT"].to_numpy(dtype=np.float32)[: settings.data.get("hours")]

    window = settings.data.get("window", WINDOW)
    windows = len(series) - window
    held_out = int(windows * 0.8)  # as int(len(inputs) * (1 - val_ratio)) in the released code
    last_train = held_out if protocol == "paper" else held_out - held_out // 8
    seen = series if protocol == "paper" else series[: last_train + window]
    series = (series - seen.mean()) / seen.std()

    x = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(series, window)[:windows].copy())
    y = torch.from_numpy(series[window:].copy()).unsqueeze(1)
    name, sizes = "ETTh1.csv" if source == "real" else "synthetic", {"window": window}
    if protocol == "paper":
        return Data((x[:held_out], y[:held_out]), (x[held_out:], y[held_out:]), None, name, sizes)
    return Data(
        (x[:last_train], y[:last_train]),
        (x[last_train:held_out], y[last_train:held_out]),
        (x[held_out:], y[held_out:]),
        name,
        sizes,
    )


# ---------------------------------------------------------------- model


class TimeSeriesTransformer(nn.Module):
    """Linear(1→d), sinusoidal positions, pre-norm encoder layers, Linear(d→1) from the last position."""

    positions: Tensor

    def __init__(
        self, d_model: int, heads: int, layers: int, feed_forward: int, dropout: float, window: int = WINDOW
    ) -> None:
        super().__init__()
        self.input_projection = nn.Linear(1, d_model)
        self.register_buffer("positions", sinusoidal_positions(window, d_model), persistent=False)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, heads, feed_forward, dropout, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.output_projection = nn.Linear(d_model, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast the next hour (N, 1) from windows (N, window)."""
        h = self.input_projection(x.unsqueeze(-1)) + self.positions
        for layer in self.layers[:-1]:
            h = layer(h)
        forecast: Tensor = self.output_projection(last_position(self.layers[-1], h))
        return forecast


def last_position(layer: Any, h: Tensor) -> Tensor:
    """Compute a pre-norm encoder layer at the last position only, (N, T, d) → (N, d), which halves the cost of a step.

    The forecast reads no other position. A test compares it with the whole layer.
    """
    normed = layer.norm1(h)
    last = h[:, -1:] + layer.dropout1(layer.self_attn(normed[:, -1:], normed, normed, need_weights=False)[0])
    hidden = layer.dropout(F.relu(layer.linear1(layer.norm2(last))))
    result: Tensor = (last + layer.dropout2(layer.linear2(hidden))).squeeze(1)
    return result


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Return the sine and cosine position code of Vaswani et al. (2017), shape (length, width)."""
    angle = torch.arange(length).unsqueeze(1) * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=2).reshape(length, width)


def build(settings: Settings, data: Data) -> nn.Module:
    """Build a freshly initialised model."""
    return TimeSeriesTransformer(**settings.model, **data.sizes)


# ---------------------------------------------------------------- loss and metric


def score(model: nn.Module, batch: Batch) -> Score:
    """Return the mean squared error in squared standard deviations, which is the metric, too."""
    x, y = batch
    return Score(F.mse_loss(model(x), y), len(y))


# ---------------------------------------------------------------- configuration


def settings(profile: str) -> Settings:
    """``paper``: Tables 1 and 4. ``smoke``: a narrow model, windows of a day, 328 synthetic hours.

    ``lite``: half the paper's width, and windows of half a day instead of four days. Batch size and K_meta are the
    paper's. All hours are kept, since errors are so uneven that fewer would hide any gain. Guessing the mean has 100
    times the error. But the last hour alone predicts the next about as well as the paper's models do, at any size. The
    longest run of the search takes 10 epochs.

    Raises:
        ValueError: for an unknown profile.
    """
    check_choice("profile", profile, PROFILES)
    epochs, meta_every, width, data = {
        "paper": (8, 217, 128, {}),
        "lite": (10, 217, 64, {"window": 12}),
        "smoke": (2, 5, 16, {"hours": 328, "window": 24}),
    }[profile]
    return Settings(
        epochs=epochs,
        batch_size=64,
        meta_every=meta_every,
        min_delta=1e-4,
        metaadamw={
            "attn_layers": 8,
            "attn_hidden_dim": 16,
            "attn_heads": 6,
            "feature_version": "basic",
            "use_feature_gating": True,
            "huw_priorities": (1.0, 1.0, 1.0),
        },
        model={"d_model": width, "heads": 4, "layers": 2, "feed_forward": 4 * width, "dropout": 0.2},
        data=data,
        scheduled_epochs=9 if profile == "lite" else None,
    )


ETTH1 = Task(
    name="etth1",
    title="ETTh1 forecasting",
    metric="MSE",
    unit="MSE (squared std)",
    lower_is_better=True,
    settings=settings,
    load=load,
    build=build,
    score=score,
    metric_of=mean_squared_error,
)
