"""The flat files at the root as the package `videonsa`, for the tests, tools and benchmarks.

Only the Hub's loader makes a package of them by itself.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
