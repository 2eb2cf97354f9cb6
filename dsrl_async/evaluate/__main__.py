"""`python -m dsrl_async.evaluate`, and the console script `dsrl-evaluate`."""

import sys
from functools import partial

from dsrl_async.host.command import run_command

main = partial(run_command, "evaluate")

if __name__ == "__main__":
    sys.exit(main())
