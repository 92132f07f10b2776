"""Lets trainers be imported where no CUDA and no RDMA driver is; import it before them.

The libraries that are left out have nothing to do with routes: FlashMLA's kernels, which verl,
miles and SGLang can do without, and Mooncake, with which miles can send weights.
"""

from __future__ import annotations

import sys
import types

sys.modules["flash_mla"] = None  # type: ignore[assignment]
for name in ("mooncake", "mooncake.engine"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["mooncake.engine"].TransferEngine = None  # type: ignore[attr-defined]
