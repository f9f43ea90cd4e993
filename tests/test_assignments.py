"""The student's copies: their tests fail without the bodies of the rules and pass with them."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("make", ROOT / "assignments" / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

METHODS = sorted(path.stem for path in ROOT.glob("*.py") if make.rules_of(path.read_text(encoding="utf-8")))


def outcome(folder):
    """How many tests of the folder passed and failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    words = done.stdout.strip().split("\n")[-1].replace(",", "").split()
    return {kind: int(words[words.index(kind) - 1]) if kind in words else 0 for kind in ("passed", "failed", "error")}


def test_every_method_has_rules_to_write():
    assert {"cocuring", "scn", "ncctfer", "jointgan", "twostage"} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_tests_of_a_copy_fail_until_the_bodies_are_back(method, tmp_path):
    assert make.main([method, "--out", str(tmp_path / "student")]) == 0
    empty = outcome(tmp_path / "student")
    assert empty["passed"] == empty["error"] == 0 and empty["failed"] >= 5
    source = (ROOT / f"{method}.py").read_text(encoding="utf-8")
    (tmp_path / "student" / f"{method}.py").write_text(source, encoding="utf-8")
    assert outcome(tmp_path / "student") == {"passed": empty["failed"], "failed": 0, "error": 0}


@pytest.mark.parametrize("method", METHODS)
def test_the_task_names_every_package_that_its_tests_need(method, tmp_path):
    assert make.main([method, "--out", str(tmp_path)]) == 0
    tree = ast.parse((tmp_path / f"test_{method}.py").read_text(encoding="utf-8"))
    needed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    needed |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    needed = {name.split(".")[0] for name in needed} - set(sys.stdlib_module_names) - {method, "common", "support"}
    (install,) = [line.split() for line in (tmp_path / "TASK.md").read_text().splitlines() if "pip install" in line]
    named = {{"scikit-learn": "sklearn"}.get(word, word) for word in install[install.index("requirements.txt") :]}
    required = (tmp_path / "requirements.txt").read_text().split()
    assert needed <= named | {re.match(r"\w+", line)[0] for line in required}
    assert "sklearn" not in named - needed


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_keeps_everything_but_the_bodies(method):
    source = (ROOT / f"{method}.py").read_text(encoding="utf-8")
    emptied, rules = make.without_bodies(source), make.rules_of(source)
    assert [ast.unparse(node.args) for node in make.rules_of(emptied)] == [ast.unparse(node.args) for node in rules]
    assert [ast.get_docstring(node) for node in make.rules_of(emptied)] == [ast.get_docstring(node) for node in rules]
    others = [[ast.unparse(node) for node in ast.parse(text).body] for text in (source, emptied)]
    assert sum(a != b for a, b in zip(*others, strict=True)) == len(rules)
    assert all("NotImplementedError" in ast.unparse(node.body[1]) for node in make.rules_of(emptied))


def test_a_copy_is_refused_for_no_method_and_over_other_files(tmp_path, capsys):
    assert make.main(["align_faces", "--out", str(tmp_path / "student")]) == 2
    assert "cocuring" in capsys.readouterr().err and not (tmp_path / "student").exists()
    (tmp_path / "mine.txt").write_text("mine")
    assert make.main(["scn", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
