"""What all commands have in common: help with examples, completion, JSON for scripts, quiet where nobody looks."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from shutil import which
from typing import Any
from unittest.mock import Mock

import click
import pytest
from click.shell_completion import ShellComplete, get_completion_class
from click.testing import CliRunner, Result

from saemill.cache_schema.shell_completion import Bash, Fish, Zsh
from saemill.evaluate.output import plots
from saemill.evaluate.run import command, offer_training
from saemill.studies import study
from saemill.train.config.recipe import Recipe, Sae

COMMANDS = {
    "sae-harvest": "harvest.cli",
    "sae-train": "train.cli",
    "sae-eval": "evaluate.cli",
    "sae-store": "cache_schema.cli",
    "sae-export": "train.export",
    "sae-study": "studies.study",
}
QUICK = ["--set", "core.batch_size_prompts=4", "--set", "core.resamples=2", "--set", "core.ablations=zero"]
SHORT = ["--set", "data.batch_tokens=256", "--tokens", "1k", "--width", "32", "--device", "cpu"]


def main_of(name: str) -> click.Command:
    return import_module(f"saemill.{COMMANDS[name]}").main


def with_subcommands() -> list[tuple[str, click.Command]]:
    store = main_of("sae-store")
    assert isinstance(store, click.Group)
    return [*((name, main_of(name)) for name in COMMANDS), *((f"sae-store {n}", c) for n, c in store.commands.items())]


@pytest.fixture(scope="module")
def small(make_world: Any) -> Any:
    """A store long enough to train on: one batch of recipes, which is 4,096 tokens."""
    from .conftest import make_tokens

    return make_world(tokens=make_tokens(440), splits=(400, 420), layers=(2,), attention_layers=(1, 2, 3))


@pytest.fixture
def type_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command as in a pipe: `type_("sae-train", "--variant", "topk")`."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *words: object, code: int = 0, answer: str | None = None) -> Result:
        result = CliRunner().invoke(main_of(name), [str(word) for word in words], input=answer, prog_name=name)
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return call


def is_plain(text: str) -> bool:
    """Neither colours nor a cursor that moves."""
    return re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text) is None


def examples(command: click.Command) -> list[str]:
    """The lines below Examples, as --help prints them."""
    text = click.Context(command, info_name="it", max_content_width=100).command.get_help(click.Context(command))
    return [line.strip() for line in re.split(r"\n\s*Examples?:\n", text)[1].splitlines()]


@pytest.mark.parametrize(("name", "command"), with_subcommands())
def test_help_has_examples_and_each_can_be_typed(name: str, command: click.Command) -> None:
    lines = examples(command)
    assert lines
    for line in lines:
        words = shlex.split(line.partition("|")[0], comments=True)
        words = words[words.index("--no-python") + 1 :] if words[0] == "torchrun" else words
        assert shlex.join(words).startswith(name)
        main = main_of(words[0])
        rest = words[1:]
        if isinstance(main, click.Group):
            main, rest = main.commands[rest[0]], rest[1:]
        main.make_context(words[0], rest)  # an unknown option or a value of another kind is an error


@pytest.mark.parametrize(
    ("name", "words", "incomplete", "expected"),
    [
        ("sae-train", ["--variant"], "topk", {"topk"}),
        ("sae-train", ["--recipe"], "attention/run_4", {"attention/run_4"}),
        ("sae-train", ["--resume"], "mi", {"mine"}),
        ("sae-train", ["--out", "elsewhere", "--resume"], "", {"other"}),
        ("sae-train", ["--init"], "mi", {"mine"}),
        ("sae-train", [], "--js", {"--json"}),
        ("sae-eval", ["--evals"], "core,sparse_probing_", {"core,sparse_probing_sae_probes"}),
        ("sae-eval", ["--evals"], "al", {"all"}),
        ("sae-eval", ["mine"], "mi", {"mine"}),
        ("sae-export", [], "mi", {"mine"}),
        ("sae-study", [], "tie", {"tiered"}),
    ],
)
def test_completion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str], incomplete: str, expected: set[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = '{"cache": {}, "saes": {}}'
    for run, config in {"runs/mine": begun, "runs/mixtral": "{}", "elsewhere/other": begun}.items():
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.json").write_text(config)
    found = ShellComplete(main_of(name), {}, name, "_X_COMPLETE").get_completions(words, incomplete)
    assert {item.value for item in found} == expected


@pytest.mark.parametrize("shell", [Bash, Fish, Zsh])
def test_a_value_after_an_equals_sign_is_completed(monkeypatch: pytest.MonkeyPatch, shell: type[ShellComplete]) -> None:
    """bash takes it for a word of its own; the others replace the option too."""
    is_bash = shell is Bash
    monkeypatch.setenv("COMP_WORDS", "sae-eval --evals = core,tie" if is_bash else "sae-eval --evals=core,tie")
    monkeypatch.setenv("COMP_CWORD", "--evals=core,tie" if shell is Fish else "3" if is_bash else "1")
    found = get_completion_class(shell.name)
    assert found is shell
    completion = shell(main_of("sae-eval"), {}, "sae-eval", "_SAE_EVAL_COMPLETE")
    (item,) = completion.get_completions(*completion.get_completion_args())
    assert item.value == ("core,tiers" if is_bash else "--evals=core,tiers")


@pytest.mark.skipif(which("fish") is None, reason="needs fish")
def test_fish_completes_the_last_of_several_names(tmp_path: Path) -> None:
    """What lies behind a comma was cut off."""
    (tmp_path / "sae-eval").write_text(
        f'#!/bin/sh\n{sys.executable} -c \'import sys; sys.argv[0] = "sae-eval"\n'
        'from saemill.evaluate.cli import main; main()\' "$@"\n'
    )
    (tmp_path / "sae-eval").chmod(0o755)
    load, complete = "env _SAE_EVAL_COMPLETE=fish_source sae-eval | source", "complete -C 'sae-eval --evals core,tie'"
    paths = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["fish", "-c", f"{load}; {complete}"], env=paths, capture_output=True, text=True, timeout=60)
    assert done.stdout == "core,tiers\n", done.stderr


def test_every_command_is_plain_in_a_pipe_and_json_is_one_document(
    small: Any, type_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(*words: object, **how: Any) -> Result:
        result = type_(*words, **how)
        assert is_plain(result.stdout) and is_plain(result.stderr), repr(result.output)
        return result

    def parsed(*words: object, **how: Any) -> Any:
        return json.loads(plain(*words, "--json", **how).stdout)

    plain("sae-store", "info", small.store)
    assert parsed("sae-store", "info", small.store)["layers"] == [2]
    assert parsed("sae-store", "verify", small.store)["damaged"] == []
    assert "all exactly as committed" in plain("sae-store", "verify", small.store).stdout
    digest = plain("sae-store", "digest", small.store).stdout.strip()
    told = parsed("sae-store", "digest", small.store)
    assert told.pop("shards") == told.pop("shards_committed") and told == {"url": small.store, "digest": digest}

    export = ["run_1", "--to", "sparsify"]
    train = ["sae-train", "--variant", "topk", "--cache", small.store, "--k", "4", *SHORT]
    assert "next: sae-eval run_1" in plain(*train, "--no-plots").stdout
    (run,) = parsed(*train, "--grid", "seed=0,1", "--no-plots")["runs"]
    assert run["run"] == "run_2" and run["folder"] == "runs/run_2" and set(run["saes"]) == {"topk_seed0", "topk_seed1"}
    assert run == {"folder": "runs/run_2", **json.loads(Path("runs/run_2/result.json").read_text())}

    assert "next: sae-eval run_1 --evals browser " in plain("sae-eval", "run_1", *QUICK, "--no-plots").stdout
    table = parsed("sae-eval", "run_1", "run_2", "--compare", *QUICK, "--no-plots")
    assert [row["sae"] for row in table["results"]] == ["run_1/topk", "run_2/topk_seed0", "run_2/topk_seed1"]
    assert [row["status"] for row in table["results"]] == ["kept", "done", "done"]
    assert table["results"][0]["metrics"]["sparsity.l0"] == pytest.approx(4, abs=0.5)
    assert Path(table["results"][0]["file"]).is_file() and table["problems"] == []
    table = parsed("sae-eval", "run_1", "nowhere", "--resume", *QUICK, "--no-plots", code=1)
    assert table["problems"][0].startswith("no run 'nowhere'") and len(table["results"]) == 1

    assert "run_1/topk (sae_lens) -> exported (sparsify)" in plain("sae-export", *export, "--out", "exported").stdout
    exported = parsed("sae-export", *export, "--out", "again")
    assert exported["read"] == [{"folder": "runs/run_1/topk", "kind": "sae_lens"}]
    assert exported["written"] == {"folder": "again", "kind": "sparsify"} and exported["difference"] < 1e-5
    recipe = Recipe("run_0", "", (Sae("standard", "standard"),), evals=("decoder_cosine",), study="tiered")
    monkeypatch.setattr(study, "runs_of", lambda _: (recipe,))
    monkeypatch.setattr(plots, "make_plots", lambda *_: [])  # most of a short study's time
    result = plain("sae-study", "tiered", "--cache", small.store, *SHORT[:-2], "--json")
    assert result.stderr.startswith("$ sae-train --recipe tiered/run_0")
    (found,) = json.loads(result.stdout)["studies"]
    assert found == {
        "folder": "study_runs/tiered",
        "saes": json.loads(Path("study_runs/tiered/table.json").read_text()),
    }


def test_results_without_pages_of_their_latents_say_how_these_are_made(tmp_path: Path, small: Any) -> None:
    words = {"targets": ("my run",), "runs": "else where"}
    words |= dict.fromkeys(("cache", "layer", "model", "dtype", "massive_norms"))

    def said(
        hook: str = "resid", eval_id: str = "core", document: Any = (), store: str | None = small.store
    ) -> str | None:
        subject = Mock(home=tmp_path, width=2048, hooks=(hook, hook), cache_url=store)
        return command.suggest_browser([Mock(subject=subject, eval_id=eval_id, document=document)], words)

    how = "next: sae-eval 'my run' --runs 'else where' --evals browser    # pages that show all latents, about 8.19 MB"
    assert said() == how
    words["layer"] = 0
    assert said() == how.replace(" --evals", " --layer 0 --evals")
    assert said(hook="mlp_in") is said(eval_id="browser") is said(document=None) is None  # no pages; asked for; failed
    assert said(store=None) is said(store=str(tmp_path / "gone")) is None  # it would end in `give --cache`
    words["cache"] = small.store
    assert said(store=None) == how.replace(" --evals", f" --cache {small.store} --layer 0 --evals")
    words |= {"model": "pocket", "dtype": "float32", "massive_norms": "inf"}
    assert " --layer 0 --model pocket --dtype float32 --massive-norms inf --evals browser " in (said() or "")
    (tmp_path / "browser").mkdir()
    assert said() is None


def test_colours_are_left_out_where_no_color_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from saemill.evaluate.run.console_table import make_console

    monkeypatch.setenv("FORCE_COLOR", "1")  # as at a terminal
    for is_off in (False, True):
        if is_off:
            monkeypatch.setenv("NO_COLOR", "1")
        console = make_console()
        with console.capture() as said:
            console.print("warning", style="yellow")
        assert ("\x1b[33m" in said.get()) != is_off


def recipe_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_4` is a short run of one SAE, so that a test can wait for it."""
    settings = {"width": 32, "course.tokens": 2000, "data.batch_tokens": 256}
    recipe = Recipe("run_4", "", (Sae("standard", "standard"),), settings, study="attention")
    monkeypatch.setattr(offer_training, "find_recipes", lambda _: (recipe,))
    monkeypatch.setattr(command, "is_at_terminal", lambda: True)


def test_at_a_terminal_a_missing_run_with_a_recipe_is_trained_on_the_way(
    small: Any, type_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_of_one(monkeypatch)
    result = type_("sae-eval", "run_4", "--cache", small.store, "--json", *QUICK, "--no-plots", answer="\n")
    for said in (
        "no run 'run_4' in runs, but there is a recipe attention/run_4: timing a few steps",
        "1 SAE side by side, 7 steps, about ",
        f"$ sae-train --recipe attention/run_4 --cache {small.store} --out runs --name run_4 --no-plots",
    ):
        assert said in result.stderr
    (row,) = json.loads(result.stdout)["results"]
    assert row["sae"] == "run_4/standard" and row["status"] == "done"
    assert not {"plots", "report.html"} & {path.name for path in Path("runs/run_4").iterdir()}
    assert "recipe" not in type_("sae-eval", "run_4", *QUICK, "--no-plots").output  # it is there now


def test_at_a_terminal_a_run_that_is_still_trained_stops_no_other(
    small: Any, builder: Any, type_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "is_at_terminal", lambda: True)
    builder.run(small, "run_1", {"small": builder.make_sae()})
    builder.run(small, "run_2", {}, finished=False)
    words = ["--cache", small.store, "--device", "cpu", "--evals", "decoder_cosine", "--no-plots", "--json"]
    result = type_("sae-eval", "run_1", "run_2", *words, code=1)
    found = json.loads(result.stdout)
    assert [row["status"] for row in found["results"]] == ["done"] and "has not ended" in found["problems"][0]


@pytest.mark.parametrize("words", [["--cache", "nowhere"], []])
def test_who_declines_or_has_no_store_is_told_the_command(
    small: Any, type_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    recipe_of_one(monkeypatch)
    words = words or ["--cache", small.store]
    result = type_("sae-eval", "run_4", *words, answer="n\n", code=1)
    assert ("[Y/n]" in result.stderr) == (words[1] == small.store)
    assert f"`sae-train --recipe attention/run_4 --cache {words[1]}` trains the one" in result.stderr
    assert not Path("runs").exists()


def test_the_store_that_the_demo_leaves_is_found_and_named(
    small: Any, type_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """README names `sae-eval run_4`, and `make demo` may be all that was run before."""
    recipe_of_one(monkeypatch)
    said = type_("sae-eval", "run_4", code=1).stderr
    assert "no store here yet" in said and "`sae-train --variant topk --cache ./store` trains a first run" in said
    Path("demo").mkdir()
    Path("demo/store").symlink_to(small.store)
    result = type_("sae-eval", "run_4", answer="n\n", code=1)
    assert "timing a few steps of it on ./demo/store" in result.stderr and "[Y/n]" in result.stderr
    assert "`sae-train --recipe attention/run_4 --cache ./demo/store` trains the one" in result.stderr
    Path("store").symlink_to(small.store)  # what was harvested for oneself comes first
    assert "attention/run_4 --cache ./store`" in type_("sae-eval", "run_4", answer="n\n", code=1).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "less than one batch"),  # the store has not even that
        (["--evals", "cor"], "unknown evaluation 'cor'"),
        (["--evals", "browser", "--set", "browser.top=-1"], "top: expected 0 or more, found -1"),
        (["--set", "core.resamples=many"], "core.resamples: expected a whole number, found 'many'"),
        (["--massive-norms", "0.5"], "--massive-norms: expected a multiple"),
        (["--massive-norms", "abc"], "--massive-norms: expected a multiple"),
        (["--device", "nope"], "--device nope"),
    ],
)
def test_what_is_refused_is_said_before_the_question(
    world: Any, type_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    """And before steps of the recipe are timed."""
    recipe_of_one(monkeypatch)
    result = type_("sae-eval", "run_4", "--cache", world.store, *words, code=1)
    assert said in result.stderr and "[Y/n]" not in result.stderr
    assert ("timing" in result.stderr) == (words == [])


def test_a_long_run_has_a_shorter_one_beside_it(
    small: Any, type_: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_of_one(monkeypatch)
    recipe = Recipe("run_4", "", (Sae("standard", "standard"),), {"width": 32, "data.batch_tokens": 256})
    monkeypatch.setattr(offer_training, "find_recipes", lambda _: (recipe,))
    monkeypatch.setattr(offer_training, "estimate_seconds", lambda *_: 16 * 3600.0)
    result = type_("sae-eval", "run_4", "--cache", small.store, answer="n\n", code=1)
    assert "one epoch takes about 60.0 minutes: sae-train --recipe attention/run_4" in result.stderr
    assert "--name run_4 --epochs 1\n" in result.stderr and "about 16.0 hours [y/N]" in result.stderr


def test_a_real_terminal_is_asked(small: Any, tmp_path: Path) -> None:
    """Without one the same words end with the command: `test_a_run_of_a_recipe_says_how_it_is_made`."""
    words = [sys.executable, "-m", "saemill.evaluate.cli", "run_0", "--cache", small.store, "--device", "cpu"]
    seen, status = at_a_terminal(words, tmp_path, "n")
    assert status == 1 and "[Y/n]" in seen and "sae-train --recipe attention/run_0" in seen


def at_a_terminal(words: list[str], folder: Path, answer: str) -> tuple[str, int]:
    """What a person sees who gives this answer to the question."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder)
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 120
    try:
        while time.monotonic() < deadline and (select.select([ours], [], [], 0.2)[0] or process.poll() is None):
            if select.select([ours], [], [], 0)[0]:
                try:
                    seen += os.read(ours, 65536)
                except OSError:  # the other side is closed
                    break
            if answer and b"[Y/n]" in seen:
                os.write(ours, f"{answer}\n".encode())
                answer = ""
        return seen.decode(), process.wait(30)
    finally:
        process.kill()
        os.close(ours)
