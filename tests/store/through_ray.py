"""A driver of Ray that puts views of a record into its object store and has them read elsewhere.

    python through_ray.py ARENA TICKET FOLDER

Says in its last line what each reader got. Ray keeps its files and its object store in FOLDER.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
PATHS = f"{HERE.parents[1]}:{HERE}"
os.environ |= {"PYTHONPATH": PATHS, "RAY_USAGE_STATS_ENABLED": "0"}
sys.path[:0] = PATHS.split(":")

import ray  # noqa: E402 (its environment comes first)
from actors import described  # noqa: E402

from shmroute import ShmRouteReader  # noqa: E402


@ray.remote
def task(array, arena):
    return described(array, arena)


@ray.remote
class Trainer:
    def take(self, array):
        self._array = array

    def read(self, arena):
        return described(self._array[3:], arena)


def views(whole, arena):
    trainer = Trainer.options(num_cpus=0).remote()
    ray.get(trainer.take.remote(ray.put(whole)))
    return {
        "whole": described(ray.get(ray.put(whole)), arena),
        "slice": described(ray.get(ray.put(whole[7:20, 1])), arena),
        "copy": described(ray.get(ray.put(whole.copy())), arena),
        "task": ray.get(task.remote(whole, arena)),
        "actor": ray.get(trainer.read.remote(arena)),
    }


def main():
    arena, ticket, folder = sys.argv[1:]
    with ShmRouteReader(base64.b64decode(ticket)) as routes:
        whole = routes.array()
    ray.init(
        num_cpus=1,
        object_store_memory=80 << 20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
        _plasma_directory=folder,
    )
    try:
        stored = len(ray.cloudpickle.dumps(whole))
        print(json.dumps({"stored_bytes": stored, "views": views(whole, arena)}))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
