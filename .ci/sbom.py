"""sbom.cdx.json and docs/licences.md: what is installed by requirements.lock, and under which licences.

CycloneDX 1.6, from the metadata of the packages in this environment. No time and no number of its own are in it,
so that it changes when a package does and never else.
"""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import PackageMetadata, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LINE = re.compile(r"([a-z0-9.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")
CLASSIFIER = "License :: OSI Approved :: "
HEAD = """# Licences

The packages that `requirements.lock` installs, with the licence each declares. The lock is for CPUs only: Linux on
x86-64, Python 3.11, torch's CPU build. CUDA builds of torch bring NVIDIA's libraries, under their own licences, which
are not listed here.
Made by `make sbom`, with `sbom.cdx.json` (CycloneDX). saemill itself is under Apache-2.0.

| package | version | licence |
|---|---|---|
"""


def locked() -> dict[str, tuple[str, str]]:
    """Name -> version and hash."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    return {match[1]: (match[2], match[3]) for match in found if match is not None}


def licence_of(found: PackageMetadata) -> str:
    """Its SPDX expression, its classifier, or the first line of what it says."""
    said = found.get("License-Expression")
    classifiers = [one.removeprefix(CLASSIFIER) for one in found.get_all("Classifier") or [] if CLASSIFIER in one]
    free = (found.get("License") or "").strip().splitlines()
    return said or " and ".join(classifiers) or (free[0][:60] if free else "not said")


def component(name: str, version: str, digest: str, found: PackageMetadata) -> dict[str, Any]:
    said = found.get("License-Expression")
    licence = {"expression": said} if said else {"license": {"name": licence_of(found)}}
    purl = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    part = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    return {**part, "licenses": [licence], "hashes": [{"alg": "SHA-256", "content": digest}]}


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {name: (*parts, metadata(name)) for name, parts in sorted(locked().items())}
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": f"pkg:pypi/saemill@{project['version']}",
                "name": "saemill",
                "version": project["version"],
                "licenses": [{"expression": project["license"]}],
            }
        },
        "components": [component(name, *parts) for name, parts in packages.items()],
    }
    (ROOT / "sbom.cdx.json").write_text(json.dumps(document, indent=1) + "\n")
    rows = [f"| {name} | {version} | {licence_of(found)} |" for name, (version, _, found) in packages.items()]
    (ROOT / "docs" / "licences.md").write_text(HEAD + "\n".join(rows) + "\n")
    print(f"{len(packages)} packages: sbom.cdx.json, docs/licences.md")


if __name__ == "__main__":
    main()
