"""What nobody needs to read to understand a method: data set readers, command line, run folder, prediction, figures."""

import sys
from pathlib import Path


def say_interrupted(kind, error, trace, shown=sys.excepthook) -> None:
    """Ctrl-C while the packages are imported, before `main` begins, is one line too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        shown(kind, error, trace)


script = getattr(sys.modules["__main__"], "__file__", None)
if script is not None and Path(script).resolve().parent == Path(__file__).resolve().parent.parent:
    sys.excepthook = say_interrupted  # a script of this folder: another program that imports a function keeps its own
