"""Text from a model, fast: prompts in, tokens out as they come, finished rows replaced by waiting prompts.

    generator = Generator(model, tokenizer, batch_size=8)
    for completion in generator.complete([Request(tokens) for tokens in prompts]):
        print(completion.text)

What runs on the device is in :mod:`.decode_engine`; here it is decided who is in which row, and when a text is at its
end. ``model.generate`` of transformers goes on working beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .decode_engine import BLOCK, Beginning, DecodeEngine
from .decode_step import DecodeModel
from .requests import Completion, Counts, Event, Request, RequestError, token_rows
from .sampling import BROKEN, Sampling
from .speculative import DraftModel, Proposer
from .text_stream import TextStream
from .weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Completion", "Event", "Generator", "Request", "RequestError", "Sampling", "generate"]

# positions of a cache are a multiple of this, so that one is not made anew for every other prompt
_LENGTH_STEP = 256
_NOT_A_NUMBER = (
    "the model's logits are not finite here: its weights, or the token's embedding, hold nan or inf, or a value "
    "overflowed; check the checkpoint, or compute in another dtype"
)


@dataclass
class _Text:
    """A request in a row."""

    request: Request
    completion: Completion
    budget: int
    stream: TextStream | None
    tokens: list[int]


class Generator:
    """Continues prompts with one model.

    Args:
        model: a MistralForCausalLM, quantized or not, on its device.
        tokenizer: for texts and stop strings; tokens alone need none.
        batch_size: texts that are continued at once, at most.
        chunk: tokens of a prompt read at once.
        int8_cache: keys and values as int8: 1.03 bytes a value at heads of 128.
        batch_invariant: a prompt's text does not depend, in any bit, on what else is in the batch; it costs speed.
        eos: tokens that end a text; those of the model's generation config by default.
        proposer: of drafts, :class:`.PromptLookup` or :class:`.DraftModel`; each text is the same without.
        repack: on a CPU, copy dense fp32 weights into the layout that is fastest there.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 1,
        chunk: int = 512,
        int8_cache: bool = False,
        batch_invariant: bool = False,
        eos: Sequence[int] | None = None,
        proposer: Proposer | None = None,
        repack: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.tokenizer: Any = tokenizer
        self.proposer = proposer
        self.drafts = 0 if proposer is None else proposer.drafts
        self.model = DecodeModel(
            model, rows=batch_size * (1 + self.drafts), invariant=batch_invariant, repack=repack
        )
        if isinstance(proposer, DraftModel) and proposer.vocab != self.model.vocab:
            raise ValueError(
                f"the draft model has {proposer.vocab} tokens and the model {self.model.vocab}: they need the same "
                "vocabulary"
            )
        self.batch_size, self.chunk, self.int8_cache = batch_size, chunk, int8_cache
        self.eos = eos_of(model) if eos is None else tuple(eos)
        self.positions = int(self.model.config.max_position_embeddings)
        # steps between two looks at the device; on a CPU a look costs nothing
        self.block = 1 if self.model.device.type == "cpu" else BLOCK
        self.counts = Counts()
        self._engine: DecodeEngine | None = None
        self._streaming = False
        self._source, self._weights = model, Weights(model)

    def complete(self, requests: Iterable[Request]) -> list[Completion]:
        """The completions of all requests, in their order."""
        events = self.stream(requests, every_token=False)
        done = [event.completion for event in events if event.completion is not None]
        return sorted(done, key=lambda completion: completion.index)

    def stream(self, requests: Iterable[Request], *, every_token: bool = True) -> Iterator[Event]:
        """Continue all requests, as many at once as there are rows.

        A request that cannot be carried out, or whose logits are not finite, ends with reason ``error``; the others
        go on.

        Args:
            every_token: events after every step. On a GPU that is a look at the device a step; without, one a block of
                steps.
        Raises:
            RuntimeError: another stream of this generator has not come to its end, or the model is not what it was.
        """
        if (name := self._weights.changed(self._source)) is not None:
            raise RuntimeError(
                f"the model was changed since this Generator was made ({name}): its weights were arranged then, so "
                "make a new one"
            )
        waiting: deque[tuple[int, Request]] = deque()
        longest = 0
        for index, request in enumerate(requests):
            try:
                self._check(request)
            except RequestError as error:
                yield Event(
                    index, completion=Completion(index, len(request.prompt), reason="error", error=str(error))
                )
                continue
            waiting.append((index, request))
            longest = max(longest, min(len(request.prompt) + request.max_new_tokens, self.positions))
        if not waiting:
            return
        if self._streaming:
            raise RuntimeError(
                "another stream of this Generator has not come to its end, and its texts are in the rows: finish or "
                "close it first, or make a second Generator"
            )
        engine = self._engine_for(longest)
        texts: list[_Text | None] = [None] * self.batch_size
        self._streaming = True
        try:
            while waiting or any(texts):
                yield from self._fill(engine, texts, waiting)
                count = self._close_ranks(engine, texts)
                if count:
                    yield from self._advance(engine, texts, count, every_token, bool(waiting))
        finally:
            self._streaming = False
            for row, text in enumerate(texts):
                if text is not None:
                    engine.release(row)

    def _check(self, request: Request) -> None:
        request.check(self.model.vocab, self.positions)
        if request.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer: give one to the Generator")

    def _engine_for(self, longest: int) -> DecodeEngine:
        """An engine whose rows hold texts of this length; the one there is, where it does."""
        if self._engine is None or self._engine.length < longest:
            length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, self.positions)
            self._engine = None  # its cache makes room for the next one's
            self._engine = DecodeEngine(
                self.model,
                rows=self.batch_size,
                length=length,
                chunk=self.chunk,
                drafts=self.drafts,
                int8_cache=self.int8_cache,
                ends=self.eos,
            )
        if self.proposer is not None:
            self.proposer.prepare(self.batch_size, self._engine.length + self.drafts)
        return self._engine

    def _fill(
        self, engine: DecodeEngine, texts: list[_Text | None], waiting: deque[tuple[int, Request]]
    ) -> Iterator[Event]:
        """Read waiting prompts into free rows; a text may be at its end with its first token."""
        while waiting and None in texts:
            begun: list[Beginning] = []
            for row in [row for row, text in enumerate(texts) if text is None][: len(waiting)]:
                index, request = waiting.popleft()
                prompt = list(request.prompt)
                budget = min(request.max_new_tokens, self.positions - len(prompt))
                stream = self._text_stream(request)
                texts[row] = _Text(request, Completion(index, len(prompt)), budget, stream, prompt)
                begun.append(Beginning(row, list(prompt), request.sampling, budget))
            for b, first in zip(begun, engine.start(begun)):
                if self.proposer is not None and first != BROKEN:
                    self.proposer.start(b.row, b.prompt)
                yield self._deliver(engine, texts, b.row, [first])

    def _text_stream(self, request: Request) -> TextStream | None:
        if self.tokenizer is None:
            return None
        return TextStream(self._decode, request.stop)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _close_ranks(self, engine: DecodeEngine, texts: list[_Text | None]) -> int:
        """Move texts from the last rows to free ones before them -> how many rows are in use, the first ones."""
        count = sum(text is not None for text in texts)
        for row in range(count):
            if texts[row] is None:
                last = max(r for r, text in enumerate(texts) if text is not None)
                engine.move(last, row)
                if self.proposer is not None:
                    self.proposer.move(last, row)
                texts[row], texts[last] = texts[last], None
        return count

    def _advance(
        self, engine: DecodeEngine, texts: list[_Text | None], count: int, every_token: bool, waiting: bool
    ) -> Iterator[Event]:
        """A step of all rows, or a block of them."""
        running = [text for text in texts[:count] if text is not None]
        if self.proposer is not None:
            found = self._speculate(engine, self.proposer, running)
        else:
            rest = [text.budget - len(text.completion.tokens) for text in running]
            steps = 1 if every_token else max(1, min(self.block, min(rest) if waiting else max(rest)))
            found = engine.run(count, steps)
            self.counts.steps += steps
        for row, tokens in enumerate(found):
            new = [token for token in tokens if token >= 0 or token == BROKEN]
            assert new, "a row in use goes on, or this would never end"
            yield self._deliver(engine, texts, row, new)

    def _speculate(self, engine: DecodeEngine, proposer: Proposer, running: list[_Text]) -> list[list[int]]:
        proposed = proposer.propose([text.tokens for text in running])
        # what is certain to be cut off need not be computed
        drafts = [
            draft[: max(0, text.budget - len(text.completion.tokens) - 1)]
            for draft, text in zip(proposed, running)
        ]
        self.counts.steps += 1
        if any(drafts):
            found = engine.verify(drafts)
        else:
            found = engine.run(len(running))
        right = [max(0, sum(token >= 0 for token in tokens) - 1) for tokens in found]
        proposer.settle(right)
        self.counts.proposed += sum(map(len, drafts))
        self.counts.accepted += sum(min(n, len(draft)) for n, draft in zip(right, drafts))
        return found

    def _deliver(self, engine: DecodeEngine, texts: list[_Text | None], row: int, tokens: list[int]) -> Event:
        """New tokens of a row: note them, and see whether the text has come to its end."""
        text = texts[row]
        assert text is not None, "only rows in use are advanced"
        done, stream = text.completion, text.stream
        piece, new = "", []
        for token in tokens:
            if token == BROKEN:
                done.reason, done.error = "error", _NOT_A_NUMBER
                break
            new.append(token)
            done.tokens.append(token)
            text.tokens.append(token)
            if stream is not None:
                piece += stream.push([token])
                if stream.stopped is not None:
                    done.reason = "stop"
                    break
            if token in self.eos:
                done.reason = "eos"
                break
            if len(done.tokens) >= text.budget:
                done.reason = "length" if text.budget == text.request.max_new_tokens else "positions"
                break
        self.counts.tokens += len(new)
        if not done.reason:
            return Event(done.index, tuple(new), piece)
        if stream is not None:
            piece += stream.end()
            done.text = stream.text
            if stream.stopped is not None and done.reason != "error":
                done.reason = "stop"
        engine.release(row, broken=done.reason == "error")
        texts[row] = None
        return Event(done.index, tuple(new), piece, done)


def eos_of(model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a text: those of the model's generation config, and of nothing else, as for ``generate``."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def generate(
    model: nn.Module,
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    **options: Any,
) -> list[list[int]]:
    """The tokens that follow each prompt, as a greedy (or sampled) ``model.generate`` gives them.

    Args:
        input_ids: int64 [B, T], or a list of prompts of any lengths.
        attention_mask: [B, T], 1 = a token of the prompt, as transformers has it; padding may be anywhere.
        sampling: of all prompts; row b takes ``seed + b``.
        options: of :class:`Generator`.
    Raises:
        RequestError: a prompt that cannot be continued.
        FloatingPointError: the model's logits are not finite.
    """
    sampling = sampling or Sampling()
    rows = token_rows(input_ids, "input_ids")
    if attention_mask is not None:
        kept = token_rows(attention_mask, "attention_mask")
        if [len(r) for r in kept] != [len(r) for r in rows]:
            raise RequestError("attention_mask must be of the shape of the input_ids, a row for each prompt")
        rows = [[token for token, keep in zip(row, mask) if keep] for row, mask in zip(rows, kept)]
    generator = Generator(model, batch_size=options.pop("batch_size", max(1, len(rows))), **options)
    requests = []
    for b, row in enumerate(rows):
        seed = sampling.seed + b
        own = Sampling(**{**vars(sampling), "seed": seed})
        requests.append(Request(row, max_new_tokens, own))
        requests[-1].check(generator.model.vocab, generator.positions)
    done = generator.complete(requests)
    for completion in done:
        if completion.error is not None:
            raise FloatingPointError(f"prompt {completion.index}: {completion.error}")
    return [completion.tokens for completion in done]
