"""`python -m dsrl_async.plan`, and the console script `dsrl-plan`."""

import sys
from functools import partial

from dsrl_async.host.command import run_command

main = partial(run_command, "plan")

if __name__ == "__main__":
    sys.exit(main())
