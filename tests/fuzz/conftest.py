"""Makes what the tests of this folder share importable: ``from hostile import ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
