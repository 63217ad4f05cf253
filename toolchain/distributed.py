"""The ranks that train together: one, or as many as torchrun started.

Every rank holds b of the B rows of each batch, and the same parameters.  It gathers the features of all ranks, and
compares its own rows as anchors with the rows of all ranks as candidates.  The mean of the losses over the W ranks is
the loss of the batch.  The gradient of `gather` is the sum over the losses of all ranks, of a rank's own
rows.  DistributedDataParallel takes the mean over ranks of the parameters' gradients, which is the gradient of the
batch: for the towers through their rows, and for scales, which each loss reads directly.

CLIP-KD's released code computes the loss of the whole batch on each rank and keeps the gradient of the rank's rows
alone; the mean over ranks makes its student's gradients 1/W of the loss's gradient.

Batch norms use the rows of all ranks (distillation/batch_norms.py).  With `distill.batch_norm: per_process`, and in the
released code, each rank normalizes by its own b rows, and the running statistics of rank 0 are kept.  With `frozen`,
every rank has the statistics that the student starts from.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from toolchain import torchrun
from toolchain.errors import ClipkdError, UsageError

_PATIENCE = timedelta(hours=2)  # rank 0 may index shards or download the teacher meanwhile


@dataclass(frozen=True)
class Processes:
    """This process's rank, the number of ranks, and this rank's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True for rank 0, which writes, logs and reports."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """Return this rank's rows of a batch.

        Raises:
            UsageError: the batch cannot be split evenly.
        """
        if batch_size % self.size:
            raise UsageError(
                f"distill.batch_size {batch_size} cannot be split evenly over {self.size} ranks; "
                f"the nearest size that can: {max(1, batch_size // self.size) * self.size}"
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def gather(self, rows_bD: Tensor) -> Tensor:
        """Return the rows of all ranks in order, [B, D], with exact gradients (see the module)."""
        return rows_bD if self.size == 1 else _Gather.apply(rows_bD, self.rank, self.size)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over ranks, without gradient (a collective call)."""
        if self.size == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def gather_rows(self, rows_bD: Tensor, count: int) -> Tensor:
        """Return [count, D] without gradient, in order: each rank holds rows rank, rank + W, rank + 2 W, ..."""
        if self.size == 1:
            return rows_bD
        share = -(-count // self.size)
        padded_bD = rows_bD.new_zeros(share, rows_bD.shape[1])
        padded_bD[: len(rows_bD)] = rows_bD
        gathered_WbD = rows_bD.new_empty(self.size, *padded_bD.shape)
        dist.all_gather_into_tensor(gathered_WbD.flatten(0, 1), padded_bD)
        return gathered_WbD.transpose(0, 1).flatten(0, 1)[:count]

    def data_parallel(self, module: nn.Module) -> nn.Module:
        """Return the module with gradients averaged over ranks, starting from the parameters of rank 0."""
        if self.size == 1:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # no static_graph: it fails in `no_sync`, which accumulation needs, and saves nothing if all is used
        )

    @contextmanager
    def explain_lost_rank(self) -> Iterator[None]:
        """Turn the error of a collective call whose peer has ended into one sentence.

        Raises:
            ClipkdError: another rank ended, or the network to it failed.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise ClipkdError(
                f"rank {self.rank} of {self.size} lost its connection to another rank "
                f"({str(error).partition('. ')[0]}). That rank ended or cannot be reached; if it printed no error, "
                "torchrun's summary has its exit code (-9: killed, as for too little memory). Checkpoints are intact: "
                "run the same command to resume; torchrun --max-restarts 3 resumes by itself"
            ) from error

    def share_buffers(self, module: nn.Module) -> None:
        """Broadcast the buffers of rank 0: batch norms that are not synchronized have statistics of a rank's rows."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def any(self, flag: bool) -> bool:
        """Return True if any rank passes True (a collective call)."""
        return self.any_of_each(flag)[0]

    def any_of_each(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any rank passes True (a collective call).

        The hosts exchange the flags; nothing waits for a GPU.
        """
        if self.size == 1:
            return list(flags)
        any_flag = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(any_flag, dist.ReduceOp.MAX)
        return [bool(flag) for flag in any_flag.tolist()]

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 (a collective call)."""
        if self.size == 1:
            return value
        box = [value]
        with self.explain_lost_rank():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the value of every rank, in order (a collective call)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.explain_lost_rank():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first rank of each machine run the block before its others, so they find what it writes there."""
        is_first = self.leads or os.environ.get("LOCAL_RANK") == "0"
        if not is_first:
            self.wait()
        yield
        if is_first:
            self.wait()

    def wait(self) -> None:
        """Wait until every rank has reached this call."""
        if self.size > 1:
            with self.explain_lost_rank():
                dist.barrier()


ALONE = Processes(0, 1, torch.device("cpu"))
"""A single rank, on the CPU."""


def join_processes() -> Processes:
    """Return this process's rank under torchrun, or the only rank without it; on its own GPU if there is one.

    Raises:
        ClipkdError: the ranks do not find each other.
    """
    rank, size = torchrun.rank(), torchrun.world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torchrun.local_rank())
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        try:
            # tensors on the host go through gloo, so ranks agree on flags and objects without waiting for their GPUs
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store = _open_store(rank, size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise ClipkdError(
                f"rank {rank} of {size} cannot join the other ranks: {error}. Start all ranks with: "
                "torchrun --nproc-per-node N -m clipkd distill RECIPE --out RUN. On several machines, set "
                "GLOO_SOCKET_IFNAME to the network interface that connects them"
            ) from error
    return Processes(rank, size, device)


def _open_store(rank: int, size: int) -> Store:
    """Return the store through which the ranks of this attempt find each other.

    torchrun keeps one store for all attempts of `--max-restarts`, and in it torch would find the addresses of ranks
    that have ended.  So rank 0 draws a name for the keys of this attempt.  Each other rank asks for it with a token of
    its own and confirms it; rank 0 asks again until then, because the token that it reads may be that of an ended rank.
    """
    store: Store = next(rendezvous("env://", rank, size, timeout=_PATIENCE))[0]
    if rank == 0:
        name = uuid4().hex
        for other in range(1, size):
            while True:
                token = store.get(f"clipkd/token of {other}").decode()
                store.set(f"clipkd/name for {token}", name)
                if store.check([f"clipkd/{token} has {name}"]):
                    break
                time.sleep(0.02)
    else:
        token = uuid4().hex
        store.set(f"clipkd/token of {rank}", token)
        name = store.get(f"clipkd/name for {token}").decode()
        store.set(f"clipkd/{token} has {name}", "")
    return PrefixStore(name, store)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_bD: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        gathered_BD = rows_bD.new_empty(size * len(rows_bD), *rows_bD.shape[1:])
        dist.all_gather_into_tensor(gathered_BD, rows_bD.contiguous())
        return gathered_BD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        share = len(gradients[0]) // ctx.size
        total_BD = gradients[0].clone()
        dist.all_reduce(total_BD)
        return total_BD[ctx.rank * share : (ctx.rank + 1) * share], None, None
