"""Make a student's copy of a script: its losses and rules without their bodies, and the tests that grade them.

    python assignments/make.py cocuring --out student/
    cd student && python -m pytest -q          # fails until the functions are written

The copy is made from the sources, so it never goes stale: <method>.py with the functions under "Losses and rules"
emptied (signature and docstring stay), what it needs to run, test_<method>.py with the tests of these functions, and
TASK.md. `--solution` writes the same folder with the bodies in place. assignments/README.md suggests further tasks.
"""

import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.runs import Parser  # noqa: E402 - found through the line above

BANNER = "# " + "-" * 118  # above and below the title of a section


def rules_of(source: str) -> list[ast.FunctionDef]:
    """The functions in the section "Losses and rules" of a script."""
    lines = source.split("\n")
    titles = [n for n in range(1, len(lines) - 1) if lines[n - 1] == lines[n + 1] == BANNER]
    inside = [n for n in titles if lines[n].startswith("# Losses")]
    if not inside:
        return []
    end = min([n for n in titles if n > inside[0]], default=len(lines))
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return [node for node in found if inside[0] < node.lineno <= end]


def first_line(node: ast.FunctionDef) -> str:
    return ast.get_docstring(node).split("\n")[0]


def without_bodies(source: str) -> str:
    """The script with each of its rules reduced to signature, docstring and NotImplementedError."""
    lines = source.split("\n")
    for node in reversed(rules_of(source)):
        docstring = node.body[0]
        lines[docstring.end_lineno : node.end_lineno] = [f"    raise NotImplementedError({first_line(node)!r})"]
    return "\n".join(lines)


def names_in(node: ast.AST) -> set[str]:
    """All names that the node uses, and attributes as `module.attribute`."""
    found = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            found.add(f"{part.value.id}.{part.attr}")
    return found


def defined_by(node: ast.stmt) -> set[str]:
    """The names that a statement at the top level of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}


def is_plain_test(node: ast.stmt) -> bool:
    """A test function that takes no fixtures: all its arguments come from parametrize."""
    if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
        return False
    given = {"parametrize": set()}
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and isinstance(decorator.args[0], ast.Constant):
            given["parametrize"] |= {name.strip() for name in str(decorator.args[0].value).split(",")}
    return {argument.arg for argument in node.args.args} <= given["parametrize"]


def tests_of(tests: str, method: str, rules: set[str], others: set[str]) -> str:
    """The tests of a script's rules, with the helpers and imports that they use.

    rules: names of the functions that are graded. others: names of the other functions of the script: a test that uses
    one of them, itself or through a helper, tests more than the rules and is left out.
    """
    nodes = ast.parse(tests).body
    definitions = {name: node for node in nodes for name in defined_by(node)}

    def closure(node: ast.stmt) -> tuple[set[ast.stmt], set[str]]:
        seen, used, todo = set(), set(), [node]
        while todo:
            current = todo.pop()
            if current in seen:
                continue
            seen.add(current)
            names = names_in(current)
            used |= names
            todo += [definitions[name] for name in names if name in definitions]
        return seen, used

    kept: set[ast.stmt] = set()
    for node in filter(is_plain_test, nodes):
        seen, used = closure(node)
        touched = {name.removeprefix(f"{method}.") for name in used}
        if touched & rules and not touched & others:
            kept |= seen
    parts, lines = [], tests.split("\n")
    needed = set().union(*(names_in(node) for node in kept)) | rules
    for node in nodes:
        if node not in kept:
            continue
        if isinstance(node, ast.ImportFrom):
            node.names = [alias for alias in node.names if (alias.asname or alias.name) in needed]
            parts.append(ast.unparse(node))
        elif isinstance(node, ast.Import):
            parts.append(ast.unparse(node))
        else:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            space = "\n\n" if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""
            parts.append(space + "\n".join(lines[first - 1 : node.end_lineno]))
    return "\n".join(parts).lstrip("\n") + "\n"


def task(method: str, source: str, rules: list[ast.FunctionDef], tests: str) -> str:
    """TASK.md: what is to be written, from which paper, and how it is graded."""
    about = ast.get_docstring(ast.parse(source))
    title, paper = about.split("\n")[0], about.split("\n\n")[1]
    rows = "\n".join(f"| `{node.name}` | {first_line(node)} |" for node in rules)
    more = " scikit-learn" if "sklearn" in tests else ""
    return f"""# {title}

{paper}

Read the paper, and those that the docstrings name (links: docs/{method}.md of the project). Then write the functions of
`{method}.py` that raise NotImplementedError. Signature and docstring say what each takes and returns, and which
equation or section it is, or that it is in no paper.

| function | what it computes |
|---|---|
{rows}

Graded by the tests, which need no data:

    pip install -r requirements.txt pytest{more}
    python -m pytest -q

When all pass, train with your functions, and compare with the page of the method (docs/{method}.md of the project):

    python {method}.py --data toy --noise 0.4
"""


def make(method: str, out: Path, solution: bool = False) -> None:
    """Write the folder `out`. Raises ValueError for a method without rules, FileExistsError for a folder with files."""
    script = ROOT / f"{method}.py"
    source = script.read_text(encoding="utf-8") if method.isidentifier() and script.is_file() else ""
    rules = rules_of(source)
    if not rules:
        known = sorted(path.stem for path in ROOT.glob("*.py") if rules_of(path.read_text(encoding="utf-8")))
        raise ValueError(f"{method}: not one of the scripts {', '.join(known)}")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: is not empty; --out FOLDER names another")
    graded = {node.name for node in rules}
    defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    tests = (ROOT / "tests" / f"test_{method}.py").read_text(encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "support", out / "support", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("common.py", "requirements.txt", "LICENSE"):
        shutil.copy(ROOT / name, out / name)
    (out / f"{method}.py").write_text(source if solution else without_bodies(source), encoding="utf-8")
    tests = tests_of(tests, method, graded, defined - graded)
    (out / f"test_{method}.py").write_text(tests, encoding="utf-8")
    (out / "TASK.md").write_text(task(method, source, rules, tests), encoding="utf-8")
    print(f"{out}: {method}.py, {len(rules)} functions to write ({', '.join(node.name for node in rules)}); TASK.md")


def main(argv=None) -> int:
    parser = Parser(__file__, __doc__)
    parser.add_argument("method", help="name of a script, without .py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, empty or not there yet")
    parser.add_argument("--solution", action="store_true", help="keep the bodies: what the tests pass on")
    args = parser.parse_args(argv)
    try:
        make(args.method, args.out, args.solution)
    except (OSError, ValueError) as error:
        print(f"make.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
