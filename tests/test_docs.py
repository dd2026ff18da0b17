"""The pages: every command on them is understood, every link leads somewhere, every setting is there."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from huggingface_hub.cli.hf import app as hf

from saemill.evaluate import evals
from saemill.evaluate.run.command import make_configs
from saemill.harvest.cli import make_config
from saemill.train.config.parse_settings import parse_grid, parse_settings
from saemill.train.kit import variant_registry
from saemill.train.train_runs import find_requests

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
LAUNCHERS = ("accelerate", "torchrun")
ACTIVATE = "source .venv/bin/activate"
OWN_FILES = ("CONTRIBUTING.md", "README.md", "SECURITY.md")


def load_builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("saemill_docs", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = load_builder()


def commands_of(text: str) -> Iterator[str]:
    """Commands in the fenced parts of a page: one a line, or on several where a line goes on."""
    for block in (one.content for one in BUILD.parse(text) if one.type == "fence" and one.info in ("", "sh", "bash")):
        lines = re.sub(r"\\\n\s*|\n\s+", " ", block).splitlines()
        yield from filter(None, (re.sub(r"\s#\s.*|^#.*", "", line).strip() for line in lines))


def found_in_pages() -> list[tuple[str, str]]:
    files = [*(ROOT / name for name in OWN_FILES), *sorted((ROOT / "docs").rglob("*.md"))]
    return [(file.relative_to(ROOT).as_posix(), line) for file in files for line in commands_of(file.read_text())]


def check(line: str) -> None:
    """Raise where a command would not be understood. What is in brackets may be left out: here it is said."""
    if line == ACTIVATE:
        return
    words = shlex.split(line.replace("[", "").replace("]", ""))
    if words[0] in LAUNCHERS:  # of several processes: what they run is checked
        words = words[next((place for place, word in enumerate(words) if word in BUILD.COMMANDS), 0) :]
    if words[0] in BUILD.COMMANDS:
        check_own(words[0], words[1:])
    elif words[0] == "hf":
        parse(hf, words[0], words[1:])
    elif words[0] == "make":
        for word in words[1:]:
            name, given, _ = word.partition("=")
            assert re.search(rf"^{name}\s*\?=" if given else rf"^{name}:", MAKEFILE, re.MULTILINE), word
    elif words[0] == "python" or words[0].endswith("/bin/python"):
        script, *options = words[1:]
        source = (ROOT / script).read_text()
        assert not [one for one in options if one.startswith("--") and f'"{one}"' not in source]
    else:
        assert "COMPLETE=bash_source" in line, f"nobody knows whether this works: {line}"


def check_own(name: str, words: list[str]) -> None:
    given = parse(BUILD.COMMANDS[name], name, words)
    if name == "sae-harvest":
        make_config({key: value for key, value in given.items() if key not in ("is_dry_run", "is_json")})
    elif name == "sae-train" and given["resume"] is None:
        options = {key: given[key] for key in ("k", "width", "layer", "seed") if given[key] is not None}
        settings = options | parse_settings(given["set"])
        for request in find_requests(
            given["variant"], given["recipe"], given["name"], settings, parse_grid(given["grid"])
        ):
            assert request.members(lambda _: {})
    elif name == "sae-eval":
        make_configs(given["evals"], given["set"])


def parse(command: click.Command, name: str, words: list[str]) -> dict[str, Any]:
    while isinstance(command, click.Group):
        sub, found, words = command.resolve_command(click.Context(command), words)
        assert sub is not None and found is not None
        command = found
    return command.make_context(name, words).params


@pytest.mark.parametrize(("page", "line"), found_in_pages(), ids=str)
def test_every_command_of_the_pages_is_understood(page, line):
    check(line)


@pytest.mark.parametrize("target", ["demo", "harvest", "studies", "decide"])
@pytest.mark.parametrize("model", ["auto", "smollm2"])
def test_every_command_of_a_recipe_of_the_makefile_is_understood(target, model):
    expanded = subprocess.run(
        ["make", "-n", target, f"MODEL={model}", "VENV=venv"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace("\\\n", " ")
    lines = re.findall(r"venv/bin/(sae-[^|>;&'\n]*)", expanded.replace("{}", "tiered"))
    assert lines and {line.split()[0] for line in lines} <= set(BUILD.COMMANDS)
    for line in lines:
        check(line)


@pytest.mark.parametrize(
    ("said", "is_read"), [("COLUMN=body", False), ("LAYER=3", True), ("HF_HOME=/x", True), ("DATASET=a b=C", True)]
)
def test_a_variable_that_nothing_in_the_makefile_reads_is_refused(said, is_read):
    done = subprocess.run(["make", "-n", "harvest", said], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0) == is_read and ("nothing reads COLUMN" in done.stderr) == (not is_read)


@pytest.mark.parametrize(
    "line",
    [
        "sae-train --variant topk --sizes 3 --cache ./store",
        "sae-train --variant tpok --cache ./store",
        "sae-train --variant topk --set kk=3 --cache ./store",
        "sae-train --variant topk --grid k=16,x --cache ./store",
        "sae-train --recipe attention/run_99 --cache ./store",
        "sae-eval run_1 --evals cores",
        "sae-eval run_1 --set core.windows=2",
        "sae-harvest --tokens ten",
        "sae-store look ./store",
        "torchrun --nproc-per-node 2 --no-python sae-train --variant tpok --cache ./store",
        "hf upload me/a ./a --repo-kind space",
        "hf uplaod me/a ./a",
        "make harvests",
        "make harvest MODELL=pocket",
        "python bench/train.py --nothing",
        "curl example.org",
        "source .venv/bin/deactivate",
    ],
)
def test_a_command_that_is_wrong_is_found(line):
    with pytest.raises((AssertionError, click.ClickException, ValueError, LookupError)):
        check(line)


def test_every_link_leads_to_a_page_a_heading_or_a_file():
    assert BUILD.broken_links(BUILD.pages()) == []
    text = {"docs/a.md": "# One\n[x](b.md) [y](a.md#two) [z](a.md#one) [w](../README.md)"}
    assert [problem.split(", ")[0] for problem in BUILD.broken_links(text)] == [
        "docs/a.md links to docs/b.md",
        "docs/a.md links to docs/a.md#two",
    ]


def test_the_site_has_every_setting_and_its_links_lead_to_files(tmp_path):
    BUILD.main(str(tmp_path))
    variants = (tmp_path / "docs/settings_variants.html").read_text()
    assert all(f'<h2 id="{name}">' in variants for name in variant_registry.names())
    assert "Peak learning rate" in variants
    evaluations = (tmp_path / "docs/settings_evaluations.html").read_text()
    assert all(f'<h2 id="{name}">' in evaluations for name in evals.names())
    for page in tmp_path.rglob("*.html"):
        for address in Addresses.of(page.read_text()):
            path = address.partition("#")[0]
            assert not path or (page.parent / path).is_file(), f"{page}: {address}"


def test_pages_take_the_place_of_pages_and_of_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(BUILD, "pages", lambda: {"README.md": "# A"})
    BUILD.main(str(tmp_path))
    (tmp_path / "old.html").touch()
    BUILD.main(str(tmp_path))
    assert not (tmp_path / "old.html").exists()
    for name in ("source.py", "index.html"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(BUILD.FolderTaken, match="left as they are"):
            BUILD.main(str(folder))
        assert (folder / name).read_text() == "mine"


def test_a_table_without_a_heading_has_a_name_in_the_menu_and_its_deviations_stay_with_their_means():
    """The menu had five raw paths, and a cell `0.79 ± 0.019` took three lines."""
    name, text = "docs/studies/decisive/attention_plan.md", "| SAE | dead |\n|---|--:|\n| base | 0.79 ± 0.019 |"
    page = BUILD.document(name, text, {name: text})
    assert "<title>attention plan: decisive: saemill" in page and ">attention plan: decisive</a>" in page
    assert "0.79&nbsp;±&nbsp;0.019" in page


class Addresses(HTMLParser):
    """What a page of the site leads to inside it."""

    @classmethod
    def of(cls, text: str) -> list[str]:
        reader = cls()
        reader.found = []
        reader.feed(text)
        return reader.found

    def handle_starttag(self, tag, attrs):
        self.found += [to for key, to in attrs if key in ("href", "src") and "://" not in to and to != "data:,"]
