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

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Let DeepSeek models prefill.

        For a backend without an entry SGLang expands the latent keys when no prefix is
        cached, but the torch-native backend attends to what the cache holds, which is
        latent keys: only the absorbed form fits them.
        """
        # Imported here: the module needs the model runner, which makes this platform.
        from sglang.srt.models.deepseek_common import attention_backend_handler as handler

        def absorbed(*_: Any) -> Any:
            return handler.AttnForwardMethod.MLA

        handler.AttentionBackendRegistry.register("torch_native", absorbed)


def pageable_memory(dims: tuple[int, ...], dtype: torch.dtype, *_: Any, **__: Any) -> torch.Tensor:
    """Take the arguments of SGLang's page-locking allocators and do not page-lock."""
    return torch.empty(dims, dtype=dtype)
