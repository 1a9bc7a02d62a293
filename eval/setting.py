"""How every model of a comparison is measured: one setting, made once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..model.checkpoint import load_tokenizer
from ..model.foreign.reader import config_of
from .data import FREE, Bos, Text, TextError, Windows, load_text, make_windows
from .protocols import protocol_of, protocol_text, protocol_windows
from .provenance import code_commit
from .record import Protocol
from .speed import SpeedProtocol
from .tasks import TaskRequest


@dataclass(frozen=True)
class Setting:
    """The same windows, precision, device, tasks and timing for every model.

    Attributes:
        windows: what is scored.
        batch: windows of a forward pass.
        speed: what to time; None times nothing, and measures no peaks of memory either.
        batches, contexts: where speed is measured on a grid besides; empty for none.
        tasks: of lm-eval.
        cache_dir: of the assets.
    """

    windows: Windows
    dtype: torch.dtype
    device: torch.device
    batch: int = 1
    speed: SpeedProtocol | None = None
    seed: int = 0
    command: str | None = None
    batches: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    tasks: tuple[TaskRequest, ...] = ()
    cache_dir: str | Path | None = None

    @property
    def protocol(self) -> Protocol:
        w = self.windows
        return Protocol(
            text=w.text_name,
            text_sha256=w.text_sha256,
            tokens_sha256=w.sha256,
            windows=w.count,
            # windows of unequal lengths have one token more, which is only predicted
            length=w.length - (w.stop is not None),
            stride=w.stride,
            scored_tokens=w.scored_tokens,
            bos=w.bos,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
            speed=self.speed,
            name=w.protocol,
        )

    @property
    def extra(self) -> dict[str, list[str]]:
        """What is measured besides the protocol, for the key of a row; empty where there is nothing."""
        found: dict[str, list[str]] = {}
        if self.tasks:
            found["tasks"] = [str(task) for task in self.tasks]
        if self.batches and self.contexts:
            found["speeds"] = [f"{batch}x{context}" for batch in self.batches for context in self.contexts]
        return found


def make_setting(
    source: Path,
    text: str | Text | None = None,
    *,
    protocol: str = FREE,
    windows: int | None = 16,
    length: int = 1024,
    stride: int | None = None,
    bos: Bos = "auto",
    batch: int = 1,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    speed: SpeedProtocol | None = None,
    seed: int = 0,
    command: str | None = None,
    batches: Sequence[int] = (),
    contexts: Sequence[int] = (),
    tasks: Sequence[str] = (),
    cache_dir: str | Path | None = None,
) -> Setting:
    """The setting for ``source``, a checkpoint's folder, whose tokenizer cuts the text.

    Args:
        text: see :func:`brise.eval.data.load_text`; None is ``boolq``, or a named protocol's own.
        protocol: a name of :data:`brise.eval.protocols.PROTOCOLS`; then length, stride and BOS are its own.
        windows, length, stride, bos: see :func:`brise.eval.data.make_windows`; windows None takes all.
        dtype: of the computation; None is the checkpoint's own.
        speed: what to time; None times nothing. batches, contexts: see :class:`Setting`.
        tasks: as ``NAME`` or ``NAME:LIMIT``.

    Raises:
        TextError: no such text or protocol, or too short a text.
        TaskError: no such task.
        ValueError: longer windows than the model has positions for.
    """
    code_commit()  # for the rows to come: of the code that is at work now
    config = config_of(source)
    if dtype is None:
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
        dtype = getattr(torch, name)
    positions = config.get("max_position_embeddings")
    requests = tuple(TaskRequest.parse(task) for task in tasks)
    if protocol == FREE:
        if positions is not None and length > positions:
            raise ValueError(
                f"expected windows of at most {positions} tokens, the model's positions, got {length}"
            )
        if text is None or isinstance(text, str):
            text = load_text(text or "boolq", "evaluation", cache_dir)
        cut = make_windows(text, load_tokenizer(source), length=length, count=windows, stride=stride, bos=bos)
    else:
        rule = protocol_of(protocol)
        if stride is not None or bos != "auto":
            raise TextError(f"{protocol} has a stride and a BOS of its own: leave both out, or take {FREE}")
        if text is None or isinstance(text, str):
            text = protocol_text(rule, text, cache_dir)
        cut = protocol_windows(rule, text, load_tokenizer(source), windows, positions)
    return Setting(
        cut,
        dtype,
        torch.device(device),
        batch,
        speed,
        seed,
        command,
        tuple(batches),
        tuple(contexts),
        requests,
        cache_dir,
    )


def without_timing(setting: Setting) -> Setting:
    """The same setting, with nothing measured but quality on the windows."""
    return dataclasses.replace(setting, speed=None, batches=(), contexts=(), tasks=())
