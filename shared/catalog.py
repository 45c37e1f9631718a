"""The catalogue: the models described in models/*.toml, and the names that find a model, a voice or a language.

It lists the models that this project knows. The GPU worker knows which of them have their weights on disk.
"""

from pathlib import Path
from typing import Final, Literal

import msgspec

from shared.access import folder_problem, unreadable

CATALOG_DIR: Final = Path(__file__).resolve().parent.parent / "models"
"""The folder with this project's descriptions: one TOML file for each model."""

OPENAI_MODELS: Final[dict[str, str]] = {"tts-1": "small", "tts-1-hd": "large", "gpt-4o-mini-tts": ""}
"""OpenAI's model names -> the size of the default model's family that each stands for ("": the default's own)."""

OPENAI_VOICES: Final = (
    "alloy",
    "ash",
    "ballad",
    "coral",
    "echo",
    "fable",
    "nova",
    "onyx",
    "sage",
    "shimmer",
    "verse",
    "marin",
    "cedar",
)
"""The voice names of OpenAI's speech API; each model with voices maps all of them to voices of its own."""


class CatalogError(Exception):
    """A description in models/ cannot be read; the message names the file."""


class Voice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A preset voice. `id` is its name in the engine, `language` its native language."""

    id: str
    name: str
    language: str
    description: str = ""


class Language(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A language of a model: its name in lower case, and the codes that clients may use for it."""

    name: str
    codes: list[str]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The description of one model.

    `id` is its name for clients; `hf_id` is its Hugging Face repository ("" if it has none).
    `size` is "small" or "large" within a family of models, "" in a family without sizes.
    `timestamps`: its engine knows when each word is said.
    `instructions`: the model follows style instructions (a voice-design model needs a description instead).
    `sampling`: the model uses seeds, temperatures and the like.
    `estimated_bytes` is its size on the device until it was measured.
    """

    id: str
    name: str
    engine: Literal["espeak", "qwen"]
    task: Literal["CustomVoice", "VoiceDesign", "Base"]
    owned_by: str
    created: int
    languages: list[Language]
    estimated_bytes: int
    hf_id: str = ""
    aliases: list[str] = []
    size: Literal["", "small", "large"] = ""
    instructions: bool = False
    timestamps: bool = False
    sampling: bool = False
    voices: list[Voice] = []
    openai_voices: dict[str, str] = {}

    def answers_to(self, name: str) -> bool:
        """True if `name`, in any case, is the model's id, its Hugging Face id or one of its aliases."""
        wanted = name.casefold()
        return any(wanted == known.casefold() for known in (self.id, self.hf_id, *self.aliases) if known)

    def voice(self, name: str) -> Voice | None:
        """The preset voice with this id, name or OpenAI name, in any case; None if there is none."""
        wanted = name.casefold()
        for voice in self.voices:
            if wanted in (voice.id.casefold(), voice.name.casefold()):
                return voice
        mapped = self.openai_voices.get(wanted)
        return next((voice for voice in self.voices if voice.id == mapped), None)

    def language(self, name: str) -> str | None:
        """The model's name of a language that a client writes as "English", "en" or "en-US"; None if it has none.

        A code with an unknown region finds the language without the region.
        """
        wanted = name.casefold().replace("_", "-").strip()
        base = wanted.split("-")[0]
        for spelling in (wanted, base) if base != wanted and len(base) in {2, 3} else (wanted,):
            for language in self.languages:
                if spelling == language.name.replace("_", "-") or spelling in (
                    code.casefold() for code in language.codes
                ):
                    return language.name
        return None


def load_catalog(directory: Path = CATALOG_DIR) -> list[ModelSpec]:
    """The models described in `directory`; CatalogError names the file and the problem."""
    if problem := folder_problem(directory):
        raise CatalogError(problem)
    specs: list[ModelSpec] = []
    for path in sorted(directory.glob("*.toml")):
        try:
            spec = msgspec.toml.decode(path.read_bytes(), type=ModelSpec)
        except OSError as error:
            raise CatalogError(unreadable(path, error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CatalogError(f"{path}: {error}") from error
        if problem := _problem_of(spec, specs):
            raise CatalogError(f"{path}: {problem}")
        specs.append(spec)
    if not specs:
        raise CatalogError(f"{directory}: no model is described there (*.toml)")
    return specs


def _problem_of(spec: ModelSpec, others: list[ModelSpec]) -> str | None:
    for other in others:
        for name in (spec.id, spec.hf_id, *spec.aliases):
            if name and other.answers_to(name):
                return f"{name!r} already names {other.id}"
    if spec.task == "CustomVoice" and not spec.voices:
        return "a CustomVoice model needs voices"
    known = {voice.id for voice in spec.voices}
    unknown = sorted(set(spec.openai_voices.values()) - known)
    if unknown:
        return f"openai_voices names voices that the model lacks: {', '.join(unknown)}"
    missing = [name for name in OPENAI_VOICES if name not in spec.openai_voices]
    if spec.voices and missing:
        return f"openai_voices leaves out {', '.join(missing)}"
    return None
