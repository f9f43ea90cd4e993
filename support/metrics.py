"""The scalars of an epoch and of a run. Letters in shapes: N samples, C classes."""

import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> list[list[int]]:
    """Counts: row the label, column the prediction. predicted, labels: int64 (N,)."""
    cells = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.view(num_classes, num_classes).tolist()


def accuracy_scalars(table: list[list[int]], classes: tuple[str, ...]) -> dict[str, float]:
    """accuracy/test, accuracy/test_mean_class and accuracy/class/<class> (of the classes that occur), as fractions.

    table: see `confusion_matrix`.
    """
    correct = [row[i] for i, row in enumerate(table)]
    own = {f"accuracy/class/{name}": hits / sum(row) for name, hits, row in zip(classes, correct, table) if sum(row)}
    mean = sum(own.values()) / len(own)
    return {"accuracy/test": sum(correct) / sum(map(sum, table)), "accuracy/test_mean_class": mean, **own}


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve, 0.5 without samples of either kind. scores: (N,). positive: bool (N,)."""
    above, below = scores[positive].double(), scores[~positive].double().sort().values
    if not len(above) or not len(below):
        return 0.5
    wins = torch.searchsorted(below, above) + torch.searchsorted(below, above, right=True)
    return (wins.double().mean() / (2 * len(below))).item()


def label_scalars(given: Tensor, current: Tensor, clean: Tensor | None) -> dict[str, float]:
    """relabel/changed and, where the clean labels are known, labels/accuracy, relabel/precision and relabel/recall.

    given, current, clean: int64 (N,). Precision is left out while no label is changed, recall if none is corrupted.
    """
    changed = current != given
    scalars = {"relabel/changed": changed.sum().item()}
    if clean is not None:
        correct, corrupted = current == clean, given != clean
        scalars["labels/accuracy"] = correct.float().mean().item()
        if changed.any():
            scalars["relabel/precision"] = correct[changed].float().mean().item()
        if corrupted.any():
            scalars["relabel/recall"] = correct[corrupted].float().mean().item()
    return scalars


def audit_scores(probs: Tensor, given: Tensor) -> Tensor:
    """How suspicious each given label is, (N,) in [0, 1]: max_k p_k - p_given. probs: (N, C) on unaugmented images."""
    return probs.amax(1) - probs.gather(1, given[:, None])[:, 0]


def audit_order(probs: Tensor, given: Tensor) -> Tensor:
    """The rows, int64 (N,), the most suspicious label first: by `audit_scores`, equal ones by the least p_given.

    The score of a label that the network agrees with is 0, and these are most of the rows.
    """
    by_p = probs.gather(1, given[:, None])[:, 0].argsort(stable=True)
    return by_p[audit_scores(probs, given)[by_p].argsort(descending=True, stable=True)]


def summary(history: list[dict]) -> dict[str, float]:
    """best (highest test accuracy of any epoch), last5 (mean of the last five), final, as fractions, and best_epoch."""
    accuracies = [line["accuracy/test"] for line in history]
    last5, best = accuracies[-5:], max(accuracies)
    epoch = history[accuracies.index(best)]["epoch"]
    return {"best": best, "last5": sum(last5) / len(last5), "final": accuracies[-1], "best_epoch": epoch}
