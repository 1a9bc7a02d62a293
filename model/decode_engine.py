"""The device's side of generation: rows of a static cache, what each is to do, and steps that move them all on.

A row goes through ``start`` (its prompt is read and its first token chosen), ``run`` (a block of steps, for all rows
at once) and ``release``. What a step needs is on the device, at addresses that never change, and a step asks the
device for nothing: on a GPU it is one CUDA graph for each batch bucket. Who has finished is known on the device too, so
that a block of several steps needs the host only at its end.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .cache_rows import move_row, rows_of
from .decode_attend import Attention, ChunkAttention, LeanAttention, PackedAttention, StepAttention
from .decode_step import DecodeModel
from .graphs import Graphs, Step
from .sampling import BROKEN, RESTING, SamplerState, Sampling, choose, record
from .static_cache import StaticRollingCache

# most steps of one block
BLOCK = 32


class RowStates:
    """What the device knows of each row.

    token: int64 [rows], the newest, not yet in the cache. active: int32 [rows], 1 while the text goes on. left: int32
    [rows], tokens still to come at most. ends: int64 [E], tokens that end a text.
    """

    def __init__(self, rows: int, vocab: int, ends: Sequence[int], device: torch.device) -> None:
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.active, self.left = torch.zeros(2, rows, dtype=torch.int32, device=device)
        # a token that there is not, so that the tensor is never empty
        self.ends = torch.tensor([*ends, -1], dtype=torch.int64, device=device)
        self.sampler = SamplerState(rows, vocab, device)

    def rows(self, start: int, stop: int) -> RowStates:
        """These rows, sharing the storage."""
        part = object.__new__(RowStates)
        part.token, part.active, part.left = (t[start:stop] for t in (self.token, self.active, self.left))
        part.ends, part.sampler = self.ends, self.sampler.rows(start, stop)
        return part

    def move(self, source: int, target: int) -> None:
        for t in (self.token, self.active, self.left):
            t[target] = t[source]
        self.sampler.move(source, target)

    def emit(self, logits: Tensor, alive: Tensor, plain: bool) -> Tensor:
        """Choose and count a token in the rows ``alive`` (bool [rows]) -> int64 [rows], or why there is none."""
        chosen = torch.where(alive, choose(logits, self.sampler, plain), RESTING)
        record(chosen, self.sampler, plain)
        real = chosen >= 0
        self.token.copy_(torch.where(real, chosen, self.token))
        self.left -= real.to(torch.int32)
        over = (chosen[:, None] == self.ends).any(-1) | (chosen == BROKEN) | (self.left <= 0)
        self.active.masked_fill_(alive & over, 0)
        return chosen


@dataclass(frozen=True)
class Beginning:
    """A text that a free row is to begin: its prompt (tokens of the vocabulary, at least one) and how it goes on.

    The prompt and ``new_tokens`` together fit the engine's length.
    """

    row: int
    prompt: Sequence[int]
    sampling: Sampling
    new_tokens: int


def _chunks(lengths: Sequence[int], size: int, alone: bool) -> list[list[tuple[int, int, int]]]:
    """What to read together: lists of (prompt, begin, end), at most ``size`` tokens each, every prompt in order."""
    plans: list[list[tuple[int, int, int]]] = []
    room = 0
    for i, length in enumerate(lengths):
        begin = 0
        if alone:
            room = 0
        while begin < length:
            if room == 0:
                plans.append([])
                room = size
            end = min(length, begin + room)
            plans[-1].append((i, begin, end))
            room -= end - begin
            begin = end
    return plans


class DecodeEngine:
    """A model and ``rows`` texts that it continues at once.

    Args:
        model: with as many rows as are multiplied in a step, ``rows * (1 + drafts)``, or fewer.
        length: positions a text may reach; a model with a window shorter than that keeps only the window.
        chunk: tokens of a prompt read at once.
        drafts: the most tokens that are verified in one step beside the newest.
        int8_cache: keys and values as int8.
        ends: tokens that end a text.
    """

    def __init__(
        self,
        model: DecodeModel,
        *,
        rows: int = 1,
        length: int,
        chunk: int = 512,
        drafts: int = 0,
        int8_cache: bool = False,
        ends: Sequence[int] = (),
    ) -> None:
        for name, value, least in (
            ("rows", rows, 1),
            ("length", length, 1),
            ("chunk", chunk, 1),
            ("drafts", drafts, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.model = model
        self.size, self.chunk, self.drafts = rows, chunk, drafts
        self.length = length
        device, config = self.model.device, copy.copy(self.model.config)
        # Mistral's mask goes by the window in every layer, whatever its config says of their types
        config.layer_types = None
        self.cache = StaticRollingCache(
            config,
            rows,
            # drafts that are rejected have been written all the same
            length=length + drafts,
            spare=drafts,
            dtype=self.model.dtype,
            device=device,
            int8=int8_cache,
        )
        self.whole = model.whole.step is not None and not int8_cache
        self.lean = self.model.lean and not int8_cache and not model.invariant
        self.states = RowStates(rows, self.model.vocab, ends, device)
        self.out = torch.full((rows, max(BLOCK, drafts + 1)), RESTING, dtype=torch.int64, device=device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.draft_tokens = torch.zeros(rows, max(1, drafts), dtype=torch.int64, device=device)
        self.graphs = Graphs(device)
        self._buckets: dict[int, tuple[StaticRollingCache, RowStates]] = {}
        self.plain: list[bool] = [True] * rows

    @torch.inference_mode()
    def start(self, begun: Sequence[Beginning]) -> list[int]:
        """Read prompts into rows that are free, and choose the first token of each (or BROKEN)."""
        tokens = []
        for b in begun:
            tokens.append(torch.tensor(b.prompt, dtype=torch.int64, device=self.model.device))
            rows_of(self.cache, b.row, b.row + 1).reset()
            self.states.sampler.begin(b.row, b.sampling, tokens[-1])
            self.states.left[b.row] = b.new_tokens
            self.states.active[b.row] = 1
            self.plain[b.row] = b.sampling.plain
        last = self._read([b.row for b in begun], tokens)
        together = len(last) if not self.model.invariant else 1
        logits = torch.cat(
            [self.model.logits(part, chunk=True) for part in torch.stack(last).split(together)]
        )
        chosen = []
        for b, behind in zip(begun, logits.split(1)):
            states = self.states.rows(b.row, b.row + 1)
            chosen.append(states.emit(behind, states.active > 0, b.sampling.plain))
        return torch.cat(chosen).tolist()

    def _read(self, rows: list[int], prompts: list[Tensor]) -> list[Tensor]:
        """Prompts int64 [T] into the caches of rows that are empty -> the last hidden state [D] of each.

        As many of them at once as make a chunk; each alone where rows must not depend on one another.
        """
        last: list[Tensor] = [torch.empty(0)] * len(prompts)
        for plan in _chunks([len(p) for p in prompts], self.chunk, self.model.invariant):
            parts: list[ChunkAttention] = []
            for i, begin, end in plan:
                cache = rows_of(self.cache, rows[i], rows[i] + 1)
                at = cache.advance(end - begin)
                turn = self.model.turn(torch.arange(begin, end, device=self.model.device)[None])
                parts.append(ChunkAttention(cache, self.model.heads, turn, at, begin))
            tokens = torch.cat([prompts[i][begin:end] for i, begin, end in plan])
            attend = parts[0] if len(parts) == 1 else PackedAttention(parts, [e - b for _, b, e in plan])
            hidden = self.model.hidden(tokens[None], attend, chunk=True)[0]
            done = 0
            for i, begin, end in plan:
                done += end - begin
                last[i] = hidden[done - 1]
        return last

    @torch.inference_mode()
    def run(self, count: int, steps: int = 1) -> list[list[int]]:
        """``steps`` steps of the first ``count`` rows -> for each row the token of each step, or RESTING, or BROKEN."""
        cache, states = self._bucket(count)
        size, plain = cache.rows.batch_size, all(self.plain[:count])
        self.cursor.zero_()
        step = partial(self._step, cache, states, plain)
        for _ in range(steps):
            self.graphs.run(("step", size, plain), step, partial(self._quietly, states))
        return self.out[:count, :steps].tolist()

    def _step(self, cache: StaticRollingCache, states: RowStates, plain: bool) -> None:
        alive = states.active > 0
        logits = self._forward(cache, states.token[:, None], states.active)[:, 0]
        chosen = states.emit(logits, alive, plain)
        self.out[: chosen.shape[0]].index_copy_(1, self.cursor, chosen[:, None])
        self.cursor += 1

    @torch.inference_mode()
    def verify(self, drafts: Sequence[Sequence[int]]) -> list[list[int]]:
        """One step of the first ``len(drafts)`` rows that goes on, in each, for as long as a draft is right.

        Args:
            drafts: what may follow the newest token of each row, at most ``drafts`` of the constructor, tokens of the
                vocabulary; fewer, or none, for any row.
        Returns:
            the tokens that came, at least one for each row that goes on: the right drafts and the one behind them; in a
            row that broke its last is BROKEN.
        """
        count = len(drafts)
        # each width is a graph of its own, so on a GPU there is one
        width = self.drafts if self.model.device.type == "cuda" else max(1, max(map(len, drafts)))
        cache, states = self._bucket(count)
        size, plain = cache.rows.batch_size, all(self.plain[:count])
        # a row with fewer drafts gets any token, which is right or wrong as every other
        padded = [[*row, *[0] * (width - len(row))] for row in drafts]
        self.draft_tokens[:count, :width] = torch.tensor(padded, dtype=torch.int64).to(
            self.draft_tokens.device
        )
        step = partial(self._verify, cache, states, plain, width)
        self.graphs.run(("verify", size, plain, width), step, partial(self._quietly, states))
        found = self.out[:count, : width + 1].tolist()
        return [[token for token in row if token != RESTING] for row in found]

    def _verify(self, cache: StaticRollingCache, states: RowStates, plain: bool, width: int) -> None:
        size = cache.rows.batch_size
        drafts = self.draft_tokens[:size, :width]
        alive = states.active > 0
        written = (width + 1) * states.active
        tokens = torch.cat((states.token[:, None], drafts), dim=1)
        logits = self._forward(cache, tokens, written)
        kept = torch.zeros_like(states.active)
        for i in range(width + 1):
            chosen = states.emit(logits[:, i], alive, plain)
            self.out[:size, i] = chosen
            kept += alive.to(torch.int32)
            if i < width:
                alive = alive & (chosen == drafts[:, i]) & (states.active > 0)
        cache.retract(torch.where(written > 0, written - kept, 0).to(torch.int32))

    def _forward(self, cache: StaticRollingCache, tokens: Tensor, written: Tensor) -> Tensor:
        """tokens [B, T]; ``written`` int32 [B] is T in rows that go on and 0 in those that rest -> [B, T, vocab]."""
        batch, width = tokens.shape
        first = cache.advance(written)
        at = first.clamp(min=0)[:, None] + torch.arange(width, device=tokens.device)
        turn = self.model.turn(at)
        attend: Attention
        if self.whole:
            hidden = self.model.advance(tokens, cache, turn, first)
        elif self.lean:
            attend = LeanAttention(cache, self.model.heads, turn, first)
            hidden = self.model.hidden(tokens, attend, chunk=False)
        else:
            attend = StepAttention(cache, self.model.heads, turn, first, self.model.invariant)
            hidden = self.model.hidden(tokens, attend, chunk=False)
        return self.model.logits(hidden.flatten(0, 1), chunk=False).view(batch, width, -1)

    @torch.inference_mode()
    def release(self, row: int, broken: bool = False) -> None:
        """Give up a row. One that broke is wiped: what is not finite would reach beyond a weight of zero."""
        self.states.active[row] = 0
        self.plain[row] = True
        rows_of(self.cache, row, row + 1).reset()
        if broken:
            for layer in self.cache.layers:
                for t in layer.tensors.values():
                    t[row].zero_()

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Carry a row over to a free one, so that the rows in use are the first ones."""
        move_row(self.cache, source, target)
        self.states.move(source, target)
        self.plain[target] = self.plain[source]
        self.release(source)

    def _bucket(self, count: int) -> tuple[StaticRollingCache, RowStates]:
        """The first rows: exactly ``count`` on a CPU, on a GPU the next power of two, as each size is a graph."""
        size = count
        if self.model.device.type == "cuda":
            size = min(self.size, 1 << (count - 1).bit_length())
        if size not in self._buckets:
            self._buckets[size] = rows_of(self.cache, 0, size), self.states.rows(0, size)
        return self._buckets[size]

    def _quietly(self, states: RowStates, step: Step) -> None:
        """Run steps while all rows rest: nothing is written and nothing counted."""
        before, cursor = states.active.clone(), self.cursor.clone()
        states.active.zero_()
        step()
        states.active.copy_(before)
        self.cursor.copy_(cursor)
