"""requirements.lock: every package that an installation takes, by version and by the hash of its file.

pip resolves pyproject.toml's dependencies within constraints.txt and reports what it would install; the lock has
names, versions and SHA-256 alone, no place that they came from. It is of one platform, the one that it is made
on: Linux on x86-64, Python 3.11, torch's build for processors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
HEADER = """\
# Made by `make lock` from pyproject.toml and constraints.txt, for Linux on x86-64, Python 3.11 and torch's build
# for processors, which PyTorch keeps in an index of its own. Then:
#   pip install --require-hashes -r requirements.lock
#   pip install --no-deps .
"""


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["s3"]]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
        command = [sys.executable, "-m", "pip", "install", *options, "-c", str(ROOT / "constraints.txt"), *wanted]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    lines = sorted(line_of(package) for package in found)
    LOCK.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages: {LOCK.name}")


def line_of(package: dict) -> str:
    name, version = package["metadata"]["name"], package["metadata"]["version"]
    digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{name.lower().replace('_', '-')}=={version} --hash=sha256:{digest}"


if __name__ == "__main__":
    main()
