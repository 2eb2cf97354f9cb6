"""`python -m dsrl_async` says which commands there are."""

import importlib
import sys

import dsrl_async
from dsrl_async.config.command_line import COMMANDS, program
from dsrl_async.config.settings import ConfigError
from dsrl_async.host.command import guard


def main() -> int:
    """List the commands; what they do says the docstring of each one's package."""
    if sys.argv[1:] not in ([], ["--help"], ["-h"]):
        raise ConfigError(f"{sys.argv[1]} means nothing here; python -m dsrl_async lists the commands")
    print(f"{dsrl_async.__doc__}\n")
    for name in COMMANDS:
        print(f"{program(name):30}{importlib.import_module(f'dsrl_async.{name}').__doc__}")
    print("\nEach has --help, and is installed as a console script, too: dsrl-launch and so on.")
    making = program("pretraining")
    print(f"{making}.NAME makes a small policy (NAME: tabletop, libero), .make_NAME_demonstrations its data.")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
