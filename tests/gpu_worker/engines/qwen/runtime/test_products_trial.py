"""The choice of kernels: by a trial, whose outcome a file keeps, and by TTS_QUANTIZATION."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from structlog.testing import capture_logs

from gpu_worker.engines.qwen.runtime import products, products_trial
from gpu_worker.engines.qwen.runtime.products_trial import MAX_KEPT, PLAIN, Clocks, Outcome, Products, choose, trial

LARGE = [(1024, 512), (512, 1024)]
NAMES = ["plain", "packed", "fp16", "fp16_threaded"]


class Trials:
    """Stands in for `trial`: counts the calls, and finds `fastest`."""

    def __init__(self, *fastest: str) -> None:
        self.calls = 0
        self.fastest = list(fastest or ("fp16", "packed", "plain"))
        self.quiet = True
        self.before: object = None

    def __call__(self, *arguments: object) -> Outcome:
        """The outcome of a trial that was not made."""
        self.calls += 1
        self.before = arguments[-1]
        return Outcome(self.fastest, dict.fromkeys(NAMES, 1), self.quiet)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    """No trial is made, and every kernel is available."""
    fake = Trials()
    monkeypatch.setattr(products_trial, "trial", fake)
    monkeypatch.setattr(products, "available", lambda _: True)
    return fake


def kernels(quantization: str, dtype: torch.dtype = torch.float32, file: Path | None = None) -> Products:
    """The choice for large matrices on a CPU."""
    return choose(quantization, LARGE, dtype, file)  # type: ignore[arg-type]


def test_auto_takes_the_fastest_and_none_the_fastest_that_is_not_quantised(trials: Trials) -> None:
    """int8 has errors, so only its name chooses it. Its heads and `down` have wide activations."""
    assert kernels("auto") == kernels("fp16") == Products("fp16", "fp16", 1)
    assert kernels("none") == Products("packed", "packed", 1)
    assert kernels("int8") == Products("int8", "int8_wide", 1)
    trials.fastest = ["plain", "packed", "fp16_threaded"]
    assert kernels("auto").quantization == "none"
    assert kernels("fp16").weights == "fp16_threaded"


def test_only_exact_kernels_fold_norms(trials: Trials) -> None:
    """float16 would round a weight that was multiplied."""
    del trials
    assert [kernels(name).folds for name in ("none", "fp16", "int8")] == [True, False, True]


def test_an_outcome_is_kept(tmp_path: Path, trials: Trials) -> None:
    """For each dtype and for each set of shapes one trial is made. The next process reads the file."""
    file = tmp_path / "below" / "products.json"
    for _ in range(2):
        kernels("auto", file=file)
    assert trials.calls == 1
    kernels("auto", torch.bfloat16, file)
    choose("none", LARGE[:1], torch.float32, file)
    assert trials.calls == 3
    assert [path.name for path in file.parent.iterdir()] == ["products.json"]


def test_the_outcome_of_a_busy_moment_stays_until_a_quiet_one(tmp_path: Path, trials: Trials) -> None:
    """Each load times the kernels again until then. It does not try their bits again, which takes most of the time."""
    file = tmp_path / "products.json"
    trials.quiet = False
    assert kernels("auto", file=file).weights == "fp16"
    assert trials.before is None
    trials.fastest = ["packed", "plain"]
    assert kernels("auto", file=file).weights == "fp16"
    trials.quiet = True
    for _ in range(2):
        assert kernels("auto", file=file).weights == "packed"
    assert trials.calls == 3
    assert trials.before == Outcome(["fp16", "packed", "plain"], dict.fromkeys(NAMES, 1), quiet=False)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}', b"\xff", b'{"a": {"fastest": 1, "row_multiples": {}}}'])
def test_a_damaged_file_is_replaced(tmp_path: Path, trials: Trials, content: bytes) -> None:
    """It costs a trial."""
    file = tmp_path / "products.json"
    file.write_bytes(content)
    kernels("auto", file=file)
    kernels("auto", file=file)
    assert trials.calls == 1


def test_the_file_is_bounded(tmp_path: Path, trials: Trials) -> None:
    """The oldest outcomes go."""
    file = tmp_path / "products.json"
    for number in range(MAX_KEPT + 3):
        choose("auto", [(1 << 10, (1 << 10) + number)], torch.float32, file)
    kept = msgspec.json.decode(file.read_bytes(), type=dict[str, Outcome])
    assert len(kept) == MAX_KEPT
    assert file.stat().st_size < 1 << 16
    assert trials.calls == MAX_KEPT + 3


def test_a_folder_that_cannot_be_written_costs_a_trial_at_each_load(tmp_path: Path, trials: Trials) -> None:
    """A container may have no home folder."""
    (tmp_path / "file").write_text("")
    for _ in range(2):
        with capture_logs() as events:
            kernels("auto", file=tmp_path / "file" / "products.json")
        assert "products_trial_not_kept" in [event["event"] for event in events]
    assert trials.calls == 2


def test_small_matrices_stay_as_they_are(trials: Trials) -> None:
    """The log says so if something else was asked for."""
    with capture_logs() as events:
        assert choose("int8", [(64, 64), *LARGE], torch.float32) == PLAIN
    assert [event["event"] for event in events] == ["quantization_left_out"]
    assert trials.calls == 0


def test_int8_without_fbgemm_takes_the_product_of_integers(monkeypatch: pytest.MonkeyPatch, trials: Trials) -> None:
    """For the torch that has removed the deprecated operators. No trial is needed: there is no other."""
    monkeypatch.setattr(products, "available", lambda name: name == "int8_portable")
    assert kernels("int8") == Products("int8_portable", "int8_portable_wide", 1)
    assert trials.calls == 0


def test_a_trial_finds_the_fastest_by_the_clock() -> None:
    """Each kernel is timed alike, so the order follows the clock; plain products need groups of rows."""
    ticks = itertools.chain.from_iterable((n, n + cost) for cost in (3, 1) for n in range(0, 50, 10))
    clocks = Clocks(ticks.__next__, itertools.count(0, 3).__next__)
    found = trial([(512, 512)], torch.float32, ["plain", "packed"], clocks)
    assert found.fastest == ["packed", "plain"]
    assert found.quiet
    assert found.row_multiples["plain"] == products.BATCH_MULTIPLE


@pytest.mark.parametrize(("rounds", "quiet"), [([3, 3, 3, 3, 3, 3, 2], True), ([3] * 15, False)])
def test_a_trial_that_others_disturb_goes_on(rounds: Sequence[int], *, quiet: bool) -> None:
    """Until the fastest round has the processor to itself, up to a bound. Here each round computes for 2 s."""
    ticks = itertools.chain.from_iterable((n * 10, n * 10 + took) for n, took in enumerate(rounds))
    found = trial([(64, 64)], torch.float32, ["plain"], Clocks(ticks.__next__, itertools.count(0, 2).__next__))
    assert found.quiet is quiet
    assert trial([(64, 64)], torch.float32, ["plain"], Clocks(), found).row_multiples is found.row_multiples
    assert next(ticks, None) is None


def test_rows_are_padded_where_their_bits_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that adds its rows' number needs groups of rows."""

    class Dependent(products.Plain):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) + len(x) % products.BATCH_MULTIPLE

    def multiples(names: Sequence[str]) -> dict[str, int]:
        return trial([(64, 64)], torch.float32, names, Clocks()).row_multiples

    class OfPrompts(products.Int8Portable):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) + (len(x) > 32)

    monkeypatch.setitem(products.KERNELS, "packed", Dependent)
    monkeypatch.setitem(products.KERNELS, "fp16", products.Int8Portable)
    assert multiples(["packed", "fp16"]) == {"packed": products.BATCH_MULTIPLE, "fp16": 1}
    monkeypatch.setitem(products.KERNELS, "fp16", OfPrompts)
    assert multiples(["fp16"]) == {"fp16": products.BATCH_MULTIPLE}


@pytest.mark.skipif(not products.packs(torch.bfloat16), reason="oneDNN packs no bfloat16 here")
@pytest.mark.parametrize("shape", [(1024, 2048), (2048, 6144)])
def test_rounding_to_bfloat16_hides_no_other_order_of_a_sum(shape: tuple[int, int]) -> None:
    """Of a few rows, those that need no padding have the same bits alone and in company, whatever their values."""
    multiples = products_trial._row_multiples(["packed"], [shape], torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    kernel = products.Packed(torch.randn(shape, generator=generator).bfloat16())
    x = torch.randn(32, shape[1], generator=generator).bfloat16()

    groups = torch.cat([kernel(rows) for rows in x.split(multiples["packed"])])

    assert torch.equal(kernel(x), groups)
