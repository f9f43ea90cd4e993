"""What stands in the pictures of a run. How they look is for the eye."""

from types import SimpleNamespace

from support import figures

import numpy as np
import torch


def texts(figure):
    (axes,) = figure.axes
    return [text.get_text() for text in axes.texts]


def faces(count, **more):
    images = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    return SimpleNamespace(images=images, names=list(range(count)), classes=("a", "b"), **more)


def test_the_curves_are_those_of_their_tags():
    history = [
        {"epoch": epoch, "accuracy/test": 0.1 * epoch, "accuracy/train": 0.2 * epoch, "labels/accuracy": 0.3 * epoch}
        for epoch in (1, 2, 3)
    ]
    (axes,) = figures.curves(history, "valid").axes
    got = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    tags = ("accuracy/test", "accuracy/train", "labels/accuracy")
    assert list(got.values()) == [[100 * line[tag] for line in history] for tag in tags]
    assert [name.split()[0] for name in got] == ["valid", "train,", "training"]


def test_the_rows_of_the_confusion_matrix_are_shares_of_a_label():
    figure = figures.confusion([[3, 1], [0, 0]], ("a", "b"))
    assert texts(figure) == ["75.0", "25.0", "0.0", "0.0"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("predicted (%)", "label")


def test_the_faces_of_scn_have_the_lowest_importance():
    figure = figures.weights(faces(3), torch.tensor([0, 1, 1]), torch.tensor([0.9, 0.1, 0.5]))
    assert texts(figure) == ["b\nalpha 0.10", "b\nalpha 0.50", "a\nalpha 0.90"]


def test_wrong_labels_are_red_in_the_figure_of_confidence():
    train = faces(2, labels=torch.tensor([0, 1]), clean=torch.tensor([0, 0]))
    figure = figures.confidence(train, torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    assert texts(figure) == ["a 0.90\na 0.90", "b 0.20\na 0.80"]
    assert [text.get_color() for text in figure.axes[0].texts] == ["black", "tab:red"]


def test_generated_faces_have_a_column_for_each_class_and_a_row_for_each_latent_vector(monkeypatch):
    seen = []

    def generate(decoder, y0, labels, va, sets, args):
        seen.append((y0, labels, va))
        return torch.zeros(len(y0), 3, 4, 4, dtype=torch.uint8)

    monkeypatch.setattr(figures, "generate_faces", generate)
    va = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    figure = figures.generated(None, torch.tensor([[1.0], [2.0], [3.0]]), faces(2), va, 1, None)
    ((y0, labels, given),) = seen
    assert labels.argmax(1).tolist() == [0, 1] * 3 and y0[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    assert torch.equal(given, va.repeat(3, 1)) and texts(figure) == ["a", "b"] * 3


def test_the_losses_of_correct_and_wrong_labels_are_told_apart():
    losses = torch.tensor([0.0, 0.1, 0.9, 1.0, 0.05])
    train = faces(5, labels=torch.tensor([0, 0, 0, 0, 0]), clean=torch.tensor([0, 0, 1, 1, 0]))
    ones = torch.full((2,), 0.5, dtype=torch.float64)
    axes = figures.mixtures(losses, train, lambda x: (ones, ones, ones), per_class=True).axes[0]
    bars = {name: container for name, container in zip(("correct", "wrong"), axes.containers)}
    middle = {
        name: np.average([bar.get_x() for bar in container], weights=[bar.get_height() for bar in container])
        for name, container in bars.items()
    }
    assert [text.get_text() for text in axes.get_legend().texts] == ["correct", "wrong"]
    assert middle["correct"] < 0.2 and middle["wrong"] > 0.8
