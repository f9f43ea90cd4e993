"""How a script ends: errors are one line, signals like Ctrl-C, and a standard stream that breaks ends nothing."""

import functools
import os
import re
import signal
import sys
import threading
from pathlib import Path

import torch

from common import UserError

# Control characters, line ends, and what Python makes of bytes that are not UTF-8: no list of names can hold them.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text) -> str:
    """`text` with what is not printable escaped: a file name may hold line ends."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def reason_of(error: Exception) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# In plain RuntimeErrors of torch: of the CPU's allocator, of CUDA and NCCL outside torch's allocator, of cuBLAS and
# cuDNN, and of a convolution for which each of cuDNN's algorithms ran out of memory
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the device or here."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in NO_MEMORY)


class Tolerant:
    """A text stream whose reader may go away (`| head -1`, a closed terminal): later output is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before Python began
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # a name may not fit the terminal's encoding

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, work, *args) -> None:
        try:
            work(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def interrupt(number, frame):
    raise KeyboardInterrupt


def say_of_thread(failure, shown=threading.excepthook) -> None:
    """TensorBoard's thread cannot write, say: its error is raised where its work is waited for, which is enough."""
    if not issubclass(failure.exc_type, OSError):
        shown(failure)


def reports_errors(main):
    """Decorator of a script's main(argv=None) -> int: 0 is success, 2 bad input (one line on stderr), 130 interrupted.

    A file that cannot be written (no such folder, no space) counts as bad input, as do sizes that fill the memory.
    SIGTERM and SIGHUP end like Ctrl-C. A standard stream that nobody reads any more ends nothing.
    """

    @functools.wraps(main)
    def wrapped(argv=None) -> int:
        streams, hook, handled = (sys.stdout, sys.stderr), threading.excepthook, []
        sys.stdout, sys.stderr = map(Tolerant, streams)
        threading.excepthook = say_of_thread
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
            handled = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores one
        for number in handled:
            signal.signal(number, interrupt)
        try:
            return main(argv)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if out_of_memory(error):
                error = f"out of memory, a smaller --batch-size or --size takes less ({reason_of(error)})"
            elif not isinstance(error, (UserError, OSError)):
                raise
            print(one_line(f"{Path(sys.argv[0]).name}: error: {error}"), file=sys.stderr)
            return 2
        except SystemExit as exit_:  # argparse: 0 after --help, 2 after a bad argument
            return exit_.code or 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            (sys.stdout, sys.stderr), threading.excepthook = streams, hook
            for number in handled:
                signal.signal(number, signal.SIG_DFL)

    return wrapped
