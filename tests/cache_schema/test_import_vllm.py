"""Hidden states as vLLM writes them, by safetensors' own writer, to a store; and what is no such folder."""

from __future__ import annotations

import os
import resource
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from saemill.cache_schema import ImportInvalid, Request, Site, Store
from saemill.cache_schema.cli import main
from saemill.cache_schema.formats_to_import import VllmSource


def write_requests(folder: Path, lengths: list[int], layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> list:
    """Each in a folder of its own, as some releases of vLLM have it."""
    generator, written = torch.Generator().manual_seed(0), []
    for number, length in enumerate(lengths):
        tensors = {
            "hidden_states": torch.randn(length, layers, 6, generator=generator).to(dtype),
            "token_ids": torch.randint(0, 90, (length,), generator=generator),
        }
        (folder / f"request-{number}").mkdir(parents=True)
        save_file(tensors, folder / f"request-{number}" / "hidden_states.safetensors")
        written.append(tensors)
    return written


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_requests_become_windows(tmp_path: Path, dtype: torch.dtype) -> None:
    written = write_requests(tmp_path / "states", [9, 4, 13, 3, 8], dtype=dtype)
    words = ("--layer", 19, "--layer", 3, "--context", 4, "--model", "m", "--validation", 0, "--test", 0)
    run("import", tmp_path / "store", "--vllm", tmp_path / "states", *words)
    expected = [one["hidden_states"][at : at + 4] for one in written for at in range(0, len(one["token_ids"]) - 3, 4)]
    tokens = [one["token_ids"][at : at + 4] for one in written for at in range(0, len(one["token_ids"]) - 3, 4)]
    with Store.open(tmp_path / "store") as store:
        assert store.manifest.model.dtype == str(dtype).removeprefix("torch.")
        (part,) = store.stream(Request(layers=(3, 19), tokens=True))
        for place, layer in enumerate((19, 3)):
            values = torch.stack(expected)[:, :, place].float().numpy()
            assert np.array_equal(part.values(Site("resid", layer)), values)
        assert np.array_equal(part.tokens, torch.stack(tokens).numpy())


def test_a_request_is_a_document_and_in_one_split(tmp_path: Path) -> None:
    """Windows of one text on both sides of a split would make what is held out easy."""
    write_requests(tmp_path / "states", [9, 3, 26, 8, 40, 12])
    words = ("--layer", 19, "--layer", 3, "--context", 4, "--model", "m", "--validation", 0.1, "--test", 0.3)
    run("import", tmp_path / "store", "--vllm", tmp_path / "states", *words)
    with Store.open(tmp_path / "store") as store:
        (part,) = store.stream(Request(documents=True))
        assert part.documents is not None
        found = part.documents.copy()
        assert store.manifest.splits == {"train": (0, 10), "validation": (10, 20), "test": (20, 23)}
    expected = np.repeat([0, 1, 2, 3, 4], [2, 6, 2, 10, 3])
    assert np.array_equal(found, np.repeat(expected[:, None], 4, axis=1))


def test_requests_and_tokens_that_fill_no_window_are_counted(tmp_path: Path) -> None:
    """Fifty of 52 requests are shorter than a window: the two others alone would look like a whole import."""
    write_requests(tmp_path / "states", [3] * 50 + [110, 108])
    words = ("--vllm", tmp_path / "states", "--layer", 19, "--layer", 3, "--model", "m")
    said = run("import", tmp_path / "store", *words, "--context", 4)
    expected = "152 of 368 tokens, which fill no window of 4; 50 of 52 requests are shorter than one"
    assert "54 windows" in said and f"left out: {expected}\n" in said
    whole = run("import", tmp_path / "whole", *words, "--context", 1)
    cut = "one document's windows are in two splits"
    assert "left out" not in whole and cut not in whole and cut in said
    (tmp_path / "states" / "request-0" / "states.pt").touch()
    others = f"1 other file of {tmp_path / 'states'} ('request-0/states.pt'): only its .safetensors files are read"
    assert f"left out: {others}\n" in run("import", tmp_path / "whole", *words, "--context", 1)


def test_what_cannot_become_a_store_is_named(tmp_path: Path) -> None:
    states, word = tmp_path / "states", ("--layer", 1, "--layer", 2, "--model", "m")

    def said(*words: object) -> str:
        return " ".join(run("import", tmp_path / "store", "--vllm", states, *words, code=1).split())

    states.mkdir()
    assert "found none" in said(*word)
    write_requests(states, [9, 4])
    assert "requests have 4 to 9 tokens. Give --context T" in said(*word)
    assert "expected 2 layers, as in its files, found --layer [1]" in said("--layer", 1, "--model", "m", "--context", 4)
    assert "no request fills a window of 10 tokens" in said(*word, "--context", 10)
    file = states / "request-1" / "hidden_states.safetensors"
    whole = file.read_bytes()

    def with_shape(shape: bytes) -> bytes:
        end = 8 + int.from_bytes(whole[:8], "little")
        header = whole[8:end].replace(b"[4,2,6]", shape)
        return len(header).to_bytes(8, "little") + header + whole[end:]

    cut = (whole[:-1], whole[:20], b"", b"\xff" * 40, whole.replace(b"token_ids", b"token_idx"))
    for damaged in (*cut, with_shape(b"[4.0,2,6]"), with_shape(b"[-4,-2,6]"), with_shape(b"[4,2,true,6]")):
        file.write_bytes(damaged)
        assert "expected a safetensors file of hidden_states and token_ids" in said(*word, "--context", 4)
    assert not (tmp_path / "store").exists()


def test_more_requests_than_a_process_may_open_files(tmp_path: Path) -> None:
    written = write_requests(tmp_path, [4] * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/dev/fd")))
    tenth_free = next(islice((number for number in count() if number not in taken), 10, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (tenth_free, hard))
    try:
        source = VllmSource(tmp_path, (3, 19), None)
        acts, tokens = source.acts(Site("resid", 19), 0, 100), source.tokens
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert acts.shape == (100, 4, 6)
    assert {row.tobytes() for row in tokens} == {
        one["token_ids"].numpy().astype(tokens.dtype).tobytes() for one in written
    }


def test_a_file_that_is_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    write_requests(tmp_path, [4])
    source = VllmSource(tmp_path, (3, 19), None)
    file = tmp_path / "request-0" / "hidden_states.safetensors"
    file.write_bytes(file.read_bytes()[:90])
    with pytest.raises(ImportInvalid, match="hidden_states.safetensors changed while it was being read"):
        source.acts(Site("resid", 3), 0, 1)


@pytest.mark.parametrize("context", [0, -1])
def test_windows_of_no_tokens_are_refused(tmp_path: Path, context: int) -> None:
    write_requests(tmp_path, [4])
    with pytest.raises(ImportInvalid, match=f"expected a --context of at least 1, found {context}"):
        VllmSource(tmp_path, (3, 19), context)


def test_a_context_beside_what_has_windows_is_refused(tmp_path: Path) -> None:
    words = ("--saelens", tmp_path / "cached", "--model", "m", "--context", 4)
    assert "--context is for --vllm" in run("import", tmp_path / "store", *words, code=2)


@pytest.mark.parametrize(
    ("lengths", "splits", "large"),
    [
        ([80] * 10, [(0, 160), (160, 180), (180, 200)], []),
        (
            [400] * 3,
            [(0, 100), (100, 200), (200, 300)],
            ["33% of the windows are for validation", "33% of the windows"],
        ),
        ([400], [(0, 90), (90, 95), (95, 100)], ["one document's windows are in two splits"]),
        ([200, 200], [(0, 90), (90, 95), (95, 100)], ["one document's windows are in two splits"]),
        ([4, 4, 392], [(0, 1), (1, 2), (2, 100)], ["98% of the windows are for test, not 5% as asked"]),
    ],
)
def test_every_split_that_is_asked_for_has_windows(tmp_path: Path, lengths: list, splits: list, large: list) -> None:
    """Of few requests, each in one split; one alone is cut. One that is far too large for its share is told."""
    write_requests(tmp_path / "states", lengths)
    said = run(
        "import",
        tmp_path / "a store",
        "--vllm",
        tmp_path / "states",
        "--layer",
        19,
        "--layer",
        3,
        "--context",
        4,
        "--model",
        "m",
    )
    with Store.open(tmp_path / "a store") as store:
        assert list(store.manifest.splits.values()) == splits
    assert said.count("warning: ") == len(large) and all(words in said for words in large)
    assert "--validation 0" not in said  # with which no run ends
    train, validation, test = (stop - start for start, stop in splits)
    assert f"windows: train {train}, validation {validation}, test {test}\n" in said
    assert f"next: sae-store info '{tmp_path / 'a store'}'" in said
