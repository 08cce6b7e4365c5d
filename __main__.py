"""``python <this folder> …``: the command line, from anywhere and in an isolated or embedded Python."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from training.__main__ import main

    sys.exit(main())
