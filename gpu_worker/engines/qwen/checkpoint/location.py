"""Where the checkpoint of a model is on this machine, and its download when it is nowhere.

This module decides between the possible directories. It verifies the one that it returns.
"""

from collections.abc import Callable
from pathlib import Path

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.verification import verify


def locate(
    hf_id: str,
    *,
    configured: Path | None,
    models_dir: Path,
    allow_download: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """The verified directory of a model's checkpoint.

    If a path is configured, only that path counts. Otherwise the first of these directories is taken:
    `models_dir/<Hugging Face basename>`, then the newest snapshot in the Hugging Face cache.
    A damaged directory is an error: `locate` never goes on to the next one.
    If `allow_download` is set, a missing or damaged checkpoint is downloaded into `models_dir` instead.
    `progress` is called with a sentence before each file of a download.

    Raises:
        JobError: `model_unavailable`, naming the file at fault or the directories tried.
    """
    if configured is not None:
        verify(configured)
        return configured
    target = models_dir / hf_id.rpartition("/")[2]
    found = target if target.is_dir() else _cached_snapshot(hf_id)
    if found is not None:
        try:
            verify(found)
        except JobError:
            if not allow_download:
                raise
        else:
            return found
    elif not allow_download:
        raise JobError(
            "model_unavailable",
            f"{hf_id} is neither at {target} nor in the Hugging Face cache, and TTS_ALLOW_DOWNLOAD is off; "
            f"download it with `python -m gpu_worker download {hf_id}`",
        )
    from gpu_worker.engines.qwen.checkpoint.download import download_checkpoint  # noqa: PLC0415 -- half a second to import

    download_checkpoint(hf_id, target, progress=progress)
    verify(target)
    return target


def _cached_snapshot(hf_id: str) -> Path | None:
    """The newest snapshot in the Hugging Face cache, even an incomplete one; None if there is none."""
    from huggingface_hub import constants  # noqa: PLC0415 -- needs the gpu extra

    # Every start asks for every model, and most machines have few in that cache.
    if not (Path(constants.HF_HUB_CACHE) / f"models--{hf_id.replace('/', '--')}").is_dir():
        return None
    from huggingface_hub import snapshot_download  # noqa: PLC0415 -- 0.3 s of CPU time to import
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415 -- as above

    try:
        return Path(snapshot_download(hf_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
