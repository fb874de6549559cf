"""The gradients of a loss over a whole batch whose embeddings are computed in parts (GradCache, arXiv 2101.06983).

1. Each process encodes its share of the rows, `micro_batch` at a time; the embeddings are gathered.
2. The loss of all of them gives the gradient of each embedding (and of the head and the logit scale).
3. Each process takes its share of these back through its towers, encoding anew what it encoded without a graph, with
   the same random numbers; the parameters' gradients are summed over the processes.

So a contrastive batch is as large as it was asked to be, whatever fits in memory and on however many processes, and its
gradients are those of a single pass. Shapes: n rows of a side, D embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.trainer.processes.peers import Alone


@dataclass(frozen=True)
class Side:
    """What one tower encodes in a step. encode(start, stop): those of the n rows -> (stop - start, D) float32, the same
    whenever it is called. Without `trained` it runs without gradients."""

    rows: int
    encode: Callable[[int, int], Tensor]
    trained: bool


def chunks(start: int, stop: int, micro_batch: int | None) -> list[tuple[int, int]]:
    size = micro_batch or max(stop - start, 1)
    return [(i, min(i + size, stop)) for i in range(start, stop, size)]


def backward(
    sides: Sequence[Side],
    width: int,
    loss: Callable[[list[Tensor]], Tensor],
    parameters: Mapping[str, nn.Parameter],
    micro_batch: int | None,
    peers: Alone,
) -> None:
    """Add the gradients of `loss` (embeddings (n, D) of each side, in order -> a scalar) to the parameters.

    width: D. Raises torch.OutOfMemoryError in all processes if one of them runs out of memory: nothing is left half
    done but gradients, which the caller drops."""
    shares = [chunks(*peers.share(side.rows), micro_batch) for side in sides]
    graphs: list[Tensor | None] = [None] * len(sides)  # kept where a share is one chunk: no need to encode it again
    parts: list[Tensor] = []

    def encode() -> None:
        for i, (side, share) in enumerate(zip(sides, shares, strict=True)):
            single = side.trained and len(share) == 1
            with torch.set_grad_enabled(single):
                encoded = [side.encode(start, stop) for start, stop in share]
            graphs[i] = encoded[0] if single else None
            parts.append(torch.cat([part.detach() for part in encoded]) if encoded else _nothing(width, parameters))

    def backpropagate() -> None:
        loss(leaves).backward()  # type: ignore[no-untyped-call]
        for side, share, leaf, graph in zip(sides, shares, leaves, graphs, strict=True):
            if leaf.grad is None:  # fixed, or of no use to the loss
                continue
            for start, stop in share:
                embeddings = side.encode(start, stop) if graph is None else graph
                embeddings.backward(leaf.grad[start:stop])  # type: ignore[no-untyped-call]

    _together(encode, peers)
    leaves = [
        peers.gathered(part, side.rows).requires_grad_(side.trained) for part, side in zip(parts, sides, strict=True)
    ]
    _together(backpropagate, peers)
    peers.sum_gradients(parameters)


def _together(work: Callable[[], None], peers: Alone) -> None:
    short = False
    try:
        work()
    except torch.OutOfMemoryError:
        if peers.count == 1:
            raise
        short = True
    if peers.any(short):
        raise torch.OutOfMemoryError("one of the run's processes is out of memory")


def _nothing(width: int, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    return torch.zeros(0, width, device=next(iter(parameters.values())).device)
