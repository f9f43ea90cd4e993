"""Every script on a device that is not the CPU: tests/second_device.py stands in for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).parent
SMALL = "--size 32 --batch-size 12 --epochs 3 --warm-up 1"
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices written in Python",
)


def python(*arguments):
    paths = os.pathsep.join(map(str, (HERE.parent, HERE)))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *arguments], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize(
    "command",
    [
        "cocuring --noise 0.4 --delta 0",
        "scn --noise 0.4 --margin2 0 --learn-margin",
        "ncctfer --noise 0.4",
        "twostage --noise 0.4",
        "jointgan --noise 0.3 0.4 --va-noise 0.3 --width 0.02",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_run_is_the_same_on_a_second_device(command, tmp_path):
    python("second_device.py", str(tmp_path), *command.split(), *SMALL.split())


def test_the_second_device_refuses_what_a_gpu_refuses():
    python("-c", STRICT)


STRICT = """
from second_device import *
register()
with Strict():
    here, there = torch.arange(4.0), torch.arange(4.0).to(SECOND)
    for wrong in (
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: there.mul_(here),
        lambda: torch.where(there > 1, here, there),
        lambda: here[there.long()],
        lambda: there.index_select(0, here.long()),
        lambda: torch.rand(2, device=SECOND, generator=torch.Generator()),
        lambda: there.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert there[here.long()].device.type == (there * torch.tensor(2.0)).device.type == "second"
    assert here.copy_(there).device.type == there.cpu().device.type == "cpu" and there.tolist() == [0, 1, 2, 3]
"""
