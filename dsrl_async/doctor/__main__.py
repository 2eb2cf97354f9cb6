"""`python -m dsrl_async.doctor`, and the console script `dsrl-doctor`."""

import sys
from functools import partial

from dsrl_async.host.command import run_command

main = partial(run_command, "doctor")

if __name__ == "__main__":
    sys.exit(main())
