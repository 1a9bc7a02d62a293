"""A file of prompts continued into a file of texts, in their order; a run that was killed goes on where it was.

Both are JSON lines. What is done is kept in a journal beside the output, each line on the disk before the next one
begins; when all is done the output appears whole and the journal goes. So a kill at any moment costs at most the texts
that were in the making, and no prompt is answered twice or never.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .atomic import fsync_folder
from .generate import Generator
from .prompts import encode_messages, encode_prompt
from .requests import Completion, Request, RequestError
from .sampling import Sampling

Progress = Callable[[str, int, int], None]
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_KEYS = {"id", "prompt", "messages", "max_new_tokens", "stop", *_SAMPLING}


class BatchError(ValueError):
    """A file that cannot be read or written, or that belongs to another run."""


@dataclass(frozen=True)
class Defaults:
    """What a line does not say. Line i takes ``sampling.seed + i``, so that no two samples are alike."""

    max_new_tokens: int = 128
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    stop: tuple[str, ...] = ()
    chat: bool = False


@dataclass(frozen=True)
class Line:
    """One line of the input: a request, or why it is none."""

    index: int
    id: Any
    request: Request | None
    error: str | None = None


def read_lines(text: str, tokenizer: Any, defaults: Defaults) -> list[Line]:
    """The prompts of a JSONL text; empty lines are passed over. A line that is wrong is an error of its own."""
    lines: list[Line] = []
    for raw in text.split("\n"):  # not splitlines: a string may hold other line ends as they are
        if not raw.strip():
            continue
        index, name = len(lines), None
        try:
            data = json.loads(raw, object_pairs_hook=_object, parse_constant=_no_constant)
            if not isinstance(data, dict):
                raise RequestError(f"expected an object with a prompt, got {raw.strip()[:60]}")
            json.dumps(data.get("id"), allow_nan=False)  # 1e999 is read as infinite, and could not be written
            name = data.get("id")
            lines.append(Line(index, name, _request(data, index, tokenizer, defaults)))
        except (RequestError, ValueError, TypeError) as error:
            lines.append(Line(index, name, None, str(error)))
        except RecursionError:
            lines.append(Line(index, None, None, "brackets within brackets, too many for a line of JSON"))
    return lines


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RequestError(f"a key stands there twice: {', '.join(key for key, _ in pairs)}")
    return found


def _no_constant(name: str) -> Any:
    raise RequestError(f"{name} is no JSON")


def _request(data: Mapping[str, Any], index: int, tokenizer: Any, defaults: Defaults) -> Request:
    unknown = sorted(set(data) - _KEYS)
    if unknown:
        raise RequestError(f"unknown key {', '.join(unknown)}; a line may have {', '.join(sorted(_KEYS))}")
    if ("prompt" in data) == ("messages" in data):
        raise RequestError("a line needs a prompt or messages, and not both")
    if "messages" in data:
        tokens = encode_messages(tokenizer, data["messages"])
    elif not isinstance(data["prompt"], str):
        raise RequestError(f"the prompt must be a string, got {type(data['prompt']).__name__}")
    elif defaults.chat:
        tokens = encode_messages(tokenizer, [{"role": "user", "content": data["prompt"]}])
    else:
        tokens = encode_prompt(tokenizer, data["prompt"])
    own = {name: data[name] for name in _SAMPLING if name in data}
    sampling = Sampling(**{**vars(defaults.sampling), "seed": defaults.sampling.seed + index, **own})
    stop = data.get("stop", defaults.stop)
    if not isinstance(stop, str | list | tuple):
        raise RequestError(f"stop must be a string or a list of them, got {stop!r}")
    count = data.get("max_new_tokens", defaults.max_new_tokens)
    if isinstance(count, bool) or not isinstance(count, int):
        raise RequestError(f"max_new_tokens must be an integer, got {count!r}")
    return Request(tokens, count, sampling, (stop,) if isinstance(stop, str) else tuple(stop))


class Journal:
    """Results by index, each on the disk when :meth:`add` returns. One run at a time.

    Attributes:
        fresh: no run before this one left anything.

    Raises:
        BatchError: another run is writing it, or it belongs to one with other prompts or settings.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.results: dict[int, dict[str, Any]] = {}
        self._file: IO[bytes] = path.open("a+b")
        try:
            self._lock()
            self._recover(fingerprint)
        except BaseException:
            self._file.close()
            raise

    def add(self, result: dict[str, Any]) -> None:
        self._write(result)
        self.results[result["index"]] = result

    def close(self, remove: bool = False) -> None:
        if remove:
            self.path.unlink()
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(
                f"another run is writing {self.path}; wait for it, or choose another output"
            ) from None
        # a run that ended between the opening and the lock has taken the file away
        if not self.path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            raise BatchError(f"another run has just finished with {self.path}; look at its output")

    def _recover(self, fingerprint: str) -> None:
        """Read what an earlier run has done, and cut off a line that it was killed in."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        lines = whole.splitlines()
        self.fresh = not lines
        if self.fresh:
            self._write({"fingerprint": fingerprint})
            fsync_folder(self.path.parent)
            return
        try:
            head, *results = [json.loads(line) for line in lines]
            self.results = {result["index"]: result for result in results}
            found = head["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise BatchError(f"{self.path} is damaged ({error}); delete it to begin anew") from error
        if found != fingerprint:
            raise BatchError(
                f"{self.path} is of a run with other prompts, another model or other settings; repeat it as it was, "
                "delete the file to begin anew, or choose another output"
            )

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def continue_file(
    generator: Generator,
    source: str | Path,
    target: str | Path,
    defaults: Defaults,
    *,
    identity: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Continue every prompt of ``source`` into ``target``.

    Args:
        generator: with a tokenizer.
        identity: what, beside the prompts and the defaults, the texts depend on: the model, for one. A journal of a run
            with another is refused.
        overwrite: replace a target that exists.
        progress: called with ("prompts", done, in all).
    Returns:
        the lines written, in the order of the prompts: index, id where there was one, prompt_tokens, new_tokens, text,
        reason; or error.
    Raises:
        BatchError: the target exists, or a journal beside it is another run's.
    """
    source, target = Path(source), Path(target)
    part = target.with_name(target.name + ".part")
    if target.exists() and os.path.samefile(source, target):
        raise BatchError(f"{target} is the file of the prompts; choose another output")
    text = source.read_text(encoding="utf-8-sig")  # some editors put a mark before the first line
    settings = json.dumps([text, repr(defaults), dict(identity or {})], sort_keys=True, default=str)
    journal = Journal(part, hashlib.sha256(settings.encode()).hexdigest())
    finished = False
    try:
        # looked at under the journal's lock: another run may have ended since this one began
        if journal.fresh and target.exists() and not overwrite:
            finished = True
            raise BatchError(f"{target} exists; choose another output, or allow overwriting")
        lines = read_lines(text, generator.tokenizer, defaults)
        _continue_lines(generator, lines, journal, progress or (lambda *_: None))
        done = [journal.results[line.index] for line in lines]
        _write_whole(target, "".join(_dumped(result) + "\n" for result in done))
        finished = True
    finally:
        journal.close(remove=finished)
    return done


def _continue_lines(generator: Generator, lines: list[Line], journal: Journal, progress: Progress) -> None:
    waiting = []
    for line in lines:
        if line.index in journal.results:
            continue
        if line.request is None:
            journal.add(_result(line, Completion(line.index, 0, reason="error", error=line.error)))
        else:
            waiting.append(line)
    progress("prompts", len(journal.results), len(lines))
    for event in generator.stream((line.request for line in waiting if line.request), every_token=False):
        if event.completion is not None:
            journal.add(_result(waiting[event.index], event.completion))
            progress("prompts", len(journal.results), len(lines))


def _result(line: Line, done: Completion) -> dict[str, Any]:
    result: dict[str, Any] = {"index": line.index}
    if line.id is not None:
        result["id"] = line.id
    if done.error is not None:
        return {**result, "error": done.error}
    return {
        **result,
        "prompt_tokens": done.prompt_tokens,
        "new_tokens": len(done.tokens),
        "text": done.text,
        "reason": done.reason,
    }


def _dumped(result: dict[str, Any]) -> str:
    text = json.dumps(result, ensure_ascii=False)
    # half of a surrogate pair, which JSON can escape and a name may hold, is nothing that UTF-8 can write
    return text if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text) else json.dumps(result)


def _write_whole(target: Path, text: str) -> None:
    """The file is there with all of the text or not at all."""
    new = target.with_name(target.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, target)
    fsync_folder(target.parent)
