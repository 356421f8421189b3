"""Tortures the programs: `python tests/torture/run.py --help`. It is no part of the ordinary tests."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # its modules are the package `torture`

if __name__ == "__main__":
    if sys.platform != "linux":  # Windows has no fork, and macOS's libraries don't allow it once torch is imported
        print("skipped: all parts need to fork a process with torch in it, which is safe on Linux only")
        sys.exit(0)

    from torture.suite import main

    sys.exit(main())
