"""The descriptions of models, and the names that find a model, a voice or a language."""

from pathlib import Path

import msgspec
import pytest

from shared.catalog import OPENAI_VOICES, CatalogError, ModelSpec, load_catalog

PLAIN = """
id = "plain"
name = "Plain"
engine = "qwen"
task = "Base"
owned_by = "nobody"
created = 1
languages = []
estimated_bytes = 1
"""

VOICED = PLAIN.replace('"Base"', '"CustomVoice"') + '[[voices]]\nid = "v"\nname = "V"\nlanguage = "english"\n'


def _write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / f"{name}.toml").write_text(text)
    return directory


@pytest.fixture(scope="module")
def shipped() -> dict[str, ModelSpec]:
    """The descriptions of this project, by id."""
    return {spec.id: spec for spec in load_catalog()}


class TestShipped:
    """models/*.toml."""

    def test_all_there(self, shipped: dict[str, ModelSpec]) -> None:
        """There are espeak-ng and the five published Qwen3-TTS checkpoints."""
        assert sorted(spec.hf_id for spec in shipped.values()) == [
            "",
            "Qwen/Qwen3-TTS-12Hz-0.6B-Base",
            "Qwen/Qwen3-TTS-12Hz-0.6B-CustomVoice",
            "Qwen/Qwen3-TTS-12Hz-1.7B-Base",
            "Qwen/Qwen3-TTS-12Hz-1.7B-CustomVoice",
            "Qwen/Qwen3-TTS-12Hz-1.7B-VoiceDesign",
        ]
        assert shipped["espeak-ng"].engine == "espeak"

    def test_names(self, shipped: dict[str, ModelSpec]) -> None:
        """Each id, hub id and alias, in any case, finds one model."""
        for spec in shipped.values():
            for name in filter(None, (spec.id, spec.hf_id, *spec.aliases)):
                for spelling in (name, name.upper(), name.lower()):
                    assert [other.id for other in shipped.values() if other.answers_to(spelling)] == [spec.id]

    def test_an_empty_name_finds_no_model(self, shipped: dict[str, ModelSpec]) -> None:
        """An empty name does not find the model without a hub id."""
        assert not any(spec.answers_to("") for spec in shipped.values())

    def test_task_and_names_agree(self, shipped: dict[str, ModelSpec]) -> None:
        """Task and size are those in the checkpoint's published name."""
        for spec in shipped.values():
            if spec.hf_id:
                assert spec.hf_id.endswith(spec.task)
                assert {"small": "0.6B", "large": "1.7B"}[spec.size] in spec.hf_id
                assert spec.sampling
                assert spec.instructions == (spec.size == "large" and spec.task != "Base")

    def test_openai_voices(self, shipped: dict[str, ModelSpec]) -> None:
        """In each model with voices, each OpenAI name, in any case, finds a voice."""
        assert len(OPENAI_VOICES) == 13
        for spec in shipped.values():
            for name in OPENAI_VOICES if spec.voices else ():
                voice = spec.voice(name.upper())
                assert voice is not None
                assert voice in spec.voices

    def test_voices(self, shipped: dict[str, ModelSpec]) -> None:
        """Ids and names find one voice each, and its language is one of its model's."""
        for spec in shipped.values():
            names = [name.casefold() for voice in spec.voices for name in {voice.id.casefold(), voice.name.casefold()}]
            assert len(names) == len(set(names))
            assert not set(names) & set(OPENAI_VOICES)
            for voice in spec.voices:
                assert spec.voice(voice.id.upper()) == spec.voice(voice.name.lower()) == voice
                assert voice.language in [language.name for language in spec.languages]
                assert voice.description

    def test_languages(self, shipped: dict[str, ModelSpec]) -> None:
        """Names are in lower case; each name and code finds one language of the model."""
        for spec in shipped.values():
            assert spec.languages
            for language in spec.languages:
                assert language.name == language.name.lower()
                for name in (language.name, language.name.upper(), *language.codes):
                    assert spec.language(name) == language.name

    def test_espeak_is_rich(self, shipped: dict[str, ModelSpec]) -> None:
        """The default engine has at least 20 voices and 20 languages."""
        assert len(shipped["espeak-ng"].voices) >= 20
        assert len(shipped["espeak-ng"].languages) >= 20

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("English", "english"),
            ("en", "english"),
            ("en-US", "english"),
            ("en_us", "english"),
            ("EN-au", "english"),
            (" en ", "english"),
            ("zh", "chinese"),
            ("zh-CN", "chinese"),
            ("zh-Hant-TW", "chinese"),
            ("pt-BR", "portuguese"),
            ("Klingon", None),
            ("e", None),
            ("english-ish", None),
            ("", None),
            ("-", None),
            ("auto", None),
        ],
    )
    def test_language_spellings(self, shipped: dict[str, ModelSpec], written: str, meant: str | None) -> None:
        """Names and codes find a language; an unknown region is ignored, and nothing else is."""
        for model in ("espeak-ng", "qwen3-tts-1.7b-customvoice"):
            assert shipped[model].language(written) == meant

    def test_unknown_voice(self, shipped: dict[str, ModelSpec]) -> None:
        """An unknown voice is not replaced by another."""
        assert shipped["espeak-ng"].voice("nobody") is None
        assert shipped["qwen3-tts-1.7b-base"].voice("alloy") is None


class TestMistakes:
    """Wrong descriptions are errors that name the file."""

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("id = ", "Invalid value"),
            ("id = 3\n", "Expected `str`"),
            (PLAIN.replace("name =", "nam ="), "unknown field `nam`"),
            (PLAIN.replace('owned_by = "nobody"\n', ""), "missing required field `owned_by`"),
            (PLAIN.replace('"Base"', '"Singing"'), "Invalid enum value 'Singing'"),
            (PLAIN.replace('"Base"', '"CustomVoice"'), "a CustomVoice model needs voices"),
            (VOICED, "openai_voices leaves out alloy, ash"),
            (VOICED + '[openai_voices]\nalloy = "x"\nash = "w"\n', "that the model lacks: w, x"),
        ],
    )
    def test_named(self, tmp_path: Path, text: str, problem: str) -> None:
        """The error has the file and the problem."""
        with pytest.raises(CatalogError) as caught:
            load_catalog(_write(tmp_path, bad=text))
        assert str(caught.value).startswith(f"{tmp_path / 'bad.toml'}: ")
        assert problem in str(caught.value)

    def test_not_text(self, tmp_path: Path) -> None:
        """A file in another encoding is an error."""
        (tmp_path / "bad.toml").write_bytes(PLAIN.replace("nobody", "Jürgen").encode("latin-1"))
        with pytest.raises(CatalogError, match=r"bad\.toml: "):
            load_catalog(tmp_path)

    def test_unreadable(self, tmp_path: Path) -> None:
        """A description that cannot be read, or their folder, is an error that names it."""
        (tmp_path / "bad.toml").mkdir()
        with pytest.raises(CatalogError, match=r"bad\.toml cannot be read by .*: Is a directory"):
            load_catalog(tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(CatalogError, match="file is not a folder"):
            load_catalog(tmp_path / "file")

    @pytest.mark.parametrize("line", ['hf_id = "PLAIN"', 'aliases = ["x", "Plain"]'])
    def test_name_taken(self, tmp_path: Path, line: str) -> None:
        """A name must not find two models."""
        other = PLAIN.replace('id = "plain"', f'id = "other"\n{line}')
        with pytest.raises(CatalogError, match=r"z\.toml: '(PLAIN|Plain)' already names plain"):
            load_catalog(_write(tmp_path, a=PLAIN, z=other))

    def test_none(self, tmp_path: Path) -> None:
        """A directory without descriptions is an error, not an empty catalogue."""
        with pytest.raises(CatalogError, match="no model is described there"):
            load_catalog(tmp_path)
        with pytest.raises(CatalogError, match="no model is described there"):
            load_catalog(tmp_path / "nowhere")

    def test_good(self, tmp_path: Path) -> None:
        """The descriptions above without their mistakes are accepted."""
        voiced = VOICED.replace('"plain"', '"voiced"')
        voiced += "[openai_voices]\n" + "".join(f'{name} = "v"\n' for name in OPENAI_VOICES)
        plain, other = load_catalog(_write(tmp_path, a=PLAIN, b=voiced))
        assert (plain.id, other.id) == ("plain", "voiced")
        assert msgspec.json.decode(msgspec.json.encode(other), type=ModelSpec) == other
