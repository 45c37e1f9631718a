"""Budgets for the launches of a published 1.7B model in bfloat16 on a GPU, counted without one: see fake_cuda.py.

A change may only lower a budget. A CUDA kernel in a graph takes about 2 µs, however little it computes.
"""

from typing import Any

import pytest

from gpu_worker.engines.qwen.kernels.selection import OPERATIONS
from gpu_worker.engines.qwen.runner import GRAPH_NODE_BYTES, graph_bytes
from tests.checkpoints import CACHE
from tests.gpu_worker.engines.qwen.kernels.interpreter import needs_triton

KERNELS = {
    "code_predictor_step/1/0": 627,
    "code_predictor_step/16/0": 629,
    "talker_step/1/2048": 266,
    "talker_step/16/2048": 266,
    "prefill/1/16": 294,
    "prefill/4/32": 296,
    "decode/1/1": 240,
    "decode/16/8": 240,
}
"""Kernels of one replay, at most."""

GRAPHS = 56
"""Graphs of an engine with 64 slots."""

NODES = 17_723
"""Kernels of all those graphs: each takes about 10 KB of the driver's memory, and its share of a restore."""

NODE_MS = 0.008 + 0.003
"""The cost of a kernel in a restore, derived: an operator from Python 5 to 8 µs, an instantiation 2 to 3 a kernel."""

PCIE_BYTES_MS = 25e6
"""Bytes a millisecond from pinned memory: 25 GB/s through PCIe 4, twice that through PCIe 5."""

RESTORE_MS = 360
"""A restore of the model in one step. The aim is 500.

A second step for the 28 graphs of more than 4 rows would bring a model back SECOND_STEP_MS earlier.
But it would capture beside the model's own frames, and no more than 4 jobs could run until its end:
not worth it while the aim is met.
"""

SECOND_STEP_MS = 102

QUANTISED = {"none": (4114, 5136), "int8": (2994, 3192), "fp8": (3379, 3960)}
"""MB at most: of the weights, and of what the products of one frame of one stream read of them."""

TALKER_BYTES = 2_860_308_260
"""Bytes that the operators of a talker step of 16 rows read and write, without keys and values."""

LARGE = {key.split("/")[0]: key for key in KERNELS}
"""Of each name the key with the larger batch."""

pytestmark = needs_triton

ATTENTION_SHAPES = 6
"""Different shapes and strides of attention in the functions of KERNELS: a kernel may be chosen or planned for each."""


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """The counts of fake_cuda.py."""
    from tests.gpu_worker.engines.qwen import fake_cuda  # noqa: PLC0415 -- it needs triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(CACHE.parent / "triton"))  # what was compiled is kept between runs
        return fake_cuda.counts()


def test_captured_functions_stay_on_the_device(counted: dict[str, Any]) -> None:
    """No operator reads or writes a tensor of the host. Where a value decides what is launched, torch itself raises."""
    assert counted["launched"].keys() == KERNELS.keys()
    assert [one["crossings"] for one in counted["launched"].values() if one["crossings"]] == []


@pytest.mark.parametrize("key", KERNELS)
def test_kernels_of_a_function(counted: dict[str, Any], key: str) -> None:
    """If they are fewer than the budget, lower it."""
    assert counted["launched"][key]["kernels"] == KERNELS[key], counted["launched"][key]["by_name"]


def test_every_triton_kernel_compiles(counted: dict[str, Any]) -> None:
    """As it is launched, for an H100: the interpreter accepts more than the compiler does."""
    assert counted["compiled"].keys() == set(OPERATIONS)
    assert all(counted["compiled"].values())


def test_graphs_and_nodes_of_an_engine(counted: dict[str, Any]) -> None:
    """Every batch size from 2 on launches the same kernels."""
    assert len(counted["functions"]) == GRAPHS
    by_kind = {(key.split("/")[0], key.split("/")[1] == "1"): one for key, one in KERNELS.items()}
    keys = [key.split("/") for key in counted["functions"]]
    nodes = sum(by_kind[name, batch == "1"] for name, batch, _ in keys)
    assert nodes == NODES
    # What is reserved of the device's memory.
    assert nodes * GRAPH_NODE_BYTES <= graph_bytes(64) <= 1.05 * nodes * GRAPH_NODE_BYTES


def test_a_frame_has_one_graph_for_all_lengths(counted: dict[str, Any]) -> None:
    """Attention reads each row's own length, so one long stream costs the others nothing."""
    lengths = {key.rpartition("/")[2] for key in counted["functions"] if key.startswith("talker_step")}
    assert lengths == {"2048"}
    assert "_flash_attention_forward" in counted["launched"]["talker_step/1/2048"]["by_name"]


def test_bytes_do_not_depend_on_the_longest_row(counted: dict[str, Any]) -> None:
    """However long a row may become, an operator reads no more for it; attention reads each row's own keys alone."""
    step, longer = counted["launched"]["talker_step/16/2048"], counted["twice_as_long"]
    assert step["bytes"] == longer["bytes"] <= TALKER_BYTES
    assert step["kernels"] == longer["kernels"]
    assert step["attention_reads_all"] == longer["attention_reads_all"] == 0


def test_a_restore_on_paper(counted: dict[str, Any]) -> None:
    """It captures every function once (see test_cuda_engine.py) and copies the weights: derived, not measured."""
    copy_ms = counted["weight_bytes"] / PCIE_BYTES_MS
    assert NODES * NODE_MS + copy_ms <= RESTORE_MS
    later = [key.split("/") for key in counted["functions"] if int(key.split("/")[1]) > 4]
    nodes = sum(KERNELS[LARGE[name]] for name, _, _ in later)
    assert nodes * NODE_MS <= SECOND_STEP_MS


def test_quantised_weights_cost_no_kernel(counted: dict[str, Any]) -> None:
    """A product with them is one kernel, as a plain one is, and reads half the bytes. Estimates know that."""
    everything = {**counted["quantised"], "none": counted}
    frame = [key for key in KERNELS if key.startswith(("code_predictor_step/1/", "talker_step/1/"))]
    for quantization, (weights, read) in QUANTISED.items():
        launched = [everything[quantization]["launched"][key] for key in frame]
        assert [one["kernels"] for one in launched] == [KERNELS[key] for key in frame]
        assert not any(one["crossings"] for one in launched)
        assert everything[quantization]["weight_bytes"] <= weights * 1e6
        assert everything[quantization]["estimated"] == pytest.approx(
            everything[quantization]["weight_bytes"], rel=0.01
        )
        assert sum(one["product_bytes"] for one in launched) <= read * 1e6
    int8 = [counted["quantised"]["int8"]["launched"][key]["by_name"] for key in frame]
    assert [one["quantized_linear"] for one in int8] == [14 * 3 * 5 + 2, 3 * 28]


def test_attention_has_few_shapes(counted: dict[str, Any]) -> None:
    """Of those in all functions that were called."""
    shapes = {shape for one in counted["launched"].values() for shape in one["attention"]}
    assert len(shapes) == ATTENTION_SHAPES
