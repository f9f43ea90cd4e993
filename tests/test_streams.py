"""How a script ends: errors, signals, and standard streams that break."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from support import streams
from support.streams import reports_errors

import pytest
import torch

from common import UserError

ROOT = Path(streams.__file__).parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "from support" in path.read_text())


def raising(error):
    @reports_errors
    def main(argv=None):
        raise error

    return main


@pytest.mark.parametrize(
    "error, status, words",
    [
        (UserError("--noise 2: outside"), 2, "error: --noise 2: outside"),
        (UserError("a\nb: no such file"), 2, "error: a\\nb: no such file"),
        (FileNotFoundError(2, "No such file or directory", "x\ny"), 2, "No such file or directory: 'x\\ny'"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (MemoryError("Unable to allocate 7 PiB"), 2, "out of memory, a smaller --batch-size"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
            2,
            "--size takes less (CUDA out of memory.)",
        ),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), 2, "out of memory, a smaller"),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 2, "out of memory, a smaller"),
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), 2, "out of memory, a smaller"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, status, words, capsys):
    assert raising(error)() == status
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out


def test_memory_that_torch_cannot_get_here_is_one_line(capsys):
    @reports_errors
    def main(argv=None):
        torch.empty(2**55)

    assert main() == 2 and capsys.readouterr().err.count("\n") == 1


def test_other_errors_are_not_hidden(capsys):
    for error in (RuntimeError("a mistake of ours"), ValueError("another"), KeyError("a third")):
        with pytest.raises(type(error)):
            raising(error)()
    assert not capsys.readouterr().err
    assert raising(SystemExit(2))() == 2 and raising(SystemExit(0))() == 0 == raising(SystemExit())()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_end_like_ctrl_c_and_only_inside(name, capsys):
    @reports_errors
    def main(argv=None):
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except KeyboardInterrupt:
            print("cleaned up")
            raise

    number, before = getattr(signal, name), (sys.stdout, sys.stderr, threading.excepthook)
    handler = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        assert main() == 130 and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, handler)
    assert capsys.readouterr() == ("cleaned up\n", "interrupted\n")
    assert (sys.stdout, sys.stderr, threading.excepthook) == before


def test_a_signal_that_nohup_ignores_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert reports_errors(lambda argv: os.kill(os.getpid(), signal.SIGHUP) or 0)() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_main_may_run_in_a_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(raising(UserError("x"))()))
    thread.start()
    thread.join()
    assert results == [2]


def test_what_a_thread_cannot_write_is_said_by_who_waits_for_it(capsys):
    @reports_errors
    def main(argv=None):
        for error in (OSError(28, "No space left"), KeyError("a mistake")):
            thread = threading.Thread(target=raise_it, args=[error])
            thread.start()
            thread.join()
        return 0

    def raise_it(error):
        raise error

    assert main() == 0
    said = capsys.readouterr().err
    assert "a mistake" in said and "No space left" not in said


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_closed_or_has_no_reader_ends_nothing(name, monkeypatch):
    @reports_errors
    def main(argv=None):
        for _ in range(3):
            print("x" * 10**5, file=getattr(sys, name), flush=True)
        print("unflushed", file=getattr(sys, name), end="")
        return 0

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as broken:
        for stream in (broken, None):
            monkeypatch.setattr(sys, name, stream)
            assert main() == 0


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert reports_errors(lambda argv: print("中 caf\udce9") or 0)() == 0
    assert shown.getvalue() == rb"\u4e2d caf\udce9" + b"\n"


PRINTS = """
import sys
from support.streams import reports_errors

@reports_errors
def main(argv=None):
    for i in range(10**5):
        print(i)
        print(i, file=sys.stderr)
    return 0

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.parametrize(
    "redirection, shown",
    [
        ("2>/dev/null | head -1", "0\n"),
        ("2>&1 >/dev/null | head -1", "0\n"),
        (">&- 2>&- <&- | cat", ""),
        (">/dev/full 2>/dev/null | cat", ""),
    ],
)
def test_a_process_ends_well_without_its_streams(redirection, shown, tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS)
    command = f"{sys.executable} {tmp_path / 'prints.py'} {redirection}; echo status ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"{shown}status 0\n", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_packages_are_imported_is_one_line(script, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job may ignore it
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "interrupted\n")


def test_an_imported_function_leaves_the_handling_of_errors_alone(tmp_path):
    code = "import sys; before = sys.excepthook; import cocuring, support; assert sys.excepthook is before"
    (tmp_path / "mine.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in ([str(tmp_path / "mine.py")], ["-c", code]):
        subprocess.run([sys.executable, *command], env=environment, check=True, timeout=120)


def test_other_errors_of_an_import_are_shown(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch for this machine')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / "scn.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "no torch for this machine" in done.stderr
