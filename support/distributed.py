"""Training in several processes: `torchrun --nproc-per-node 2 scn.py ...`; gloo on the CPU, nccl on CUDA.

A step of n processes with --batch-size B is one of a single process with n B: common.Loader deals the samples of each
batch out by rank, with the draws that they have in one process, and here the gradients are averaged over all of them
before an optimiser takes its step. At the end of an epoch the labels that each process has changed are brought together
and the running statistics of batch normalisation averaged: then all processes have the same labels and the same
networks. What a method computes of a batch it computes of the samples of one process (docs/speed.md). Rank 0 alone has
the run folder, and prints.
"""

import contextlib
import datetime
import functools
import io
import os
import sys

from support import streams

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
from common import UserError

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
PATIENCE = datetime.timedelta(days=1)  # the others wait while rank 0 decodes a data set; torchrun ends them if it fails
REPORT = datetime.timedelta(seconds=5)  # so long another process waits whether rank 0 reports an error itself


class Several(common.Processes):
    """The processes that torchrun has started, this one among them."""

    def __init__(self):
        store, self.rank, self.count = next(dist.rendezvous("env://"))
        self.local_rank, self.part = int(os.environ["LOCAL_RANK"]), slice(0, 0)
        self.stamps, self.modules, self.reports = {}, [], dist.PrefixStore("reports", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.count, timeout=PATIENCE)

    @property
    def share(self) -> float:
        """Of the samples of the current step, those of this process; 1 / count where no Loader deals them out."""
        first, stop = self.part.start, self.part.stop
        return len(range(first, stop, self.count)) / (stop - first + self.rank) if stop else 1 / self.count

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(values)
        return values

    def average_gradients(self, optimizer, *_) -> None:
        """The mean of the gradients over the samples of the step in all processes, before any optimiser's step."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        replace([p.grad for p in parameters if p.grad is not None], lambda flat: self.sum(flat * self.share))

    def assigned(self, values: Tensor, index: Tensor, last: Tensor) -> None:
        """Stamp values (N,) with the places in the global order, from 1 on, that decided them in this epoch."""
        _, stamps = self.stamps.setdefault(id(values), (values, torch.zeros_like(values, dtype=torch.int32)))
        place = self.part.start + last.int() * self.count + 1
        stamps[index] = torch.where(last >= 0, place, stamps[index])

    def end_epoch(self) -> None:
        """Bring the assigned values together, the later place decides; average the modules' floating-point buffers."""
        for values, stamps in self.stamps.values():
            merge(values, stamps)
        self.stamps = {}
        buffers = []
        for module in self.modules:
            state = module.state_dict()  # buffers that are not in it are constants, which a mean would round
            buffers += [b for name, b in module.named_buffers() if name in state and b.is_floating_point()]
        replace(buffers, lambda flat: self.sum(flat / self.count))


def average_buffers_of(parts) -> None:
    """Average the floating-point buffers of the modules among `parts` over the processes at the end of each epoch."""
    if common.processes.count > 1:
        common.processes.modules = [part for part in parts if isinstance(part, nn.Module)]


def replace(tensors: list[Tensor], change) -> None:
    """Put change(all of them in one vector) in the place of the tensors."""
    if tensors:
        flat = change(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, new in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(new.view(tensor.shape))


def merge(values: Tensor, stamps: Tensor) -> None:
    """Make values (N,), float32 or int64 of 31 bits, equal in all processes: those with the highest of stamps (N,)."""
    low = values.view(torch.int32) if values.dtype == torch.float32 else values.int()
    keys = (stamps.long() << 32) | (low.long() & 0xFFFFFFFF)
    dist.all_reduce(keys, dist.ReduceOp.MAX)
    low = keys.int()  # the lower half
    values.copy_(low.view(torch.float32) if values.dtype == torch.float32 else low)


def by_first(decide):
    """What decide() returns or raises in the process of rank 0, in all processes; tensors come on the CPU."""
    if common.processes.count == 1:
        return decide()
    packed = [None]
    if common.processes.rank == 0:
        try:
            result, error = decide(), None
        except Exception as raised:
            result, error = None, raised
        buffer = io.BytesIO()
        torch.save((result, error), buffer)
        packed = [buffer.getvalue()]
    dist.broadcast_object_list(packed)
    if common.processes.rank:  # written by rank 0, so safe
        result, error = torch.load(io.BytesIO(packed[0]), map_location="cpu", weights_only=False)
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def first_goes_ahead():
    """The process of rank 0 goes through the block before the others: what it puts into a cache they find there."""
    if common.processes.rank:
        common.processes.sum(torch.zeros(1))
    try:
        yield
    finally:
        if common.processes.rank == 0:
            common.processes.sum(torch.zeros(1))


def take_device(name: str) -> None:
    """Of several processes: make "cuda" mean the GPU of this one; UserError for a --device that they cannot have."""
    if common.processes.count > 1:
        if name not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {name}: each process has a device of its own, --device cuda")
        there, wanted = torch.cuda.device_count(), common.processes.local_rank
        if name != "cpu" and 0 < there <= wanted:
            raise UserError(f"no GPU for process {wanted}: this machine has {there}; --nproc-per-node {there} fits")
        if name != "cpu" and there:
            torch.cuda.set_device(wanted)


def reports_errors(main):
    """support.streams.reports_errors, for the processes that torchrun starts too: they are joined around main."""
    run = streams.reports_errors(main)

    @functools.wraps(main)
    def wrapped(argv=None) -> int:
        if os.environ.get("WORLD_SIZE", "1") == "1" or any(key not in os.environ for key in ENVIRONMENT):
            return run(argv)
        common.processes = Several()
        hook = register_optimizer_step_pre_hook(common.processes.average_gradients)
        try:
            status = run_as_one(common.processes, run, argv)
            if status == 0:  # after an error a group may wait for processes that are no more
                # In PyTorch 2.6 a thread of the group that frees the last tensor waits for Python's lock, which the end
                # of the group holds while it waits for the thread: so this tensor is held, and all others are free.
                with contextlib.suppress(RuntimeError):  # another process failed in its last lines, and is gone
                    held = common.processes.sum(torch.zeros(1))  # noqa: F841
                dist.destroy_process_group()
            return status
        finally:
            hook.remove()
            common.processes = common.Processes()

    return wrapped


def another_failed(processes: Several) -> bool:
    """Whether another process has reported a failure, or the reports are gone with the process that keeps them."""
    try:
        return any(processes.reports.check([str(rank)]) for rank in range(processes.count) if rank != processes.rank)
    except RuntimeError:
        return True


def run_as_one(processes: Several, run, argv) -> int:
    """run(argv) -> exit status. Only rank 0 prints, and another that fails where rank 0 does not."""
    said, status = io.StringIO(), 2
    try:
        with contextlib.ExitStack() as stack:
            if processes.rank:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                stack.enter_context(contextlib.redirect_stderr(said))
            status = run(argv)
    except RuntimeError:  # the connection broke because another process has failed?
        if not another_failed(processes):
            raise
        return 2
    finally:
        if status:
            with contextlib.suppress(RuntimeError):  # the reports are gone
                processes.reports.set(str(processes.rank), "failed")
    if status and processes.rank:
        try:
            processes.reports.wait(["0"], REPORT)
        except RuntimeError:  # rank 0 is well, or gone
            print(f"process {processes.rank}: {said.getvalue().strip()}", file=sys.stderr)
    return status
