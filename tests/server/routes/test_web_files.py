"""The files that the pages load."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import server

NODE = shutil.which("node")
WEB = Path(server.__file__).parent / "web"
VENDOR = WEB / "vendor"
SCRIPTS = sorted(WEB.rglob("*.js"))
ROW = re.compile(r"^\| (\S+) \| ([0-9a-f]{64}) \| (?:`(.*)` )?\|$", re.MULTILINE)
PUBLISHED = {file: (digest, removed) for file, digest, removed in ROW.findall((VENDOR / "VERSIONS.md").read_text())}


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_scripts_are_whole() -> None:
    """Every script can be parsed: none was cut off when it was copied."""
    parse = """
        const {readFileSync} = require("node:fs");
        const {Script, SourceTextModule} = require("node:vm");
        for (const file of process.argv.slice(1)) {
            const text = readFileSync(file, "utf8");
            try { new SourceTextModule(text) } catch { new Script(text, file) }
        }
    """
    subprocess.run([str(NODE), "--experimental-vm-modules", "--no-warnings", "-e", parse, *SCRIPTS], check=True)


@pytest.mark.parametrize("file", PUBLISHED)
def test_vendored_files_are_the_published_ones(file: str) -> None:
    """Each byte is that of the package, but for source maps and the name of an import: none was cut off or changed."""
    digest, removed = PUBLISHED[file]
    content = (VENDOR / file).read_bytes().replace(b'from"./preact.js"', b'from"preact"')
    ends = (removed, removed + "\n")
    assert digest in {hashlib.sha256(content + end.encode()).hexdigest() for end in ends}


def test_every_vendored_file_has_a_digest() -> None:
    """A library that is added needs its row."""
    assert set(PUBLISHED) == {path.name for path in VENDOR.iterdir() if path.suffix in {".js", ".css"}}
