"""Calls into compiled libraries, and tapes of them: what was called once, called again as one.

A decoding step is hundreds of short calls, and Python takes about as long to make one as it runs.
A tape notes them while they are made. Played, it makes the same calls, with the same pointers: what
is in the memory may differ, where it is may not.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LETTERS = {"p": "q", "i": "q", "f": "d"}


class _Thread(threading.local):
    tape: Tape | None = None


_thread = _Thread()


class Function:
    """A function of a compiled library that takes its arguments as words (words.h).

    Args:
        library: that it is in.
        name: that it was exported under.
        signature: a letter for each argument: p for an address, i for an int64, f for a float.
    """

    def __init__(self, library: ctypes.CDLL, name: str, signature: str) -> None:
        function = getattr(library, f"call_{name}")
        function.argtypes, function.restype = [ctypes.c_char_p], None
        library.play.argtypes, library.play.restype = [ctypes.c_char_p, ctypes.c_int64], None
        self.play, self._function = library.play, function
        self.head = struct.pack("=qq", ctypes.cast(function, ctypes.c_void_p).value, len(signature))
        self._pack = struct.Struct("=" + "".join(_LETTERS[letter] for letter in signature)).pack

    def __call__(self, *arguments: float) -> None:
        """Call it; a tape that records notes that."""
        words = self._pack(*arguments)
        self._function(words)
        if _thread.tape is not None:
            _thread.tape.note(self, words)


class Memory:
    """Results of calls, where the calls of other tapes have theirs: one tape runs at a time.

    Args:
        rows: the most that a result has.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._parts: dict[tuple[int, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def part(self, number: int, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """The result with this number."""
        key = number, shape[1:], like.dtype
        if key not in self._parts:
            self._parts[key] = like.new_empty(self.rows, *shape[1:])
        return self._parts[key][: shape[0]]

    def __len__(self) -> int:
        """How many results there is room for."""
        return len(self._parts)


class Tape:
    """Calls of one thread.

    Args:
        memory: of their results.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._noted: list[bytes] = []
        self._next = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the calls that this thread makes."""
        _thread.tape = self
        try:
            yield
        finally:
            _thread.tape = None
        self._words, self._calls = b"".join(self._noted), len(self._noted) // 2
        self._noted.clear()

    def note(self, function: Function, words: bytes) -> None:
        """One call, when it was made."""
        self._play = function.play
        self._noted += function.head, words

    def rewind(self) -> None:
        """From here on results may take the memory of those before: nobody reads them any more."""
        self._next = 0

    def empty(self, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for a result."""
        self._next += 1
        return self._memory.part(self._next, shape, like)

    def play(self) -> None:
        """Make all calls again."""
        self._play(self._words, self._calls)


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Memory for a result, of the dtype of `like`."""
    tape = _thread.tape
    return like.new_empty(shape) if tape is None else tape.empty(like, shape)
