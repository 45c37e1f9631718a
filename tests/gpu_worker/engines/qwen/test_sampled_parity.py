"""Sampled codes: the official package, sampling at our uniforms, must give our codes.

Only whole sampled runs test the order of the logits processors, the way of the parameters from checkpoint and request
into a slot, and which uniform belongs to which code. Greedy runs test none of these.
"""

import contextlib
import functools
from collections.abc import Iterator

import msgspec
import pytest
import torch
from torch import Tensor

from gpu_worker.engines.qwen.model import qwen3_tts
from gpu_worker.engines.qwen.model.sampling import SamplingParams
from gpu_worker.engines.qwen.planner import sampling_params
from shared.protocol import Sampling
from tests.checkpoints import Generation, Kind, Size
from tests.gpu_worker.engines.qwen import parity
from tests.gpu_worker.engines.qwen.parity import CASES, Ours, Request, generate, official_run, our_model

FRAMES = 8
"""Two of the runs end before."""

PUBLISHED = {"temperature": 0.9, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.05}
NARROW = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.5}
FEW = {"temperature": 1.6, "top_k": 3, "top_p": 1.0, "repetition_penalty": 1.05}
"""Hot enough for the end of speech to be sampled, if top_k did not exclude it."""
UNLIMITED = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "repetition_penalty": 0.8}
WIDE = {"temperature": 1.0, "top_k": 200, "top_p": 0.9, "repetition_penalty": 2.0}

RUNS = [
    (0, PUBLISHED),
    (1, UNLIMITED),
    (3, FEW),
    (4, WIDE),
    (5, PUBLISHED),
    (6, NARROW),
    (7, UNLIMITED),
    (8, PUBLISHED),
    (9, WIDE),
    (10, NARROW),
    (12, PUBLISHED),
    (13, UNLIMITED),
    (15, WIDE),
]
"""The case and the parameters of each run. The index of a run is its seed."""

SOAK = pytest.mark.soak

QUICK = (0, 1, 2, 4, 6, 9, 11, 12)
"""The runs of `make test`: each kind of checkpoint, and each set of parameters. The others are left to the soak."""

LAYOUT = CASES[1]
"""The case of the tests of parameters. Its speech is longer than the tests read."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.cache
def wanted(run: int) -> Tensor:
    """The official codes of RUNS[run]."""
    index, parameters = RUNS[run]
    return official_run(
        CASES[index], seed=run, frames=FRAMES, do_sample=True, subtalker_dosample=True, **parameters
    ).codes


def request(ours: Ours, run: int, join: int = 0) -> Request:
    """RUNS[run] as a request to our model."""
    index, parameters = RUNS[run]
    params = SamplingParams(greedy=False, **parameters)
    return Request(prompt=ours.prompt(CASES[index]), join=join, frames=FRAMES, params=params, seed=run)


@pytest.mark.parametrize("run", [run if run in QUICK else pytest.param(run, marks=SOAK) for run in range(len(RUNS))])
def test_sampled_codes_equal_the_official_ones(run: int) -> None:
    """For every layout, with and without a projection, the codes are the same and end at the same frame."""
    case = CASES[RUNS[run][0]]
    ours = our_model(case.kind, case.size)
    (codes,) = generate(ours, [request(ours, run)])
    assert torch.equal(codes, wanted(run))


@pytest.mark.parametrize("run", [2, pytest.param(11, marks=SOAK)])
def test_quick_masks_change_no_code(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official runs give the same codes with the masks that transformers makes by default."""
    quick = wanted(run)
    monkeypatch.setattr(parity, "quick_masks", contextlib.nullcontext)
    assert torch.equal(wanted.__wrapped__(run), quick)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("custom_voice", None), ("custom_voice", "1b7"), ("voice_design", None), ("base", None), ("base", "1b7")],
)
def test_a_mixed_batch_equals_the_official_runs(kind: Kind, size: Size | None) -> None:
    """Requests with different parameters join, end and reuse slots. The codes of each are the official ones."""
    ours = our_model(kind, size)
    cases = {run: CASES[RUNS[run][0]] for run in QUICK}
    numbers = [run for run, case in cases.items() if (case.kind, case.size) == (kind, size)]
    runs = (numbers * 10)[:6]
    requests = [request(ours, run, join=2 * place) for place, run in enumerate(runs)]
    for codes, run in zip(generate(ours, requests), runs, strict=True):
        assert torch.equal(codes, wanted(run))


@pytest.mark.parametrize("seed", [11, pytest.param(14, marks=SOAK)])
def test_speech_has_at_least_two_frames(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the end of speech is sampled earlier, the model continues as the official one does."""
    ours = our_model(LAYOUT.kind, LAYOUT.size)
    params = SamplingParams(greedy=False, **PUBLISHED)
    request = Request(prompt=ours.prompt(LAYOUT), frames=6, params=params, seed=seed)
    (codes,) = generate(ours, [request])
    monkeypatch.setattr(qwen3_tts, "MIN_FRAMES", 0)
    (short,) = generate(ours, [request])
    assert len(short) < 2
    official = official_run(LAYOUT, seed=seed, frames=6, do_sample=True, subtalker_dosample=True, **PUBLISHED)
    assert torch.equal(codes, official.codes)


@pytest.mark.parametrize(
    "generation",
    [
        "odd",
        "greedy talker",
        "greedy predictor",
        *(pytest.param(generation, marks=SOAK) for generation in ("published", "greedy")),
    ],
)
def test_the_checkpoints_sampling_is_the_default(generation: Generation) -> None:
    """A request without parameters is sampled by generation_config.json, in the talker and the code predictor."""
    assert torch.equal(*spoken(generation, Sampling(seed=5)))


@pytest.mark.parametrize(
    "parameter",
    [
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.3},
        {"repetition_penalty": 2.0},
    ],
    ids=lambda parameter: next(iter(parameter)),
)
def test_a_request_replaces_single_parameters(parameter: dict[str, float]) -> None:
    """One parameter is the request's and the others the checkpoint's. Each parameter changes the codes."""
    ours, official = spoken("odd", Sampling(seed=5, **parameter))
    assert torch.equal(ours, official)
    assert not torch.equal(official, spoken("odd", Sampling(seed=5))[1])


@functools.cache
def spoken(generation: Generation, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Our codes and the official ones of one text, with the parameters of `sampling` alone."""
    case = msgspec.structs.replace(LAYOUT, generation=generation)
    ours = our_model(case.kind, case.size, generation=generation)
    params = sampling_params(sampling, ours.generation)
    (codes,) = generate(
        ours, [Request(prompt=ours.prompt(case), frames=FRAMES, params=params, seed=sampling.seed or 0)]
    )
    named = {name: value for name, value in msgspec.structs.asdict(sampling).items() if value is not None}
    return codes, official_run(case, frames=FRAMES, **named).codes
