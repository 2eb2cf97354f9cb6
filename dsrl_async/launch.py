"""The command: `python -m dsrl_async.launch [--config YAML] [--key value ...]`.

Checks everything first, then runs; progress goes to stderr, and the last line on stdout is the run's summary as one
JSON object. Exit codes: 0 after a limit or a signal (the run ended as asked, with a checkpoint), 1 after a failure,
2 for a configuration that cannot run.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from dsrl_async import preflight
from dsrl_async.config import ConfigError, load_config
from dsrl_async.session import Session, StopRequest
from dsrl_async.supervisor import Supervisor
from dsrl_async.telemetry.console import make_console

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    stop = StopRequest()
    try:
        config = load_config(argv)
        policy, spec = preflight.check_policy(config)
        preflight.check_memory(config, spec, policy.action_horizon)
        preflight.check_device(config)
        run_dir, lock = preflight.open_run_directory(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = make_console(config)
    log_file = logging.FileHandler(run_dir / "logs" / "supervisor.log")
    log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[console.handler, log_file])
    with lock:
        try:
            session = Session(config, run_dir, spec, policy.action_horizon, stop, console)
            logger.info("run directory: %s", run_dir)
            if config.serial:
                from dsrl_async.serial import run_serial  # imports torch, which the supervisor does without

                summary = run_serial(session)
            else:
                summary = Supervisor(session).run()
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            console.close()
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary), flush=True)
    return 1 if summary["exit_reason"].startswith("failed") else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
