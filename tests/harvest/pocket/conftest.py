"""The scripts of bench/pocket import each other by name, and their tests do so too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "bench" / "pocket"))
