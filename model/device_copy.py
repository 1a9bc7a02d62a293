"""Weights on their way to a device and back, while it computes on others.

A copy to a GPU overlaps with what the GPU does if it begins in pinned memory and runs in a stream of its own. Pieces go
one ahead of the computing through two pinned buffers in turns; what came of a weight goes back in a third stream, while
the next one is read. Sums of blocks and Hessians stay on the device; see :mod:`.calibrated` for what goes there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..quant.rows import Rows
from ..quant.workers import Workers

A = TypeVar("A")
B = TypeVar("B")
# weights of a piece: enough that a copy takes longer than its start, few enough that a weight is many pieces
_PIECE = 1 << 23


class DeviceError(RuntimeError):
    """A device that is not there, or none that weights can be quantized on."""


def compute_device(name: str | torch.device) -> torch.device:
    """The device by that name: ``cpu``, ``cuda:N``, or ``cuda``, under torchrun each process's own.

    Raises:
        DeviceError: torch does not see it, or it is of another kind.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"expected the device cpu, cuda or cuda:N, got {str(name)!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceError(f"expected the device cpu, cuda or cuda:N, got {str(name)!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise DeviceError(f"{name}: torch sees no CUDA device here; give cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) % count if device.index is None else device.index
    if index >= count:
        raise DeviceError(f"{name}: torch sees {count} CUDA devices, the last is cuda:{count - 1}")
    return torch.device("cuda", index)


def pieces_on(device: torch.device) -> Workers | DevicePieces:
    """What rounds weights piece by piece: this machine's cores, or the device."""
    return Workers() if device.type == "cpu" else DevicePieces(device)


def one_ahead(items: Iterable[A], begin: Callable[[A], B]) -> Iterator[B]:
    """What ``begin`` gives for each item, which is called for the next item before each is handed out."""
    begun: list[B] = []
    for item in items:
        begun.append(begin(item))
        if len(begun) == 2:
            yield begun.pop(0)
    yield from begun


class DevicePieces:
    """See :class:`brise.quant.rows.Pieces`; used as a context manager, behind which all results are there.

    On the CPU, where streams are none and copies wait, it does the same in the same order.

    Attributes:
        piece: weights of a piece.
    """

    def __init__(self, device: torch.device, piece: int = _PIECE) -> None:
        self.device = device
        self.piece: int | None = piece
        self._api: Any = torch.get_device_module(device)
        self._pinned = device.type == "cuda"

    def __enter__(self) -> DevicePieces:
        self._in, self._out = self._api.Stream(self.device), self._api.Stream(self.device)
        self._stages = [_Stage(self._pinned, self._api), _Stage(self._pinned, self._api)]
        self._held: list[tuple[Tensor, Any]] = []
        self._back: list[Any] = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in [*self._back, *(stage.sent for stage in self._stages)]:
            event.synchronize()
        self._held, self._stages = [], []

    def each(
        self, function: Callable[[slice, Tensor], B], rows: Rows, parts: Sequence[slice], again: bool = False
    ) -> list[B]:
        """As :meth:`.workers.Workers.each`; ``again`` computes on what the last call copied."""
        if not again:
            self._held = []
        arriving = iter(self._held) if again else one_ahead(parts, lambda part: self._send(rows, part))
        here = self._api.current_stream(self.device)
        results = []
        for part, (piece, arrived) in zip(parts, arriving, strict=True):
            here.wait_event(arrived)
            results.append(function(part, piece))
        return results

    def back(self, tensor: Tensor) -> Tensor:
        """A copy in the machine's own memory, whole once the context is left."""
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned)
        self._out.wait_stream(self._api.current_stream(self.device))
        with self._api.stream(self._out):
            out.copy_(tensor, non_blocking=True)
            self._keep_for(tensor, self._out)
            self._back.append(self._done(self._out))
        return out

    def _send(self, rows: Rows, part: slice) -> tuple[Tensor, Any]:
        """Begin to copy a piece; the rows as they are stored, and what tells that they have arrived."""
        stage = self._stages[0]
        self._stages.reverse()
        staged = stage.fill(rows(part.start, part.stop))
        with self._api.stream(self._in):
            piece = torch.empty(staged.shape, dtype=staged.dtype, device=self.device)
            piece.copy_(staged, non_blocking=True)
            stage.sent = self._done(self._in)
        self._keep_for(piece, self._api.current_stream(self.device))
        self._held.append((piece, stage.sent))
        return self._held[-1]

    def _keep_for(self, tensor: Tensor, stream: Any) -> None:
        """Memory of one stream that another still works with is not to be given away."""
        if tensor.device.type != "cpu":
            tensor.record_stream(stream)

    def _done(self, stream: Any) -> Any:
        event = self._api.Event()
        event.record(stream)
        return event


class _Stage:
    """A buffer that the next piece is read into once the one before has left it."""

    def __init__(self, pinned: bool, api: Any) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.sent = api.Event()

    def fill(self, rows: Tensor) -> Tensor:
        self.sent.synchronize()
        if self._bytes.numel() < rows.nbytes:
            self._bytes = torch.empty(rows.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._bytes[: rows.nbytes].view(rows.dtype).view(rows.shape).copy_(rows)
