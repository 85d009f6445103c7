"""For runs under test whose PYTHONPATH leads here: their checkpointers end a process at some operation."""

import os
import sys
from pathlib import Path

_ROLE = "vitgraft.trainer.checkpointer"
if "VITGRAFT_TEST_KILLS" in os.environ and _ROLE in sys.orig_argv:
    sys.path.append(str(Path(__file__).parent.parent))
    from support_kills import kill_in_run

    kill_in_run(Path(os.environ["VITGRAFT_TEST_KILLS"]), sys.orig_argv[sys.orig_argv.index("--run-dir") + 1])
