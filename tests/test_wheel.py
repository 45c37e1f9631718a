"""The wheel: all modules and files of the product, and no files of the machine that built it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shared.catalog import load_catalog

pytestmark = pytest.mark.slow  # the wheel is built

ROOT = Path(__file__).resolve().parents[1]

BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel of this project."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("server", "gpu_worker", "shared", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    weights = source / "models" / "Qwen3-TTS-12Hz-1.7B-Base"
    shutil.copytree(ROOT / "models", source / "models", ignore=lambda _, names: {n for n in names if n[-5:] != ".toml"})
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"weights")
    (source / "models" / "stray.safetensors").write_bytes(b"weights")
    subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=source, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(built / "unpacked")
    return built / "unpacked"


@pytest.mark.slow
def test_it_has_the_catalogue(unpacked: Path, tmp_path: Path) -> None:
    """With only the wheel installed, the catalogue is the project's."""
    program = "from shared import catalog; print(catalog.__file__, *(spec.id for spec in catalog.load_catalog()))"
    environ = os.environ | {"PYTHONPATH": str(unpacked)}
    said = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=tmp_path, env=environ, check=True, capture_output=True, text=True
    ).stdout
    assert said.split() == [str(unpacked / "shared" / "catalog.py"), *(spec.id for spec in load_catalog())]


def test_it_has_all_of_the_product_and_no_more(unpacked: Path) -> None:
    """Every module and static file of the product is in the wheel; tests, weights and caches are not."""
    packed = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    packed = {path for path in packed if not path.parts[0].endswith(".dist-info")}
    ours = {path for name in ("server", "gpu_worker", "shared") for path in (ROOT / name).rglob("*") if path.is_file()}
    ours |= set((ROOT / "models").glob("*.toml"))
    assert packed == {path.relative_to(ROOT) for path in ours if "__pycache__" not in path.parts}
