"""Files that a marker speaks of, on a file system that shows a marker before its data.

A marker is written last, but a client of a shared file system answers from what it has cached: for some seconds it may
not know a file's name, or know its size of before. So a file that is absent or cut short is looked for again, for a
bounded time, before anybody calls its set damaged. One that is as long as it should be is never waited for.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

PATIENCE_S = 6.0
_SAY_S = 2.0
_PAUSE_S, _GROWTH = 0.05, 1.5
_LARGEST_HEADER = 100 << 20  # as safetensors has it


def wait_for(path: Path) -> bool:
    """Whether a file that a marker speaks of is there and not cut short; it is given a few seconds to become so."""
    begun, pause_s, is_said = time.monotonic(), _PAUSE_S, False
    while _is_missing(path):
        waited_s = time.monotonic() - begun
        if waited_s >= PATIENCE_S:
            return False
        if waited_s >= _SAY_S and not is_said:
            print(f"waiting for {path}: its marker is there, the file is not yet, or not all of it", file=sys.stderr)
            is_said = True
        time.sleep(min(pause_s, PATIENCE_S - waited_s))
        pause_s *= _GROWTH
        with suppress(OSError):
            os.listdir(path.parent)  # has an NFS client ask its server for the names again
    return True


def _is_missing(path: Path) -> bool:
    """Whether a file is absent, or shorter than its own beginning says."""
    try:
        with path.open("rb") as file:  # which has an NFS client ask for the size; a stat need not
            size = os.fstat(file.fileno()).st_size
            return size < _least_size(path.suffix, file, size)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ESTALE)
    except ValueError:  # a name that no file can have
        return False


def _least_size(kind: str, file: BinaryIO, size: int) -> int:
    """Bytes that a file must have, as far as its kind tells; 1 where it does not tell, 0 where it is damaged."""
    try:
        if kind == ".parquet":
            file.seek(max(size - 4, 0))
            return size + (file.read() != b"PAR1")
        if kind == ".safetensors":
            begin = 8 + struct.unpack("<Q", file.read(8))[0]
            if begin > min(size, _LARGEST_HEADER):
                return int(begin) if begin <= _LARGEST_HEADER else 0
            tensors = json.loads(file.read(begin - 8))
            ends = [facts["data_offsets"][1] for name, facts in tensors.items() if name != "__metadata__"]
            return int(begin + max(ends, default=0))
        if kind == ".mds":
            begin = 4 * (struct.unpack("<I", file.read(4))[0] + 2)
            file.seek(begin - 4)
            return int(begin if begin > size else struct.unpack("<I", file.read(4))[0])
    except struct.error:  # too short to say how long it is
        return size + 1
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return 0
    return 1
