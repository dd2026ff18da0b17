"""Stores written once must be readable forever, and must not be written differently without a word."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from saemill.cache_schema import Request, Store, from_float32
from saemill.cache_schema.verify import digest

GOLDEN = Path(__file__).parent.parent / "golden"
spec = importlib.util.spec_from_file_location("make_store", GOLDEN / "make_store.py")
make_store = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_store)

DIGEST = "sha256:faaabfbb68a694202f208fb3247f9a6701df8f6bfc4a66c3c3e1c89f34c68c37"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("codec", make_store.CODECS)
def test_golden_store_reads_as_it_was_made(codec: str) -> None:
    with Store.open(GOLDEN / f"store_{codec}") as store:
        request = Request(layers=(1,), attention_layers=(0,), tokens=True, documents=True)
        parts = [store.read(request, span) for span in store.spans(request)]
        assert digest(store) == DIGEST
    assert np.array_equal(np.concatenate([part.tokens for part in parts]), make_store.tokens())
    assert np.array_equal(np.concatenate([part.documents for part in parts]), make_store.documents())
    expected = from_float32(make_store.resid(), "bfloat16")
    assert np.array_equal(np.concatenate([part.resid[1] for part in parts]), expected)
    for part in parts:
        assert np.array_equal(part.attention[0].dense(), make_store.attention(part.span.windows).dense())


@pytest.mark.parametrize("codec", make_store.CODECS)
def test_todays_writer_writes_the_golden_bytes(tmp_path: Path, codec: str) -> None:
    make_store.write(tmp_path / "store", codec)
    assert files_of(tmp_path / "store") == files_of(GOLDEN / f"store_{codec}")
