"""saemill from Python: the same words as the commands, and what comes back."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saemill
from saemill import Store, evaluate, harvest, load_sae, train
from saemill.api import store as store_module
from saemill.api.command_words import words_of
from saemill.cache_schema import RequestInvalid, StoreMissing, info
from saemill.cache_schema.formats_to_import import NumpySource
from saemill.cache_schema.import_into_store import ImportSettings, import_store
from saemill.cache_schema.sites import RESID, Site
from saemill.evaluate.cli import main as sae_eval
from saemill.evaluate.errors import TargetUnknown
from saemill.harvest.cli import main as sae_harvest
from saemill.harvest.cli import make_config
from saemill.train.cli import main as sae_train
from saemill.train.data.batches_for_others import Batches
from saemill.train.engine.fleet_of_saes import Fleet
from saemill.train.errors import ConfigInvalid, RunMissing

HOSTILE = "<script>alert('model')</script>"
QUICK: dict[str, Any] = {"set": {"data.batch_tokens": 256}, "width": 32, "device": "cpu", "plots": False}
ROOT = Path(saemill.__file__).parent
PAGES = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]


def import_into(store: Path, folder: Path, **settings: Any) -> None:
    source = NumpySource({Site(RESID, 4): folder / "acts.npy"}, folder / "tokens.npy")
    settings |= {"validation_share": 0.05, "test_share": 0.05, "shard_windows": 256}
    import_store(str(store), source, ImportSettings(HOSTILE, **settings), lambda *_: None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 800 windows of 8 tokens, of a model with a hostile name."""
    folder = tmp_path_factory.mktemp("imported")
    rng = np.random.default_rng(0)
    np.save(folder / "acts.npy", rng.standard_normal((800, 8, 16)).astype(np.float32))
    np.save(folder / "tokens.npy", rng.integers(3, 50, (800, 8)))
    import_into(folder / "store", folder)
    return folder / "store"


@pytest.fixture
def run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    return train(cache=path, variant="topk", grid={"k": [2, 4]}, tokens="1k", **QUICK)


def test_importing_the_package_imports_nothing_and_its_names_work_in_any_order() -> None:
    code = """
import sys, saemill
brought = {"torch", "numpy", "click", "transformers"} & set(sys.modules)
assert not brought, brought
assert callable(saemill.evaluate) and callable(saemill.harvest)
import saemill.train.engine
from saemill.train import load_sae as same
from saemill import train, load_sae
assert callable(train) and train is saemill.train is sys.modules["saemill.train"]
assert train.engine is saemill.train.engine
assert load_sae is same is saemill.load_sae
assert "transformers" not in sys.modules
try:
    saemill.trian
except AttributeError as error:
    assert "trian" in str(error)
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_functions(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("""
from saemill import Store, evaluate, harvest, load_sae, train
from saemill.train import load_sae as same
from saemill.train.engine.fleet_of_saes import Fleet

store: Store = harvest(model="pocket", out="./store")
rows: list[dict[str, object]] = train(cache=store, variant="topk").rows
text: str = repr(evaluate("run_1", evals="core"))
length: int = len(store.batches(layers=19)) + load_sae("run_1").d_in + same("run_1").d_in + len(Fleet.__name__)
wrong: int = train(variant="topk")
""")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/saemill").symlink_to(ROOT, target_is_directory=True)  # checkers do not see an editable install
    checker = [
        sys.executable,
        "-m",
        "pyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        str(tmp_path / "mine.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
    said = json.loads(subprocess.run(checker, capture_output=True, text=True, env=environment).stdout)[
        "generalDiagnostics"
    ]
    assert [line["range"]["start"]["line"] + 1 for line in said] == [10], said


@pytest.mark.parametrize(("verb", "command"), [(harvest, sae_harvest), (train, sae_train), (evaluate, sae_eval)])
def test_the_words_are_the_commands(verb: Any, command: Any) -> None:
    taken = inspect.signature(verb).parameters
    assert set(taken) == {option.name for option in command.params} - {"is_json", "is_dry_run"}
    assert all(taken[name].default == "runs" for name in ("out", "runs") if name in taken and verb is not harvest)


def test_a_run_has_rows_and_saes(run: Any, path: Path) -> None:
    assert run.saes == ("topk_k2", "topk_k4") and run.name == "run_1"
    assert [row["l0"] for row in run.rows] == pytest.approx([2, 4], abs=0.2)
    assert run.results == json.loads(Path("runs/run_1/result.json").read_text())
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for which in (1, -1, "topk_k4"):
        assert torch.equal(run.load(which).encode(x), load_sae("run_1/topk_k4").encode(x))
    with pytest.raises(RunMissing, match="no SAE 7: choose one of topk_k2, topk_k4"):
        run.load(7)
    assert repr(run).startswith("Run('runs/run_1'): 3 steps; topk_k2: L0 2.0")
    run.results["diverged"] = {"standard": "diverged at step 2"}
    assert repr(run).endswith("; standard: diverged at step 2")
    assert "<p>standard: diverged at step 2</p>" in run._repr_html_()
    config = json.loads(Path("runs/run_1/config.json").read_text())
    assert config["cache"]["url"] == str(path) and config["data"]["batch_tokens"] == 256


def test_a_run_beside_the_folder_of_runs_is_itself(run: Any, path: Path) -> None:
    """Others look under `runs` first, where another has its name."""
    other = train(cache=path, variant="topk", k=3, tokens="1k", out=".", name=run.name, **QUICK)
    assert other.load("topk").gate.k == 3 and evaluate(other, evals="decoder_cosine", plots=False).rows[0]["sae"]
    assert Path(os.fspath(other)) == Path("run_1").absolute() and type(run)("run_1").path == other.path


def test_a_run_that_has_not_ended_says_so(run: Any) -> None:
    (run.path / "result.json").unlink()
    with pytest.raises(RunMissing, match=r"has not ended: go on with train\(resume='runs/run_1'\)"):
        type(run)(run.path)


def test_a_table_has_a_row_for_each_sae(run: Any) -> None:
    table = evaluate(run, evals=["decoder_cosine", "core"], plots=False, device="cpu")
    assert [row["sae"] for row in table.rows] == ["run_1/topk_k2", "run_1/topk_k4"]
    assert table.rows[0]["decoder_cosine.mean"] > 0
    assert table.results[0]["eval_type_id"] == "decoder_cosine"
    assert any(note.startswith("incomplete: core of run_1/topk_k2") for note in table.notes)  # nobody has that model
    assert '<th title="decoder_cosine.mean">mean</th>' in table._repr_html_()  # as short as a terminal has it
    assert "decoder_cosine: " in repr(table) and "run_1/topk_k4" in repr(table)
    assert "LoadedSae" not in repr(vars(table))  # whose weights a notebook would hold
    (one,) = evaluate("run_1/topk_k2", evals="decoder_cosine", resume=True, plots=False, device="cpu").rows
    assert one["sae"] == "run_1/topk_k2"


def test_words_may_be_numbers_of_numpy_and_lists_of_any_kind() -> None:
    grid = {"seed": range(3), "layers": [np.arange(2), (3,)], "optim.lr": np.array([0.5])}
    read = words_of("train", (), {"variant": ("topk",), "k": np.int64(16), "lr": np.float32(0.5), "grid": grid})
    assert (read["k"], read["lr"]) == (16, 0.5)
    assert read["grid"] == ("seed=0,1,2", "layers=[0, 1],[3]", "optim.lr=0.5")
    assert words_of("harvest", (), {"attention_layers": range(17, 20)})["attention_layers"] == "17,18,19"
    assert words_of("harvest", (), {"attention_layers": (), "device": torch.device("cuda:1")})["device"] == "cuda:1"
    assert make_config(words_of("harvest", (), {"resid_layers": (), "attention_layers": []})).attention_layers == "none"


def test_a_thread_can_train(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main one may catch signals."""
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, cache=path, variant="topk", k=2, tokens="1k", **QUICK).result().saes == ("topk",)


def test_a_store_of_the_bundled_model_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(path) as store:
        found = store_module.facts(store) | {"model": "pocket", "revision": info.BUNDLED[1]}
        monkeypatch.setattr(store_module, "facts", lambda _: found)
        assert "pocket (the small bundled model, not Gemma-2-2B)" in store._repr_html_()


def test_they_show_themselves_and_names_are_text(run: Any, path: Path) -> None:
    with Store(path) as store:
        page = store._repr_html_()
        assert "&lt;script&gt;alert(&#x27;model&#x27;)" in page and "5,760" in page
        assert repr(store).startswith(f"Store({str(path)!r}): ")
    evaluated = evaluate(run, evals="decoder_cosine", plots=False, device="cpu")
    (hostile,) = (Path("runs") / "<img src=x>[k=32]",)
    run.path.rename(hostile)
    moved = type(run)(hostile)
    pages = (
        page,
        moved._repr_html_(),
        evaluated._repr_html_(),
        evaluate(moved, plots=False, device="cpu")._repr_html_(),
    )
    for text in pages:
        tags = {tag.strip("/").split()[0] for tag in re.findall(r"<([^>]*)>", text)}
        assert "table" in tags and tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
        assert text.count("<td") == text.count("</td>")
    assert f"\n{hostile.name}/topk_k2" in repr(evaluate(moved, evals="decoder_cosine", plots=False, device="cpu"))
    assert "&lt;img src=x&gt;" in pages[1] and "&lt;img src=x&gt;" in pages[3]


def test_batches_of_the_store_are_those_of_training(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    trained, step = [], Fleet.step

    def noting(fleet: Fleet, draw: Any) -> Any:
        trained.append(draw.batch(fleet.needs["topk"]).x)
        return step(fleet, draw)

    monkeypatch.setattr(Fleet, "step", noting)
    train(cache=path, variant="topk", k=2, tokens="1k", out=tmp_path, **QUICK)
    with Store(path) as store:
        batches = list(store.batches(layers=4, batch_tokens=256, device="cpu", scaled=True))
        assert len(trained) == 3 and all(map(torch.equal, trained, batches))
        assert float(torch.cat(batches).norm(dim=1).mean()) == pytest.approx(4, rel=0.05)
        other = next(store.batches(layers=4, batch_tokens=256, device="cpu", scaled=True, seed=1))
        assert not torch.equal(other, batches[0])


def test_batches_of_the_store_are_as_asked(path: Path, tmp_path: Path) -> None:
    rows = torch.from_numpy(np.load(path.parent / "acts.npy"))
    with Store(path) as store:

        def batches(layers: Any = 4, batch_tokens: int = 256, **words: Any) -> Batches:
            return store.batches(layers, batch_tokens=batch_tokens, device="cpu", **words)

        whole = list(batches(shuffle=False))
        assert len(whole) == 720 * 8 // 256 and torch.equal(torch.cat(whole), rows.flatten(0, 1)[: 22 * 256])
        held_out = batches(shuffle=False, split="validation")
        assert torch.equal(next(held_out), rows[720:].flatten(0, 1)[:256]) and held_out.state_dict()["split"] != "train"
        assert len(batches(epochs=2)) == 2 * len(whole)
        shares = zip(*(batches(shuffle=False, rank=rank, size=2) for rank in range(2)), strict=True)
        assert all(torch.equal(torch.cat(share), x) for share, x in zip(shares, whole, strict=True))
        bounds = [batches(massive_norms=of).state_dict()["largest_norms"] for of in ("store's", 10, 20, None)]
        median = bounds[0]["4"] / 10
        assert bounds == [{"4": 10 * median}, {"4": 10 * median}, {"4": pytest.approx(20 * median)}, {}]
        for layers, shape in ((np.int64(4), (10, 16)), ((4,), (10, 1, 16)), (np.array([4]), (10, 1, 16))):
            assert next(batches(layers, 10)).shape == shape
        with pytest.raises(ConfigInvalid, match="expected a device like"):
            store.batches(layers=4, device="nonsense")
        assert batches(exact=True)
    import_into(tmp_path / "small", path.parent, stored_as="int8")
    with Store(tmp_path / "small") as store:
        assert batches()
        with pytest.raises(RequestInvalid, match="keeps them as int8"):
            batches(exact=True)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda path: train(varient="topk"), TypeError, "did you mean 'variant'"),
        (lambda path: train(variant="topk", cache=path, tokens="many"), ValueError, "expected a number like 50M"),
        (lambda path: train("topk"), TypeError, "positional"),
        (lambda path: train(variant="topk", cache=path, k=object()), TypeError, "a number or a list of them, found <o"),
        (lambda path: harvest(model="pocket", tokens=""), ValueError, "--tokens: expected a whole number"),
        (lambda path: harvest(model="pocket", attention_layers=""), ValueError, "--attention-layers: expected layers"),
        (
            lambda path: train(variant="topk", cache=path, k=[16, 32]),
            ValueError,
            "'--k': expected one value, found [16",
        ),
        (lambda path: train(variant="topk", cache=path, k=range(2)), ValueError, "as grid={'k': [16, 32]}"),
        (lambda path: train(variant="topk", cache=path, grid=3), ConfigInvalid, "a grid like k=16,32,64, found '3'"),
        (lambda path: train(variant="topk", cache=path, set=3), ConfigInvalid, "optim.lr=1e-4, found '3'"),
        (lambda path: train(variant="topkk", cache=path), ValueError, "did you mean 'topk'"),
        (lambda path: train(recipe="attention", cache=path), ConfigInvalid, "one run, like attention/run_0"),
        (lambda path: evaluate("nowhere"), TargetUnknown, "no run 'nowhere'"),
        (lambda path: evaluate(), ValueError, "TARGET"),
        (lambda path: harvest(model="pocket", tokens="lots"), ValueError, "10M or 1.5B, found 'lots'"),
        (lambda path: harvest(dtype="float8"), ValueError, "float8"),
        (lambda path: Store(path / "none"), StoreMissing, "there is no store"),
        (lambda path: Store(path).batches(layers=9, device="cpu"), ValueError, "residuals of layer 9"),
        (lambda path: Store(path).batches(layers=4, hook="mlp_in", device="cpu"), ValueError, "mlp_in of layer 4 (it"),
    ],
)
def test_mistakes_are_errors_with_a_remedy(
    path: Path, tmp_path: Path, monkeypatch: Any, call: Any, error: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as raised:
        call(path)
    assert said in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_every_python_snippet_of_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small part of the text; the one that makes the store first."""
    monkeypatch.chdir(tmp_path)
    found = {code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)}
    order = ("harvest(", "stream(", "register_forward_hook(", "without(")
    snippets = sorted(found, key=lambda code: tuple(word not in code for word in order))
    assert len(snippets) == 5
    small = {
        '"300k"': '"6k"',
        "4096": "512",
        "epochs=2": "epochs=1, width=64, plots=False",
        "(run, ": "(run, plots=False, ",
    }
    small |= {"1e-3}": '1e-3, "data.batch_tokens": 512}'}
    made, read, inside, loaded = [
        {"x": torch.randn(3, 128, generator=torch.Generator().manual_seed(0))} for _ in snippets[1:]
    ]
    for code, names in zip(snippets, (made, read, inside, inside, loaded), strict=True):
        is_first = "harvest(" in code
        for word, shorter in small.items() if is_first else ():
            assert word in code
            code = code.replace(word, shorter)
        exec(code, names)
    assert isinstance(made["store"], Store) and made["run"].saes == ("topk",) and len(made["table"].rows) == 1
    assert loaded["x_hat"].shape == (3, 128)
    assert "a place" not in str(inside["sae"]) and not torch.equal(inside["changed"], inside["steered"])
    seen: list[torch.Tensor] = []
    handle = inside["at_layer"](inside["without"](12))
    inside["model"].model.layers[19].register_forward_hook(lambda module, args, x: seen.append(x))
    with torch.no_grad():
        inside["model"](torch.arange(40)[None])
        handle.remove()
        inside["model"](torch.arange(40)[None])
        fires = loaded["sae"].encode(seen[1])[..., 12] > 0
    is_changed = (seen[0] != seen[1]).any(-1)  # the model's bfloat16 may swallow what is small
    assert is_changed.any() and not is_changed[~fires].any()
    for part in made["store"].stream(read["request"]):
        attention = part.attention[17]
        assert attention.to_scipy().nnz == attention.entries
