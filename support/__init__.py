"""What nobody needs to read to understand a method: data set readers, command line, run folder, prediction, figures."""

import sys


def say_interrupted(kind, error, trace, shown=sys.excepthook) -> None:
    """Ctrl-C while the packages are imported, before `main` begins, is one line too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        shown(kind, error, trace)


sys.excepthook = say_interrupted
