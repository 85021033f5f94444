"""Keep odd terminals, closed streams and readers that leave from ending a command."""

import codecs
import os
import select
import sys

# What characters of our own output become where a terminal lacks them.
PLAIN = {"±": "+-", "—": "-", "…": "..."}
ERRORS = "topiary"


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace characters that an encoding lacks, as `codecs.register_error` asks it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    if all(c in PLAIN for c in text):
        return "".join(PLAIN[c] for c in text), error.end
    return codecs.backslashreplace_errors(error)


def prepare() -> None:
    """Make the standard streams take every text, and give closed ones a place to write to."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The next file to be opened would get the number of a closed stream, and with it all
            # that is printed.
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error(ERRORS, _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=ERRORS)


def reader_left() -> bool:
    """Return True if nobody reads the standard output any more, as after `| head`."""
    number = sys.stdout.fileno()
    poll = select.poll()
    poll.register(number, 0)  # errors are reported without being asked for
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    # Python flushes standard output when it exits, which would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True
