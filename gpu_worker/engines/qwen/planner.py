"""Jobs checked against the model, and what follows from them: utterances, sampling, prompts, frame caps.

The Planner rejects every job whose fault shows in the request and the model's configuration.
It has no slots and no state of running jobs.
"""

import secrets
from collections.abc import Iterator
from typing import Final

import msgspec
from torch import Tensor

from gpu_worker.engines.base import Job, JobError
from gpu_worker.engines.qwen.checkpoint.model_config import GenerationConfig, ModelConfig
from gpu_worker.engines.qwen.model.prompt import Prompt, PromptBuilder, Voice
from gpu_worker.engines.qwen.model.sampling import SamplingParams
from gpu_worker.engines.qwen.model.slot_state import MAX_TRAILING_TOKENS
from gpu_worker.engines.qwen.passages import OpenText, Passage, WholeText
from gpu_worker.engines.qwen.text_splitting import (
    MAX_CHARS_PER_TOKEN,
    clean_text,
    fits_tokens,
    remove_controls,
    split_into_utterances,
)
from gpu_worker.voices import check_transcript
from shared.protocol import Sampling, Task
from shared.text import NO_SPEAKABLE_TEXT, is_speakable

TASKS: Final[dict[str, Task]] = {"custom_voice": "CustomVoice", "voice_design": "VoiceDesign", "base": "Base"}

MAX_UTTERANCE_TOKENS: Final = 96
"""Longer texts are split: this is about 25 s of speech, well within the lengths that the model was trained on."""

FRAMES_RESERVED_PER_TOKEN: Final = 5
"""Frames reserved in the slot for each text token of a described voice: speech takes 3 to 5."""

FRAMES_PER_TOKEN: Final = 12
MIN_FRAME_CAP: Final = 192
"""An utterance has at most max(MIN_FRAME_CAP, FRAMES_PER_TOKEN * its tokens) frames.

0.2 to 0.5 % of utterances never end by themselves. Speech takes 3 to 5 frames a token.
"""

GREEDY_BELOW_TEMPERATURE: Final = 1e-5
"""Lower temperatures mean greedy sampling: logits divided by a smaller number leave the range of float32."""


_NEEDS_STREAMING_LAYOUT: Final = "a text that is still being written is read frame by frame: it must be false"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A job that passed all checks.

    `passages` yields the texts of the utterances, once; each is cut off when it is asked for.
    Of an open job it yields None while more text has to come first, and `open_text` takes that text.
    `longest_tokens` is the most text tokens that an utterance can have.
    `max_new_tokens` limits the frames of the whole job; None if the request sets no limit.
    `whole_text` is the text layout, see PromptBuilder.build.
    `live`: the speech is the same, to the last bit, as that of an open job with this text. The request asks for that by
    `non_streaming_mode: false`. Without it, a clone reads its text frame by frame as well, but in larger chunks.
    `instructions` and `transcript` are the job's, without control characters and control tokens.
    """

    passages: Iterator[Passage | None]
    longest_tokens: int
    sampling: SamplingParams
    seed: int
    max_new_tokens: int | None
    whole_text: bool
    live: bool = False
    instructions: str = ""
    transcript: str = ""
    open_text: OpenText | None = None


class Utterance(msgspec.Struct, frozen=True):
    """The next prompt of a slot, with `tokens` of text to speak in at most `max_frames` frames.

    With `incomplete`, more of its text comes, see Planner.more_text; until then `max_frames` is the most there can be.
    """

    prompt: Prompt
    tokens: int
    max_frames: int
    incomplete: bool = False


class MoreText(msgspec.Struct, frozen=True):
    """More of an utterance's text: its `rows` of text embeddings, and how many tokens the utterance has now."""

    rows: Tensor
    tokens: int
    complete: bool


class Planner:
    """Checks jobs, and builds the prompts of their utterances."""

    def __init__(
        self, config: ModelConfig, generation: GenerationConfig, prompts: PromptBuilder, *, max_model_len: int
    ) -> None:
        """`max_model_len`: tokens that a slot holds, prompt and frames together."""
        self._config = config
        self._generation = generation
        self._prompts = prompts
        self._max_model_len = max_model_len

    def plan(self, job: Job) -> Plan:
        """Check a job, and start to split its text.

        Raises:
            JobError: `invalid_value`, `voice_not_found` or `task_mismatch`, with the field at fault.
        """
        texts = [segment.text for segment in job.segments if is_speakable(segment.text)]
        if not texts and not job.open:
            raise JobError("invalid_value", NO_SPEAKABLE_TEXT, param="input")
        if job.open and job.non_streaming_mode:
            raise JobError("invalid_value", _NEEDS_STREAMING_LAYOUT, param="non_streaming_mode")
        instructions = remove_controls(job.instructions)
        transcript = remove_controls(job.reference.text or "").strip() if job.reference is not None else ""
        self._check(job, transcript)
        limit = self._max_tokens(job, instructions)
        longest = limit
        if len(texts) > 1:
            if job.task == "VoiceDesign":
                raise _in_parts()
        elif job.open:
            pass
        elif fits_tokens(text := clean_text(texts[0]), limit, self._prompts.count):
            longest = self._prompts.count(text)
        elif job.task == "VoiceDesign":
            raise self._too_long(text, limit)

        def split(text: str) -> Iterator[str]:
            return split_into_utterances(text, job.language, limit, self._prompts.count)

        open_text = None
        if job.open:
            open_text = OpenText(
                job.segments,
                self._prompts,
                language=job.language,
                limit=limit,
                too_long=(lambda text: self._too_long(text, limit)) if job.task == "VoiceDesign" else None,
                in_parts=_in_parts(),
            )
        return Plan(
            passages=open_text or WholeText(job.segments, split),
            open_text=open_text,
            longest_tokens=longest,
            sampling=sampling_params(job.sampling, self._generation),
            seed=secrets.randbits(63) if job.sampling.seed is None else job.sampling.seed,
            max_new_tokens=job.sampling.max_new_tokens,
            # The defaults of the official package: only clones read their text frame by frame.
            whole_text=job.task != "Base" and not job.open
            if job.non_streaming_mode is None
            else job.non_streaming_mode,
            live=job.open or job.non_streaming_mode is False,
            instructions=instructions,
            transcript=transcript,
        )

    def utterance(self, job: Job, plan: Plan, passage: Passage, voice: Voice, *, frames_left: int | None) -> Utterance:
        """The prompt of one of the plan's passages. `frames_left`: frames that the job may still make.

        Rejects the whole plan if its longest utterance does not fit into the slot, so no speech is cut off half-way.

        Raises:
            JobError: `invalid_value`: instructions or reference are too long and leave no room for speech.
        """
        ids = self._prompts.ids(passage.text) if plan.open_text is None else plan.open_text.ids
        tokens = len(ids)
        if plan.live:
            prompt = self._prompts.begin(
                ids,
                voice,
                language=job.language,
                instructions=plan.instructions,
                complete=not passage.incomplete,
            )
        else:
            prompt = self._prompts.build(
                passage.text,
                voice,
                language=job.language,
                instructions=plan.instructions,
                whole_text=plan.whole_text,
            )
        longer = plan.longest_tokens - tokens
        # The last position stays free: a finished row is computed with the others until its slot is taken again.
        room = self._max_model_len - len(prompt.embeds) - 1
        wanted = self._generation.max_new_tokens if frames_left is None else frames_left
        least_room, trailing = (room - longer, 0) if plan.whole_text else (room, longer + passage.incomplete)
        if least_room < min(MIN_FRAME_CAP, wanted) or len(prompt.trailing) + trailing > MAX_TRAILING_TOKENS:
            field = "ref_text" if voice.codes is not None else "instructions"
            raise JobError("invalid_value", f"{field}: no room is left for speech; make it shorter", param=field)
        if passage.incomplete:
            return Utterance(prompt, tokens, frame_cap(plan.longest_tokens, wanted, room), incomplete=True)
        return Utterance(prompt, tokens, frame_cap(tokens, wanted, room))

    def more_text(self, open_text: OpenText, tokens: int) -> MoreText | None:
        """The sure part of the utterance's text behind its first `tokens`; None if it is empty."""
        open_text.read_on()
        ids = open_text.ids[tokens:]
        if not ids and not open_text.complete:
            return None
        rows = self._prompts.text_rows(ids, complete=open_text.complete)
        return MoreText(rows, len(open_text.ids), open_text.complete)

    def least_ids(self, voice: Voice) -> int:
        """How many tokens of its text an utterance needs to begin."""
        return self._prompts.least_ids(voice)

    def _max_tokens(self, job: Job, instructions: str) -> int:
        """The most text tokens of an utterance. With a described voice, the whole text must be one utterance."""
        if job.task != "VoiceDesign":
            return MAX_UTTERANCE_TOKENS
        used = self._prompts.count(instructions) if instructions else 0
        return max(
            MAX_UTTERANCE_TOKENS,
            min(MAX_TRAILING_TOKENS, (self._max_model_len - used) // (FRAMES_RESERVED_PER_TOKEN + 1)),
        )

    def _too_long(self, text: str, limit: int) -> JobError:
        """A described voice is a different one in each utterance, so its text cannot continue in a second one."""
        head = text[: MAX_CHARS_PER_TOKEN * limit]
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
        if job.reference is not None and task != "Base":
            raise JobError("task_mismatch", f"a {task} model takes no recording", param="ref_audio")
        if job.reference is None and task == "Base":
            raise JobError("invalid_value", "this model clones a recording: ref_audio is missing", param="ref_audio")
        if job.reference is not None and not job.reference.x_vector_only:
            if not transcript:
                message = "ref_text, the transcript of the recording, is missing; or set x_vector_only_mode"
                raise JobError("invalid_value", message, param="ref_text")
            check_transcript(transcript, job.reference.pcm)


def _in_parts() -> JobError:
    """A described voice is a different one in each utterance, and a pause ends an utterance."""
    message = (
        "a described voice speaks its text in one go: leave out the pauses and changes of rate between the words, "
        "or save the voice (POST /v1/audio/voices, type=prompt) and let that one speak"
    )
    return JobError("invalid_value", message, param="input")


def frame_cap(tokens: int, wanted: int, room: int) -> int:
    """The most frames of an utterance of `tokens` text tokens, in a slot with `room` free positions."""
    return min(max(MIN_FRAME_CAP, FRAMES_PER_TOKEN * tokens), wanted, room)


def sampling_params(sampling: Sampling, generation: GenerationConfig) -> SamplingParams:
    """The request's parameters. Those that the request does not set are the checkpoint's."""
    temperature = generation.temperature if sampling.temperature is None else sampling.temperature
    top_k = generation.top_k if sampling.top_k is None else sampling.top_k
    greedy = temperature < GREEDY_BELOW_TEMPERATURE
    if sampling.temperature is None and not generation.do_sample:
        # do_sample is the talker's alone: for the code predictor the official package reads subtalker_dosample.
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
