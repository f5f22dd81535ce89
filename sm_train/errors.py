"""The one error a person can cause, and the frame every command runs in."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A person's mistake: one line that names the thing, the value and the remedy."""


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command's ``main(argv)``: a :class:`UserError` becomes one line and exit code 2.

    Anything else is our own bug and keeps its traceback.
    """
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        raise SystemExit(130) from None
