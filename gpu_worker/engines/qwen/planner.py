"""What a job asks for, checked against what the model is: utterances, sampling, prompts.

It owns the refusals that can be told from the request and the model's configuration.
It holds no slots and no state of a running job.
"""

import secrets
from collections.abc import Iterator
from typing import Final

import msgspec

from gpu_worker.engines.base import Job, JobError, Sampling, Task
from gpu_worker.engines.qwen.checkpoint.model_config import GenerationConfig, ModelConfig
from gpu_worker.engines.qwen.model.prompt import Prompt, PromptBuilder, Voice
from gpu_worker.engines.qwen.model.qwen3_tts import MAX_TRAILING_TOKENS
from gpu_worker.engines.qwen.model.sampling import SamplingParams
from gpu_worker.engines.qwen.sequence import LEAST_CAP, frame_cap
from gpu_worker.engines.qwen.text_splitting import HEAD, clean, fits, split, tidy
from gpu_worker.voices import check_transcript

TASKS: Final[dict[str, Task]] = {"custom_voice": "CustomVoice", "voice_design": "VoiceDesign", "base": "Base"}

UTTERANCE_TOKENS: Final = 96
"""Longer texts are split: some 25 s of speech, well within what the model was trained on."""

ROOM_PER_TOKEN: Final = 5
"""Frames of room that a token of a described voice's text gets: speech takes 3 to 5."""

COLD: Final = 1e-5
"""Temperatures below choose the best: logits divided by a smaller one leave the range of float32."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A job that can be done.

    `texts`: its utterances, to be read once; each is cut when it is asked for, and has at most `longest` tokens.
    `max_new_tokens`: frames that the whole job may take, None where it names no number.
    `instructions` and `transcript` are the job's, without what would steer the prompt.
    `whole_text`: the layout, see PromptBuilder.build.
    """

    texts: Iterator[str]
    longest: int
    choice: SamplingParams
    seed: int
    max_new_tokens: int | None
    whole_text: bool
    instructions: str = ""
    transcript: str = ""


class Utterance(msgspec.Struct, frozen=True):
    """What a slot reads next: a prompt with `tokens` of text to speak, in at most `cap` frames."""

    prompt: Prompt
    tokens: int
    cap: int


class Planner:
    """Checks jobs and makes their prompts."""

    def __init__(
        self, config: ModelConfig, generation: GenerationConfig, prompts: PromptBuilder, *, max_model_len: int
    ) -> None:
        """`max_model_len`: tokens that a slot holds."""
        self._config = config
        self._generation = generation
        self._prompts = prompts
        self._max_model_len = max_model_len

    def plan(self, job: Job) -> Plan:
        """Check a job and begin to split its text.

        Raises:
            JobError: saying which field is at fault.
        """
        text, instructions = clean(job.text), tidy(job.instructions)
        transcript = tidy(job.reference.text or "").strip() if job.reference is not None else ""
        self._check(job, transcript)
        limit = self._limit(job, instructions)
        longest = limit
        if fits(text, limit, self._prompts.count):
            longest = self._prompts.count(text)
        elif job.task == "VoiceDesign":
            raise self._too_long(text, limit)
        return Plan(
            texts=split(text, job.language, limit, self._prompts.count),
            longest=longest,
            choice=choice_of(job.sampling, self._generation),
            seed=secrets.randbits(63) if job.sampling.seed is None else job.sampling.seed,
            max_new_tokens=job.sampling.max_new_tokens,
            # The official package's defaults: only clones get their text frame by frame.
            whole_text=job.task != "Base" if job.non_streaming_mode is None else job.non_streaming_mode,
            instructions=instructions,
            transcript=transcript,
        )

    def utterance(self, job: Job, plan: Plan, text: str, voice: Voice, *, left: int | None) -> Utterance:
        """One of the plan's texts, ready to be read; `left`: frames that the job may still take.

        Where the longest of the plan's utterances would find no room, none does: no speech ends in the middle for it.

        Raises:
            JobError: `invalid_value` where instructions or the reference leave no room to speak.
        """
        prompt = self._prompts.build(
            text, voice, language=job.language, instructions=plan.instructions, whole_text=plan.whole_text
        )
        tokens = self._prompts.count(text)
        spare = plan.longest - tokens
        # The last position stays free: until its slot is taken again, a row that has ended is computed with the others.
        room = self._max_model_len - len(prompt.embeds) - 1
        wanted = self._generation.max_new_tokens if left is None else left
        least, trailing = (room - spare, 0) if plan.whole_text else (room, spare)
        if least < min(LEAST_CAP, wanted) or len(prompt.trailing) + trailing > MAX_TRAILING_TOKENS:
            field = "ref_text" if voice.codes is not None else "instructions"
            raise JobError("invalid_value", f"{field}: no room is left for speech; make it shorter", param=field)
        return Utterance(prompt, tokens, frame_cap(tokens, wanted, room))

    def _limit(self, job: Job, instructions: str) -> int:
        """Text tokens of an utterance; a described voice's is all of its text, if a slot can hold it."""
        if job.task != "VoiceDesign":
            return UTTERANCE_TOKENS
        used = self._prompts.count(instructions) if instructions else 0
        return max(UTTERANCE_TOKENS, min(MAX_TRAILING_TOKENS, (self._max_model_len - used) // (ROOM_PER_TOKEN + 1)))

    def _too_long(self, text: str, limit: int) -> JobError:
        """A described voice is another one each time it is made: its text cannot go on in a second utterance."""
        head = text[: HEAD * limit]
        characters = len(head) * limit // self._prompts.count(head)
        message = (
            f"a described voice speaks at most {limit} tokens at once, about {characters} characters of this text; "
            "shorten it, or save the voice (POST /v1/audio/voices, type=prompt) and let that one speak"
        )
        return JobError("invalid_value", message, param="input")

    def _check(self, job: Job, transcript: str) -> None:
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
            if not transcript:
                message = "ref_text, what the recording says, is missing; or set x_vector_only_mode"
                raise JobError("invalid_value", message, param="ref_text")
            check_transcript(transcript, job.reference.pcm)


def choice_of(sampling: Sampling, generation: GenerationConfig) -> SamplingParams:
    """What a request asks for, where it does not the checkpoint's own parameters."""
    temperature = generation.temperature if sampling.temperature is None else sampling.temperature
    top_k = generation.top_k if sampling.top_k is None else sampling.top_k
    greedy = temperature < COLD
    if sampling.temperature is None and not generation.do_sample:
        # The talker's alone: the code predictor of the official package asks subtalker_dosample.
        greedy, top_k = not generation.subtalker_dosample, 1
    penalty = sampling.repetition_penalty
    return SamplingParams(
        greedy=greedy,
        greedy_codes=not generation.subtalker_dosample,
        temperature=temperature,
        top_k=top_k,
        top_p=generation.top_p if sampling.top_p is None else sampling.top_p,
        repetition_penalty=generation.repetition_penalty if penalty is None else penalty,
    )
