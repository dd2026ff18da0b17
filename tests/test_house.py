"""The house: who may import whom, what importing starts, and what a wheel holds."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from saemill import cache_schema
from saemill.cache_schema import errors

ROOT = Path(__file__).parent.parent
ROOMS = ("cache_schema", "harvest", "train", "evaluate", "studies", "api")
FLOORS = {  # of every package, from the ground up: its folders, and the modules beside them; imports lead down
    "cache_schema": (
        "numbers_in_words keep_freed_memory errors users_own_files sites splits stored_dtypes strict_json",
        "shell_completion csr disk_and_cloud_files launcher_environment manifest formats_to_import",
        "layout requests_and_spans",
        "encode_and_read_chunks commits moments shard_claims",
        "token_counts_and_summary open_and_check_root",
        "shard_content reader",
        "massive_activations",
        "info watch writer",
        "__init__ import_into_store verify_and_repair",
        "cli",
    ),
    "harvest": (
        "__init__ errors",
        "pack_windows network pocket progress",
        "corpus model sparsify_attention stats",
        "capture config tokenise_corpus",
        "process store_plan shards",
        "create_or_resume_store estimate_cost",
        "run",
        "dry_run",
        "cli",
    ),
    "train": (
        "errors file_registry",
        "data parallel",
        "sae/kernels/triton",
        "sae/kernels",
        "sae",
        "disk engine sae/attention sae/shapes",
        "disk/formats terms",
        "kit",
        "config variants",
        "run study_recipes",
        "cli_support train_runs",
        "dry_run",
        "__init__ cli export",
    ),
    "evaluate": (
        "__init__ errors",
        "model",
        "context",
        "evals/evaluation_contract",
        "evals/absorption evals/core evals/measures evals/probing evals/ravel evals/unlearning output/figures",
        "evals evals/browser output/plots",
        "evals/autointerp output/report",
        "output",
        "run",
        "cli",
    ),
    "studies": ("__init__ compare_and_decide", "run_results seed_plots", "tables", "study"),
    "api": ("__init__ notebook_html command_words", "run store table", "calls"),
}
BELOW_ITS_FOLDER = ("evals/evaluation_contract",)  # what folders inside a folder stand on
ALL = "all of it"
MAY_IMPORT = {  # rooms of other packages
    "cache_schema": {},
    "harvest": {"cache_schema": ALL},
    "train": {"cache_schema": ALL},
    "evaluate": {
        "cache_schema": ALL,
        "harvest": "corpus errors model network progress sparsify_attention stats",
        "train": "cli_support config data disk dry_run engine errors file_registry kit run sae sae/kernels train_runs",
    },
    "studies": {
        "cache_schema": "cli disk_and_cloud_files launcher_environment strict_json",
        "train": "cli cli_support config disk errors run",
        "evaluate": "cli context errors evals output/figures output/plots run",
    },
    "api": {
        "cache_schema": ALL,
        "harvest": "cli progress run",
        "train": "config cli data disk errors parallel run sae train_runs",
        "evaluate": "cli context output run",
    },
}
NEVER_IMPORTS = {
    "cache_schema": {"torch", "transformers"},
    "harvest": set(),
    "train": {"transformers"},
    "evaluate": set(),
    "studies": set(),
    "api": {"transformers"},
}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imports_of(file: Path) -> tuple[str, ...]:
    return tuple(_imports_of(file))


def _imports_of(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, in full: relative ones as saemill.room.module."""
    package = ("saemill", *file.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            parts = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def inner_imports(room: str) -> Iterator[tuple[Path, list[str]]]:
    for file in sources(room):
        for name in imports_of(file):
            if name.split(".")[0] == "saemill":
                yield file, name.split(".")[1:]


def part_of(file: Path) -> tuple[str, str]:
    """The package of a file, and in it the folder; or the module, where it stands beside folders or below its own."""
    package, *folders = file.relative_to(ROOT).parts[:-1]
    module = "/".join((*folders, file.stem))
    return package, module if not folders or module in BELOW_ITS_FOLDER else "/".join(folders)


def arrows() -> Iterator[tuple[Path, Path]]:
    """Who imports whom, file by file."""
    for room in ROOMS:
        for file, name in inner_imports(room):
            found = [ROOT.joinpath(*name[:length]) for length in range(len(name), 0, -1)]
            modules = (path for base in found for path in (base.with_suffix(".py"), base / "__init__.py"))
            target = next((path for path in modules if path.is_file()), None)
            if target is not None and target != file:
                yield file, target


def shown(file: Path, target: Path) -> str:
    return f"{file.relative_to(ROOT)} imports {target.relative_to(ROOT)}"


def test_every_folder_and_module_has_a_floor():
    listed = {room: sorted(part for floor in FLOORS[room] for part in floor.split()) for room in ROOMS}
    there = {room: sorted({part_of(file)[1] for file in sources(room)}) for room in ROOMS}
    assert listed == there


def test_imports_inside_a_package_lead_down():
    floor_of = {(room, part): floor for room in ROOMS for floor, row in enumerate(FLOORS[room]) for part in row.split()}
    wrong = []
    for file, target in arrows():
        here, there = part_of(file), part_of(target)
        if here[0] == there[0] and here != there and floor_of[there] >= floor_of[here]:
            wrong.append(shown(file, target))
    assert not wrong


def test_packages_import_only_what_they_may():
    wrong = []
    for file, target in arrows():
        (package, _), (other, part) = part_of(file), part_of(target)
        allowed = MAY_IMPORT[package].get(other, "")
        if package != other and allowed != ALL and part not in allowed.split():
            wrong.append(shown(file, target))
    assert not wrong


def test_what_may_be_imported_is():
    """A permission that nobody needs any more goes."""
    used = {(part_of(file)[0], *part_of(target)) for file, target in arrows()}
    idle = [
        f"{package}: {other}/{part}"
        for package, others in MAY_IMPORT.items()
        for other, parts in others.items()
        if parts != ALL
        for part in parts.split()
        if (package, other, part) not in used
    ]
    assert not idle


def test_no_file_imports_itself_over_others():
    """Peel off the files that import none of the rest, or that none of the rest imports: circles remain."""
    imports: dict[Path, set[Path]] = {file: set() for room in ROOMS for file in sources(room)}
    for file, target in arrows():
        imports[file].add(target)
    size = 0
    while size != len(imports):
        size = len(imports)
        imports = {file: targets & imports.keys() for file, targets in imports.items() if targets & imports.keys()}
        imported = {target for targets in imports.values() for target in targets}
        imports = {file: targets for file, targets in imports.items() if file in imported}
    assert not [str(file.relative_to(ROOT)) for file in imports]


def test_nobody_imports_a_variant():
    """Variants are found by their files' names: what names one of them cannot be for all."""
    variants = ROOT / "train" / "variants"
    named = [shown(*arrow) for arrow in arrows() if arrow[1].parent == variants != arrow[0].parent]
    assert not named


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_never_import_what_is_forbidden_to_them(room):
    wrong = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in sources(room)
        for name in imports_of(file)
        if name.split(".")[0] in NEVER_IMPORTS[room]
    ]
    assert not wrong


def test_imports_inside_the_package_are_relative():
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for room in ROOMS
        for file in sources(room)
        for node in ast.walk(tree_of(file))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "saemill")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "saemill" for alias in node.names))
    ]
    assert not wrong


NOTED = {"notes"}  # of a step's view: what its terms say for the log
FILLS = {"add", "append", "clear", "extend", "pop", "setdefault", "update"}


def test_no_frozen_record_is_filled_after_it_was_made():
    """What says that it does not change is read so: containers of such a record are whole when it is made."""
    wrong = []
    for file in (file for room in ROOMS for file in sources(room)):
        tree = tree_of(file)
        records = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        frozen = [one for one in records if any("frozen=True" in ast.unparse(mark) for mark in one.decorator_list)]
        fields = [part for one in frozen for part in one.body if isinstance(part, ast.AnnAssign)]
        held = {
            ast.unparse(part.target)
            for part in fields
            if re.search(r"\b(dict|list|set)\[", ast.unparse(part.annotation))
        }
        for node in ast.walk(tree):
            into: list[ast.expr] = []
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                into = [node.value]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FILLS:
                into = [node.func.value]
            wrong += [
                f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(one)}"
                for one in into
                if isinstance(one, ast.Attribute) and one.attr in held - NOTED
            ]
    assert not wrong


RUNS_WHAT_IT_READS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNS_OR_PICKLES = re.compile(
    r"(builtins\.)?(eval|exec|compile)|os\.(system|popen|exec[lv]p?e?|spawn\w+|posix_spawnp?)|pty\.spawn|"
    r"subprocess\.get(status)?output|torch\.(jit\.)?save|(np|numpy)\.savez\w*"
)
REFUSES_OBJECTS = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False", "np.save": "allow_pickle=False"}
IF_SAID = {"trust_remote_code": "False", "allow_pickle": "False", "shell": "False"}


def runs_or_pickles(call: ast.Call) -> bool:
    """Whether it runs what it is given, or reads or writes what does so when it is read."""
    name, said = ast.unparse(call.func), {word.arg or "": ast.unparse(word.value) for word in call.keywords}
    required, _, value = REFUSES_OBJECTS.get(name.replace("numpy.", "np."), "").partition("=")
    return (
        RUNS_OR_PICKLES.fullmatch(name) is not None
        or (required != "" and said.get(required) != value)
        or any(said.get(word, wanted) != wanted for word, wanted in IF_SAID.items())
    )


RUNS = "eval(x) builtins.exec(x) compile(x,x,x) os.system(x) os.popen(x) os.execvp(x,x) os.spawnl(x,x) pty.spawn(x)"
RUNS += " os.posix_spawn(x,x,x) subprocess.getoutput(x) run(x,shell=True) run(x,shell=y) f(x,trust_remote_code=True)"
RUNS += " torch.load(x) torch.load(x,weights_only=False) torch.save(x,y) np.load(x) numpy.load(x,allow_pickle=True)"
RUNS += " np.save(x,y) np.savez(x,y) f(x,allow_pickle=True)"
RUNS_NOTHING = "re.compile(x) torch.compile(x) model.eval() save_file(x,y) run(x) run(x,shell=False) executor.spawn(x)"
RUNS_NOTHING += " torch.load(x,weights_only=True) np.load(x,allow_pickle=False) np.save(x,y,allow_pickle=False)"


def test_nothing_stored_is_ever_evaluated():
    """No pickle, no eval, no code from beside a model: stored bytes are numbers and JSON."""
    for words, expected in ((RUNS, True), (RUNS_NOTHING, False)):
        calls = [ast.parse(word, mode="eval").body for word in words.split()]
        assert [runs_or_pickles(call) for call in calls] == [expected] * len(calls)
    wrong = []
    for file in (file for room in ROOMS for file in sources(room)):
        for name in imports_of(file):
            if name.split(".")[0] in RUNS_WHAT_IT_READS or RUNS_OR_PICKLES.fullmatch(name):
                wrong.append(f"{file}: {name}")
        calls = (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call))
        wrong += [f"{file}:{call.lineno}: {ast.unparse(call.func)}" for call in calls if runs_or_pickles(call)]
    assert not wrong


def is_of_the_locale(call: ast.Call) -> bool:
    """Whether it reads or writes text, and names no encoding."""
    called, said = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
    name, given = called.rpartition(".")[2], [*map(ast.unparse, call.args), *said.values()]
    modes = [word for word in given if re.fullmatch(r"'[rwxabt+]+'", word)] or ["'r'"] * (called == "open" or not given)
    is_text = name in ("read_text", "write_text", "TextIOWrapper") or said.get("text") == "True"
    return "encoding" not in said and (is_text or (name in ("open", "fdopen") and bool(modes) and "b" not in modes[0]))


TEXT = "open(x) x.open() open(x,'w') x.open('r+') gzip.open(x,'rt') open(x,mode='a') x.read_text() run(x,text=True)"
NO_TEXT = "open(x,'rb') x.open('ab') os.open(x,os.O_RDONLY) Store.open(x) x.read_text(encoding='utf-8') run(x)"


def test_text_is_never_in_the_encoding_of_the_locale():
    """Latin-1 takes every byte: UTF-8 is other text then, without an error."""
    for words, expected in ((TEXT, True), (NO_TEXT, False)):
        calls = [node for node in ast.walk(ast.parse(words.replace(" ", "\n"))) if isinstance(node, ast.Call)]
        assert [is_of_the_locale(call) for call in calls] == [expected] * len(words.split())
    assert not [
        f"{file.relative_to(ROOT)}:{call.lineno}"
        for room in ROOMS
        for file in sources(room)
        for call in ast.walk(tree_of(file))
        if isinstance(call, ast.Call) and is_of_the_locale(call)
    ]


def run_python(code: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@pytest.mark.parametrize(
    "given, found", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_that_wait_spin_briefly_unless_the_user_says_otherwise(given, found):
    """The variable has to be there before torch is loaded, so it is set by what every command loads first."""
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    code = "import sys, saemill, os; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    assert run_python(code, environment).split() == [found, "False"]


def test_importing_the_store_starts_nothing_and_brings_no_torch():
    code = """
import json, sys, threading
import saemill.cache_schema
print(json.dumps([threading.active_count(), sorted(sys.modules)]))
"""
    threads, modules = json.loads(run_python(code))
    assert threads == 1
    assert not {"torch", "transformers", "datasets", "pandas", "s3fs", "click"} & set(modules)


def test_importing_all_of_train_and_evaluate_starts_nothing_and_brings_none_of_what_they_have_no_use_for():
    """Seconds that --help and what only looks at weights would wait for."""
    code = """
import json, pkgutil, sys, threading
for room in ("train", "evaluate"):
    package = __import__(f"saemill.{room}", fromlist=["__path__"])
    for module in pkgutil.walk_packages(package.__path__, f"saemill.{room}."):
        __import__(module.name)
    import torch
    assert not torch.cuda.is_initialized()
    print(json.dumps([threading.active_count(), sorted(sys.modules)]))
"""
    found = [json.loads(line) for line in run_python(code).splitlines()]
    assert [threads for threads, _ in found] == [1, 1]
    of_train, of_evaluate = (set(modules) for _, modules in found)
    assert not {"transformers", "wandb", "datasets", "tensorboard", "accelerate", "huggingface_hub"} & of_train
    assert not {"transformers", "wandb", "datasets"} & of_evaluate


def test_every_command_is_also_a_module_and_neither_completion_nor_help_waits_for_torch():
    """`python -m` in an environment that has no scripts: not a silent success."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    modules = sorted((place.removesuffix(":main") for place in scripts.values()), key=lambda name: name[-4:] != ".cli")
    code = f"""
import io, json, runpy, sys
from contextlib import redirect_stdout, suppress
from click.shell_completion import ShellComplete
from saemill.evaluate.cli import main as e
from saemill.train.cli import main as t
for main, words in ((t, ["--variant"]), (t, ["--recipe"]), (t, ["--resume"]), (e, ["--evals"]), (e, [])):
    ShellComplete(main, {{}}, "x", "_X").get_completions(words, "")
print(json.dumps("torch" in sys.modules))
sys.argv[1:] = ["--help"]
for module in {modules}:
    with redirect_stdout(io.StringIO()) as said, suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    print(json.dumps([module, said.getvalue(), sorted({{"torch", "transformers"}} & set(sys.modules))]))
"""
    waits, *told = [json.loads(line) for line in run_python(code).splitlines()]
    assert not waits, "completion waits for torch"
    assert [module for module, *_ in told] == modules
    for module, said, loaded in told:
        assert f"Usage: python -m {module}" in said, module
        assert not (module.endswith(".cli") and loaded), module  # the others are rarely asked for help


def packages_in_tree() -> list[str]:
    folders = {file.parent.relative_to(ROOT) for room in ROOMS for file in (ROOT / room).rglob("__init__.py")} | {
        Path()
    }
    return sorted(".".join(("saemill", *folder.parts)) for folder in folders)


def test_the_package_list_is_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == packages_in_tree()
    for room in ROOMS:
        for file in sources(room):
            assert (file.parent / "__init__.py").exists(), f"{file} lies in no package"


def test_a_wheel_holds_this_package_and_nothing_beside_it(tmp_path):
    """Modules called `evaluate` or `train` at top level would overwrite other people's."""
    options = ["--no-deps", "-q", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(copy_of_the_sources(tmp_path)), *options, "-w", tmp_path / "out"],
        check=True,
        cwd=tmp_path,
    )
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} - {name.split("/")[0] for name in names if ".dist-info/" in name} == {
        "saemill"
    }
    python = sorted(name for name in names if name.endswith(".py"))
    expected = {"saemill/__init__.py"} | {
        f"saemill/{file.relative_to(ROOT)}" for room in ROOMS for file in sources(room)
    }
    assert set(python) == expected
    assert "saemill/cache_schema/FORMAT.md" in names
    assert not any("held_out" in name for name in names)  # of the pocket model, which only bench/pocket reads


def copy_of_the_sources(folder: Path) -> Path:
    """Building leaves folders behind: it happens to a copy."""
    tracked = [*(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"))]
    for file in [*tracked, *(file for room in ROOMS for file in (ROOT / room).rglob("*") if file.is_file())]:
        if "__pycache__" not in file.parts:
            target = folder / "sources" / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder / "sources"


def test_public_names_are_sorted_and_there():
    assert cache_schema.__all__ == sorted(cache_schema.__all__)
    public = {name for name, value in vars(cache_schema).items() if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(cache_schema, name), type(ast))}
    assert set(cache_schema.__all__) == public - modules


def error_classes(module: ModuleType) -> dict[str, type]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if value.__module__ == module.__name__}


def test_every_error_is_public_and_also_a_builtin():
    plain = {value for value in vars(builtins).values() if isinstance(value, type)} - {object, Exception, BaseException}
    for name, error in error_classes(errors).items():
        assert name in cache_schema.__all__
        assert issubclass(error, errors.StoreError)
        assert error.__doc__, name
        if error is not errors.StoreError:
            assert plain & set(error.__mro__), f"{name} is no builtin error too"


def test_modules_say_what_they_are_for():
    for room in ROOMS:
        for file in sources(room):
            assert ast.get_docstring(tree_of(file)), f"{file} has no docstring"
