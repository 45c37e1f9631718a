"""Settings and their surroundings: .env, the catalogue, the disk."""

import importlib.util
from pathlib import Path

import pytest

from shared.environment import environment, impossible_kernels, unknown_models, unusable_folders
from shared.settings import Settings, SettingsError, load_settings


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """.env gives the TTS_* variables that the environment lacks, and no others."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text('TTS_PORT=1\nTTS_MAX_QUEUE="7"\nTTS_HOST=\nPATH=/nowhere\n')
    monkeypatch.setenv("TTS_PORT", "2")
    found = environment()
    assert (found["TTS_PORT"], found["TTS_MAX_QUEUE"]) == ("2", "7")
    assert "TTS_HOST" not in found
    assert found["PATH"] != "/nowhere"


def test_a_line_that_cannot_be_read_hides_no_other_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One list has the line, and the wrong values of the other lines and of the environment."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("TTS_API_KEYS: hush\nTTS_IDLE_TIMEOUT=soon\nTTS_PROT=1\nTTS_MAX_QUEUE='7\nTTS_PORT=x\n")
    monkeypatch.setenv("TTS_PORT", "2")
    monkeypatch.setenv("TTS_WEB_WORKERS", "many")
    with pytest.raises(SettingsError) as caught:
        environment()
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        *(".env line 1", ".env line 4", "TTS_PROT", "TTS_IDLE_TIMEOUT", "TTS_WEB_WORKERS"),
    ]
    assert "hush" not in str(caught.value)


def test_unknown_models_are_problems() -> None:
    """A model that the catalogue lacks is a problem, and the message lists the known models."""
    settings = load_settings(
        {"TTS_DEFAULT_MODEL": "nothing", "TTS_PRELOAD": "espeak, void", "TTS_MODEL_PATHS": "none=/"}
        | {"TTS_MODEL_REPLICAS": "nowhere=2"},
    )
    problems = unknown_models(settings)
    assert [problem.split(":")[0] for problem in problems] == [
        *("TTS_DEFAULT_MODEL", "TTS_PRELOAD", "TTS_MODEL_PATHS", "TTS_MODEL_REPLICAS"),
    ]
    assert all("espeak-ng" in problem for problem in problems)


def test_aliases_of_models() -> None:
    """An alias stands for a known model or one of OpenAI's names; it must not be another model's own name."""
    assert unknown_models(load_settings({"TTS_MODEL_ALIASES": "kokoro=TTS-1,tts-1=espeak"})) == []
    problems = unknown_models(load_settings({"TTS_MODEL_ALIASES": "a=void,Espeak=tts-1"}))
    assert [problem.split(":")[0] for problem in problems] == ["TTS_MODEL_ALIASES"] * 2
    assert "'Espeak' is the name of a model already" in problems[0]
    assert "there is no model 'void'" in problems[1]


def test_known_models_are_no_problem() -> None:
    """A setting may name a model by its id, its hub id or an alias, in any case; auto names none."""
    names = {"TTS_DEFAULT_MODEL": "Espeak", "TTS_MODEL_PATHS": "qwen/qwen3-tts-12hz-1.7b-base=/"}
    assert unknown_models(load_settings(names)) == []
    assert unknown_models(Settings()) == []


def test_kernels_need_triton_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TTS_KERNELS=triton names what is missing, and what to do, in one sentence. Other values have a fallback."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert impossible_kernels(Settings(kernels="auto")) == []
    assert impossible_kernels(Settings(kernels="torch", default_device="cpu")) == []
    assert impossible_kernels(Settings(kernels="triton")) == [
        "TTS_KERNELS: the package triton is not installed; use auto or torch"
    ]
    assert impossible_kernels(Settings(kernels="triton", default_device="cpu")) == [
        "TTS_KERNELS: triton needs a CUDA device, but TTS_DEFAULT_DEVICE is cpu; use auto or torch"
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert impossible_kernels(Settings(kernels="triton")) == []
    assert Settings(kernels="triton", default_device="cuda").needing_cuda() == ["TTS_DEFAULT_DEVICE", "TTS_KERNELS"]
    assert Settings(kernels="triton").needing_cuda() == ["TTS_KERNELS"]
    assert Settings(kernels="triton", default_device="cpu").needing_cuda() == []


def test_missing_weights_are_problems(tmp_path: Path) -> None:
    """The path of a model must be a folder."""
    file = tmp_path / "file"
    file.touch()
    names = {"a": tmp_path, "b": tmp_path / "nowhere", "c": file}
    problems = unusable_folders(Settings(model_paths=names, voices_dir=tmp_path))
    assert problems == [
        f"TTS_MODEL_PATHS: {tmp_path / 'nowhere'} is not a folder (for b)",
        f"TTS_MODEL_PATHS: {file} is not a folder (for c)",
    ]


@pytest.mark.parametrize("folder", ["file", "file/voices", "dangling"])
def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, folder: str) -> None:
    """A folder for voices that cannot be written or created is a problem unless no voices are saved."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (problem,) = unusable_folders(Settings(voices_dir=tmp_path / folder))
    assert problem.startswith("TTS_VOICES_DIR: ")
    assert unusable_folders(Settings(voices_dir=tmp_path / folder, max_voices=0)) == []


def test_a_folder_for_voices_may_be_created_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may be missing, as the default one on a fresh machine; the check does not create it."""
    monkeypatch.chdir(tmp_path)
    assert unusable_folders(Settings()) == []
    assert unusable_folders(Settings(voices_dir=tmp_path / "some" / "where")) == []
    assert list(tmp_path.iterdir()) == []


def test_every_mistake_at_once() -> None:
    """One message has the problems of the catalogue, of the disk and of the values."""
    wrong = {"TTS_PORT": "many", "TTS_PRELOAD": "void", "TTS_VOICES_DIR": "/dev/null/x", "TTS_NO_SUCH": "1"}
    with pytest.raises(SettingsError) as caught:
        load_settings(wrong, unknown_models, unusable_folders)
    assert sorted(problem.split(":")[0] for problem in caught.value.problems) == sorted(wrong)
