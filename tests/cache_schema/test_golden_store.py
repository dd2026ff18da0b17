"""Stores written once must be readable forever, and must not be written differently without a word."""

from pathlib import Path

import numpy as np
import pytest

from saemill.cache_schema import FormatTooNew, Request, Site, Store, StoreWriter, from_float32, to_float32
from saemill.cache_schema import manifest as manifest_module
from saemill.cache_schema.verify_and_repair import digest, find_wrong_derived

from ..golden import make_store

GOLDEN = Path(__file__).parent.parent / "golden"

DIGEST = "sha256:faaabfbb68a694202f208fb3247f9a6701df8f6bfc4a66c3c3e1c89f34c68c37"
DIGEST_OF_HOOKS = "sha256:5e486b0cac1b8d5a5944cbe69e40bd9aa16411fd47f46aac38b403bebf5631e8"
DIGESTS_OF_SMALL = {
    "int8": "sha256:aa577d26f502bfe7117336135773e10b2d27c51483d1268b0f1fc9c667785ae8",
    "fp8": "sha256:311677ab1ca911c0346a3fb88689ac7be9c17860116cf232fad74adec84e51a9",
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("codec", make_store.CODECS)
def test_golden_store_reads_as_it_was_made(codec: str) -> None:
    with Store.open(GOLDEN / f"store_{codec}") as store:
        request = Request(layers=(1,), attention_layers=(0,), tokens=True, documents=True)
        parts = [store.read(request, span) for span in store.spans(request)]
        assert digest(store) == DIGEST
        assert find_wrong_derived(store) == []
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), make_store.tokens())
    assert np.array_equal(np.concatenate([part.documents for part in parts]), make_store.documents())
    expected = from_float32(make_store.resid(), "bfloat16")
    assert np.array_equal(np.concatenate([part.resid[1] for part in parts]), expected)
    for part in parts:
        assert np.array_equal(part.attention[0].dense(), make_store.attention(part.span.windows).dense())


def test_golden_store_of_format_2_reads_as_it_was_made() -> None:
    with Store.open(GOLDEN / "store_hooks") as store:
        assert store.manifest.format == 2
        request = Request(layers=(1,), hooks={"mlp_in": (0, 1), "mlp_out": (1,), "z": (1,)})
        parts = [store.read(request, span) for span in store.spans(request)]
        assert digest(store) == DIGEST_OF_HOOKS
        assert find_wrong_derived(store) == []
        assert store.moments(1, "z").mean.shape == (2,)
    assert np.array_equal(
        np.concatenate([part.resid[1] for part in parts]), from_float32(make_store.resid(), "bfloat16")
    )
    for hook, layers in request.hooks.items():
        for layer in layers:
            expected = from_float32(make_store.act(Site(hook, layer)), "bfloat16")
            assert np.array_equal(np.concatenate([part.acts[hook][layer] for part in parts]), expected)


@pytest.mark.parametrize(("small", "expected"), DIGESTS_OF_SMALL.items())
def test_golden_store_of_format_3_reads_as_it_was_made(small: str, expected: str) -> None:
    """No value is further from its own than its code can be: half a step of int8, a sixteenth of itself in fp8."""
    request = Request(layers=(1,), hooks={"z": (1,)})
    with Store.open(GOLDEN / f"store_{small}") as store:
        assert store.manifest.format == 3
        assert store.manifest.stored_as == small
        assert digest(store) == expected
        parts = [store.read(request, span) for span in store.spans(request)]
    for site, made in {Site("resid", 1): make_store.resid(), Site("z", 1): make_store.act(Site("z", 1))}.items():
        values = np.concatenate([part.values(site) for part in parts])
        plain = to_float32(from_float32(made, "bfloat16"), "bfloat16")
        largest = np.abs(plain).max(axis=2, keepdims=True)
        bound = largest / 254 if small == "int8" else np.maximum(np.abs(plain) / 16, largest / 448 / 1024)
        assert (np.abs(values - plain) <= bound * 1.001).all()
        assert not np.array_equal(values, plain)


@pytest.mark.parametrize("reader", range(1, manifest_module.FORMAT + 1))
@pytest.mark.parametrize("name", make_store.NAMES)
def test_every_reader_reads_what_is_older_and_refuses_what_is_newer(monkeypatch, name: str, reader: int) -> None:
    """The matrix of formats: a reader looks at the number first, and says it."""
    with Store.open(GOLDEN / f"store_{name}") as store:
        written = store.manifest.format
    monkeypatch.setattr(manifest_module, "FORMAT", reader)
    if written <= reader:
        Store.open(GOLDEN / f"store_{name}").close()
        return
    for use in (Store.open, StoreWriter.open):
        with pytest.raises(FormatTooNew, match=f"has format {written}; this saemill reads formats up to {reader}"):
            use(GOLDEN / f"store_{name}")


@pytest.mark.parametrize("name", make_store.NAMES)
def test_todays_writer_writes_the_golden_bytes(tmp_path: Path, name: str) -> None:
    make_store.write(tmp_path / "store", name)
    assert files_of(tmp_path / "store") == files_of(GOLDEN / f"store_{name}")
