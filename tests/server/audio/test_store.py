"""Audio on disk: its bounds in size and time, several processes on one folder, left-overs, hostile ids."""

import fcntl
import os
from pathlib import Path

import pytest

from server.audio import AudioFacts, AudioStore
from server.audio.store import BLOCK_BYTES
from tests.server.running import becomes

FACTS = AudioFacts(media_type="audio/mpeg", sample_rate=24_000)
KEPT_S = 100.0


class Clock:
    """Unix seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def an_id(number: int) -> str:
    """An id of stored audio."""
    return f"{number:032x}"


def a_store(folder: Path, clock: Clock, blocks: int = 10) -> AudioStore:
    """A store of so many blocks."""
    return AudioStore(folder, max_bytes=blocks * BLOCK_BYTES, ttl_s=KEPT_S, wall=clock)


def names(folder: Path) -> set[str]:
    """The files in `folder` but the lock."""
    return {path.name for path in folder.iterdir()} - {".lock"}


async def content(store: AudioStore, number: int) -> bytes | None:
    """The whole stored audio, or None."""
    audio = await store.open(an_id(number))
    if audio is None:
        return None
    try:
        return await audio.read(0, audio.size + 100)
    finally:
        audio.close()


async def test_what_is_stored_can_be_read(tmp_path: Path) -> None:
    """The audio, its facts and its size; a part of it; and by another process of the same folder."""
    clock = Clock()
    store = a_store(tmp_path / "new" / "folder", clock)
    assert await store.put(an_id(1), b"0123456789", FACTS)
    clock.now += 30
    audio = await a_store(tmp_path / "new" / "folder", clock).open(an_id(1))
    assert audio is not None
    assert (audio.facts, audio.size, audio.expires_in_s) == (FACTS, 10, 70)
    assert await audio.read(3, 4) == b"3456"
    assert await audio.read(8, 99) == b"89"
    audio.close()


async def test_nobody_else_can_read_the_files(tmp_path: Path) -> None:
    """Folder and files are the user's alone."""
    await a_store(tmp_path / "audio", Clock()).put(an_id(1), b"x", FACTS)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "audio", *(tmp_path / "audio").iterdir()]}
    assert modes == {"audio": 0o700, an_id(1): 0o600, ".lock": 0o600}


async def test_the_least_recent_goes_first(tmp_path: Path) -> None:
    """Without room the audio that was not asked for the longest is dropped; one that is open stays readable."""
    clock = Clock()
    store = a_store(tmp_path, clock, blocks=3)
    for number in (1, 2, 3):
        await store.put(an_id(number), bytes([number]), FACTS)
        clock.now += 1
    two = await store.open(an_id(2))
    for number in (1, 3):
        clock.now += 1
        assert await content(store, number) == bytes([number])
    assert await store.put(an_id(4), b"\4", FACTS)
    assert [await content(store, number) for number in (1, 2, 3, 4)] == [b"\1", None, b"\3", b"\4"]
    assert two is not None
    assert await two.read(0, 1) == b"\2"
    two.close()


async def test_audio_larger_than_the_store(tmp_path: Path) -> None:
    """It is not stored, and nothing makes room for it in vain."""
    store = a_store(tmp_path, Clock(), blocks=2)
    assert await store.put(an_id(1), b"x", FACTS)
    assert not await store.put(an_id(2), bytes(2 * BLOCK_BYTES), FACTS)
    assert await content(store, 1) == b"x"
    assert not await a_store(tmp_path, Clock(), blocks=0).put(an_id(3), b"x", FACTS)


async def test_small_files_count_as_blocks(tmp_path: Path) -> None:
    """The number of files is bounded too."""
    clock = Clock()
    store = a_store(tmp_path, clock, blocks=5)
    for number in range(20):
        clock.now += 1
        assert await store.put(an_id(number), b"x", FACTS)
    assert len(names(tmp_path)) == 5


async def test_audio_expires(tmp_path: Path) -> None:
    """However often it is asked for, it is gone after its time, and from the disk as well."""
    clock = Clock()
    store = a_store(tmp_path, clock)  # not entered, so nothing sweeps the folder yet
    await store.put(an_id(1), b"x", FACTS)
    clock.now += KEPT_S - 1
    assert await content(store, 1) == b"x"
    clock.now += 1
    assert await content(store, 1) is None
    assert (tmp_path / an_id(1)).exists()
    async with a_store(tmp_path, clock):
        await becomes(lambda: not (tmp_path / an_id(1)).exists())


async def test_a_clock_that_was_set_back(tmp_path: Path) -> None:
    """Audio of the future does not stay for ever."""
    clock = Clock()
    store = a_store(tmp_path, clock)
    await store.put(an_id(1), b"x", FACTS)
    clock.now -= 10 * KEPT_S
    await store.put(an_id(2), b"y", FACTS)
    assert [await content(store, number) for number in (1, 2)] == [None, b"y"]


async def test_left_overs_of_a_killed_process(tmp_path: Path) -> None:
    """Half-written files go at the start; files that are not the store's stay."""
    left_over = tmp_path / f"{an_id(1)}.part"
    left_over.write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"somebody's")
    (tmp_path / "notes.part").write_bytes(b"somebody's")
    async with a_store(tmp_path, Clock()):
        await becomes(lambda: not left_over.exists())
    assert {"notes.txt", "notes.part"} <= names(tmp_path)


@pytest.mark.parametrize("left", [b"", b"\0" * 4096, b'{"media_type":'])
async def test_a_file_that_a_power_cut_has_damaged(tmp_path: Path, left: bytes) -> None:
    """It is not there any more, and takes no room."""
    store = a_store(tmp_path, Clock())
    assert await store.put(an_id(1), b"abc", FACTS)
    (tmp_path / an_id(1)).write_bytes(left)
    os.utime(tmp_path / an_id(1), (Clock().now, Clock().now))
    assert await content(store, 1) is None
    assert names(tmp_path) == set()


async def test_nothing_is_removed_that_another_process_is_writing(tmp_path: Path) -> None:
    """While another process holds the lock, its half-written file stays."""
    store = a_store(tmp_path, Clock())
    await store.put(an_id(1), b"x", FACTS)
    writing = tmp_path / f"{an_id(2)}.part"
    with (tmp_path / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writing.write_bytes(b"half")
        async with a_store(tmp_path, Clock()) as other:
            assert await content(other, 1) == b"x"
            assert writing.exists()
            fcntl.flock(lock, fcntl.LOCK_UN)
            await becomes(lambda: not writing.exists())


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Nothing is stored, and nothing breaks."""
    (tmp_path / "file").write_bytes(b"")
    store = a_store(tmp_path / "file" / "audio", Clock())
    async with store:
        assert not await store.put(an_id(1), b"x", FACTS)


@pytest.mark.parametrize(
    "hostile",
    ["", ".", "..", ".lock", "../" + "a" * 29, "a" * 31, "a" * 33, "A" * 32, "a" * 31 + "/", "a" * 31 + "\0", "é" * 32],
)
async def test_hostile_ids(tmp_path: Path, hostile: str) -> None:
    """Only 32 hexadecimal digits reach the disk."""
    store = a_store(tmp_path, Clock())
    await store.put(an_id(1), b"x", FACTS)
    assert await store.open(hostile) is None
    with pytest.raises(ValueError, match="hexadecimal"):
        await store.put(hostile, b"x", FACTS)


async def test_usage_and_clearing(tmp_path: Path) -> None:
    """Whole files count, in blocks of the disk; look-ups are hits or misses; then all of it is gone."""
    store = a_store(tmp_path, Clock())
    assert await store.usage() == (0, 0)
    for number in (1, 2):
        assert await store.put(an_id(number), bytes(5_000), FACTS)
    (tmp_path / "somebody's.txt").write_text("x")
    assert await store.usage() == (2, 4 * BLOCK_BYTES)
    assert await content(store, 1) == bytes(5_000)
    assert await content(store, 3) is None
    assert await store.open("../1") is None
    assert (store.hits, store.misses) == (1, 1)
    await store.clear()
    assert (await content(store, 1), await store.usage()) == (None, (0, 0))
    assert names(tmp_path) == {"somebody's.txt"}
    await a_store(tmp_path / "none", Clock()).clear()
