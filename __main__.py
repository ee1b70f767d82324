"""The command `psacpo`, and `python -m psacpo` for launchers that take a module.

What takes time to import is imported inside, so that Ctrl-C is one line from the first moment on.
"""

import sys


def main() -> None:
    """`psacpo.cli.main`; Ctrl-C before it is there ends as it does later."""
    try:
        from psacpo.cli import main as command

        command()
    except KeyboardInterrupt:
        print("psacpo: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
