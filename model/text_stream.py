"""Tokens to text as they come: whole characters only, and nothing that may still turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
_HALF = "\N{REPLACEMENT CHARACTER}"
# more tokens than a character takes: what ends in half a character after so many is none
_PATIENCE = 16


class TextStream:
    """The text of one sequence of tokens.

    A token may end in the middle of a UTF-8 character, and may be decoded in another way at the beginning of a text. So
    new tokens are decoded behind those of the piece before, once their last character is whole, and what these give is
    cut off. Both pieces begin where a character does: decoders for tokens of single bytes (byte fallback) give up a
    whole run of them that begins within one.

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
        # the piece before, and what follows it: _tokens[_begin:_done] and _tokens[_done:]
        self._begin = self._done = 0
        self._all = ""
        self.text = ""
        self.stopped: str | None = None

    def push(self, tokens: Sequence[int]) -> str:
        """Take in new tokens, one after another -> what of the text has become certain."""
        return "".join(self._take(token) for token in tokens if self.stopped is None)

    def _take(self, token: int) -> str:
        self._tokens.append(token)
        piece = self._behind()
        if piece.endswith(_HALF) and len(self._tokens) - self._done < _PATIENCE:
            return ""
        if piece:  # tokens without text are no context
            self._begin = self._done
        self._done = len(self._tokens)
        return self._add(piece, final=False)

    def end(self) -> str:
        """No more tokens -> the rest of the text."""
        if self.stopped is not None:
            return ""
        return self._add(self._behind(), final=True)

    def _behind(self) -> str:
        """The text of the tokens after ``_done``."""
        before = self._decode(self._tokens[self._begin : self._done])
        now = self._decode(self._tokens[self._begin :])
        if now.startswith(before):
            return now[len(before) :]
        # bytes that are no character, and with them the decoder gave up the run that they are in
        return self._decode(self._tokens[self._done :])

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
