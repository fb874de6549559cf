"""The processes of a run: what each one encodes, and how the parts come together. `Alone` is the usual run of one."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 8 * 2**20  # numbers summed at a time


class Alone:
    """One process. Shares, in [start, stop), are everything; sums and agreements are what they were."""

    rank = 0
    count = 1

    def share(self, n: int) -> tuple[int, int]:
        """This process's rows of n; shares differ by at most one and may be empty."""
        return n * self.rank // self.count, n * (self.rank + 1) // self.count

    def largest_share(self, n: int) -> int:
        return -(-n // self.count)

    def gathered(self, part: Tensor, n: int) -> Tensor:
        """Each one's rows, in the order of the ranks: (its share, D) -> (n, D)."""
        return part

    def any(self, flag: bool) -> bool:
        """Whether it holds for one of them: asked at the same place by all, it lets them go on together."""
        return flag

    def highest(self, value: int) -> int:
        return value

    def sum_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Gradients of a loss that every process computed whole, each back through its own share."""


class Ranks(Alone):
    """The processes of an initialised torch.distributed group that takes CPU tensors too."""

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._used: list[str] | None = None

    def gathered(self, part: Tensor, n: int) -> Tensor:
        # A sum with zeros everywhere else: exact, and shares need not be of one size.
        whole = part.new_zeros(n, *part.shape[1:])
        start, stop = self.share(n)
        whole[start:stop] = part
        dist.all_reduce(whole)
        return whole

    def any(self, flag: bool) -> bool:
        return self.highest(int(flag)) > 0

    def highest(self, value: int) -> int:
        held = torch.tensor([value])  # on the CPU: nobody waits for a device
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def sum_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        names = list(parameters)
        if self._used is None:  # which have gradients is the same in each step, but not in an empty share
            flags = torch.tensor([parameters[name].grad is not None for name in names], dtype=torch.uint8)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            self._used = [name for name, used in zip(names, flags.tolist(), strict=True) if used]
        bucket: list[Tensor] = []
        held = 0
        for name in self._used:
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif self.rank and (name == "logit_scale" or name.startswith("head.")):
                parameter.grad.zero_()  # not encoded in shares: every process has the whole of it, and one counts
            bucket.append(parameter.grad)
            held += parameter.numel()
            if held >= _BUCKET:
                _sum(bucket)
                bucket, held = [], 0
        _sum(bucket)


def _sum(tensors: list[Tensor]) -> None:
    """Sum each of them over the processes, in one message."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))
