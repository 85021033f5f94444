"""Keep freed host memory for the next program in place of giving it back to the system."""

import ctypes
import os

# Most bytes that stay with the process, and size from which an allocation is the system's own.
KEPT_BYTES = 512 << 20
# The largest such size that glibc before 2.35 takes.
OLD_MOST_BYTES = 32 << 20
# Parameters of glibc's mallopt, as malloc.h numbers them.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> None:
    """Let glibc's allocator keep freed memory, in one pool for all threads.

    A program of a block takes some 40 MB of memory for its temporary arrays and frees it at its
    end. By default that memory goes back to the system, which clears each page again for the next
    program: a sixth of the time of SmolLM2's forward pass on a CPU. Elsewhere than with glibc, and
    where the user has set the allocator up, nothing changes.
    """
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):
        return  # another C library
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") for name in os.environ
    ):
        return
    libc = ctypes.CDLL(None)
    # One pool: those of other threads are too small for such arrays, and go back to the system.
    libc.mallopt(ARENA_MAX, 1)
    if not libc.mallopt(MMAP_THRESHOLD, KEPT_BYTES):
        libc.mallopt(MMAP_THRESHOLD, OLD_MOST_BYTES)
    libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
