"""Run every benchmark of this folder, one after the other, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """The number of benchmarks that failed."""
    here = Path(__file__).resolve()
    scripts = sorted(path for path in here.parent.glob("*.py") if path != here)
    failed = [path.name for path in scripts if subprocess.run([sys.executable, str(path)], check=False).returncode]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
