"""TorchRL's inference server with its process-slot transport, as a measured process. Runs in .reference/torchrl.

The environments' processes use the transport's bare client. TorchRL's environments and collectors around it would take
several times as long.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.modules.inference_server import InferenceServer, ProcessSlotTransport

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from dsrl_async.host.cpu_time import usage


def observation() -> dict[str, torch.Tensor]:
    return {
        "images": torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8),
        "sac_image": torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8),
        "state": torch.randn(8),
    }


def environment(client: Any, decisions: Any, lane: int) -> None:
    request = TensorDict(observation())
    while True:
        client(request)
        decisions[lane] += 1


def policy(batch: TensorDictBase) -> TensorDictBase:
    return batch.set("action", torch.zeros(*batch.batch_size, 10, 7))


def main(environments: int, warm_s: float, seconds: float) -> dict[str, float]:
    torch.set_num_threads(1)
    context = get_context("fork")
    answer = TensorDict({"action": torch.zeros(10, 7), "policy_version": torch.zeros((), dtype=torch.long)})
    transport = ProcessSlotTransport(
        TensorDict(observation()), answer, num_slots=environments, ctx=context, copy_result=False
    )
    counts = context.Array(ctypes.c_long, environments, lock=False)
    clients = [transport.client() for _ in range(environments)]
    children = [
        context.Process(target=environment, args=(client, counts, lane), daemon=True)
        for lane, client in enumerate(clients)
    ]
    for child in children:
        child.start()
    processes = [os.getpid(), *(child.pid for child in children)]
    with InferenceServer(policy, transport, max_batch_size=environments, collect_stats=False):
        time.sleep(warm_s)
        decisions, begin, before = sum(counts), time.monotonic(), usage(processes)
        time.sleep(seconds)
        sample = {
            "decisions": sum(counts) - decisions,
            "seconds": time.monotonic() - begin,
            "cpu_s": usage(processes).since(before).running,
        }
        for child in children:
            child.kill()
    return sample


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))), flush=True)
    os._exit(0)
