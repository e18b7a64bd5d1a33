"""Where the tests find the repository. pyproject.toml puts its root and tools/ on the path."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
