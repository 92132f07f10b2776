"""The platform class and its host allocator; imported only once the platform is selected."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU of which SGLang is told nothing but that it can run torch."""

    # Declared CPU, SGLang would look for its compiled CPU kernels; an out-of-tree
    # platform gets the native form of every operator.
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_device(self, device_id: int = 0) -> str:
        # A text, which SGLang splits: its CPU's own answer is a torch.device, and ends the start of
        # an engine that was given no device.
        return "cpu"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def post_load_model(self, model: torch.nn.Module) -> None:
        # Imports are inside: the modules need the model runner, which makes this platform.
        _let_deepseek_prefill()
        _let_dp_attention_run()


def _let_deepseek_prefill() -> None:
    """Let DeepSeek models prefill.

    For a backend without an entry SGLang expands the latent keys when no prefix is
    cached, but the torch-native backend attends to what the cache holds, which is
    latent keys: only the absorbed form fits them.
    """
    from sglang.srt.models.deepseek_common import attention_backend_handler as handler

    def absorbed(*_: Any) -> Any:
        return handler.AttnForwardMethod.MLA

    handler.AttentionBackendRegistry.register("torch_native", absorbed)


def _let_dp_attention_run() -> None:
    """Let data-parallel ranks pass their tokens to one another on a CPU.

    SGLang has forms for a CPU and takes them where it finds its compiled CPU kernels. Without
    them it copies with Triton, page-locks through CUDA, and gathers with operators that are
    registered for another device. An older one (0.5.17) has no such forms, and its DP attention
    does not run on a CPU.
    """
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.model_executor import forward_batch_info

    if not hasattr(dp_attention, "memcpy_cpu"):
        return
    dp_attention.memcpy_func = dp_attention.memcpy_cpu
    forward_batch_info._is_cpu = parallel_state._is_cpu = True
    # Length of a request that only pads a rank's batch to the length of another's.
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda _: 1


def pageable_memory(dims: tuple[int, ...], dtype: torch.dtype, *_: Any, **__: Any) -> torch.Tensor:
    """Take the arguments of SGLang's page-locking allocators and do not page-lock."""
    return torch.empty(dims, dtype=dtype)
