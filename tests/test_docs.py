"""The commands, the links and the names in README.md and docs/, and the tags that runs write.

Every command of the pages and of the scripts' docstrings is parsed by its script. Those that train, predict or inject
noise are run, for an epoch on small data sets, without drawing figures.
"""

import argparse
import ast
import contextlib
import fnmatch
import importlib
import io
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

from support import figures, toyfaces

import conftest
import pytest
import torch
from conftest import Tiny

import common

ROOT = Path(common.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path for folder in (".", "support", "benchmarks", "assignments") for path in sorted((ROOT / folder).glob("*.py"))
]
METHODS = sorted(path.stem for path in ROOT.glob("*.py") if "\ndef restore(" in path.read_text(encoding="utf-8"))
WEIGHTS = "resnet18_msceleb.pth"
TRAINED_OR_NOT = ("--labels", "--va-labels", "--from-checkpoint", "--predict", "--evaluate")


def commands_in(text: str) -> list[str]:
    """`python X.py ...` and `torchrun ... X.py ...`, of code blocks, of backticks and of indented lines."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if language in ("", "bash") for line in block.splitlines()]
    lines += [line for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`(python [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [line.strip() for line in lines if re.match(r"\s*(python|torchrun [^#]*?) ?[\w/]+\.py( |$)", line)]
    return [line for line in found if "$" not in line and "{" not in line]


def docstring_of(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""


def words_of(command: str) -> tuple[Path, list[str]]:
    """The script and its arguments; what optional placeholders stand for is left out."""
    words = shlex.split(re.sub(r"\[.*?\]|\.\.\.", "", command), comments=True)
    script = next(k for k, word in enumerate(words) if word.endswith(".py"))
    return ROOT / words[script], words[script + 1 :]


COMMANDS = [(path.name, line) for path in PAGES for line in commands_in(path.read_text(encoding="utf-8"))]
COMMANDS += [(path.name, line) for path in SOURCES for line in commands_in(docstring_of(path))]


class Parsed(BaseException):
    pass


def main_of(script: Path):
    if script.parent == ROOT:
        return importlib.import_module(script.stem).main
    spec = importlib.util.spec_from_file_location(f"{script.stem}_of_the_docs", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


def check_arguments(script: Path, arguments: list[str], monkeypatch) -> None:
    """The script takes the arguments: by its parse_args, or by its main as far as to the end of parsing."""
    main = main_of(script)
    module = sys.modules[main.__module__]
    said = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        if hasattr(module, "parse_args"):
            work = module.parse_args
        else:
            work, parse = main, argparse.ArgumentParser.parse_args

            def stop(self, *rest):
                parse(self, *rest)
                raise Parsed

            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            assert not work(arguments) or work is not main, said.getvalue()
        except Parsed:
            pass
        except SystemExit:
            pytest.fail(said.getvalue())


def test_the_pages_have_commands():
    assert len(COMMANDS) > 100 and {page for page, _ in COMMANDS} >= {"README.md", "cocuring.md", "scn.py", "audit.md"}
    assert {words_of(line)[0].stem for _, line in COMMANDS} >= {*METHODS, "inject_noise", "align_faces", "compare"}


def test_a_command_with_a_wrong_flag_is_found(monkeypatch):
    for line in ("python scn.py --data toy --nose 0.4", "python benchmarks/figures.py tsnee RUN"):
        with pytest.raises((pytest.fail.Exception, AssertionError)):
            check_arguments(*words_of(line), monkeypatch)


@pytest.mark.parametrize("page", dict.fromkeys(page for page, _ in COMMANDS))
def test_every_command_is_understood_by_its_script(page, monkeypatch, tmp_path):
    for folder in ("photos", "new_photos"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.processes, "count", 1)
    for line in dict.fromkeys(line for name, line in COMMANDS if name == page):
        script, arguments = words_of(line)
        assert script.exists(), line
        check_arguments(script, arguments, monkeypatch)


# ----------------------------------------------------------------------------------------------------------------------
# Commands that are run
# ----------------------------------------------------------------------------------------------------------------------


class FaceNetwork(Tiny):
    """Stands in for dlib's network and its weights."""

    size = 32

    def load_pretrained(self, path, inputs) -> int:
        return len(self.state_dict())


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """The current folder has small data sets, and weights, where the commands expect them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toyfaces, "SPLITS", {"train": 80, "valid": 20, "test": 20})
    monkeypatch.setitem(common.BACKBONES, "resnet18", Tiny)
    monkeypatch.setitem(common.BACKBONES, "dlib", FaceNetwork)
    for name in ("raf", "ferplus", "cifar10"):
        conftest.BUILDERS[name](tmp_path / "data" / name)
    for name in ("affectnet", "affectnet-auto"):
        conftest.BUILDERS["affectnet"](tmp_path / "data" / name)
    for name in ("my_faces", "faces"):
        conftest.build_folder_splits(tmp_path / name, count=8)
    conftest.build_folder(tmp_path / "new_faces")
    torch.save({"state_dict": Tiny().state_dict()}, tmp_path / WEIGHTS)


def value(arguments: list[str], flag: str, default: str) -> str:
    return arguments[arguments.index(flag) + 1] if flag in arguments else default


def runnable() -> list[tuple[Path, list[str]]]:
    """The commands that train, predict or inject noise; of those that differ in numbers alone the first.

    Those of records.md have been run: each has its record.
    """
    found = [(line, *words_of(line)) for page, line in COMMANDS if line.startswith("python") and page != "records.md"]
    found = [(script, arguments) for _, script, arguments in found if script.parent == ROOT]
    found = [command for command in found if command[0].stem in (*METHODS, "inject_noise")]
    kinds = {}
    for script, arguments in found:
        kind = script, *(re.sub(r"^[\d.]+(e-\d+)?$", "number", argument) for argument in arguments)
        kinds.setdefault(kind, (script, arguments))
    return list(kinds.values())


def test_the_commands_run(stand_ins, capsys, monkeypatch):
    monkeypatch.setattr(figures, "write", lambda path, draw: None)
    ran = set()
    for script, arguments in runnable():
        files = [value(arguments, flag, "") for flag in TRAINED_OR_NOT if flag in arguments]
        if not all(Path(file).exists() for file in files):
            continue  # a file that somebody else made
        if script.stem in METHODS and "--predict" not in arguments:
            limit = "64" if value(arguments, "--data", "toy") == "toy" else "14"
            arguments = [*arguments, *f"--epochs 1 --limit {limit} --size 32 --batch-size 7 --overwrite".split()]
            if script.stem == "jointgan":
                arguments += ["--width", "0.02"]
        status = main_of(script)(arguments)
        assert status == 0, (script.name, arguments, capsys.readouterr().err)
        ran |= {(script.stem, value(arguments, "--data", "toy")), *((script.stem, flag) for flag in files)}
        ran |= {(script.stem, flag) for flag in arguments if flag in (WEIGHTS, "dlib", "--predict", "--labels")}
    assert ran >= {(method, "toy") for method in METHODS}
    assert ran >= {(method, "raf") for method in ("cocuring", "scn", "ncctfer", "inject_noise")}
    assert ran >= {
        ("cocuring", "ferplus"),
        ("twostage", "affectnet"),
        ("cocuring", "affectnet-auto"),
        ("cocuring", "folder"),
    }
    assert ran >= {
        (method, weights) for method in ("cocuring", "scn", "ncctfer", "twostage") for weights in (WEIGHTS, "dlib")
    }
    assert ran >= {("cocuring", "--predict"), ("cocuring", "--labels")}


# ----------------------------------------------------------------------------------------------------------------------
# Links and names
# ----------------------------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


HEADINGS = [
    "Idea",
    "Equations",
    "Usage",
    "The paper's tables and figures",
    "What is logged",
    "Paper, published code, this script",
    "Results",
    "What was tried",
]
METHOD_PAGES = [page for page in PAGES if page.stem in METHODS and "## Equations" in page.read_text(encoding="utf-8")]


def test_the_methods_have_pages_of_one_form():
    assert {"cocuring", "scn", "ncctfer", "twostage"} <= {page.stem for page in METHOD_PAGES}


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_the_headings_are_the_same_in_the_same_order(page):
    found = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_the_functions_and_tests_of_the_equations_exist(page):
    text = page.read_text(encoding="utf-8")
    table = text[text.index("## Equations") : text.index("## Usage")]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    script = importlib.import_module(page.stem)
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests" / f"test_{page.stem}.py").read_text(), re.MULTILINE)
    assert len(rows) >= 4
    for _, functions, names in rows:
        functions, names = re.findall(r"`(\w+)`", functions), re.findall(r"`([\w*]+)`", names)
        assert functions and names
        for function in functions:
            assert callable(getattr(script, function, None)), function
        for name in names:
            assert fnmatch.filter(tests, name), name


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard
# ----------------------------------------------------------------------------------------------------------------------

RUNS = {  # flags with which a script writes all its tags in two epochs
    "jointgan": "--noise 0.3 0.4 --va-noise 0.3 --warm-up 0 --width 0.02",
    "cocuring": "--warm-up 0 --delta 0",
    "scn": "--warm-up 0 --margin2 0 --relabel-batch",
}


def tags_of(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    found = {tag for kind in ("scalars", "images", "histograms") for tag in tags[kind]}
    classes = "|".join(map(re.escape, toyfaces.CLASSES))
    found = {re.sub(rf"/({classes})$", "/<class>", tag) for tag in found}
    return {re.sub(r"^score/[^/]+/", "score/<name>/", re.sub(r"/set\d$", "/set<k>", tag)) for tag in found}


def documented() -> dict[str, set[str]]:
    """Script -> tags, by docs/tensorboard.md: rows `tag`, `tag` | meaning | scripts."""
    found = {method: set() for method in METHODS}
    for line in (ROOT / "docs" / "tensorboard.md").read_text(encoding="utf-8").splitlines():
        cells = line.strip("|").split("|")
        if len(cells) == 3 and "`" in cells[0]:
            scripts = METHODS if cells[2].strip() == "all" else cells[2].replace(",", " ").split()
            for script in scripts:
                found[script] |= set(re.findall(r"`([^`]+)`", cells[0]))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_index_of_tags_is_what_runs_write(method, tiny, tmp_path):
    flags = ["--epochs", "2", *RUNS.get(method, "--warm-up 1").split(), "--out", str(tmp_path), "--name", "run"]
    assert importlib.import_module(method).main([*tiny, *flags, "--cache", str(tmp_path / "cache")]) == 0
    assert tags_of(tmp_path / "run") == documented()[method]
