"""How app.py and serve.py end where they cannot start: with one line, and what to install."""

import sys
from typing import NoReturn

CANNOT_START = (ValueError, OSError, ImportError, RuntimeError)


def end(command: str, error: Exception) -> NoReturn:
    """Ends with exit code 2 and the error in one line on stderr."""
    line = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        line += ": pip install -r requirements-demo.txt -c constraints-demo.txt"
    print(f"{command}: {line}", file=sys.stderr)
    sys.exit(2)
