"""Which labels are wrong? How often a model contradicted them while it trained tells, in several ways.

``SampleHistory`` looks at every training sample after every epoch. Its ``suspicion`` is one number for each sample and
method, larger for labels that look wrong; ``detection`` says how well such a ranking finds those that are wrong.
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
    """Sums over epochs of what a model says of each of N samples.

    Args:
        labels: observed labels, (N,).
        share: the share of samples that "small-loss frequency" takes for clean, which is told it.
    """

    def __init__(self, labels: Tensor, share: float) -> None:
        self.labels, self.share = labels.cpu(), share
        count = len(labels)
        names = ("loss", "entropy", "margin", "small_loss", "easy", "hard", "forgotten", "learned")
        self.sums: dict[str, Tensor] = {name: torch.zeros(count, dtype=torch.float64) for name in names}
        self.sums["was_right"] = torch.zeros(count, dtype=torch.float64)
        self.sums["last_loss"] = torch.zeros(count, dtype=torch.float64)
        self.epochs = 0

    def add(self, logits: Tensor, lilaw: LiLAW | None) -> None:
        """Take in the logits (N, C) after an epoch."""
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
        """For each method a number for each sample, (N,), larger for a label that looks wrong.

        Args:
            weighted: whether there was a LiLAW to ask.
        """
        from cleanlab.rank import get_label_quality_scores  # takes seconds to import

        sums, epochs = self.sums, max(1, self.epochs)
        never = sums["learned"] == 0  # as the authors of forgetting events count it: worse than any that is forgotten
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
        """For a checkpoint."""
        return {"sums": self.sums, "epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.sums = {name: x.cpu() for name, x in state["sums"].items()}  # a checkpoint is loaded to the run's device
        self.epochs = state["epochs"]


def detection(scores: Mapping[str, Array], wrong: Array) -> dict[str, dict[str, float]]:
    """Area under the ROC curve and average precision of each ranking; chance is 0.5 and the share of wrong labels.

    Args:
        scores: for each method a number for each of N samples, larger for a label that looks wrong.
        wrong: which labels are wrong, (N,); at least one is and one is not.

    Returns:
        For each method "auroc" and "auprc"; NaN where a number is not finite.
    """
    areas = {"auroc": roc_auc_score, "auprc": average_precision_score}
    return {
        name: {area: float(f(wrong, x)) if np.isfinite(x).all() else math.nan for area, f in areas.items()}
        for name, x in scores.items()
    }
