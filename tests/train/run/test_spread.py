"""Which process gets which SAEs."""

from types import SimpleNamespace

import pytest
import torch

from saemill.train.config.run_config import Member
from saemill.train.errors import ConfigInvalid
from saemill.train.kit.variant_registry import config_type
from saemill.train.parallel.processes import require_one_kind, require_own_devices
from saemill.train.run.start_or_resume import deal_members, empty_host_cache, members_of


def members(**settings):
    """SAEs by label: `(variant, width)` or `(variant, width, layer)`."""
    return [
        Member(label, variant, config_type(variant)(width=width, **({"layer": rest[0]} if rest else {})))
        for label, (variant, width, *rest) in settings.items()
    ]


def labels(parts):
    return [[member.label for member in part] for part in parts]


def test_processes_get_about_as_much_each_and_keep_the_order_of_the_run():
    dealt = deal_members(members(a=("topk", 512), b=("topk", 2048), c=("topk", 1024), d=("topk", 512)), 2, 8)
    assert labels(dealt) == [["b"], ["a", "c", "d"]]


def test_a_process_reads_few_layers():
    every = members(a=("topk", 256, 1), b=("topk", 256, 2), c=("topk", 256, 2), d=("topk", 256, 1))
    assert labels(deal_members(every, 2, 8)) == [["a", "d"], ["b", "c"]]


def test_the_first_process_can_measure_the_shuffling_of_tokens():
    every = members(windows=("temporal", 4096), tokens=("topk", 256))
    assert labels(deal_members(every, 2, 8)) == [["tokens"], ["windows"]]


def test_what_cannot_be_spread_is_refused():
    process = SimpleNamespace(is_spread=True, group=SimpleNamespace(size=3, rank=0))
    config = SimpleNamespace(members=members(a=("topk", 256)), course=SimpleNamespace(shard_width=False))
    with pytest.raises(ConfigInvalid, match="at least one SAE for each of 3 processes, found 1"):
        members_of(config, 8, process)
    config.course.shard_width = True
    with pytest.raises(ConfigInvalid, match=r"course\.shard_width .* --spread"):
        members_of(config, 8, process)


def test_two_processes_on_one_gpu_are_named():
    require_own_devices(["", ""])
    require_own_devices(["H100, one", "H100, two"])
    with pytest.raises(ConfigInvalid, match=r"each of 3 processes, found processes 0, 2 on one \(H100, one\)"):
        require_own_devices(["H100, one", "H100, two", "H100, one"])


def test_processes_with_and_without_a_gpu_are_refused():
    """Their sums go by other ways and never meet."""
    require_one_kind(["cuda", "cuda"])
    with pytest.raises(ConfigInvalid, match="a GPU for each of 3 processes, found none for 1: check CUDA_VISIBLE_DEV"):
        require_one_kind(["cuda", "cpu", "cuda"])


@pytest.mark.parametrize(("room", "name"), [(torch.accelerator, "empty_host_cache"), (torch._C, "_host_emptyCache")])
def test_page_locked_memory_is_given_back_by_the_name_that_torch_has_for_it(monkeypatch, room, name):
    """The public one is there from 2.12 on; where there is none, training begins all the same."""
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    monkeypatch.delattr(torch._C, "_host_emptyCache", raising=False)
    empty_host_cache()
    called = []
    monkeypatch.setattr(room, name, lambda: called.append(name), raising=False)
    empty_host_cache()
    assert called == [name]
