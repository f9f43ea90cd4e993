"""The scalars of an epoch and of a run, by hand."""

from support import metrics

import pytest
import torch
from sklearn.metrics import roc_auc_score


def test_accuracies_by_hand():
    predicted, labels = torch.tensor([0, 0, 1, 1, 0, 2]), torch.tensor([0, 0, 0, 0, 1, 2])
    table = metrics.confusion_matrix(predicted, labels, 4)
    assert table == [[2, 2, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert metrics.accuracy_scalars(table, ("a", "b", "c", "d")) == {
        "accuracy/test": 0.5,
        "accuracy/test_mean_class": 0.5,
        "accuracy/class/a": 0.5,
        "accuracy/class/b": 0.0,
        "accuracy/class/c": 1.0,
    }


def test_label_metrics_by_hand():
    clean = torch.tensor([0, 1, 2, 0, 1, 2])
    given = torch.tensor([0, 1, 2, 1, 2, 0])  # the last three are corrupted
    current = torch.tensor([0, 2, 2, 0, 2, 1])  # one made wrong, one restored, one changed to another wrong one
    got = metrics.label_scalars(given, current, clean)
    wanted = {"relabel/changed": 3, "labels/accuracy": 0.5, "relabel/precision": 1 / 3, "relabel/recall": 1 / 3}
    assert got == pytest.approx(wanted)


def test_label_metrics_say_nothing_where_nothing_is_known():
    labels = torch.tensor([0, 1])
    assert metrics.label_scalars(labels, labels, None) == {"relabel/changed": 0}
    assert "relabel/precision" not in metrics.label_scalars(labels, labels, torch.tensor([1, 1]))
    assert "relabel/recall" not in metrics.label_scalars(labels, labels, labels)


def test_audit_score_is_the_margin_of_the_best_class_over_the_given_one():
    got = metrics.audit_scores(torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]]), torch.tensor([0, 1]))
    torch.testing.assert_close(got, torch.tensor([0.3, 0.0]))


def test_of_equal_scores_the_label_that_is_least_probable_comes_first():
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.05, 0.05], [0.2, 0.5, 0.3], [0.4, 0.3, 0.3], [0.5, 0.2, 0.3]])
    assert metrics.audit_order(probs, torch.tensor([0, 0, 0, 0, 1])).tolist() == [2, 4, 3, 0, 1]


def test_best_last5_and_final_are_what_their_names_say():
    history = [{"epoch": i + 1, "accuracy/test": a} for i, a in enumerate([0.5, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5])]
    assert metrics.summary(history) == pytest.approx({"best": 0.9, "last5": 0.3, "final": 0.5, "best_epoch": 2})


def test_area_under_the_curve_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (60,), generator=generator) / 5  # with ties
    positive = torch.rand(60, generator=generator) < 0.3
    assert metrics.auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert metrics.auroc(scores, torch.zeros(60, dtype=torch.bool)) == 0.5 == metrics.auroc(scores, scores >= 0)
