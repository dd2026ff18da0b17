"""`sae-export --push-to-hub`, against a server on loopback that speaks the Hub's protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import constants
from huggingface_hub.cli.hf import app as hf

from saemill.evaluate.evals.browser.browser_folder import write_data, write_page
from saemill.train import load_sae
from saemill.train.data.scaling import Stats, unit_stats
from saemill.train.disk.sae_lens_folder import save_sae
from saemill.train.engine.step import Trainee
from saemill.train.errors import RunMissing
from saemill.train.export import main
from saemill.train.run.init_from_trained_sae import source_of
from saemill.train.run.model_card import plain

D = 32
SHARE = Path(__file__).parents[3] / "docs" / "share.md"
HOSTILE = 'a\n---\nlicense: evil\n# <script>x</script> | [b](javascript:c) `d` \ud800\u202e & "e'
CONFIDENCE = {"explained_variance": [0.70, 0.74], "l0": None, "ce_loss_score": [0.951, 0.965]}
CORE = {
    "eval_result_metrics": {
        "sparsity": {"l0": 31.5},
        "model_performance_preservation": {"ce_loss_score": 0.9581, "ce_loss_with_sae": float("nan")},
    },
    "saemill_metrics": {
        "explained_variance": 0.7213,
        "explained_variance_with_massive": 0.9876,
        "massive": {"tokens": 17},
        "confidence_95": CONFIDENCE,
    },
}


class Hub(ThreadingHTTPServer):
    """Repositories in memory: what huggingface_hub asks to create, commit, list and read one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Asked)
        self.repositories: dict[str, dict] = {}
        self.apart: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.has_lfs = False
        self.commits = 0
        self.refuses_commits = 0
        self.refuses_large = 0
        self.user = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, name):
        return self.repositories[name]["files"]

    def create(self, name, private=False):
        self.repositories.setdefault(name, {"files": {".gitattributes": b"*.safetensors"}, "private": private})
        self.repositories[name].setdefault("sha", f"{0:040x}")


class Asked(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format, *values):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = urlsplit(self.path)
        words = parts.path.strip("/").split("/")
        if words == ["api", "whoami-v2"]:
            known = self.headers.get("Authorization") == "Bearer hf_good"
            return self.answer(self.server.user) if known else self.answer({"error": "no"}, 401)
        name = "/".join(words[2:4] if words[0] == "api" else words[:2])
        if name not in self.server.repositories:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        repository = self.server.repositories[name]
        if words[0] != "api":
            return self.resolve(repository, "/".join(words[4:]))
        if "tree" in words:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": blob(data)}
                for path, data in repository["files"].items()
            ]
            return self.answer(entries)
        with_blobs = "blobs" in parse_qs(parts.query)
        siblings = [
            {"rfilename": path} | (self.sizes(data) if with_blobs else {}) for path, data in repository["files"].items()
        ]
        return self.answer(
            {"id": name, "sha": repository["sha"], "private": repository["private"], "siblings": siblings}
        )

    def sizes(self, data):
        """Of a file that lies apart the digest of its pointer is no use."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self.server.apart:
            return {"blobId": blob(data), "size": len(data)}
        return {"blobId": blob(b"pointer"), "lfs": {"sha256": digest, "size": len(data), "pointerSize": 134}}

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses_large:
            return self.answer({"error": "refused"}, self.server.refuses_large)
        self.server.apart[self.path.strip("/")] = data
        return self.answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        words = urlsplit(self.path).path.strip("/").split("/")
        if words[1] == "validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if words[1:3] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.create(name, asked.get("visibility") == "private")
            return self.answer({"url": f"{self.server.url}/{name}"})
        if words[-1] == "batch":
            put = {
                one["oid"]: {"upload": {"href": f"{self.server.url}/{one['oid']}"}}
                for one in json.loads(body)["objects"]
            }
            return self.answer(
                {"objects": [{"oid": oid, "size": 1, "actions": actions} for oid, actions in put.items()]}
            )
        name, repository = "/".join(words[2:4]), self.server.repositories["/".join(words[2:4])]
        if words[4] == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if self.server.has_lfs and "safetensors" in file["path"] else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if self.server.refuses_commits:
            return self.answer({"error": "refused"}, self.server.refuses_commits)
        head, *lines = map(json.loads, body.splitlines())
        if head["value"].get("parentCommit", repository["sha"]) != repository["sha"]:
            return self.answer({"error": "changed"}, 412)
        self.server.commits += 1
        repository["sha"] = f"{self.server.commits:040x}"
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "deletedFile":
                del repository["files"][value["path"]]
                continue
            data = base64.b64decode(value["content"]) if key == "file" else self.server.apart[value["oid"]]
            repository["files"][value["path"]] = data
        return self.answer(
            {"commitUrl": f"{self.server.url}/{name}/commit/{repository['sha']}", "commitOid": repository["sha"]}
        )

    def resolve(self, repository, path):
        data = repository["files"][path]
        self.server.fetched.append(path)
        self.answer(data, headers={"ETag": f'"{blob(data)}"', "X-Repo-Commit": repository["sha"]})

    def answer(self, value, status=200, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path, battery, stats):
    """A finished run of three SAEs, one of which SAELens has no architecture for."""
    home = tmp_path / "runs" / "run_1"
    home.mkdir(parents=True)
    for variant in ("topk", "batchtopk", "positional"):
        metadata = {
            "layers": [19],
            "target_layers": [19],
            "hook_name": "blocks.19.hook_resid_post",
            "model_name": "lab/model",
            "model_revision": "abc",
            "dataset_path": "lab/corpus",
            "training_tokens": 123456,
            "cache_id": "cafe",
        }
        save_sae(home / variant, battery.config_of(variant).build(D, stats).sae, stats, metadata, {"k": 8}, variant)
    held_out = {
        "l0": 8.25,
        "explained_variance": 0.6543,
        "validation_tokens": 2284,
        "validation_massive": 3,
        "explained_variance_with_massive": 0.9321,
        "dead_latents": 5,
    }
    (home / "result.json").write_text(json.dumps({"saes": {"topk": held_out}}))
    (home / "config.json").write_text("{}")
    core = home / "evals" / "core" / "topk_eval_results.json"
    core.parent.mkdir(parents=True)
    core.write_text(json.dumps(core_of(home)))
    return home


def core_of(home, name="topk", **changes):
    """Its result, of the weights that are there."""
    ours = {"sha256": source_of(home / name).sha256, "measured_on": "test split, 9 tokens of 2 documents"}
    return {**CORE, "saemill": ours, **changes}


@pytest.fixture
def stats(rng):
    return Stats(torch.full((D,), 0.37), torch.randn(D, generator=rng), float(D))


@pytest.fixture
def push(run):
    def call(source="run_1/topk", to="me/saes", *words, code=0):
        words = [source, "--push-to-hub", to, "--runs", str(run.parent), *words]
        result = CliRunner().invoke(main, words, catch_exceptions=False)
        assert result.exit_code == code, result.output
        assert len(result.output.splitlines()) == 1, result.output
        return result.output

    return call


def sae_like(sae):
    """Trained a little further."""
    with torch.no_grad():
        sae.b_enc.add_(1.0)
    return sae


def header_of(hub, name="me/saes"):
    return yaml.safe_load(hub.files(name)["README.md"].decode().split("---\n")[1])


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of huggingface_hub, where it uploads by LFS
@pytest.mark.parametrize("has_lfs", [False, True])
def test_what_is_pushed_is_what_is_loaded(hub, run, push, has_lfs):
    hub.has_lfs = has_lfs
    assert push(to="lab/saes").strip() == f"pushed: {hub.url}/lab/saes/commit/{1:040x}"
    assert hub.commits == 1  # never half there
    assert set(hub.files("lab/saes")) == {".gitattributes", "README.md", "cfg.json", "sae_weights.safetensors"}
    sae, there = load_sae(run / "topk"), load_sae("lab/saes", run.parent)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, there.state_dict()[name]), name
    assert there.metadata == sae.metadata and bool(hub.apart) == has_lfs
    push(to="lab/saes")  # again: the same weights are no other content
    save_sae(run / "topk", sae_like(sae), unit_stats(D), {}, {}, "topk")
    assert "exists and holds other content" in push(to="lab/saes", code=1)


def test_a_run_is_pushed_with_all_its_saes(hub, run, push):
    push("run_1")
    for name in ("topk", "batchtopk"):
        assert torch.equal(load_sae(f"me/saes/{name}", run.parent).W_enc, load_sae(run / name).W_enc)
    card = hub.files("me/saes")["README.md"].decode()
    lines = card.splitlines()
    ours = 'saes = {name: load_sae("me/saes" + "/" + name) for name in ["batchtopk", "positional", "topk"]}'
    assert f"{ours}  # raw activations in" in lines
    assert 'saes = {name: SAE.load_from_disk(folder + "/" + name) for name in ["batchtopk", "topk"]}' in lines
    assert "SAELens has no architecture for positional." in card


def test_no_file_is_fetched_before_it_is_known_whose(hub, run, push):
    push("run_1/topk", "me/saes")
    files = hub.files("me/saes")
    for place in ("a", "b/c"):
        files |= {f"{place}/{name}": files[name] for name in ("cfg.json", "sae_weights.safetensors")}
    del files["cfg.json"], files["sae_weights.safetensors"]
    files |= {"model-00001-of-00002.safetensors": b"x" * 1000, "config.json": b"{}"}
    with pytest.raises(RunMissing, match="me/saes holds 2 SAEs: choose one of me/saes/a, me/saes/b/c$"):
        load_sae("me/saes", run.parent)
    with pytest.raises(RunMissing, match="me/saes/d on the Hugging Face Hub holds no SAE"):
        load_sae("me/saes/d", run.parent)
    assert not hub.fetched
    for name in ("me/saes/a", "me/saes/b"):  # the only one in there
        assert torch.equal(load_sae(name, run.parent).W_enc, load_sae(run / "topk").W_enc)
    assert {path.partition("/")[0] for path in hub.fetched} == {"a", "b"}


def test_a_transcoder_that_sae_lens_has_a_form_for_is_loaded_there(hub, run, push):
    config = json.loads((run / "topk/cfg.json").read_text())
    (run / "topk/cfg.json").write_text(json.dumps(config | {"architecture": "skip_transcoder"}))
    push()
    card = hub.files("me/saes")["README.md"].decode()
    assert "SAE.load_from_disk(folder)" in card and "no architecture" not in card


def test_the_card_says_what_it_is_and_how_well_it_does(hub, push):
    push("run_1/topk", "me/saes", "--license", "cc-by-4.0", "--private")
    assert hub.repositories["me/saes"]["private"]
    assert header_of(hub) == {
        "library_name": "saemill",
        "tags": ["sparse-autoencoder", "saemill"],
        "license": "cc-by-4.0",
    }
    rows = dict(
        line.strip("| ").split(" | ", 1)
        for line in hub.files("me/saes")["README.md"].decode().splitlines()
        if line.startswith("| ") and " | " in line.strip("| ")
    )
    said = {
        "variant": "topk",
        "layers": "19",
        "width": "96",
        "input width": "32",
        "k": "6",
        "reads": r"blocks\.19\.hook\_resid\_post",
        "model": "lab/model",
        "revision": "abc",
        "corpus": "lab/corpus",
        "training tokens": "123,456",
        "store": "cafe",
        "core measured on": "test split, 9 tokens of 2 documents",
        "L0, validation split": "8.25",
        "explained variance, validation split": "0.6543",
        "explained variance with massive rows, validation split": "0.9321",
        "massive rows, validation split": "3",
        "L0, test split": "31.5",
        "explained variance, test split": "0.7213 | 0.7 to 0.74",
        "explained variance with massive rows, test split": "0.9876",
        "cross entropy score, test split": "0.9581 | 0.951 to 0.965",
    }
    assert {name: rows.get(name) for name in said} == said
    assert "cross entropy with the SAE, test split" not in rows  # NaN is no number


def test_the_card_of_several_compares_them_and_says_once_what_they_share(hub, run, push):
    """A table of all, with the numbers of core where all have them; each SAE's own has what is its own."""
    push("run_1")
    lines = hub.files("me/saes")["README.md"].decode().splitlines()
    assert "| SAE | variant | L0, validation split | explained variance, validation split |" in lines
    assert {"| topk | topk | 8.25 | 0.6543 |", "| batchtopk | batchtopk |  |  |"} <= {*lines}
    assert lines.count("| corpus | lab/corpus |") == lines.count("| training tokens | 123,456 |") == 1
    assert lines.index("| all of them |  |") < lines.index("| corpus | lab/corpus |") < lines.index("## topk")
    for name in ("topk", "batchtopk", "positional"):
        (run / f"evals/core/{name}_eval_results.json").write_text(json.dumps(core_of(run, name)))
    push("run_1")
    lines = hub.files("me/saes")["README.md"].decode().splitlines()
    titles = "L0, test split | explained variance, test split | cross entropy score, test split"
    assert f"| SAE | variant | {titles} |" in lines and "| positional | positional | 31.5 | 0.7213 | 0.9581 |" in lines
    assert lines.count("| core measured on | test split, 9 tokens of 2 documents |") == 1


def test_without_a_licence_none_is_written_and_the_card_follows_new_results(hub, run, push):
    push()
    assert set(header_of(hub)) == {"library_name", "tags"}
    for changes, said in (
        ({}, b"explained variance, test split | 0.5151"),
        ({"saemill": core_of(run)["saemill"] | {"settings": {"cache_id": "f00d"}}}, b"test split of the store f00d |"),
        ({"saemill": core_of(run)["saemill"] | {"format": 2}}, None),
        ({"saemill": {"sha256": "of other weights"}}, None),
        ({"saemill": {}}, None),
    ):
        then = core_of(run, saemill_metrics={"explained_variance": 0.5151}, **changes)
        (run / "evals" / "core" / "topk_eval_results.json").write_text(json.dumps(then))
        push()
        card = hub.files("me/saes")["README.md"]
        assert said in card if said else b"test split" not in card
        assert b"massive rows, test split" not in card  # there were none


def test_plots_of_a_run_are_on_its_card(hub, run, push):
    (run / "plots").mkdir()
    for name in ("pareto.png", "pareto.svg", "a](b).png"):
        (run / "plots" / name).write_bytes(b"drawn")
    push("run_1")
    assert {name for name in hub.files("me/saes") if "plots" in name} == {"plots/pareto.png"}
    assert "![pareto](plots/pareto.png)" in hub.files("me/saes")["README.md"].decode()
    push("run_1/topk", "me/one")  # they show the others too
    assert not [name for name in hub.files("me/one") if "plots" in name]
    shutil.copytree(run / "topk", run.parent / "elsewhere/topk")
    shutil.copytree(run / "plots", run.parent / "elsewhere/plots")  # of whatever else lies there
    push(str(run.parent / "elsewhere/topk"), "me/lone")
    assert not [name for name in hub.files("me/lone") if "plots" in name]


def test_a_run_begins_as_an_sae_of_the_hub(hub, big, sae_train, quick, tmp_path, monkeypatch):
    """Pushed, and gone from here: the first step's reconstruction is the source's."""
    words = ["--variant", "topk", "--k", 4, "--width", 32, "--cache", big["path"], *quick]
    sae_train(*words, "--tokens", 1280, "--name", "first")
    told = CliRunner().invoke(main, ["first", "--push-to-hub", "me/saes", "--runs", str(tmp_path / "runs")])
    assert told.exit_code == 0, told.output
    shutil.rmtree(tmp_path / "runs")
    source, found, step = load_sae("me/saes", tmp_path / "runs"), [], Trainee.step

    def watch(trainee, batch):
        if trainee.step_index == 0:
            scale = trainee.assembly.input_stats.scale
            with torch.no_grad():
                found.append((trainee.sae(batch.x) / scale, source(batch.x / scale)))
        return step(trainee, batch)

    monkeypatch.setattr(Trainee, "step", watch)
    sae_train(*words, "--tokens", 640, "--init", "me/saes", "--name", "second")
    ((own, theirs),) = found
    assert float((own - theirs).norm() / theirs.norm()) < 1e-5
    config = json.loads((tmp_path / "runs/second/config.json").read_text())
    assert str(tmp_path / "cache") in config["init"]["folder"]


def test_a_folder_of_gemma_scope_has_the_place_of_its_repository_on_the_hub(hub, tmp_path):
    tensors = {"W_enc": (4, 6), "b_enc": 6, "W_dec": (6, 4), "b_dec": 4, "threshold": 6}
    data = BytesIO()
    np.savez(data, **{name: np.ones(shape, np.float32) for name, shape in tensors.items()})
    hub.create("google/gemma-scope-2b-pt-mlp")
    hub.files("google/gemma-scope-2b-pt-mlp")["layer_5/width_16k/average_l0_71/params.npz"] = data.getvalue()
    metadata = load_sae("google/gemma-scope-2b-pt-mlp/layer_5/width_16k/average_l0_71", tmp_path / "runs").metadata
    assert (metadata["layers"], metadata["hook"], metadata["model_name"]) == ([5], "mlp_out", "google/gemma-2-2b")


def test_the_folder_of_a_browser_is_a_static_space(hub, tmp_path):
    """By the Hub's own command, as docs/share.md has it: a header that the Hub takes, and the files where they were."""
    folder = tmp_path / "browser"
    (folder / "data").mkdir(parents=True)
    write_page(folder, "build")
    write_data(folder, "run", {"run": "demo"})
    (line,) = re.findall(r"^hf upload .*--repo-type space.*$", SHARE.read_text(), re.MULTILINE)
    words = shlex.split(line.replace("OWNER/NAME", "me/latents").replace("runs/run_1/browser", str(folder)))
    for name in ("run", "other"):  # again: a browser that was made anew takes the place of the one before
        (folder / "data/run.js").replace(folder / f"data/{name}.js")
        result = CliRunner().invoke(hf, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        here = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        files = {name: data for name, data in hub.files("me/latents").items() if name != ".gitattributes"}
        assert files == here
    header = header_of(hub, "me/latents")
    assert header["sdk"] == "static" and header["app_file"] in files


def test_hostile_names_are_text(hub, run, push):
    config = json.loads((run / "topk" / "cfg.json").read_text())
    config["metadata"] |= dict.fromkeys(("model_name", "dataset_path", "training_architecture"), HOSTILE)
    config["metadata"]["l0"] = "<b>"
    (run / "topk" / "cfg.json").write_text(json.dumps(config))
    (run / "result.json").unlink()
    push()
    card = hub.files("me/saes")["README.md"].decode()
    assert set(header_of(hub)) == {"library_name", "tags"}
    assert card.count("\n---\n") == 1 and "<script" not in card and "<b>" not in card and "](" not in card
    assert f"| model | {plain(HOSTILE)} |" in card.splitlines()
    assert plain(HOSTILE) == (
        r"a --- license\: evil \# &lt;script&gt;x&lt;/script&gt; \| \[b\]\(javascript\:c\) \`d\` &amp; \"e"
    )


def refused_token(hub, patch):
    patch.setenv("HF_TOKEN", "hf_stale")


def no_token(hub, patch):
    patch.delenv("HF_TOKEN")


def reading_token(hub, patch):
    hub.user["auth"]["accessToken"]["role"] = "read"


def of_others(hub, patch):
    hub.user |= {"name": "you", "orgs": []}


def no_network(hub, patch):
    patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def offline(hub, patch):
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def taken(hub, patch):
    hub.create("me/saes")
    hub.files("me/saes")["sae_weights.safetensors"] = b"another"


def test_a_repository_that_holds_more_is_another(hub, push):
    """These weights and others: its card would name the one and leave out the other."""
    push()
    hub.files("me/saes")["LICENSE"] = b"added by its owner"
    push()
    hub.files("me/saes")["other/sae_weights.safetensors"] = b"another"
    assert "me/saes exists and holds other content (other/sae_weights.safetensors)" in push(code=1)


def test_a_run_is_pushed_when_it_is_whole(hub, run, push):
    (run / "config.json").write_text('{"cache": {}, "saes": {}}')
    (run / "result.json").unlink()
    assert "is not finished, and more SAEs may follow. Resume it first: sae-train --resume" in push("run_1", code=1)


def test_a_config_of_another_tool_makes_no_run_that_is_not_finished(hub, run, push):
    (run / "config.json").write_text('{"model_type": "llama"}')
    (run / "result.json").unlink()
    push("run_1")
    assert b" of a language model's activations, trained with saemill.\n" in hub.files("me/saes")["README.md"]
    save_sae(run / "topk", load_sae(run / "topk"), unit_stats(D), {}, {}, "topk")  # as from another tool's folder
    push("run_1", "me/others")
    assert b" of a language model's activations.\n" in hub.files("me/others")["README.md"]


@pytest.mark.parametrize(
    ("obstacle", "expected"),
    [
        (no_token, "no token for the Hugging Face Hub: run hf auth login"),
        (refused_token, "the token is not valid"),
        (reading_token, "the token of me may only read"),
        (of_others, "you may not write to me: expected one of you"),
        (no_network, "nothing was pushed to me/saes: "),
        (offline, "HF_HUB_OFFLINE is set"),
        (taken, "me/saes exists and holds other content (sae_weights.safetensors)"),
    ],
)
def test_what_stands_in_the_way_is_said_before_anything_changes(hub, push, monkeypatch, obstacle, expected):
    obstacle(hub, monkeypatch)
    before = json.dumps(hub.repositories, default=repr)
    assert expected in push(code=1)
    assert json.dumps(hub.repositories, default=repr) == before


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_what_is_refused_while_uploading_leaves_no_file(hub, push):
    hub.has_lfs, hub.refuses_large, hub.refuses_commits = True, 403, 400
    assert "the token may not write there" in push(code=1)
    hub.refuses_large = 0
    assert "nothing was pushed to me/saes: refused" in push(code=1)
    assert set(hub.files("me/saes")) == {".gitattributes"}
    hub.refuses_commits = 0
    push()  # the same command goes on
    assert "exists and is public" in push("run_1/topk", "me/saes", "--private", code=1)


def test_what_others_commit_meanwhile_is_not_overwritten(hub, push, monkeypatch):
    monkeypatch.setattr("saemill.train.run.push_to_hub._require_pushable", lambda *_: "f" * 40)
    hub.create("me/saes")
    assert "it changed in the meantime: run this again" in push(code=1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run_1", "no-owner"), "expected --push-to-hub OWNER/NAME, found 'no-owner'"),
        (("run_1", "me/saes", "--license", "a: b"), "expected --license by its name on the Hub"),
        (("run_2", "me/saes"), "no SAE 'run_2' here to push; runs in"),
    ],
)
def test_bad_words_end_before_the_hub_is_asked(push, words, expected):
    assert expected in push(*words, code=1)


def test_folders_of_other_tools_are_to_be_converted_first(hub, run, push):
    shutil.move(run / "topk" / "sae_weights.safetensors", run / "topk" / "ae.pt")
    assert "Convert it first: sae-export" in push(code=1)


@pytest.mark.parametrize(
    "words", [[], ["--to", "sparsify"], ["--to", "sparsify", "--push-to-hub", "a/b"], ["--private"]]
)
def test_options_that_do_not_go_together(words):
    result = CliRunner().invoke(main, ["run_1", *words])
    assert result.exit_code == 2 and "Error: " in result.output
