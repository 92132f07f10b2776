"""``sglang_bridge.Engine`` as a script: takes JSON questions on stdin, prints JSON answers.

``{"prompts": [...], "tokens": n, "api": "generate" | "async"}``: generate; the answers' meta_info
and output ids, and of which type their routes are. ``{"read": rid}``: read and release in this
very process; the rows' sum.
``{"shutdown": true}``: end the engine, stay here.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import sglang_bridge
from shmroute import ShmRouteReader


def answer(value: Any) -> None:
    print("ANSWER " + json.dumps(value), flush=True)


def main() -> None:
    engine = sglang_bridge.Engine(**json.loads(sys.argv[1]))
    answer("started")

    async def all_at_once(prompts: list[list[int]], sampling: dict[str, Any]) -> list[Any]:
        asked = [
            engine.async_generate(
                input_ids=prompt, sampling_params=sampling, return_routed_experts=True
            )
            for prompt in prompts
        ]
        return await asyncio.gather(*asked)

    for line in sys.stdin:
        question = json.loads(line)
        if question.get("shutdown"):
            engine.shutdown()
            answer("shut down")
            continue
        if "read" in question:
            with ShmRouteReader(question["read"]) as routes:
                answer(int(routes.numpy().sum()))
                routes.release()
            continue
        sampling = {"max_new_tokens": question["tokens"], "temperature": 1.0, "ignore_eos": True}
        if question["api"] == "async":
            found = engine.loop.run_until_complete(all_at_once(question["prompts"], sampling))
        else:
            found = engine.generate(
                input_ids=question["prompts"], sampling_params=sampling, return_routed_experts=True
            )
        answer([_shown(one) for one in found])


def _shown(one: dict[str, Any]) -> dict[str, Any]:
    meta = one["meta_info"]
    carried = type(meta["routed_experts"]).__name__
    return {"output_ids": one["output_ids"], "meta_info": meta, "carried": carried}


if __name__ == "__main__":
    main()
