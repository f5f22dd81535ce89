"""The program of a decoding process: utterances in as JSON lines, the encoder's inputs out as raw arrays, over pipes.

It knows neither torch nor transformers, so that it starts fast and stays small.
Shape letters: S samples, T frames, F inputs of a frame.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sm_train.data import audio, processes
from sm_train.data.inputs import Inputs
from sm_train.errors import UserError
from sm_train.records import Utterance

_MEMORY_BYTES = 8 << 30  # of addresses; a header that claims more is refused by the system, not by a killed process


@dataclass(frozen=True)
class DecodeConfig:
    """What a decoding process is told of the job, once."""

    root: str
    """Where relative audio paths start: a folder or an address."""
    max_duration_s: float
    silence_dbfs: float
    shortest_samples: int
    longest_samples: int | None
    inputs: str | None
    """The encoder's :class:`Inputs` as JSON; None for samples as they are."""


def _serve(requests: BinaryIO, replies: int) -> None:
    cfg = DecodeConfig(**json.loads(requests.readline()))
    prepare = Inputs.from_json(cfg.inputs).prepare if cfg.inputs else np.asarray
    _reply(replies, {})
    _say_no_more()
    for line in requests:
        utterance = Utterance(**json.loads(line))
        try:
            samples_S = audio.load_utterance(utterance, cfg.root, cfg.max_duration_s, cfg.silence_dbfs)
            if len(samples_S) < cfg.shortest_samples:
                detail = f"{len(samples_S)} samples; {cfg.shortest_samples} make one position"
                raise audio.BadAudio("too_short", detail)
            if cfg.longest_samples and len(samples_S) > cfg.longest_samples:
                detail = f"{len(samples_S)} samples; the encoder takes {cfg.longest_samples}"
                raise audio.BadAudio("too_long", detail)
            values = np.ascontiguousarray(prepare(samples_S), np.float32)
        except audio.BadAudio as error:
            _reply(replies, {"reason": error.reason, "detail": str(error)})
        except MemoryError:
            _reply(replies, {"reason": "too_large", "detail": "decoding it takes more memory than a decoder has"})
        except UserError as error:
            _reply(replies, {"mistake": str(error)})
        except Exception:
            _reply(replies, {"reason": "undecodable", "detail": traceback.format_exc().strip().splitlines()[-1]})
        else:
            _reply(replies, {"shape": values.shape, "num_samples": len(samples_S)}, values)


def _say_no_more() -> None:
    """After the start nobody reads what libraries print."""
    null = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2):
        os.dup2(null, handle)
    os.close(null)


def _reply(replies: int, head: dict[str, Any], values: NDArray[np.float32] | None = None) -> None:
    body = json.dumps(head).encode()
    _write_all(replies, [memoryview(len(body).to_bytes(4, "little") + body)])
    if values is not None and values.size:
        _write_all(replies, [values.reshape(-1).view(np.uint8).data])


def _write_all(handle: int, views: Sequence[memoryview]) -> None:
    for view in views:
        while len(view):
            view = view[os.write(handle, view) :]


def _main() -> None:
    processes.die_with(int(sys.argv[1]))  # in the middle of an utterance, too
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked decides
    replies = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not come between
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    _main()
