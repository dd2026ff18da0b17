"""How an SAE reads a batch: side inputs, special tokens, several layers; and the errors as they are drawn."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
import torch

from saemill.evaluate.context.loaded_sae import make_side
from saemill.evaluate.context.write_and_read_results import Result, result_path, standing_result, write_result
from saemill.evaluate.errors import NotApplicable
from saemill.evaluate.evals.core import encoding
from saemill.evaluate.model.batches import Windows, store_batches
from saemill.evaluate.output.figures.records import read_documents
from saemill.train.disk.sae_lens_folder import NORM_BOUNDS
from saemill.train.sae.gates import Relu
from saemill.train.sae.model import SparseAutoencoder


class Positional(SparseAutoencoder):
    """One latent, whose activation is the position it is told, plus one."""

    is_plain = False
    needs_side = ("position", "row_of")

    def encode(self, x, side):
        assert x.dim() == 2
        assert side["row_of"].max() == len(x) - 1
        return (side["position"] + 1.0)[:, None]


@pytest.fixture
def batch(world, open_context, builder):
    context = open_context(world)
    layer = builder.LAYER
    return next(iter(store_batches(context.store, "test", (layer,), (layer,), batch_windows=4)))


@pytest.fixture
def positional(builder):
    plain = builder.subject(builder.make_sae())
    return replace(plain, read=lambda: Positional(torch.ones(1, builder.D), torch.ones(1, builder.D), Relu()))


def test_side_inputs_reach_the_sae_and_special_tokens_get_nothing(positional, batch):
    acts = positional.encode(batch)
    position = torch.arange(batch.context).expand(len(batch), -1)
    assert torch.equal(acts[..., 0], torch.where(batch.keep, position + 1.0, 0.0))
    assert positional.needs == {"position", "row_of"}


def test_readings_with_side_inputs_are_the_same(positional, batch):
    reading = encoding.encode_kept(positional, batch)
    acts = positional.encode(batch)
    assert torch.equal(reading.l1, acts.sum(-1)[batch.keep])
    torch.testing.assert_close(reading.x_hat, positional.decode(acts)[batch.keep])


def test_positions_do_not_count_padding_on_the_left():
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    keep = valid & torch.tensor([[True, True, False, True], [False, True, True, True]])
    side = make_side(Windows(torch.zeros(2, 4, dtype=torch.int64), keep, valid), torch.ones(4, dtype=torch.bool))
    assert side["position"].tolist() == [1, 1, 2, 3]
    assert side["window"].tolist() == [0, 1, 1, 1]
    assert side["row_of"].tolist() == [[-1, -1, -1, 0], [-1, 1, 2, 3]]


def test_side_inputs_hold_the_stores_attention_and_documents(batch, builder):
    side = make_side(batch, torch.ones(int(batch.keep.sum()), dtype=torch.bool))
    assert side["attention"].keys() == {builder.LAYER}
    assert torch.equal(side["document"], batch.documents[batch.keep])


class ReadOfOthers(SparseAutoencoder):
    """One latent: whether others may read the row."""

    is_plain = False
    needs_side = ("window", "row_of")

    def encode(self, x, side):
        read = torch.zeros(len(x))
        read[side["row_of"][side["row_of"] >= 0]] = 1.0
        return read[:, None]


@pytest.mark.parametrize(("name", "bound"), [(NORM_BOUNDS, 5.0), ("largest_norms", 5.0), (NORM_BOUNDS, None)])
def test_no_row_reads_one_that_is_massive(builder, batch, name, bound):
    """Training leaves them out: what attention brings of a row a hundred times as long would be all that is seen."""
    place = tuple(batch.keep.nonzero()[3].tolist())
    resid = torch.nn.functional.normalize(batch.resid[builder.LAYER].float(), dim=-1)
    resid[place] *= 100
    metadata = {name: {str(builder.LAYER): bound} if bound else {}}
    sae = ReadOfOthers(torch.ones(1, builder.D), torch.ones(1, builder.D), Relu())
    subject = replace(builder.subject(builder.make_sae()), read=lambda: sae, config={"metadata": metadata})
    read = subject.encode(replace(batch, resid={builder.LAYER: resid}))[..., 0].bool()
    expected = batch.keep.clone()
    expected[place] = bound is None
    assert torch.equal(read, expected)


@pytest.mark.parametrize("home", [".", "sae"], ids=["of a run", "of its own"])
def test_results_of_an_earlier_sae_do_not_stand(builder, tmp_path, home):
    """Neither for --resume nor on the page, whatever the times of files say: a copy has its own, or those of before."""
    subject = replace(builder.subject(builder.make_sae()), home=tmp_path / home)
    document, path = write_result(Result(subject, {}, {}), "core", {}), result_path(subject, "core")
    evals, weights, now = tmp_path / home / "evals", subject.folder / "sae_weights.safetensors", time.time()

    def stands():
        found = {standing_result(subject, "core") is not None, bool(read_documents(evals, print, {}))}
        assert len(found) == 1
        return found.pop()

    os.utime(weights, (now + 60, now + 60))
    assert stands()
    document["saemill"].pop("sha256")  # as SAEBench's own have none
    path.write_text(json.dumps(document))
    assert not stands()
    write_result(Result(subject, {}, {}), "core", {})
    time.sleep(0.05)  # longer than two times of files need to differ
    builder.save(subject.folder, builder.make_sae(seed=9))
    os.utime(weights, (now - 60, now - 60))
    assert not stands()
    time.sleep(0.05)
    path.write_bytes(path.read_bytes())  # as one that is copied back is later than all files
    assert not stands()
    elsewhere = tmp_path / "elsewhere"
    subject.folder.rename(elsewhere)
    subject.folder.symlink_to(elsewhere)
    assert not stands()


def test_a_result_does_not_stand_for_a_folder_that_was_moved_to_its_sae(builder, tmp_path):
    """That changes no time of the files in it."""
    one, other = (replace(builder.subject(builder.make_sae(seed=n), f"sae_{n}"), home=tmp_path) for n in (0, 1))
    time.sleep(0.05)
    document = write_result(Result(one, {}, {}), "core", {})
    assert standing_result(one, "core") == document
    time.sleep(0.05)
    one.folder.rename(tmp_path / "aside")
    other.folder.rename(one.folder)
    assert standing_result(one, "core") is None
    assert not read_documents(tmp_path / "evals", print, {})
    earlier = replace(builder.subject(builder.make_sae(seed=2), "at_0"), home=tmp_path, label=one.label)
    time.sleep(0.05)
    write_result(Result(replace(one, folder=tmp_path / "aside"), {}, {}), "core", {})
    assert standing_result(earlier, "core") is None  # a revision of before: all its times are


def test_results_of_another_revision_of_an_sae_that_is_not_here_are_left_out(builder, tmp_path):
    """As of the Hub, whose weights lie in a cache."""
    home = tmp_path / "runs/hub/owner--name"
    for n, eval_id in enumerate(("core", "tpp", "scr")):
        subject = replace(builder.subject(builder.make_sae(seed=min(n, 1)), f"at_{n}"), home=home, label=home.name)
        write_result(Result(subject, {}, {}), eval_id, {})
        time.sleep(0.002)  # results say when they were made to a thousandth of a second
    assert set(read_documents(home / "evals", print, {})[home.name]) == {"tpp", "scr"}


def test_results_of_another_layer_or_of_other_weights_are_left_out_of_pages_and_told(builder, tmp_path):
    """Each `--layer` leaves results of an SAE that names none."""
    subject, said, written = builder.subject(builder.make_sae()), [], {}
    for layer, eval_id in ((5, "core"), (6, "tpp"), (6, "scr")):
        one = replace(subject, home=tmp_path, config={}, layers=(layer,), target_layers=(layer,))
        written[eval_id] = result_path(one, eval_id), write_result(Result(one, {}, {}), eval_id, {})
        time.sleep(0.002)  # results say when they were made to a thousandth of a second
    assert set(read_documents(tmp_path / "evals", said.append, {})["sae"]) == {"tpp", "scr"}
    assert len(said) == 1 and said[0].endswith("another layer or hook than the SAE has now: core of sae")
    asked = dict([written["core"]])
    assert set(read_documents(tmp_path / "evals", print, asked)["sae"]) == {"core"}  # what was asked for just now
    path, document = written["core"]
    path.write_text(json.dumps({**document, "sae_cfg_dict": {}}))  # as one that says less
    said.clear()
    assert set(read_documents(tmp_path / "evals", said.append, {})["sae"]) == {"core", "tpp", "scr"} and not said
    time.sleep(0.05)
    builder.save(subject.folder, builder.make_sae(seed=9))
    assert not read_documents(tmp_path / "evals", said.append, {})
    assert len(said) == 1 and said[0].endswith(": core of sae, scr of sae, tpp of sae")


@pytest.mark.parametrize(("layer", "stands"), [(1, True), (2, False)])
def test_saebenchs_own_result_stands_for_an_sae_of_its_place(builder, golden, tmp_path, layer, stands):
    """It names layer and hook as SAELens 6 does, in the metadata, and no weights."""
    name = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    subject = builder.subject(builder.make_sae())
    subject = replace(subject, home=tmp_path, config={"metadata": name}, layers=(layer,), target_layers=(layer,))
    path = result_path(subject, "core")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(golden.output("topk")))
    assert (standing_result(subject, "core") is not None) == stands


def test_a_result_of_the_residual_is_none_of_another_hook(builder, tmp_path):
    """Which earlier versions did not look for in an SAE from elsewhere."""
    name = {"hook_name": f"blocks.{builder.LAYER}.attn.hook_z"}
    subject = replace(builder.subject(builder.make_sae()), home=tmp_path, config={"metadata": name})
    write_result(Result(subject, {}, {}), "core", {})
    assert standing_result(subject, "core") is not None
    assert standing_result(replace(subject, config={"metadata": name | {"hook": "z"}}), "core") is None


def test_several_layers_lie_side_by_side(batch, builder):
    other = {builder.LAYER: batch.resid[builder.LAYER], 7: 2 * batch.resid[builder.LAYER]}
    x = replace(batch, resid=other).x((7, builder.LAYER))
    assert x.dtype == torch.float32
    assert torch.equal(x[..., : builder.D], 2 * x[..., builder.D :])


def test_the_one_layer_of_an_sae_that_has_several(builder):
    subject = builder.subject(builder.make_sae(d_in=2 * builder.D), layers=(1, 2))
    with pytest.raises(NotApplicable, match="reads layers"):
        _ = subject.layer
    assert builder.subject(builder.make_sae(), "one").layer == builder.LAYER


def test_gradients_flow_through_weights_that_are_first_used_where_none_do(builder):
    subject = builder.subject(builder.make_sae())
    with torch.inference_mode():
        assert not subject.sae.W_dec.is_inference()
    acts = torch.ones(1, subject.width, requires_grad=True)
    subject.sae.decode(acts).sum().backward()
    assert acts.grad is not None


def test_what_encodes_moves_with_its_sae(builder):
    """What is kept of the weights where they were would hold that memory."""
    subject = builder.subject(builder.make_sae())
    before = subject.encoder
    assert subject.encoder is before
    subject.to(torch.device("cpu"))  # where it is already
    assert subject.encoder is before
    subject.to(torch.device("meta"))
    assert subject.encoder is not before
