"""What a job asks for, checked against what the model is: utterances, sampling, prompts.

It owns the refusals that can be told from the request and the model's configuration.
It holds no slots and no state of a running job.
"""

import secrets
from typing import Final

import msgspec

from gpu_worker.engines.base import Job, JobError, Sampling, Task
from gpu_worker.engines.qwen.config import GenerationConfig, ModelConfig
from gpu_worker.engines.qwen.generation import TEXTS
from gpu_worker.engines.qwen.prompt import Prompt, PromptBuilder, Voice
from gpu_worker.engines.qwen.speaking import LEAST_CAP, frame_cap
from gpu_worker.engines.qwen.state import Choice
from gpu_worker.engines.qwen.text import clean, split
from gpu_worker.recordings import check_transcript

TASKS: Final[dict[str, Task]] = {"custom_voice": "CustomVoice", "voice_design": "VoiceDesign", "base": "Base"}

UTTERANCE_TOKENS: Final = 96
"""Longer texts are split: some 25 s of speech, well within what the model was trained on."""

FRAMES_PER_TOKEN: Final = 5
"""Room that a described voice's text gets: speech takes 3 to 5 frames a token."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A job that can be done. `tokens`: of all its text. `whole_text`: the layout, see PromptBuilder.build."""

    texts: list[str]
    tokens: int
    choice: Choice
    seed: int
    max_new_tokens: int
    whole_text: bool


class Planner:
    """Checks jobs and makes their prompts."""

    def __init__(
        self, config: ModelConfig, generation: GenerationConfig, prompts: PromptBuilder, *, positions: int
    ) -> None:
        """`positions`: tokens that a slot holds."""
        self._config = config
        self._generation = generation
        self._prompts = prompts
        self._positions = positions

    def plan(self, job: Job) -> Plan:
        """Check a job and split its text.

        Raises:
            JobError: saying which field is at fault.
        """
        self._check(job)
        text = clean(job.text)
        texts = split(text, job.language, self._limit(job), self._prompts.count)
        default = self._generation.max_new_tokens
        return Plan(
            texts=texts,
            tokens=sum(map(self._prompts.count, texts)),
            choice=choice_of(job.sampling, self._generation),
            seed=secrets.randbits(63) if job.sampling.seed is None else job.sampling.seed,
            max_new_tokens=default if job.sampling.max_new_tokens is None else job.sampling.max_new_tokens,
            # The official package's defaults: only clones get their text frame by frame.
            whole_text=job.task != "Base" if job.non_streaming_mode is None else job.non_streaming_mode,
        )

    def prompt(self, job: Job, plan: Plan, text: str, voice: Voice) -> tuple[Prompt, int]:
        """The prompt of one utterance, and how many frames it may take.

        Raises:
            JobError: `invalid_value` where instructions or the reference leave no room to speak.
        """
        prompt = self._prompts.build(
            text, voice, language=job.language, instructions=job.instructions, whole_text=plan.whole_text
        )
        # The last position stays free: until its slot is taken again, a row that has ended is computed with the others.
        room = self._positions - len(prompt.embeds) - 1
        tokens = self._prompts.count(text)
        if room < min(LEAST_CAP, plan.max_new_tokens) or len(prompt.trailing) > TEXTS:
            field = "ref_text" if voice.codes is not None else "instructions"
            raise JobError("invalid_value", f"{field} leaves no room for speech; make it shorter", param=field)
        return prompt, frame_cap(tokens, plan.max_new_tokens, room)

    def _limit(self, job: Job) -> int:
        """Text tokens of an utterance.

        A described voice is another one each time it is made, so such a text stays in one piece if a slot can hold it.
        """
        if job.task != "VoiceDesign":
            return UTTERANCE_TOKENS
        used = self._prompts.count(job.instructions) if job.instructions else 0
        return max(UTTERANCE_TOKENS, min(TEXTS, (self._positions - used) // (FRAMES_PER_TOKEN + 1)))

    def _check(self, job: Job) -> None:
        config = self._config
        task = TASKS[config.tts_model_type]
        if job.task != task:
            raise JobError("task_mismatch", f"this is a {task} model; it cannot do {job.task}", param="task_type")
        if job.language != "auto" and job.language not in config.languages:
            known = ", ".join(["auto", *config.languages])
            raise JobError("invalid_value", f"no language {job.language!r}; there are {known}", param="language")
        speakers = config.talker_config.spk_id if task == "CustomVoice" else {"": 0}
        if job.voice not in speakers:
            known = ", ".join(speakers) or "none"
            raise JobError("voice_not_found", f"no voice {job.voice!r}; there are: {known}", param="voice")
        if job.instructions and (task == "Base" or not config.follows_instructions):
            raise JobError("invalid_value", "this model cannot follow instructions", param="instructions")
        if (job.reference is not None) != (task == "Base"):
            message = "this model speaks like a recording: ref_audio is missing"
            if task != "Base":
                raise JobError("task_mismatch", f"a {task} model takes no recording", param="ref_audio")
            raise JobError("invalid_value", message, param="ref_audio")
        if job.reference is not None and not job.reference.x_vector_only:
            text = (job.reference.text or "").strip()
            if not text:
                message = "ref_text, what the recording says, is missing; or set x_vector_only_mode"
                raise JobError("invalid_value", message, param="ref_text")
            check_transcript(text, job.reference.pcm)


def choice_of(sampling: Sampling, generation: GenerationConfig) -> Choice:
    """What a request asks for, where it does not the checkpoint's own parameters."""
    temperature = sampling.temperature
    greedy = temperature == 0 or (temperature is None and not generation.do_sample)
    penalty = sampling.repetition_penalty
    return Choice(
        greedy=greedy,
        greedy_codes=not generation.subtalker_dosample,
        temperature=generation.temperature if temperature is None else temperature,
        top_k=generation.top_k if sampling.top_k is None else sampling.top_k,
        top_p=generation.top_p if sampling.top_p is None else sampling.top_p,
        repetition_penalty=generation.repetition_penalty if penalty is None else penalty,
    )
