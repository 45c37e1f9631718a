"""The version that the service reports: that of the installed package."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final


def _installed() -> str:
    try:
        return version("qwen3-tts-server")
    except PackageNotFoundError:
        return "0.0.0"


VERSION: Final = _installed()
