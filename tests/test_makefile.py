"""The Makefile on machines without what it needs: one line that names it, and no half-made environment."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

MAKEFILE: Final = Path(__file__).resolve().parents[1] / "Makefile"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("sys.version_info = (3, 10)", "Python 3.11 or newer is needed"),
        ("sys.modules['ensurepip'] = None", "python3-venv"),  # Debian's python3 without python3-venv
    ],
)
def test_missing_parts_of_python_are_named(tmp_path: Path, lacking: str, message: str) -> None:
    """The check comes before the venv: a venv that fails leaves a python behind, and looks complete to the next run."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport sys\n{lacking}\n"
        "assert sys.argv[1] == '-c', 'a venv was begun'\n"
        "exec(sys.argv[2])\n"
    )
    python.chmod(0o755)
    command = ["make", "-f", str(MAKEFILE), "install", f"PYTHON={python}"]
    (tmp_path / "pyproject.toml").touch()
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "a venv was begun" not in ended.stderr
    assert not (tmp_path / ".venv").exists()
