"""Download of published checkpoints from the Hugging Face hub into TTS_MODELS_DIR: resumable, with checked sizes.

This module does not decide when a download is allowed, and loads no weights.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import requests
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.verification import verify
from shared.catalog import ModelSpec

_CHECKPOINT_SUFFIXES: Final = (".json", ".txt", ".safetensors")
"""Files with these suffixes make up a checkpoint. Others (README, pictures) are not downloaded."""


def download_models(
    names: Sequence[str], specs: Sequence[ModelSpec], models_dir: Path, *, endpoint: str | None = None
) -> int:
    """The command `download`: download each named model, with progress bars, and report each result on stderr.

    A name is a model's id, alias or Hugging Face id, or its size and task ("0.6B-CustomVoice"), in any case.
    Files that an interrupted run has downloaded are not downloaded again.
    Returns the exit code: 0 if all models are complete, else 1.

    Raises:
        LookupError: a name is no model with published weights. Nothing has been downloaded then.
    """
    failures = 0
    for spec in [published_model(name, specs) for name in names]:
        target = models_dir / spec.hf_id.rpartition("/")[2]
        try:
            download_checkpoint(spec.hf_id, target, endpoint=endpoint)
            verify(target)
        except JobError as error:
            sys.stderr.write(f"{spec.hf_id}: {error.message}\n")
            failures += 1
        else:
            sys.stderr.write(f"{spec.hf_id}: complete at {target}\n")
    return 1 if failures else 0


def download_checkpoint(
    hf_id: str, target: Path, *, endpoint: str | None = None, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Download every file of a repository into `target`. Files that are already complete are kept.

    `progress` is called with a sentence before each file.

    Raises:
        JobError: `model_unavailable`: the hub cannot be reached or refuses, the disk is too small,
            or a file has another size than the hub lists.
    """
    try:
        sizes = _file_sizes(hf_id, endpoint)
        _require_disk_space(sizes, target)
        for count, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name)), start=1):
            progress(f"downloading {name} ({sizes[name] / 1e9:.1f} GB), file {count} of {len(sizes)}")
            hf_hub_download(hf_id, name, local_dir=target, endpoint=endpoint)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, requests.RequestException) as error:
        raise JobError("model_unavailable", _explain(hf_id, target, error)) from error
    except OSError as error:
        raise JobError("model_unavailable", f"{hf_id} cannot be stored at {target}: {error}") from error
    for name, size in sizes.items():
        found = (target / name).stat().st_size
        if found != size:
            raise JobError("model_unavailable", f"{target / name} has {found} bytes where the hub says {size}")


def published_model(name: str, specs: Sequence[ModelSpec]) -> ModelSpec:
    """The model with weights of this name: 0.6B-CustomVoice, or any id. Raises LookupError if there is none."""
    published = [spec for spec in specs if spec.hf_id]
    ending = f"-{name}".casefold()
    for spec in published:
        if spec.answers_to(name) or spec.hf_id.casefold().endswith(ending):
            return spec
    known = ", ".join(spec.id for spec in published)
    raise LookupError(f"there are no weights for {name!r}; there are {known}")


def _file_sizes(hf_id: str, endpoint: str | None) -> dict[str, int]:
    """Bytes of each file of the checkpoint, by its name in the repository."""
    listed = HfApi(endpoint=endpoint).model_info(hf_id, files_metadata=True).siblings or []
    return {file.rfilename: file.size or 0 for file in listed if file.rfilename.endswith(_CHECKPOINT_SUFFIXES)}


def _require_disk_space(sizes: dict[str, int], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    here = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    missing = sum(sizes.values()) - here
    free = shutil.disk_usage(target).free
    if missing > free:
        raise JobError(
            "model_unavailable",
            f"{target} needs {missing / 1e9:.1f} GB more, but its disk has {free / 1e9:.1f} GB free",
        )


def _explain(hf_id: str, target: Path, error: Exception) -> str:
    # The hub's client reports a failed look-up of a file as an error about the local cache, caused by the real error.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, HfHubHTTPError):
        return f"the Hugging Face hub refuses {hf_id}: {cause}"
    return (
        f"the Hugging Face hub is out of reach, so {hf_id} cannot be downloaded ({type(cause).__name__}: {cause}); "
        f"download it elsewhere and copy its files into {target}, or set HF_ENDPOINT to a mirror"
    )
