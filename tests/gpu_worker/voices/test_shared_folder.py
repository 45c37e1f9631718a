"""A folder of voices that several processes read and write."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

import pytest
from structlog.testing import capture_logs

from gpu_worker.engines.base import JobError
from gpu_worker.voices import ConsentStore, ScanFolder, VoiceFiles, VoiceStore, VoiceWrite
from gpu_worker.voices.shared_folder import SETTLED_S, RecordList, folder_lock
from tests.gpu_worker.fakes import FakeClock

RECORDING: Final = bytes(range(240)) * 200
NAMES: Final = [f"name {number}" for number in range(12)]

WRITER: Final = """
import json, sys
from pathlib import Path
from gpu_worker.voices import VoiceFiles, VoiceRecord, VoiceWrite
files = VoiceFiles(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
answers = {}
for name in json.loads(sys.argv[3]):
    record = VoiceRecord(id=f"voice_{sys.argv[2]}{len(answers)}", name=name, kind="clone", created_at=1, samples=24000)
    error = files.write(VoiceWrite(kind="save", record=record, pcm=bytes(range(240)) * 200)).error
    answers[name] = error and error.code
print(json.dumps(answers))
"""


class Store:
    """One GPU worker's list of the voices in a folder. Its writes are carried out at once."""

    def __init__(self, folder: Path) -> None:
        self.files = VoiceFiles(folder)
        self.submitted: list[VoiceWrite] = []
        self.voices = VoiceStore(self.files, self.submitted.append, 100)
        self.consents = ConsentStore(self.files, self.submitted.append, 100)

    def write(self) -> str:
        """Carry out the submitted write; the id of its voice or consent."""
        report = self.files.handle(self.submitted.pop())
        store = self.consents if report.write.record.id.startswith("cons_") else self.voices
        return store.on_written(report).id

    def scan(self) -> None:
        """Look at the folder, as the process does it every half second."""
        seen = self.files.handle(ScanFolder())
        self.voices.on_scanned(seen.voices)
        self.consents.on_scanned(seen.consents)

    def save(self, name: str) -> str:
        """Save a voice; its id."""
        self.voices.create(name, RECORDING, kind="clone")
        return self.write()

    @property
    def names(self) -> list[str]:
        """The names of the voices in the list."""
        return [voice.name for voice in self.voices.list()]


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Store, Store]:
    """Two workers on one folder."""
    return Store(tmp_path / "voices"), Store(tmp_path / "voices")


class TestTwoWorkers:
    """A change of one of them is seen by the other one at its next scan."""

    def test_save_rename_delete(self, stores: tuple[Store, Store]) -> None:
        """A voice is seen, has its new name, and is gone, its recording from memory as well."""
        one, other = stores
        voice = one.save("Ada")
        other.scan()
        assert other.names == ["Ada"]
        assert other.voices.load(voice).pcm == RECORDING
        one.voices.update(voice, name="Eva")
        one.write()
        other.scan()
        assert other.names == ["Eva"]
        one.voices.delete(voice)
        one.write()
        other.scan()
        assert other.names == []
        assert other.voices.cache_stats().entries == 0
        with pytest.raises(JobError) as caught:
            other.voices.load(voice)
        assert caught.value.code == "voice_not_found"

    def test_an_id_is_found_without_a_scan(self, stores: tuple[Store, Store]) -> None:
        """A request with the id of a voice that another worker has just saved is spoken, and can be renamed."""
        one, other = stores
        voice = one.save("Ada")
        assert other.voices.load(voice).pcm == RECORDING
        other.voices.update(voice, name="Eva")
        other.write()
        one.scan()
        assert (one.names, other.names) == (["Eva"], ["Eva"])
        one.voices.delete(voice)
        one.write()
        with pytest.raises(JobError, match="no saved voice"):
            other.voices.load("voice_" + "0" * 24)

    def test_a_name_is_given_once(self, stores: tuple[Store, Store]) -> None:
        """Whatever the lists say, the folder decides whether a name is free: for a new voice, and for a new name."""
        one, other = stores
        one.save("Ada")
        bob = other.save("Bob")
        with pytest.raises(JobError, match="already") as caught:
            other.save("ADA")
        assert (caught.value.code, caught.value.param) == ("invalid_value", "name")
        other.voices.update(bob, name="ada")
        with pytest.raises(JobError, match="already"):
            other.write()
        for store in stores:
            store.scan()
            assert sorted(store.names) == ["Ada", "Bob"]

    def test_changes_of_a_deleted_voice(self, stores: tuple[Store, Store]) -> None:
        """A voice that another worker has deleted is neither renamed nor deleted; nothing of it comes back."""
        one, other = stores
        for change in ("rename", "delete"):
            voice = one.save("Ada")
            other.scan()
            one.voices.delete(voice)
            one.write()
            _ = other.voices.update(voice, name="Eva") if change == "rename" else other.voices.delete(voice)
            with pytest.raises(JobError) as caught:
                other.write()
            assert caught.value.code == "voice_not_found"
            for store in stores:
                store.scan()
                assert store.names == []

    def test_consents(self, stores: tuple[Store, Store]) -> None:
        """Consents are shared as voices are."""
        one, other = stores
        one.consents.create("Ada", "en", RECORDING)
        consent = one.write()
        other.scan()
        assert other.consents.find(consent).name == "Ada"
        other.consents.rename(consent, "Eva")
        other.write()
        one.scan()
        assert one.consents.find(consent).name == "Eva"
        one.consents.delete(consent)
        one.write()
        other.scan()
        with pytest.raises(JobError, match="no consent"):
            other.consents.find(consent)

    @pytest.mark.parametrize("change", ["save", "rename", "delete"])
    def test_one_writes_at_a_time(self, stores: tuple[Store, Store], tmp_path: Path, change: str) -> None:
        """While one worker holds the folder's lock, a change by another one waits."""
        voice = stores[0].save("Ada")
        if change == "save":
            stores[0].voices.create("Bob", RECORDING, kind="clone")
        elif change == "rename":
            stores[0].voices.update(voice, name="Eva")
        else:
            stores[0].voices.delete(voice)
        writing = threading.Thread(target=stores[0].write)
        with folder_lock(tmp_path / "voices"):
            writing.start()
            writing.join(0.1)
            stores[1].scan()
            assert (writing.is_alive(), stores[1].names) == (True, ["Ada"])
        writing.join()
        stores[1].scan()
        assert sorted(stores[1].names) == {"save": ["Ada", "Bob"], "rename": ["Eva"], "delete": []}[change]

    def test_a_start_leaves_what_is_being_written(self, stores: tuple[Store, Store], tmp_path: Path) -> None:
        """A worker that starts while another one writes removes none of its files; without a writer it does."""
        half = tmp_path / "voices" / "voice_half.safetensors"
        stores[0].save("Ada")
        with folder_lock(tmp_path / "voices"):
            half.write_bytes(b"half")
            Store(tmp_path / "voices")
            assert half.exists()
        Store(tmp_path / "voices")
        assert not half.exists()


@pytest.mark.slow
def test_two_processes_and_the_same_names(tmp_path: Path) -> None:
    """Two processes save voices of the same names at once: each name exists once, and every file is whole."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "voices")]
    writers = [
        subprocess.Popen([*command, name, json.dumps(NAMES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("one", "other")
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    answers = [json.loads(writer.communicate(timeout=60)[0]) for writer in writers]
    for name in NAMES:
        assert sorted(str(answer[name]) for answer in answers) == ["None", "invalid_value"]
    store = Store(tmp_path / "voices")
    assert sorted(store.names) == sorted(NAMES)
    assert all(store.voices.load(voice.id).pcm == RECORDING for voice in store.voices.list())
    files = {path.name for path in (tmp_path / "voices").iterdir()} - {".lock"}
    assert files == {f"{voice.id}.{end}" for voice in store.voices.list() for end in ("json", "safetensors")}


class TestRecordList:
    """A folder is read again only where it has changed."""

    @pytest.fixture
    def clock(self) -> FakeClock:
        """Seconds."""
        return FakeClock()

    @pytest.fixture
    def reads(self) -> list[str]:
        """The names of the files that were read."""
        return []

    @pytest.fixture
    def records(self, tmp_path: Path, clock: FakeClock, reads: list[str]) -> RecordList[str]:
        """The texts of the files; a file with "bad" in it cannot be read."""

        def read(path: Path) -> str:
            reads.append(path.stem)
            if (text := path.read_text()) == "bad":
                raise ValueError(text)
            return text

        order = lambda text: (0, text)  # noqa: E731 -- shorter than a function
        return RecordList(tmp_path / "records", read, order=order, unreadable=(ValueError, OSError), clock=clock)

    def test_only_changed_files_are_read(
        self, records: RecordList[str], tmp_path: Path, clock: FakeClock, reads: list[str]
    ) -> None:
        """Each file is read once, and again when it was replaced."""
        assert records.scan() == []
        folder = tmp_path / "records"
        folder.mkdir()
        (folder / "a.json").write_text("1")
        (folder / "b.json").write_text("2")
        first = records.scan()
        assert first == ["1", "2"]
        clock.advance(SETTLED_S)
        assert records.scan() is first
        (folder / "c.json").write_text("3")
        (folder / "c.json").replace(folder / "a.json")
        assert records.scan() == ["2", "3"]
        assert sorted(reads) == ["a", "a", "b"]

    def test_a_change_within_one_step_of_the_clock_is_seen(
        self, records: RecordList[str], tmp_path: Path, clock: FakeClock
    ) -> None:
        """A change that leaves the folder's time as it was is seen by the scans of the next second."""
        folder = tmp_path / "records"
        folder.mkdir()
        (folder / "a.json").write_text("1")
        status = folder.stat()
        assert records.scan() == ["1"]
        (folder / "b.json").write_text("2")
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))
        if folder.stat().st_size != status.st_size:
            pytest.skip("this file system counts files in the folder's size")
        clock.advance(SETTLED_S)
        assert records.scan() == ["1", "2"]

    def test_a_fault_is_logged_once(self, records: RecordList[str], tmp_path: Path) -> None:
        """A file that cannot be read is logged once, left out, and listed as soon as it is whole."""
        folder = tmp_path / "records"
        folder.mkdir()
        (folder / "a.json").write_text("bad")
        with capture_logs() as logs:
            assert records.scan() == records.scan() == []
        assert [entry["voice"] for entry in logs] == ["a"]
        (folder / "b.json").write_text("good")
        (folder / "b.json").replace(folder / "a.json")
        assert records.scan() == ["good"]


def test_a_list_that_could_not_be_read_is_read_again(tmp_path: Path) -> None:
    """Also if the folder does not change meanwhile, as on a network volume that fails for a moment."""
    clock = FakeClock()
    broken = True
    (tmp_path / "one.json").write_text("")

    def read(path: Path) -> str:
        if broken:
            raise OSError("the volume is away")
        return path.stem

    records = RecordList(tmp_path, read, order=lambda name: (0, name), unreadable=(ValueError,), clock=clock)
    for _ in range(2):
        with pytest.raises(OSError, match="away"):
            records.scan()
        clock.advance(2 * SETTLED_S)
    broken = False
    assert records.scan() == ["one"]
