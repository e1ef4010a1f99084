"""Refuse files above 1.5 MB: `python -m tests.large_files FILE...`; a pre-commit hook."""

import sys
from pathlib import Path

LIMIT = 1_500_000  # bytes

too_large = [name for name in sys.argv[1:] if Path(name).stat().st_size > LIMIT]
sys.exit(f"above {LIMIT} bytes: {', '.join(too_large)}" if too_large else 0)
