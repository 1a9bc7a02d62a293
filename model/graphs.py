"""A step that is the same every time: captured in a CUDA graph on a GPU, called plainly elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

Step = Callable[[], None]


class Graphs:
    """Steps by name. Each reads and writes tensors that stay where they are, and asks the device for nothing.

    The first call of a step captures it, between ``quiet()`` and ``restore()`` of its owner: a capture runs the step
    a few times, which must leave no trace.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def run(self, name: Hashable, step: Step, quietly: Callable[[Step], None]) -> None:
        """Run ``step``; ``quietly`` runs a function such that no state is changed by the steps within it."""
        if self.device.type != "cuda":
            step()
            return
        graph = self._graphs.get(name)
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            made = graph
            quietly(lambda: self._capture(made, step))
            self._graphs[name] = graph
        graph.replay()

    def _capture(self, graph: torch.cuda.CUDAGraph, step: Step) -> None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and libraries set up, which no capture may see
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        # graphs run one after another, so they may use the same memory; captured on the stream that was warmed up, the
        # kernels find their counters there, and the graph need not clear one for each launch
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            step()
        self._pool = graph.pool()
        graph.replay()
        torch.cuda.synchronize(self.device)
