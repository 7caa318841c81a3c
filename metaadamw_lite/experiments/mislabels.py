"""Detection of wrong labels, from the model's outputs on the training samples after every epoch.

``SampleHistory`` sums the outputs over the epochs. Its ``suspicion`` is a number for each sample and method, larger for
labels that look wrong. ``detection`` measures how well this ranking finds the wrong ones.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from metaadamw_lite.lilaw import LiLAW

Array = np.ndarray[Any, np.dtype[Any]]


class SampleHistory:
    """Sums over epochs of a model's loss, entropy, margin and so on, for each of N samples.

    Args:
        labels: observed labels, (N,).
        share: the true share of clean samples, which "small-loss frequency" is given.
    """

    def __init__(self, labels: Tensor, share: float) -> None:
        self.labels, self.share = labels.cpu(), share
        count = len(labels)
        names = ("loss", "entropy", "margin", "small_loss", "easy", "hard", "forgotten", "learned")
        zeros = {name: torch.zeros(count, dtype=torch.float64) for name in (*names, "was_right", "last_loss")}
        self.sums: dict[str, Tensor] = zeros
        self.epochs = 0

    def add(self, logits: Tensor, lilaw: LiLAW | None) -> None:
        """Add the logits (N, C) after an epoch; ``lilaw`` adds its weights of the samples."""
        z, sums = logits.cpu().double(), self.sums
        log_p = z.log_softmax(dim=1)
        loss = -log_p.gather(1, self.labels[:, None]).squeeze(1)
        own = z.gather(1, self.labels[:, None]).squeeze(1)
        other = z.scatter(1, self.labels[:, None], -torch.inf).amax(dim=1)
        right = (own > other).double()
        sums["loss"] += loss
        sums["last_loss"] = loss
        sums["entropy"] -= (log_p.exp() * log_p).sum(dim=1)
        sums["margin"] += own - other
        sums["small_loss"] += (loss <= loss.quantile(self.share)).double()
        sums["forgotten"] += sums["was_right"] * (1 - right)
        sums["learned"] += right
        sums["was_right"] = right
        sums["probabilities"] = sums.get("probabilities", 0.0) + log_p.exp()
        if lilaw is not None:
            with torch.no_grad():
                parts = lilaw.parts(logits, self.labels.to(logits.device))
            sums["easy"] += parts.easy.cpu().double()
            sums["hard"] += (torch.stack(parts).argmax(dim=0) == 2).cpu().double()
        self.epochs += 1

    def suspicion(self, weighted: bool) -> dict[str, Array]:
        """Return a number for each sample, (N,), larger for a label that looks wrong, by method.

        Args:
            weighted: include the methods by LiLAW's weights.
        """
        from cleanlab.rank import get_label_quality_scores  # takes seconds to import

        sums, epochs = self.sums, max(1, self.epochs)
        never = sums["learned"] == 0  # as the authors of forgetting events count: worse than any forgotten sample
        found = {
            "loss, last epoch": sums["last_loss"],
            "loss, mean": sums["loss"] / epochs,
            "entropy, mean": sums["entropy"] / epochs,
            "margin (AUM)": -sums["margin"] / epochs,
            "forgetting events": torch.where(never, float(epochs), sums["forgotten"]),
            "small-loss frequency": -sums["small_loss"] / epochs,
        }
        if weighted:
            found |= {"LiLAW, easy weight": -sums["easy"] / epochs, "LiLAW, how often hard": sums["hard"] / epochs}
        scores = {name: x.numpy() for name, x in found.items()}
        mean = (sums["probabilities"] / sums["probabilities"].sum(dim=1, keepdim=True)).numpy()
        scores["confident learning"] = -get_label_quality_scores(self.labels.numpy(), mean, adjust_pred_probs=True)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the number of epochs, for a checkpoint."""
        return {"sums": self.sums, "epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.sums = {name: x.cpu() for name, x in state["sums"].items()}  # a checkpoint is loaded to the run's device
        self.epochs = state["epochs"]


def detection(scores: Mapping[str, Array], wrong: Array) -> dict[str, dict[str, float]]:
    """Measure each ranking by the area under its ROC curve (chance: 0.5) and average precision (chance: share wrong).

    Args:
        scores: numbers (N,) by method, larger for a label that looks wrong.
        wrong: mask of the wrong labels, (N,), with at least one True and one False.

    Returns:
        "auroc" and "auprc" by method; NaN if a number is not finite.
    """
    areas = {"auroc": roc_auc_score, "auprc": average_precision_score}
    return {
        name: {area: float(f(wrong, x)) if np.isfinite(x).all() else math.nan for area, f in areas.items()}
        for name, x in scores.items()
    }
