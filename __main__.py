"""`python -m psacpo`, for launchers that take a module."""

from psacpo.cli import main

if __name__ == "__main__":
    main()
