"""shmroute in two minutes: a real SGLang server, and a trainer that reads its routes by rid.

    make demo                      (or: python bench/demo.py [--quick] [--json PATH] [--plot PATH])

What happens
    1 A small random-weight MoE with a tokenizer is made, without a download.
    2 The real SGLang HTTP server starts with ``--shmroute-arena``, on the GPU if torch sees one,
      else on the CPU, in shadow mode: it compares every record with SGLang's own host cache.
    3 Concurrent requests go over HTTP: shared prompt prefixes, two turns, many lengths, one
      prompt long enough for chunked prefill. A second process (``demo_trainer.py``), told
      only rids, reads the routes of each.
    4 A part is sent again, one request at a time, first to this server and then to a plain
      SGLang server with native routes: the same batches, so that the rows must be the same.
      Here times and sizes are taken, with nothing else running.
    5 Before the first server ends, answers are sampled at temperature 1. A trainer process with
      the same weights in transformers (``r3_trainer.py``) computes their log-probabilities twice,
      with its own routing and with the engine's replayed, and compares both with the engine's.
    6 Both servers end; nothing of the demo stays in /dev/shm, not after Ctrl-C either.

The same figures go to ``demo-report.json``, a picture of step 5 to ``demo-report.png``. The exit
code is 1 if a promise was not kept.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np
import orjson
import pybase64
import r3_plot
import r3_report
from demo_report import Delivery, Figures, closing, result_rows, table
from demo_rollouts import Conversation, Finished, make_conversations, one_by_one, together
from demo_steps import Steps
from engine_process import (
    SGLANG_FILES,
    EngineStartError,
    ServerProcess,
    left_behind,
    shared_memory_files,
)
from engine_setup import has_gpu
from r3_metrics import Comparison
from r3_process import sample_and_compare
from result_file import exit_code, write
from trainer_process import TrainerError, TrainerProcess

import shmroute
from shmroute import inspection

LAYERS, EXPERTS, TOP_K = 12, 128, 8
KV_TOKENS = 32768
CAPACITY = 16 << 20
SERVER_ARGS = (
    f"--max-total-tokens={KV_TOKENS}",
    "--chunked-prefill-size=512",
    "--sleep-on-idle",  # or a scheduler that waits takes a core from whoever is timed
    "--random-seed=1",
)
# Beside a GPU's other users, and without what takes most of a start.
GPU_ARGS = (
    "--attention-backend=triton",
    "--moe-runner-backend=triton",
    "--sampling-backend=pytorch",
    "--cuda-graph-backend-prefill=disabled",
    "--max-running-requests=32",
    "--mem-fraction-static=0.5",
)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


FAILURES = (DemoError, EngineStartError, TrainerError, httpx.HTTPError, TimeoutError)


class Demo:
    """One run: its processes, its files, and the end of both."""

    def __init__(self, *, quick: bool) -> None:
        self.steps = Steps()
        self.quick = quick
        self.gpu = has_gpu()
        self.arena = f"demo-{os.getpid()}"
        self._before = set(shared_memory_files().values())
        self.folder = Path(tempfile.mkdtemp(prefix="shmroute-demo-"))
        self._servers: list[ServerProcess] = []
        self._trainers: list[TrainerProcess] = []

    # -- the steps ---------------------------------------------------------------------------

    def run(self) -> Figures:
        """Everything from the model to the last file removed."""
        model = self._make_model()
        conversations, again = self._make_conversations(model)
        trainer = TrainerProcess(self.arena, self.folder / "trainer.log")
        self._trainers.append(trainer)

        server = self._start_server(
            "starting the SGLang server, with an arena",
            model,
            f"--shmroute-arena={self.arena}",
            f"--shmroute-capacity={CAPACITY}",
            "--shmroute-slots=1024",
            "--shmroute-shadow",
        )
        finished = self._send_together(server, conversations)
        held = self._counters()["heap_bytes_in_use"]
        at_once = self._read_all(trainer, finished)
        alone = self._send_one_by_one(
            "sending {} requests, one by one", server, again, lambda done: by_ticket(trainer, done)
        )
        counters, experts = self._counters(), trainer.experts()
        replay = self._replay(server, model)
        with self.steps.step("ending it (SIGTERM)"):
            server.terminate()
            server.stop()

        plain = self._start_server(
            "starting a plain SGLang server", model, "--enable-return-routed-experts"
        )
        native = self._send_one_by_one(
            "sending the same {} requests to it", plain, again, lambda done: natively(trainer, done)
        )
        table_tokens = int(_server_info(plain)["max_total_num_tokens"])
        self.clean_up()

        shadow_rows = counters["shadow_rows"]
        wrong = counters["shadow_mismatches"] + counters["shadow_rows_incomparable"]
        return Figures(
            layers=LAYERS,
            num_experts=EXPERTS,
            top_k=TOP_K,
            at_once=[delivery for delivery, _ in at_once],
            alone=[delivery for delivery, _ in alone],
            native=[delivery for delivery, _ in native],
            faulty_rows=sum(faults for _, faults in (*at_once, *alone)),
            shadow_rows=shadow_rows,
            shadow_equal=shadow_rows - wrong,
            held_rows=sum(delivery.rows for delivery, _ in at_once),
            held_bytes=held,
            capacity=CAPACITY,
            native_table_bytes=table_tokens * LAYERS * TOP_K * 4,
            experts_used=experts["used"],
            expert_pairs=experts["pairs"],
            largest_ticket=max(one.route_bytes for one, _ in (*at_once, *alone)),
            left_in_shm=len(self.left_in_shm()),
            replay=replay,
            where="on the GPU" if self.gpu else "on the CPU",
        )

    def _make_model(self) -> Path:
        with self.steps.step(f"making a MoE: {LAYERS} layers, top-{TOP_K} of {EXPERTS} experts"):
            # torch and transformers take seconds to import.
            from small_models import qwen3_moe
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            return qwen3_moe(
                self.folder / "model",
                num_experts=EXPERTS,
                top_k=TOP_K,
                layers=LAYERS,
                # Small, since a CPU runs it; a GPU's kernels want more.
                hidden=256 if self.gpu else 64,
                expert_width=64 if self.gpu else 16,
                # A power of two: the likeliest token stays the same.
                logits_std=4.0,
            )

    def _make_conversations(self, model: Path) -> tuple[list[Conversation], list[Conversation]]:
        many, few = (8, 4) if self.quick else (24, 12)
        longest = 600 if self.quick else 1500
        return (
            make_conversations(model, many, "together", usual=70, longest=longest, seed=1),
            # Longer ones where times are taken: what the native path costs grows with length.
            make_conversations(model, few, "alone", usual=700, longest=longest, seed=2),
        )

    def _start_server(self, what: str, model: Path, *args: str) -> ServerProcess:
        server = ServerProcess(
            model,
            *SERVER_ARGS,
            *(GPU_ARGS if self.gpu else ()),
            *args,
            cpu=not self.gpu,
            # The user's own settings must not turn the plain server into another one.
            env={name: "" for name in os.environ if name.startswith("SHMROUTE_")},
            log=self.folder / f"server-{len(self._servers) + 1}.log",
        )
        self._servers.append(server)
        with self.steps.step(what):
            server.start()
        return server

    def _send_together(
        self, server: ServerProcess, conversations: list[Conversation]
    ) -> list[Finished]:
        finished: list[Finished] = []
        total = 2 * len(conversations)
        with self.steps.step(f"sending {total} requests, {total // 2} at once", total) as count:

            def on_finished(one: Finished) -> None:
                finished.append(one)
                count()

            together(server.url, conversations, on_finished)
        return finished

    def _read_all(
        self, trainer: TrainerProcess, finished: list[Finished]
    ) -> list[tuple[Delivery, int]]:
        with self.steps.step("reading their routes by rid", len(finished)) as count:
            read = []
            for one in finished:
                read.append(by_ticket(trainer, one))
                count()
            return read

    def _send_one_by_one(
        self,
        what: str,
        server: ServerProcess,
        conversations: list[Conversation],
        deliver: Callable[[Finished], tuple[Delivery, int]],
    ) -> list[tuple[Delivery, int]]:
        delivered: list[tuple[Delivery, int]] = []
        total = 2 * len(conversations)
        with self.steps.step(what.format(total), total) as count:

            def on_finished(one: Finished) -> None:
                delivered.append(deliver(one))
                count()

            one_by_one(server.url, conversations, on_finished)
        return delivered

    def _replay(self, server: ServerProcess, model: Path) -> Comparison:
        requests, new_tokens = (8, 16) if self.quick else (24, 48)
        return sample_and_compare(
            self.steps,
            server.url,
            self.arena,
            model,
            requests=requests,
            new_tokens=new_tokens,
            seed=0,
        )

    def _counters(self) -> dict[str, int]:
        reports = inspection.inspect_all(self.arena)
        if len(reports) != 1 or not reports[0].counters:
            raise DemoError(f"arena {self.arena} cannot be inspected: {reports}")
        return reports[0].counters

    # -- the end -----------------------------------------------------------------------------

    def clean_up(self) -> None:
        """End every process and remove every file in /dev/shm; again is harmless."""
        for trainer in self._trainers:
            trainer.stop()
        for server in self._servers:
            server.stop()
        shmroute.reap(self.arena, force=True)

    def left_in_shm(self) -> list[str]:
        """New files of the demo's arena or of SGLang's kinds that no other living process uses.

        Whatever process made them: ``ServerProcess`` removes those that it has seen in use.
        """
        ours = re.compile(f"shmroute-\\d+-{self.arena}-|{SGLANG_FILES.pattern}")
        return left_behind(ours, self._before)


def by_ticket(trainer: TrainerProcess, finished: Finished) -> tuple[Delivery, int]:
    """The way with shmroute: take the rid out of the response, the trainer maps the rows.

    Returns the delivery and the number of faulty rows.
    """
    rid = orjson.loads(finished.body)["meta_info"]["id"]
    answer = trainer.read(rid)
    if answer["start"] != 0 or not answer["complete"]:
        raise DemoError(f"rid {rid}: the record does not begin at token 0 or misses rows")
    return _delivery(finished, answer), int(answer["faults"])


def natively(trainer: TrainerProcess, finished: Finished) -> tuple[Delivery, int]:
    """SGLang's way: parse, decode, pickle the rows into the trainer, which unpickles them."""
    meta = orjson.loads(finished.body)["meta_info"]
    ids = np.frombuffer(pybase64.b64decode(meta["routed_experts"]), dtype=np.int32)
    rows = ids.reshape(-1, LAYERS, TOP_K)
    answer = trainer.compare(meta["id"], pickle.dumps(rows, protocol=5))
    return _delivery(finished, answer), 0


def _delivery(finished: Finished, answer: dict[str, Any]) -> Delivery:
    meta = finished.meta
    return Delivery(
        rid=finished.rid,
        rows=answer["rows"],
        prompt_tokens=meta["prompt_tokens"],
        new_tokens=meta["completion_tokens"],
        cached_tokens=meta["cached_tokens"],
        response_bytes=len(finished.body),
        route_bytes=len(meta["routed_experts"]),
        seconds=answer["at"] - finished.received,
        open_seconds=answer["seconds"],
        output_ids=tuple(finished.output_ids),
        equal=answer.get("equal", 0),
    )


def _server_info(server: ServerProcess) -> dict[str, Any]:
    answer = httpx.get(server.url + "/server_info", trust_env=False, timeout=60)
    info: dict[str, Any] = answer.raise_for_status().json()
    return info


def _interrupt(number: int, _frame: Any) -> NoReturn:
    """First Ctrl-C (or SIGTERM): clean up. Further ones must not cut that short."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter requests")
    parser.add_argument(
        "--json", default="demo-report.json", metavar="PATH", help="result file (%(default)s)"
    )
    parser.add_argument(
        "--plot", default="demo-report.png", metavar="PATH", help="picture (%(default)s)"
    )
    arguments = parser.parse_args()
    for path in (arguments.json, arguments.plot):
        if not Path(path).absolute().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    return arguments


def main() -> int:
    arguments = _arguments()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _interrupt)
    began = time.monotonic()
    demo = Demo(quick=arguments.quick)
    console, keep_logs = demo.steps.console, True
    try:
        figures = demo.run()
        keep_logs = False
    except KeyboardInterrupt as interrupt:
        keep_logs = False
        console.print("\nInterrupted: nothing was shown. Ending the servers ...")
        return 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)
    except FAILURES as error:
        said = "SGLang's server did not answer: " if isinstance(error, httpx.HTTPError) else ""
        console.print(f"\nThe demo failed: {said}{type(error).__name__}: {error}", markup=False)
        console.print(f"Logs: {demo.folder}")
        return 1
    finally:
        demo.clean_up()
        if not keep_logs:
            shutil.rmtree(demo.folder, ignore_errors=True)
    rows = result_rows(figures)
    write(arguments.json, "demo", " ".join(["python bench/demo.py", *sys.argv[1:]]), rows)
    r3_plot.draw(arguments.plot, [figures.replay], f"Replay of {figures.model}")
    console.print()
    console.print(table(figures))
    console.print(r3_report.layer_table([figures.replay]))
    console.print(r3_report.table([figures.replay]))
    console.print(closing(figures, exit_code(rows) == 0))
    seconds = time.monotonic() - began
    console.print(f"{seconds:.0f} s in all; figures in {arguments.json}, {arguments.plot}.")
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
