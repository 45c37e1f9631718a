"""The files that the pages load."""

import shutil
import subprocess
from pathlib import Path

import pytest

import server

NODE = shutil.which("node")
SCRIPTS = sorted((Path(server.__file__).parent / "web").rglob("*.js"))


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_whole(script: Path) -> None:
    """Every script can be parsed: none was cut off when it was copied."""
    subprocess.run([str(NODE), "--check", str(script)], check=True)
