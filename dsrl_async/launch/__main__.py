"""`python -m dsrl_async.launch`, and the console script `dsrl-launch`."""

import sys
from functools import partial

from dsrl_async.host.command import run_command

main = partial(run_command, "launch")

if __name__ == "__main__":
    sys.exit(main())
