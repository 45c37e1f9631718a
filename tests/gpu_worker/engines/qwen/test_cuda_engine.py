"""The branch that the engine takes on CUDA, on a virtual device. tests/gpu has what only a GPU can show."""

import msgspec
import pytest

from gpu_worker.engines.qwen import build
from gpu_worker.engines.qwen.runtime.cuda_products import PRODUCTS
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN
from shared.protocol import Sampling
from tests.gpu_worker.engines.qwen.driving import Outcome, job, kept_engine, run, take
from tests.gpu_worker.engines.qwen.virtual_cuda import install


def test_speech_is_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of many lengths that join at odd moments have the samples that they have on a CPU."""
    jobs = [job(number, sampling=Sampling(seed=number, max_new_tokens=1 + 3 * number)) for number in range(8)]
    wanted = run(kept_engine("custom_voice"), jobs)
    cuda = install(monkeypatch)
    speaker = cuda.engine(slots=4)
    speaker.warm_up()
    assert cuda.replays.keys() == {
        ("code_predictor_step", 4, 0),
        ("talker_step", 4, 512),
        ("prefill", 1, 16),
        ("decode", 1, 1),
    }
    assert (speaker.capacity(), speaker.runnable(())) == (4, False)
    spoken = run(speaker, jobs, every=3)
    for name, outcome in wanted.items():
        assert spoken[name].pcm == outcome.pcm
        assert spoken[name].end == outcome.end
    assert not cuda.misses
    # A frame's small kernels come before a decode's large ones, and both before all other work.
    assert cuda.capture_priorities == {
        ("code_predictor_step", -2),
        ("talker_step", -2),
        ("prefill", -2),
        ("decode", -1),
    }
    called = cuda.calls.copy()
    speaker.offload()
    speaker.restore()
    assert cuda.calls - called == dict.fromkeys(called, 1)  # captured, and not warmed up again
    assert run(speaker, jobs[:2])["job 1"].pcm == wanted["job 1"].pcm
    speaker.close()


def test_nothing_is_eager_while_somebody_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length of speech and every `top_k` is served by graphs. Only prompts of over 256 tokens have none."""
    cuda = install(monkeypatch, computes=False)
    speaker = cuda.engine(slots=4, dtype="bfloat16")
    ordinary = [job(frames, sampling=Sampling(seed=1, max_new_tokens=frames)) for frames in range(1, 41)]
    unlimited = [job(frames, sampling=Sampling(seed=1, max_new_tokens=5, top_k=0)) for frames in range(41, 45)]
    run(speaker, [*ordinary, *unlimited])
    assert not cuda.misses
    speaker.close()


def test_text_in_pieces_is_spoken_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are launched ahead of those that are read, and never ahead of their text, which comes at odd moments."""
    texts = ["Hello world, good morning.", "Good morning today", "the voice", "hello, the speech of today is good."]
    fields = [{"sampling": Sampling(seed=number, max_new_tokens=40)} for number in range(4)]
    jobs = [job(number, text, non_streaming_mode=False, **fields[number]) for number, text in enumerate(texts)]
    wanted = run(kept_engine("custom_voice"), jobs)
    cuda = install(monkeypatch, lambda _: 0.004)
    speaker = cuda.engine(slots=4)
    outcomes = {one.id: Outcome() for one in jobs}
    for one in jobs:
        speaker.admit(msgspec.structs.replace(one, segments=[], open=True))
    pieces = {one.id: one.text for one in jobs}
    for step in range(600):
        for number, (name, text) in enumerate(pieces.items(), 1):
            if step % number == 0:
                speaker.append(name, text[:number], flush=False)
                pieces[name] = text[number:]
            if not text:
                speaker.end_text(name)
            if step % 7 == 2:
                speaker.unpark(name)
        if step % 7 == 6:
            speaker.park(jobs[step % 4].id)
        if speaker.runnable(()):
            take(speaker, outcomes, step)
    for name, outcome in wanted.items():
        assert outcomes[name].pcm == outcome.pcm
        assert outcomes[name].end == outcome.end
    assert not cuda.misses
    speaker.close()


def test_quantised_weights_move_and_speak_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """From captured functions. After an offload, a reuse of every slot and a restore, a seed gives the same speech."""
    cuda = install(monkeypatch)
    products = []
    for chosen in (PRODUCTS["int8"], PLAIN):
        monkeypatch.setattr(build, "choose_products", lambda *_, found=chosen, **__: found)
        speaker = cuda.engine(slots=2, dtype="bfloat16")
        jobs = [job(number, sampling=Sampling(seed=number, max_new_tokens=6)) for number in range(3)]
        spoken = run(speaker, jobs)
        weights = speaker.memory().device["weights"]
        speaker.offload()
        assert speaker.memory().host["weights"] == weights
        speaker.restore()
        again = run(speaker, jobs)
        assert [again[one.id].pcm for one in jobs] == [spoken[one.id].pcm for one in jobs]
        products.append((weights, spoken["job 1"].pcm))
        speaker.close()
    assert not cuda.misses
    assert products[0][0] < products[1][0]
    assert products[0][1] != products[1][1]
