"""The models as ElevenLabs lists them: the answer of /v1/models to its SDK, on a path that both APIs have."""

import msgspec

from server.engine import EngineClient, fresh_catalog, status_of
from shared.settings import Settings


class ElevenLabsLanguage(msgspec.Struct, frozen=True, kw_only=True):
    """A language of a model."""

    language_id: str
    name: str


class ElevenLabsModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as ElevenLabs lists it."""

    model_id: str
    name: str
    description: str
    languages: list[ElevenLabsLanguage]
    maximum_text_length_per_request: int
    can_do_text_to_speech: bool = True
    can_do_voice_conversion: bool = False
    can_be_finetuned: bool = False
    can_use_style: bool = False
    can_use_speaker_boost: bool = False
    serves_pro_voices: bool = False
    requires_alpha_access: bool = False
    token_cost_factor: float = 1.0


async def elevenlabs_models(engine: EngineClient, settings: Settings) -> list[ElevenLabsModel]:
    """The models that can speak, the default one first."""
    catalog, snapshot = await fresh_catalog(engine)
    served = [spec for spec in catalog if status_of(spec, snapshot).state != "unavailable"]
    return [
        ElevenLabsModel(
            model_id=spec.id,
            name=spec.name,
            description=f"{spec.name} ({spec.task})",
            languages=[
                ElevenLabsLanguage(language_id=min(known.codes, key=len), name=known.name) for known in spec.languages
            ],
            maximum_text_length_per_request=settings.max_input_chars,
        )
        for spec in sorted(served, key=lambda spec: spec.id != snapshot.default_model)
    ]
