"""The version that the service reports: the installed package's."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final


def _installed() -> str:
    try:
        return version("qwen3-tts-server")
    except PackageNotFoundError:
        return "0.0.0"


VERSION: Final = _installed()
