"""In a group's place: reads its job, says so, sleeps, and ends as the job says."""

import json
import signal
import sys
import time

job = json.load(sys.stdin)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(f"group {job['group']} has begun", flush=True)
time.sleep(job.get("seconds", 600))
print("the policy cannot be read", flush=True)
sys.exit(job.get("code", 1))
