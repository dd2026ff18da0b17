"""What `--model` means, with a hub that answers as the test says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from saemill.cache_schema import ModelSpec
from saemill.cache_schema.info import BUNDLED
from saemill.harvest.errors import ModelDiffers, ModelUnavailable
from saemill.harvest.model import resolve
from saemill.harvest.model.resolve import (
    FIRST_CHOICE,
    Choice,
    choose,
    choose_again,
    fetch,
    fetch_description,
    fetch_recorded,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refusal(kind: type[HfHubHTTPError], says: str = "refused\nwith details", **more: Any) -> HfHubHTTPError:
    response = SimpleNamespace(headers={}, request=None, status_code=more.pop("status", 401))
    return kind(says, response=response, **more)


GATED = refusal(GatedRepoError)
UNREACHABLE = HTTPError("Name or service not known")
OFFLINE = OfflineModeIsEnabled("offline mode is enabled")
FAILURES = [
    (GATED, f"accept it at https://huggingface.co/{FIRST_CHOICE}, then `hf auth login`"),
    (refusal(RepositoryNotFoundError), "no model of that name on the hub"),
    (refusal(RevisionNotFoundError), "no such revision"),
    (refusal(HfHubHTTPError), r"the hub refused \(refused\): check your token"),
    (
        refusal(HfHubHTTPError, "(Request ID: 1)\n\n403 Forbidden", status=403, server_message="gates\nare shut"),
        r"the hub refused \(gates\): check your token .*, and give it read access to gated repositories",
    ),
    (UNREACHABLE, r"could not be reached \(Name or service not known\): check the network"),
    (ImportError("Using SOCKS proxy"), r"could not be reached \(Using SOCKS proxy\): .*`pip install socksio`"),
    (OFFLINE, r"could not be reached \(offline mode is enabled\)"),
    (LocalEntryNotFoundError("no snapshot here"), r"could not be reached \(no snapshot here\)"),
    (
        OSError(28, "No space left on device"),
        "disk is full while downloading into .*: free some space, or set HF_HOME",
    ),
]


def is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


class Hub:
    """A cache and a network; `calls` lists what was asked of them."""

    def __init__(self, folder: Path) -> None:
        self.snapshot = folder / COMMIT
        self.calls: list[str] = []
        self.failure: Exception | None = None
        self.answers = Event()
        self.answers.set()
        self.bytes: int | None = 1000
        self.files = ("config.json", "model.safetensors", "tokenizer.json")

    def fill_cache(self, *names: str) -> None:
        self.snapshot.mkdir(exist_ok=True)
        for name in names:
            (self.snapshot / name).write_text("{}")

    def snapshot_download(
        self, _model, *, local_files_only=False, dry_run=False, allow_patterns=(), ignore_patterns=(), **_options
    ) -> Any:
        self.calls.append("cache" if local_files_only else "sizes" if dry_run else "download")
        names = [name for name in self.files if is_any(name, allow_patterns) and not is_any(name, ignore_patterns)]
        if local_files_only:
            if not self.snapshot.is_dir():
                raise LocalEntryNotFoundError("nothing cached")
            if not all((self.snapshot / name).is_file() for name in names):
                raise IncompleteSnapshotError("files are missing", str(self.snapshot))
            return str(self.snapshot)
        if self.failure:
            if dry_run and not isinstance(self.failure, (RevisionNotFoundError, ImportError)):
                raise DryRunError("please check your internet connection or authentication token") from self.failure
            raise self.failure
        if dry_run:
            return [SimpleNamespace(file_size=self.bytes, will_download=True) for _ in names]
        self.fill_cache(*names)
        return str(self.snapshot)

    def get_hf_file_metadata(self, _url, **_options) -> None:
        self.calls.append("ask")
        self.answers.wait(60)
        if self.failure:
            raise self.failure


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub(tmp_path)
    for name in ("snapshot_download", "get_hf_file_metadata"):
        monkeypatch.setattr(resolve, name, getattr(hub, name))
    return hub


def test_auto_takes_gemma_from_the_cache_without_asking_the_network(hub):
    hub.fill_cache("config.json", "model.safetensors", "tokenizer.json")
    hub.failure = UNREACHABLE
    choice = choose("auto")
    assert choice.name == FIRST_CHOICE
    assert fetch(choice) == resolve.ModelSource(FIRST_CHOICE, COMMIT, hub.snapshot)
    assert set(hub.calls) == {"cache"}


def test_auto_takes_gemma_where_it_can_be_downloaded_and_downloads_only_on_fetch(hub):
    choice = choose("auto")
    assert choice.name == FIRST_CHOICE
    assert "can be downloaded" in choice.banner[0]
    assert hub.calls == ["cache", "ask"]
    assert fetch(choice).folder == hub.snapshot
    assert hub.calls[-1] == "download"


@pytest.mark.parametrize(("failure", "message"), FAILURES, ids=lambda value: type(value).__name__)
def test_auto_falls_back_to_the_pocket_model_and_says_why(hub, failure, message):
    hub.failure = failure
    choice = choose("auto")
    assert choice.name == "pocket"
    assert len(choice.banner) == 2
    assert re.search(message, choice.banner[0])
    assert f"--model {FIRST_CHOICE}" in choice.banner[1]


def test_a_look_at_a_model_leaves_its_weights_on_the_hub_and_knows_their_size(hub):
    found = fetch_description(Choice("owner/name"))
    assert (found.revision, found.to_download) == (COMMIT, 1000)
    assert sorted(file.name for file in hub.snapshot.iterdir()) == ["config.json", "tokenizer.json"]
    assert fetch(Choice("owner/name")).to_download is None
    assert fetch_description(Choice("owner/name")).to_download is None  # they are here now


def test_a_hub_that_does_not_say_how_large_files_are_is_helped_out(hub):
    hub.bytes = None
    assert fetch_description(Choice(FIRST_CHOICE)).to_download == 10_460_000_000
    hub.snapshot.joinpath("config.json").unlink()
    assert fetch_description(Choice("owner/name")).to_download == 0


def test_a_disk_without_room_for_the_weights_is_told_before_the_download(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000_000))
    hub.bytes = 10_460_000_000
    with pytest.raises(ModelUnavailable, match=r"its files take 10\.46 GB, but .* has 5\.00 GB free.*set HF_HOME"):
        fetch(Choice(FIRST_CHOICE))
    assert "download" not in hub.calls


@pytest.mark.parametrize("cached", [(), ("config.json",), ("config.json", "model.safetensors")], ids=len)
def test_a_cache_that_lacks_something_is_no_cache(hub, cached):
    hub.fill_cache(*cached)
    hub.failure = UNREACHABLE
    assert choose("auto").name == "pocket"


def test_what_no_harvest_reads_may_be_missing_from_the_cache(hub):
    """Of Llama-3 and Mistral the same weights lie there once more, which are not brought; other tools bring less."""
    whole = (*hub.files, "tokenizer_config.json")
    hub.files = (*whole, "original/params.json", "consolidated.safetensors")
    fetch(Choice("owner/name"))
    hub.failure = UNREACHABLE
    assert fetch(Choice("owner/name")).folder == hub.snapshot
    hub.files = (*hub.files, "params.json", "tokenizer.model")
    assert fetch(Choice("owner/name")).folder == hub.snapshot
    (hub.snapshot / "tokenizer_config.json").unlink()
    with pytest.raises(ModelUnavailable):
        fetch(Choice("owner/name"))


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr(resolve, "DECISION_SECONDS", 0.05)
    hub.answers.clear()
    choice = choose("auto")
    hub.answers.set()
    assert choice.name == "pocket"
    assert "did not answer within" in choice.banner[0]


def test_what_nobody_thought_of_is_told_by_its_own_words(hub):
    hub.failure = ValueError("Unknown scheme for proxy URL")
    assert "the hub could not be asked (Unknown scheme for proxy URL)" in choose("auto").banner[0]


def test_the_decision_takes_less_than_ten_seconds_at_worst():
    assert resolve.ANSWER_SECONDS < resolve.DECISION_SECONDS < 10


@pytest.mark.parametrize(("failure", "message"), FAILURES, ids=lambda value: type(value).__name__)
def test_an_id_never_falls_back(hub, failure, message):
    hub.failure = failure
    choice = choose(FIRST_CHOICE)
    assert choice.banner == ()
    with pytest.raises(ModelUnavailable, match=message) as caught:
        fetch(choice)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~nosuchuser/m", "two words", ""])
def test_what_is_neither_a_folder_nor_an_id(name):
    with pytest.raises(ModelUnavailable, match="no such folder, and not a valid name on the hub"):
        fetch(choose(name))


@pytest.mark.parametrize(("name", "meant"), [("Pocket", "pocket"), ("smollm", "smollm2"), ("two words", None)])
def test_a_model_of_our_own_is_offered_for_a_name_near_it(hub, name, meant):
    hub.failure = UNREACHABLE
    with pytest.raises(ModelUnavailable) as caught:
        fetch(choose(name))
    assert (f"(did you mean {meant!r}?)" in str(caught.value)) == (meant is not None)


def test_a_folder_is_named_by_its_content_not_by_its_place(make_model, tmp_path):
    for place in ("a", "b"):
        make_model("llama").save_pretrained(tmp_path / place / "mine")
    make_model("llama", head_dim=4).save_pretrained(tmp_path / "c" / "mine")
    a, b, c = (fetch(choose(str(tmp_path / place / "mine"))) for place in "abc")
    assert (a.id, a.revision) == (b.id, b.revision)
    assert a.folder != b.folder
    assert a.revision.startswith("sha256-")
    assert a.revision != c.revision


@pytest.mark.parametrize("files", [("config.json", "tokenizer.json"), ("model.safetensors",)])
def test_a_model_of_the_hub_without_weights_or_configuration(hub, files):
    hub.files = files
    with pytest.raises(ModelUnavailable, match="somebody/model: expected config.json and complete safetensors"):
        fetch(Choice("somebody/model"))


def test_a_disk_that_is_full_in_the_words_of_the_hubs_own_library(hub):
    hub.failure = RuntimeError("Data processing error: I/O error: No space left on device (os error 28)")
    with pytest.raises(ModelUnavailable, match="the disk is full while downloading into"):
        fetch(Choice("somebody/model"))


def test_auto_means_for_a_store_what_it_was_begun_with():
    gemma, pocket = (
        choose_again("auto", ModelSpec(id=name, d_model=1, dtype="float32", revision=revision))
        for name, revision in ((FIRST_CHOICE, COMMIT), ("pocket", "sha256-0"))
    )
    assert gemma is not None and (gemma.name, gemma.revision) == (FIRST_CHOICE, COMMIT)
    assert pocket is not None and (pocket.name, pocket.revision) == ("pocket", None)
    assert len(gemma.banner) == len(pocket.banner) == 2
    assert choose_again("auto", ModelSpec(id="somebody/model", d_model=1, dtype="float32", revision=COMMIT)) is None


@pytest.mark.parametrize(
    ("name", "revision", "commit"),
    [
        ("somebody/model", COMMIT, COMMIT),
        ("tiny", "sha256-0", None),
        ("a.gguf", "gguf-01", "gguf-01"),
        ("b", None, None),
    ],
)
def test_a_name_means_for_a_store_the_commit_it_was_begun_with(name, revision, commit):
    found = ModelSpec(id=name, d_model=1, dtype="float32", revision=revision)
    assert choose_again(name, found) == Choice(name, commit)
    assert choose_again("another/model", found) is None


def test_a_model_of_the_hub_may_lie_in_any_snapshot_of_its_commit(hub, make_model, tmp_path):
    """A folder's revision is a hash of what is in it: no copy of a commit would ever be taken for that."""
    model = ModelSpec(id="somebody/model", d_model=1, dtype="float32", revision=COMMIT)
    snapshots = tmp_path / "copied" / "models--somebody--model" / "snapshots"
    make_model("gemma2").save_pretrained(snapshots / COMMIT)
    shutil.copytree(snapshots / COMMIT, snapshots / COMMIT[::-1])
    shutil.copytree(snapshots / COMMIT, tmp_path / COMMIT)
    found = fetch_recorded(model, str(snapshots / COMMIT))
    assert (found.id, found.revision, found.folder) == ("somebody/model", COMMIT, snapshots / COMMIT)
    for other in (snapshots / COMMIT[::-1], tmp_path / COMMIT):
        with pytest.raises(ModelDiffers, match=rf"expected somebody/model at .*HF_HOME .*\.\.\./snapshots/{COMMIT}"):
            fetch_recorded(model, str(other))
    of_a_folder = ModelSpec(id="tiny", d_model=1, dtype="float32", revision="sha256-0")
    with pytest.raises(ModelDiffers, match=r"found \w+ at sha256-\w+$"):
        fetch_recorded(of_a_folder, str(snapshots / COMMIT))
    (snapshots / COMMIT / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="complete safetensors weights"):
        fetch_recorded(model, str(snapshots / COMMIT))
    assert hub.calls == []


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("pickled")
    with pytest.raises(ModelUnavailable, match="complete safetensors weights"):
        fetch(choose(str(tmp_path)))


def test_the_pocket_model_asks_nobody(hub, monkeypatch, make_model, tmp_path):
    make_model("gemma2").save_pretrained(tmp_path / "model")
    bundled = fetch(choose("pocket"))
    assert (bundled.id, bundled.revision) == BUNDLED
    monkeypatch.setattr(resolve, "MODEL_FOLDER", tmp_path / "model")
    source = fetch(choose("pocket"))
    assert (source.id, source.folder) == ("pocket", tmp_path / "model")
    assert hub.calls == []
