"""The one error a person can cause, and the frame every command runs in.

Exit codes: 0 done, 1 our own bug (with a traceback), 2 a person's mistake (one line), 75 saved and left after a signal,
76 left because another rank was lost or never came, 130 interrupted. After 75, 76 and 130 the same command goes on.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

OF_THE_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOTDIR,
    errno.EEXIST, errno.EISDIR,
)  # fmt: skip

MISTAKEN = 2
STOPPED = 75
"""The run was asked to stop by a signal: it saved and left."""
LOST = 76
"""Another rank died, hung, left or never came: this one could not go on."""


class UserError(Exception):
    """A person's mistake: one line that names the thing, the value and the remedy."""


class Lost(Exception):
    """The other ranks cannot be found: this one cannot begin, and the same command may."""


class Stopped(Exception):
    """A run has saved and left before its end, because a signal asked for it."""


def printable(text: object, limit: int = 1000) -> str:
    """Some text on one line, without what would steer a terminal, cut to so many characters."""
    said = str(text)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in said[:limit])
    return line if len(said) <= limit else f"{line}..."


def exit_hard(code: int = 0) -> NoReturn:
    """End a rank at once: at interpreter exit, gloo's threads have been seen to abort a rank whose work was done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's ``main(argv)``: a :class:`UserError` becomes one line and exit code 2.

    Anything else is our own bug and keeps its traceback.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        raise SystemExit(MISTAKEN) from None
    except BrokenPipeError:  # whoever read our lines has left, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr, flush=True)
        raise SystemExit(MISTAKEN) from None
    except Lost as lost:
        print(f"error: {printable(' '.join(str(lost).split()))}", file=sys.stderr, flush=True)
        exit_hard(LOST)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr)
        exit_hard(STOPPED)
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        raise SystemExit(130) from None
