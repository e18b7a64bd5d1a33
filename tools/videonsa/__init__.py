"""The flat files at the root as the package `videonsa`, for the tests, tools and benchmarks.

Only the Hub's loader makes a package of them by itself. Importing this also puts the root on the
path, so that scripts find `commands`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
__path__ = [str(ROOT)]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
