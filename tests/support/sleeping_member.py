"""In a group's place: reads its job, says so, sleeps, and ends as the job says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dsrl_async.host import tether

job = json.load(sys.stdin)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(f"group {job['group']} has begun", flush=True)
if job.get("child"):  # in a session of its own, but tied to this process
    tied = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), "/bin/sleep", "86400"]
    subprocess.Popen(tied, start_new_session=True)
if job.get("answers"):
    told = Path(job["run_dir"]) / "told.jsonl"
    while not told.is_file() or told.read_text().count("\n") < job["answers"]:
        time.sleep(0.05)
    (told.parent / "heard.jsonl").write_text(told.read_text())
time.sleep(job.get("seconds", 3600))
print("the policy cannot be read", flush=True)
sys.exit(job.get("code", 1))
