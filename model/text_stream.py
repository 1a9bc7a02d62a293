"""Tokens to text as they come: whole characters only, and nothing that may still turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
_HALF = "\N{REPLACEMENT CHARACTER}"
# tokens before a piece that are decoded along with it: what a token gives may depend on its neighbour
_CONTEXT = 6


class TextStream:
    """The text of one sequence of tokens.

    A token may end in the middle of a UTF-8 character, and may be decoded in another way at the beginning of a text. So
    new tokens are decoded behind a few older ones, once their last character is whole, and what these give is cut off.

    Args:
        decode: tokens to text.
        stop: strings that end the text; they are not part of it.

    Attributes:
        text: all that is certain so far; whole when :meth:`end` has been called.
        stopped: the stop string that was met, or None.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        if any(not s for s in stop):
            raise ValueError("a stop string must not be empty")
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []
        self._done = 0
        self._all = ""
        self.text = ""
        self.stopped: str | None = None

    def push(self, tokens: Sequence[int]) -> str:
        """Take in new tokens -> what of the text has become certain."""
        if self.stopped is not None:
            return ""
        self._tokens += tokens
        begin = max(0, self._done - _CONTEXT)
        before = self._decode(self._tokens[begin : self._done])
        now = self._decode(self._tokens[begin:])
        if now.endswith(_HALF) or not now.startswith(before):
            return ""
        self._done = len(self._tokens)
        return self._add(now[len(before) :], final=False)

    def end(self) -> str:
        """No more tokens -> the rest of the text."""
        if self.stopped is not None:
            return ""
        whole = self._decode(self._tokens)
        if whole.startswith(self._all):
            return self._add(whole[len(self._all) :], final=True)
        begin = max(0, self._done - _CONTEXT)
        before = self._decode(self._tokens[begin : self._done])
        return self._add(self._decode(self._tokens[begin:])[len(before) :], final=True)

    def _add(self, piece: str, final: bool) -> str:
        searched = max(0, len(self._all) - max(map(len, self._stop), default=0) + 1)
        self._all += piece
        found = [(at, s) for s in self._stop if (at := self._all.find(s, searched)) >= 0]
        if found:
            at, self.stopped = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            return self._upto(at)
        held = 0 if final else max((_overlap(self._all, s) for s in self._stop), default=0)
        return self._upto(len(self._all) - held)

    def _upto(self, end: int) -> str:
        piece = self._all[len(self.text) : end]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` begins, at most all but its last."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
