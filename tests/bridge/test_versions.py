"""What the bridge reads where SGLang's versions differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_bridge import versions


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let another SGLang version be installed: ``installed("0.5.17")``."""

    def install(number: str) -> None:
        monkeypatch.setattr(versions, "version", lambda: number)

    return install


@pytest.mark.parametrize(
    ("number", "older"),
    [
        ("0.5.9", True),  # by number, not by text
        ("0.5.17", True),
        ("0.5.17.post1", True),
        ("0.5.23", False),
        ("0.5.23.post1", False),
        ("0.6.0", False),
        ("1.0", False),
    ],
)
def test_the_form_changes_with_0_5_23(installed: Any, number: str, older: bool) -> None:
    installed(number)
    assert versions.is_older() == older


@pytest.mark.parametrize(("number", "slot"), [("0.5.17", 3), ("0.5.23", 7)])
def test_a_request_s_slot_is_read_where_its_version_has_it(
    installed: Any, number: str, slot: int
) -> None:
    installed(number)
    req = SimpleNamespace(req_pool_idx=3, kv=SimpleNamespace(req_pool_idx=7))
    assert versions.request_slot_reader()(req) == slot


def test_kv_locations_are_the_virtual_ones_where_there_are_any(installed: Any) -> None:
    """``req_to_token`` has those; attention may have rebound the others to physical ones."""
    batch = SimpleNamespace(out_cache_loc="physical", out_cache_loc_virtual="virtual")
    installed("0.5.23")
    locations = versions.kv_locations_reader()
    assert locations(batch) == "virtual"
    batch.out_cache_loc_virtual = None
    assert locations(batch) == "physical"
    del batch.out_cache_loc_virtual
    installed("0.5.17")
    assert versions.kv_locations_reader()(batch) == "physical"


def test_what_an_older_sglang_does_not_have_is_off(installed: Any, sglang: Any) -> None:
    installed("0.5.17")
    resolved = versions.resolved_arguments(SimpleNamespace(device="cpu"))
    assert resolved.device == "cpu"
    assert resolved.attn_dp_size == 1
    assert not resolved.enable_decoder_swa_bounded_replay


def test_an_argument_that_no_version_has_is_not_made_up(installed: Any, sglang: Any) -> None:
    installed("0.5.17")
    with pytest.raises(AttributeError):
        _ = versions.resolved_arguments(SimpleNamespace(device="cpu")).enable_something_new


@pytest.mark.parametrize(
    ("number", "given", "backend", "inside"),
    [
        ("0.5.17", None, "triton", False),
        ("0.5.17", None, "auto", False),
        ("0.5.17", None, "triton_kernel", True),
        ("0.5.17", None, "flashinfer_trtllm", True),
        ("0.5.17", "standard", "triton_kernel", False),
        ("0.5.23", None, "triton_kernel", False),
    ],
)
def test_an_older_router_without_a_format_goes_by_its_backend(
    installed: Any,
    sglang: Any,
    monkeypatch: pytest.MonkeyPatch,
    number: str,
    given: str | None,
    backend: str,
    inside: bool,
) -> None:
    """SGLang 0.5.17 decides at each forward; where the kernel routes inside, nothing captures."""
    import sglang.srt.layers.moe as moe
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    installed(number)
    monkeypatch.setattr(moe, "get_moe_runner_backend", lambda: MoeRunnerBackend(backend))
    assert versions.routes_inside_kernel(SimpleNamespace(output_format=given)) is inside


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_decode_graph_is_captured_where_sglang_s_mode_and_the_stream_say_so(
    sglang: Any, monkeypatch: pytest.MonkeyPatch, mode: bool, stream: bool
) -> None:
    from sglang.srt.model_executor.runner_utils import capture_mode

    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: stream)
    captures = versions.decode_graph_capture_reader()
    assert not captures()
    monkeypatch.setattr(capture_mode, "is_capture_mode", mode)  # changes while an engine starts
    assert captures() == (mode and stream)


def resolved(**changed: Any) -> SimpleNamespace:
    """Arguments with which routes are read off the routers' tensors, in graphs and outside."""
    graphs = {"decode": "full", "prefill": "breakable"}
    graphs |= {phase: changed.pop(phase) for phase in set(graphs) & set(changed)}
    config = {phase: SimpleNamespace(backend=backend) for phase, backend in graphs.items()}
    usual = {
        "enable_torch_compile": False,
        "kt_weight_path": None,
        "ep_size": 1,
        "enable_unified_memory": False,
    }
    return SimpleNamespace(cuda_graph_config=SimpleNamespace(**config), **usual | changed)


@pytest.mark.parametrize(
    ("changed", "stay", "in_graphs"),
    [
        ({}, True, True),
        ({"enable_torch_compile": True}, False, False),
        ({"kt_weight_path": "/weights"}, False, False),
        ({"ep_size": 2}, False, False),
        ({"decode": "breakable"}, True, False),
        ({"decode": "disabled"}, True, False),
        ({"prefill": "full"}, True, False),
        ({"enable_unified_memory": True}, True, False),
    ],
)
def test_routes_are_read_off_the_routers_tensors_where_these_still_hold_them(
    changed: dict[str, Any], stay: bool, in_graphs: bool
) -> None:
    arguments = resolved(**changed)
    assert versions.routes_stay(arguments) is stay
    assert versions.decode_graphs_store_routes(arguments) is in_graphs
