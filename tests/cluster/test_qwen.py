"""Qwen3-TTS behind a cluster, with a small random checkpoint."""

from pathlib import Path
from typing import Final

import pytest

from tests.checkpoints import tiny
from tests.cluster.cluster import running_cluster
from tests.system.service import Service, running_service

MODEL: Final = "qwen3-tts-0.6b-customvoice"
TEXTS: Final = ("The quick brown fox jumps over the lazy dog.", "One, two, three.")

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]


def _pcm(service: Service) -> list[bytes]:
    """The service's speech of TEXTS, each with a seed of its own."""
    answers = []
    for seed, text in enumerate(TEXTS):
        body = {"model": MODEL, "response_format": "pcm", "seed": seed, "max_new_tokens": 40}
        answer = service.speech(text, **body)
        assert answer.is_success, answer.text
        answers.append(answer.content)
    return answers


def test_pcm_of_a_seed_is_that_of_one_machine(tmp_path: Path) -> None:
    """The same request with the same seed gives the same bytes from a cluster and from a service without Ray."""
    settings = {"MODEL_PATHS": f"{MODEL}={tiny('custom_voice', '0b6').resolve()}", "DEFAULT_MODEL": MODEL}
    alone, many = tmp_path / "alone", tmp_path / "many"
    alone.mkdir()
    many.mkdir()
    with running_service(alone, start_timeout_s=120, **settings) as service:
        expected = _pcm(service)
    with running_cluster(many, REPLICAS=1, **settings) as cluster:
        assert _pcm(cluster) == expected
    assert all(len(pcm) > 1920 for pcm in expected)
    assert expected[0] != expected[1]
