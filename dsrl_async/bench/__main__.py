"""`python -m dsrl_async.bench`, and the console script `dsrl-bench`."""

import sys
from functools import partial

from dsrl_async.host.command import run_command

main = partial(run_command, "bench")

if __name__ == "__main__":
    sys.exit(main())
