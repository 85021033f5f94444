"""Freed memory stays with the process, unless the user has set the allocator up."""

import os
import subprocess
import sys

import pytest

from models.host_memory import KEPT_BYTES

SIZE = 64 << 20
# Page faults of the second to the tenth time that a program's memory is taken, used and freed.
PROGRAM = f"""
import ctypes, resource, sys
from models.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
for i in range(10):
    memory = libc.malloc({SIZE})
    libc.memset(memory, 1, {SIZE})
    libc.free(memory)
    if i == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **variables: str) -> int:
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_")} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):
        pytest.skip("needs glibc's allocator")
    assert SIZE < KEPT_BYTES
    pages = 9 * SIZE // os.sysconf("SC_PAGE_SIZE")
    assert faults("keep") < pages / 10
    if faults("leave") < pages / 2:
        pytest.skip("another allocator takes glibc's place here")
    assert faults("keep", MALLOC_MMAP_THRESHOLD_=str(1 << 20)) > pages / 2
    assert faults("keep", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576") > pages / 2
