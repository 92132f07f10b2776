"""Run the real SGLang engine without a GPU and without compiled kernels.

Problem: the bridge must be tested against the engine itself, on machines that
have only a CPU. SGLang's own CPU mode wants kernels that its wheel lacks.

Approach: an out-of-tree platform, which makes SGLang take the torch-native form
of every operator. It is a distribution of its own, because SGLang skips the
general plugins of any distribution that offers a platform other than the
selected one: inside shmroute it would switch the bridge off for users of other
platforms.

Promise: installed, it changes nothing. Both entry points act only under
``SGLANG_PLATFORM=shmroute_cpu``. SGLang's discovery, which asks every installed
platform when the variable is unset, gets None ("not this hardware"), and this
module imports neither torch nor SGLang before the platform was asked for.
"""

from __future__ import annotations

import os

PLATFORM = "shmroute_cpu"

__all__ = ["PLATFORM", "activate", "selected", "use_plain_host_memory"]


def selected() -> bool:
    """Whether the user asked for this platform by name."""
    return os.environ.get("SGLANG_PLATFORM") == PLATFORM


def activate() -> str | None:
    """Platform entry point: the class to use, or None to leave SGLang's choice alone."""
    return f"{__name__}.platform:PlainCpuPlatform" if selected() else None


def use_plain_host_memory() -> None:
    """General plugin: let the native route capturer allocate its host table.

    It page-locks through the CUDA runtime, even on a CPU device.
    """
    if not selected():
        return
    from sglang.srt.mem_cache.pool_host import common

    from .platform import pageable_memory

    common.ALLOC_MEMORY_FUNCS["cpu"] = pageable_memory
