"""`python -m dsrl_async.report`, and the console script `dsrl-report`."""

import sys
from functools import partial

from dsrl_async.host.command import run_command

main = partial(run_command, "report")

if __name__ == "__main__":
    sys.exit(main())
