"""What the bridge's tests share: an arena with a name of its own, and SGLang imported once."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

import shmroute
from shmroute.segments import SHM_DIR


@pytest.fixture
def arena_name() -> Iterator[str]:
    """A name nobody else uses; the test must leave none of its files behind."""
    name = f"bridge-{os.getpid()}-{secrets.token_hex(4)}"
    yield name
    shmroute.reap(name, force=True)
    left = [entry for entry in os.listdir(SHM_DIR) if f"-{name}-" in entry]
    assert not left, f"left in {SHM_DIR}: {left}"


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """SGLang writes what it resolves into the environment, and engines of later tests inherit it.

    Of DWDP, for one, that data-parallel ranks need not tell each other their batches.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def sglang() -> Iterator[SimpleNamespace]:
    """SGLang on the plain-CPU platform: what the tests use of it, by name.

    The platform is chosen at the first look, so the variable is set only around it. SGLang
    warns about kernels that a CPU lacks while it is imported.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("SGLANG_PLATFORM", "shmroute_cpu")
        from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
        from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.platforms import current_platform
        from sglang.srt.sampling.sampling_params import SamplingParams
        from sglang.srt.server_args import ServerArgs
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
        from sglang.srt.state_capturer.routed_experts import set_global_experts_capturer

        # Whoever imports it first must be inside this block.
        import sglang_bridge.engine

        assert sglang_bridge.Engine is sglang_bridge.engine.Engine
        assert type(current_platform).__name__ == "PlainCpuPlatform"
        yield SimpleNamespace(
            ChatCompletionRequest=ChatCompletionRequest,
            CompletionRequest=CompletionRequest,
            FINISH_ABORT=FINISH_ABORT,
            FINISH_LENGTH=FINISH_LENGTH,
            Req=Req,
            ReqToTokenPool=ReqToTokenPool,
            SamplingParams=SamplingParams,
            ServerArgs=ServerArgs,
            SpeculativeAlgorithm=SpeculativeAlgorithm,
            declare_resolution=declare_resolution,
            resolving_view=resolving_view,
            set_global_experts_capturer=set_global_experts_capturer,
        )
