"""The benchmark of CPUs: what counts as quiet, and the order of its rows."""

import os
import time

import msgspec
import pytest

from tests.benchmarks.cpu import Turn, _busy_s, _listen, _rows, _together

TURN = Turn(
    engine="a",
    threads=2,
    streams=1,
    ms=100,
    cpu_ms=150,
    first_audio_ms=300,
    others=0.1,
    load_cpu_s=7,
    memory_mb=900,
)


def rows(*turns: Turn) -> list[str]:
    """The rows of the table without their order's keys."""
    return [row[-1] for row in sorted(_rows(list(turns)))]


def test_only_quiet_turns_count_if_there_are_any() -> None:
    """The minimum and the median are theirs; the last column says how many there were."""
    change = msgspec.structs.replace
    turns = [TURN, change(TURN, ms=120), change(TURN, ms=50, others=0.5)]
    assert rows(*turns) == ["| 2 | 1 | a | 100 (110) | 0.80 | 150 | 300 | 7.0 | 900 | 2 of 3 |"]
    assert "50 (50)" in rows(turns[2])[0]


def test_the_fastest_engine_stands_first_for_each_setting() -> None:
    """Two threads before one."""
    change = msgspec.structs.replace
    found = rows(TURN, change(TURN, engine="b", ms=90), change(TURN, engine="c", threads=1, ms=10))
    assert [row.split(" | ")[2] for row in found] == ["b", "a", "c"]


def test_busy_time_includes_ours() -> None:
    """The kernel's figure of all cores grows by what this process takes, to its ticks."""
    before, own = _busy_s(), time.process_time()
    while time.process_time() - own < 0.1:
        pass
    assert _busy_s() - before > 0.1 - 4 / os.sysconf("SC_CLK_TCK")


def test_streams_at_once() -> None:
    """The first audio of all counts. A stream that fails fails the turn."""
    assert _together(float, 3, 8) == 8.0
    with pytest.raises(ZeroDivisionError):
        _together(lambda frames: 1 / frames, 2, 0)


def test_a_stream_of_another_length_fails() -> None:
    """Engines are compared by the same frames; one may be missing, as engines cut the end at other places."""
    assert _listen(lambda: [bytes(1920), bytes(1920)], 3) >= 0
    with pytest.raises(RuntimeError, match="instead of 4"):
        _listen(lambda: [bytes(1920), bytes(1920)], 4)
