import argparse
import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from support import inference, runs
from support.face_backbones import DlibResNet

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_ferplus, build_ferplus_csv, lines
from PIL import Image

import cocuring
import jointgan
import ncctfer
import scn


def load(name):
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).resolve().parent.parent / "benchmarks" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare, figures = load("compare"), load("figures")


@pytest.fixture
def suite(tiny, tmp_path, monkeypatch):
    rows = [
        compare.Row("one network (baseline)", "cocuring", "--networks 1 --lambda-max 0 --no-relabel", 1),
        compare.Row("SCN", "scn", "--warm-up 0", 1),
    ]
    monkeypatch.setattr(
        compare, "SUITES", {"small": {"title": "Small", "flags": " ".join(tiny), "seeds": (1, 2), "rows": rows}}
    )
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(compare, "DOCS", tmp_path / "docs")
    (tmp_path / "docs").mkdir()
    return ["small", "--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]


def test_compare_records_runs_once_and_writes_the_page(suite, tmp_path, capsys):
    assert compare.main([*suite, "--seeds", "2", "--rows", "scn"]) == 0
    assert compare.main([*suite, "--seeds", "2"]) == 0
    record = tmp_path / "results" / "small" / "scn-s2.json"
    before = record.read_bytes()
    first = json.loads(before)
    history = [
        json.loads(line) for line in (tmp_path / "runs" / "small" / "scn-s2" / "metrics.jsonl").read_text().splitlines()
    ]
    assert first["last5"] == pytest.approx(np.mean([line["accuracy/test"] for line in history]), abs=1e-6)
    assert first["weight/auroc_clean"] == pytest.approx(history[-1]["weight/auroc_clean"], abs=1e-6)
    assert first["command"].startswith("python scn.py --noise 0.4") and first["command"].endswith(
        "--warm-up 0 --seed 2"
    )
    capsys.readouterr()
    assert compare.main(suite) == 0
    assert "=== 2 of 2" in capsys.readouterr().out and record.read_bytes() == before  # seed 1 alone was left to do
    page, record_page = ((tmp_path / "docs" / name).read_text() for name in ("results.md", "records.md"))
    assert "## Small" in page and "| SCN | 2 |" in page and "mean class accuracy" in page
    assert "| SCN | 2 |" in record_page and "weight/auroc_clean" in record_page
    assert f"`{first['command'].replace('--seed 2', '--seed 1')}`" in record_page
    assert (tmp_path / "docs" / "figures" / "small.png").exists()


def test_a_finished_run_is_recorded_under_its_own_arguments_alone(suite, tmp_path, capsys):
    chosen = [*suite, "--seeds", "1", "--rows", "scn"]
    assert compare.main(chosen) == 0
    record = tmp_path / "results" / "small" / "scn-s1.json"
    before = record.read_bytes()
    record.unlink()
    assert compare.main(chosen) == 0 and record.read_bytes() == before
    record.unlink()
    compare.SUITES["small"]["flags"] += " --epochs 3"
    assert compare.main(chosen) == 2 and not record.exists()
    assert "other arguments than those of the suite" in capsys.readouterr().err
    compare.SUITES["small"]["flags"] = compare.SUITES["small"]["flags"].removesuffix(" --epochs 3")
    content = json.loads(before) | {"commit": "0123456789abcdef+"}
    record.write_text(json.dumps(content))
    assert compare.main([]) == 0
    assert "Commits: 0123456+." in (tmp_path / "docs" / "records.md").read_text()


def test_a_suite_makes_its_label_files_once_and_trains_on_them(suite, tmp_path, monkeypatch):
    made, started, honest = "inject_noise.py --data toy --noise 0.4 --output machine-x.csv", [], subprocess.run

    def remember(command, **options):
        started.append(" ".join(map(str, command)))
        return honest(command, **options)

    monkeypatch.setattr(subprocess, "run", remember)
    what = compare.SUITES["small"]
    flags = what["flags"].replace("--noise 0.4", "") + " --labels machine-x.csv"
    monkeypatch.setitem(compare.SUITES, "small", what | {"before": {"machine-x.csv": made}, "flags": flags})
    assert compare.main([*suite, "--rows", "scn"]) == 0
    assert sum("inject_noise.py" in command for command in started) == 1
    run = tmp_path / "runs" / "small"
    given = dict(line.split(",")[:2] for line in (run / "scn-s1" / "labels.csv").read_text().splitlines()[1:])
    assert given.items() <= dict(line.split(",") for line in (run / "machine-x.csv").read_text().splitlines()).items()
    record = json.loads((tmp_path / "results" / "small" / "scn-s1.json").read_text())
    assert "--labels machine-x.csv" in record["command"]
    assert f"- first `python {made}`" in (tmp_path / "docs" / "records.md").read_text()


def test_commands_before_go_on_where_they_stopped_and_a_failure_ends_all(suite, tmp_path, monkeypatch, capfd):
    first = "inject_noise.py --data toy --noise 0.4 --output machine-a.csv"
    second = "inject_noise.py --data toy --noise 2 --output machine-b.csv"
    before = {"machine-a.csv": first, "machine-b.csv": second}
    monkeypatch.setitem(compare.SUITES, "small", compare.SUITES["small"] | {"before": before})
    assert compare.main([*suite, "--rows", "scn"]) == 2 and "--noise: 2 is outside" in capfd.readouterr().err
    before["machine-b.csv"] = second.replace("--noise 2", "--noise 0.2")
    assert compare.main([*suite, "--rows", "scn"]) == 0
    assert (tmp_path / "runs" / "small" / "machine-b.csv").exists()


def test_suites_of_one_data_set_share_a_table(monkeypatch, tmp_path):
    def row(name):
        return compare.Row(name, "scn", "", 1)

    suites = {
        key: {"title": key, "flags": "", "seeds": (1,), "rows": [row("both"), row(key)]}
        for key in ("low", "high", "rest")
    }
    monkeypatch.setattr(compare, "SUITES", suites)
    monkeypatch.setattr(compare, "PAGES", [("Data", {"low": "10 %:", "high": "20 %:"}, "What it says.")])
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(compare, "DOCS", tmp_path)
    for number, (suite, what) in enumerate(suites.items()):
        for one in what["rows"]:
            path = compare.record_path(suite, one, 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            numbers = {
                "best": 0.9,
                "last5": 0.1 * number,
                "final": 0.5,
                "accuracy/test_mean_class": 0.25,
                "seconds": 120,
            }
            if one.name != "rest":
                numbers["mean_class/last5"] = 0.35
            path.write_text(json.dumps(numbers))
    compare.write_results()
    page = (tmp_path / "results.md").read_text()
    assert "| both | 0.0 | 35.0 | 10.0 | 35.0 |" in page  # the columns of both suites
    assert "| high |  |  | 10.0 | 35.0 |" in page and "What it says." in page
    assert "20 %: mean class accuracy, last5 |" in page and page.count("| final | mean class accuracy |") == 1
    assert "| both | 1 | 90.0 | 20.0 | 50.0 | 25.0 |" in page  # one row does not know the mean of five epochs
    assert "| rest | 1 | 90.0 | 20.0 | 50.0 | 25.0 |" in page  # a suite that no page names has its own table
    assert page.count("\n## ") == 2


def test_the_tables_of_the_pages_are_narrow_and_up_to_date(monkeypatch, tmp_path):
    pages = {path.name: path.read_text() for path in compare.DOCS.glob("re*s.md")}
    heads = [line for line in pages["results.md"].splitlines() if line.startswith("|  |")]
    assert heads and all(head.count("|") <= 9 for head in heads)
    monkeypatch.setattr(compare, "DOCS", tmp_path)
    compare.write_results()
    compare.write_records()
    assert {path.name: path.read_text() for path in tmp_path.glob("*.md")} == pages


def test_compare_goes_on_with_an_interrupted_run(suite, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "finish", stop)
        assert compare.main([*suite, "--seeds", "1"]) == 130
    assert not (tmp_path / "results").exists()
    assert compare.main([*suite, "--seeds", "1"]) == 0
    assert json.loads((tmp_path / "results" / "small" / "scn-s1.json").read_text())["seed"] == 1


def test_grad_cam_of_a_linear_map_is_the_weighted_map():
    # Score = sum_c w_c mean(A_c), so that the gradient at each place is w_c / (H W) and the map is relu(sum_c w_c A_c).
    conv = torch.nn.Conv2d(3, 2, 1, bias=False)
    backbone = torch.nn.Sequential(conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    head = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        conv.weight[:] = torch.tensor([[1.0, 0, 0], [0, 1, 0]])[:, :, None, None]
        head.weight[:] = torch.tensor([[1.0, -2.0], [-10, -10]])
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x[:, 0] += 1  # the first class is the prediction
    cam, probs = figures.grad_cam(SimpleNamespace(backbone=backbone), head, x)
    expected = (x[:, 0] - 2 * x[:, 1]).relu()
    assert torch.allclose(cam, expected / expected.amax((1, 2), keepdim=True), atol=1e-5)
    assert torch.allclose(
        probs, (torch.stack([x[:, 0] - 2 * x[:, 1], -10 * (x[:, 0] + x[:, 1])], 1).mean((2, 3))).softmax(1), atol=1e-5
    )


def test_grad_cam_of_dlibs_network_is_taken_at_the_last_block_with_6_pixels():
    torch.manual_seed(1)
    backbone, head = DlibResNet((2, 4, 6, 8), (1, 1, 1, 1)).eval(), torch.nn.Linear(128, 3)
    x = torch.randn(3, 3, 104, 104)
    stem = F.relu(backbone.bn(backbone.conv(x * backbone.scale + backbone.shift)))
    last = backbone.blocks[:5](F.max_pool2d(stem, 3, 2)).detach().requires_grad_()  # 24, 12, 12, 6, 6 pixels
    assert last.shape == (3, 6, 6, 6) and backbone.blocks[5](last).shape[-1] == 3
    logits = head(backbone.fc(backbone.blocks[5:](last).mean((2, 3))))
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), last)
    expected = (gradient.mean((2, 3), keepdim=True) * last).sum(1, keepdim=True).relu().detach()
    expected = F.interpolate(expected, (104, 104), mode="bilinear")[:, 0]
    assert (expected.amax((1, 2)) > 0).any()
    cam, probs = figures.grad_cam(SimpleNamespace(backbone=backbone), head, x)
    torch.testing.assert_close(cam, expected / expected.amax((1, 2), keepdim=True).clamp(min=1e-12))
    torch.testing.assert_close(probs, logits.softmax(1).detach())


def test_figures_are_drawn_from_runs(tiny, tmp_path, capsys):
    def run(script, name, *flags):
        assert (
            script.main([*tiny, *flags, "--out", str(tmp_path), "--name", name, "--cache", str(tmp_path / "cache")])
            == 0
        )
        return str(tmp_path / name)

    clean, noisy, cured = (
        run(scn, "clean", "--noise", "0"),
        run(scn, "noisy", "--no-relabel"),
        run(scn, "cured", "--warm-up", "0"),
    )
    other, peers = run(ncctfer, "other"), run(cocuring, "peers")
    for command in (
        ["weights", clean, noisy, cured],
        ["gradcam", other, cured, peers, "--columns", "9"],
        ["tsne", other],
        ["overview", cured, noisy],
        ["overview", other, noisy],  # a method that corrects no labels
    ):
        if command[0] == "tsne":
            pytest.importorskip("sklearn")
        out = tmp_path / command[0]  # written under this very name
        assert figures.main([*command, "--out", str(out)]) == 0
        pixels = np.asarray(Image.open(out).convert("RGB"))
        assert min(pixels.shape[:2]) > 100 and pixels.std() > 10
    shown = figures.overview_figure(Path(cured), Path(noisy)).axes
    with open(Path(cured) / "labels.csv") as file:
        first = next(csv.DictReader(file))
    assert shown[0].get_title().startswith(first["given"]) and shown[0].get_title().endswith(first["final"])
    accuracies = [[100 * line["accuracy/test"] for line in lines(Path(path))] for path in (cured, noisy)]
    assert [line.get_ydata() for line in shown[8].lines[:2]] == [pytest.approx(values) for values in accuracies]
    assert [len(figures.overview_figure(Path(path), Path(noisy)).axes[8].lines) for path in (cured, other)] == [3, 2]
    (tmp_path / "odd").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "odd" / "model.pt")
    for command, words in (
        (["tsne", str(tmp_path / "odd")], "not a model.pt of a finished run"),
        (["plane", str(tmp_path / "odd")], "not a model.pt of a finished run"),
        (["weights", clean, noisy, other], "no run of scn.py"),
        (["weights", cured, noisy, clean], "injected noise"),
        (["gradcam", str(tmp_path)], "model.pt"),
        (["gradcam", run(jointgan, "gan")], "of jointgan"),
        (["overview", clean, noisy], "without injected noise"),
        (["gradcam", other, "--columns", "0"], "--columns"),
        (["between", other, "happiness"], "required"),
        (["weights", clean, noisy, cured, "--col", "3"], "--col"),  # no abbreviations
        (["gradcam", other, "--out", str(tmp_path / "x.pdf")], "x.pdf: a file name that ends in .png"),
        (["gradcam", other, "--out", str(tmp_path / "none" / "x.png")], "a folder that is there"),
    ):
        capsys.readouterr()
        assert figures.main([command[0], "--out", str(tmp_path / "none.png"), *command[1:]]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "none.png").exists()
    labels = (Path(cured) / "labels.csv").read_text()
    for text in (labels.replace("train_00001", "train_99999"), labels.splitlines()[0], ""):
        (Path(cured) / "labels.csv").write_text(text)
        for command in (["weights", clean, noisy, cured], ["overview", cured, noisy]):
            assert figures.main([*command, "--out", str(tmp_path / "none.png")]) == 2
            assert "labels.csv" in capsys.readouterr().err


def test_a_row_of_faces_is_that_of_one_run(tiny, tmp_path):
    assert scn.main([*tiny, "--epochs", "1", "--out", str(tmp_path), "--name", "run"]) == 0
    run = tmp_path / "run"
    train = figures.Trained(run).train
    wrong = int((train.labels != train.clean).sum())
    for figure, faces in (
        (figures.weights_figure([run] * 3, 14), 14),
        (figures.weights_figure([run] * 3, 99), wrong),
        (figures.gradcam_figure([run, run], 99), 16),
    ):
        assert figure.get_size_inches()[0] == pytest.approx(1.35 * faces)


def test_runs_of_renamed_scripts_are_drawn(tiny, tmp_path, monkeypatch):
    root = Path(scn.__file__).parent
    monkeypatch.setattr(inference, "restore_of", lambda method, path: sys.modules[method].restore)
    for name, other in (("mine_scn", "scn"), ("mine_heads", "ncctfer"), ("mine_gan", "jointgan")):
        spec = importlib.util.spec_from_file_location(name, root / f"{other}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        flags = ["--width", "0.02", "--va-noise", "0.1"] if other == "jointgan" else []
        assert module.main([*tiny, *flags, "--epochs", "1", "--out", str(tmp_path), "--name", name]) == 0
        path = tmp_path / name / "model.pt"
        state = torch.load(path, weights_only=True)
        torch.save(state | {"method": name}, path)
    one, two, gan = (tmp_path / name for name in ("mine_scn", "mine_heads", "mine_gan"))
    assert figures.weights_figure([one] * 3, 3) and figures.gradcam_figure([one, two], 3)
    assert figures.between_figure(gan, "happiness", "anger") and figures.plane_figure(gan, "neutral")
    with pytest.raises(figures.UserError, match="a run of mine_gan; this figure needs a backbone"):
        figures.gradcam_figure([gan], 3)


def test_scalars_are_read_from_whole_lines_alone(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"epoch": 1, "a": 2.0}\n{"epoch": 2, "a": 3.0}\n{"epoch": 3, "a')
    assert figures.points_of(tmp_path, "a") == [(1, 2.0), (2, 3.0)]
    for text in ("[1, 2]\n", '{"a": 1}\n', "{\n", "3\n"):
        file.write_text(text)
        with pytest.raises(figures.UserError, match="no metrics.jsonl of a run"):
            figures.points_of(tmp_path, "a")


def test_rows_seeds_and_suites_that_are_not_there_are_refused(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(compare.SUITES, "other", {"title": "Other", "flags": "", "seeds": (3,), "rows": []})
    for flags, words in (
        (["large", *suite[1:]], "large: no suite; there are small, other"),
        ([*suite, "--seeds", "99"], "--seeds 99"),
        (["other", *suite[1:], "--rows", "scn"], "--rows scn"),
    ):
        assert compare.main(flags) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not list((tmp_path / "docs").iterdir())


def test_the_root_goes_to_suites_of_files_alone(suite, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(scn, "main", lambda argv: seen.append(argv) or 1)
    for flags in ("--data toy", "--data ferplus"):
        monkeypatch.setitem(compare.SUITES["small"], "flags", flags)
        with pytest.raises(SystemExit):
            compare.run_one("small", compare.SUITES["small"]["rows"][1], 1, argparse.Namespace(
                out=str(tmp_path), cache="cache", root="here"))
    assert ["--root" in argv for argv in seen] == [False, True]


def test_rank_correlation_and_entropy_by_hand():
    from scipy.stats import spearmanr

    a, b = np.array([3.0, 1, 2, 2, 5]), np.array([1.0, 1, 7, 3, 3])
    assert figures.ranks(a).tolist() == [4, 1, 2.5, 2.5, 5]
    assert figures.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    votes = np.array([[10, 0, 0], [5, 5, 0], [0, 0, 0]])
    assert figures.vote_entropy(votes) == pytest.approx([0, np.log(2), 0], abs=1e-9)


@pytest.mark.parametrize("build", [build_ferplus, build_ferplus_csv])
def test_suspicion_is_shown_beside_the_votes(build, tiny, tmp_path, capsys):
    root = build(tmp_path / "ferplus")
    place = ["--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert (
        cocuring.main(
            [*tiny, "--data", "ferplus", "--root", str(root), "--noise", "0", "--epochs", "1", *place, "--name", "run"]
        )
        == 0
    )
    assert cocuring.main([*tiny, "--epochs", "1", *place, "--name", "toy"]) == 0
    out = tmp_path / "votes.png"
    assert figures.main(["votes", str(tmp_path / "run"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "24 images: rank correlation of the order" in said
    assert "0.80 in all" in said  # eight of ten votes, see conftest.votes_for
    assert min(np.asarray(Image.open(out)).shape[:2]) > 100
    assert (
        figures.main(["scalar", "accuracy/train", str(tmp_path / "run"), str(tmp_path / "toy"), "--out", str(out)]) == 0
    )
    rows = (tmp_path / "run" / "labels.csv").read_text()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "args.json").write_text((tmp_path / "run" / "args.json").read_text())
    (tmp_path / "moved" / "labels.csv").write_text(rows.replace(rows.splitlines()[1].split(",")[0], "other.png"))
    for command, words in (
        (["votes", str(tmp_path / "moved")], "no majority for other.png"),
        (["votes", str(tmp_path / "toy")], "a run on toy"),
        (["votes", str(tmp_path)], "labels.csv"),
        (["scalar", "no/tag", str(tmp_path / "run")], "no/tag"),
        (["scalar", "x", str(tmp_path)], "metrics.jsonl"),
    ):
        capsys.readouterr()
        assert figures.main([*command, "--out", str(tmp_path / "none.png")]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "none.png").exists()
