"""Printing that outlives the reader of the output, a pipe such as `| tee` or a terminal, and that needs no UTF-8."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO

READER_IS_GONE = (errno.EPIPE, errno.EIO)  # errors of a pipe whose reader has ended, and of a closed terminal


class LastingStream:
    """A text stream that drops what cannot be written, and writes `?` for a character that its encoding lacks."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None  # of something that was lost while it had a reader, as on a full disk

    def write(self, text: str) -> int:
        """Write the text if possible. Return its length."""
        with self.errors_ignored():
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # in a locale without UTF-8
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream if possible."""
        with self.errors_ignored():
            self.stream.flush()

    @contextlib.contextmanager
    def errors_ignored(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # on a full disk, a later line may fit again
            if error.errno in READER_IS_GONE:
                discard(self.stream)
            else:
                self.error = error

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def discard(stream: TextIO) -> None:
    """Send the rest of a stream to /dev/null, also what it still buffers: the interpreter flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):  # not a stream of a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def lasting_output() -> Iterator[list[LastingStream]]:
    """Continue the block without output if its reader ends: `| head`, or `| tee` at Ctrl-C. Flush it at the end.

    A character that the encoding of the output lacks is printed as `?`.

    Returns:
        The streams of the block; each has its last `error`.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else LastingStream(stream) for stream in before)
    try:
        yield [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
        sys.stdout, sys.stderr = before
