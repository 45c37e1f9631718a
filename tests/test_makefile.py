"""The Makefile on machines that lack what it asks for: one line that says what to install, and nothing half made."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

MAKEFILE: Final = Path(__file__).resolve().parents[1] / "Makefile"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("sys.version_info = (3, 10)", "Python 3.11 or newer is needed"),
        ("sys.modules['ensurepip'] = None", "python3-venv"),  # Debian's python3 as it comes
    ],
)
def test_what_python_lacks_is_said(tmp_path: Path, lacking: str, said: str) -> None:
    """Before a venv is begun: one that fails leaves a python behind, and the next run would take it for whole."""
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
    assert said in ended.stderr
    assert "a venv was begun" not in ended.stderr
    assert not (tmp_path / ".venv").exists()
