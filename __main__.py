"""The command `psacpo`, and `python -m psacpo` for launchers that take a module.

What takes time to import is imported inside, so that Ctrl-C is one line from the first moment on.
"""

import signal
import sys
import time
from types import FrameType

# Seconds after a Ctrl-C in which another one is taken for the same.
_DEAF = 5.0


def interrupt_once() -> None:
    """Let a Ctrl-C on the heels of another not break off how the first one is dealt with."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    last = float("-inf")

    def interrupted(_number: int, _frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last >= _DEAF:
            last = time.monotonic()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)


def main() -> None:
    """`psacpo.cli.main`; Ctrl-C before it is there ends as it does later."""
    try:
        interrupt_once()
        from psacpo.cli import main as command

        command()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("psacpo: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
