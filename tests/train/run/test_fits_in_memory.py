"""A run that does not fit is refused with what it needs."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch

from saemill.cache_schema import LaunchInvalid
from saemill.train.config.parse_settings import parse_settings
from saemill.train.config.run_config import DataConfig, RunRequest
from saemill.train.data.batch import Batch
from saemill.train.engine.step import Trainee
from saemill.train.errors import MemoryTooSmall
from saemill.train.run import fits_in_memory, preflight
from saemill.train.run.validate_and_save_results import Tally

CPU = torch.device("cpu")


def member(*words, variant="topk"):
    return RunRequest.of_variants((variant,), parse_settings(words)).members(lambda _: {})[0]


def of_64(hook):
    return 64


def test_what_a_width_needs():
    """F = 1000, D = 64: two tables, four copies, four bytes."""
    assert fits_in_memory.weight_bytes(member("width=1000"), of_64) == 1000 * 64 * 2 * 4 * 4
    assert fits_in_memory.weight_bytes(member("width=1000"), of_64, parts=8) == 1000 * 64 * 2 * 4 * 4 / 8


def test_a_cross_layer_latent_reads_one_layer_and_writes_to_all():
    words = ["width=1000", "layers=1,2,3"]
    assert fits_in_memory.weight_bytes(member(*words, variant="clt"), of_64) == 1000 * 64 * (1 + 3) * 4 * 4
    assert fits_in_memory.weight_bytes(member(*words, variant="crosscoder"), of_64) == 1000 * 64 * (3 + 3) * 4 * 4
    causal = member(*words, "causal=true", variant="crosscoder")
    assert fits_in_memory.weight_bytes(causal, of_64) == 1000 * 64 * (1 + 3) * 4 * 4


def test_keys_are_narrower_than_the_residual():
    """Of grouped queries; what was counted as wide as the residual refused runs that fit."""
    narrow = member("width=1000", "hook=k")
    assert fits_in_memory.weight_bytes(narrow, {"k": 16, "resid": 64}.__getitem__) == 1000 * 16 * 2 * 4 * 4


def test_a_dictionary_that_cannot_be_put_together_at_the_end_is_not_begun(monkeypatch):
    monkeypatch.setattr(fits_in_memory, "free_bytes", lambda device: 2**30)
    wide = member("width=400000")
    fits_in_memory.require_room([member("width=100000")], lambda _: 256, 64, 10**6, 8, CPU, 64)
    with pytest.raises(MemoryTooSmall, match="to measure and save an SAE at the end"):
        fits_in_memory.require_room([wide], lambda _: 256, 64, 10**6, 8, CPU, 64)


@pytest.mark.parametrize(
    ("batch_tokens", "context", "is_split", "rows"),
    [
        (1000, 128, False, 1000),
        (131_072, 128, False, 4096),  # a million latents of each: 51 GB of dense codes instead of 1.6 TB
        (131_072, 8192, False, 16_384),
        (131_072, 128, True, 128),
    ],
)
def test_a_large_batch_is_measured_in_parts(batch_tokens, context, is_split, rows):
    config, manifest = SimpleNamespace(data=DataConfig(batch_tokens=batch_tokens)), SimpleNamespace(context=context)
    assert preflight.held_out_rows(config, manifest, is_split) == rows


@pytest.mark.parametrize(
    "variant", ["topk", "standard", "jumprelu", "gated", "p_anneal", "tiered", "positional", "matching_pursuit"]
)
def test_a_step_needs_what_is_measured(battery, variant):
    """At least what a step allocates whose activations are dense, and not several times as much."""
    rows, width, d_model = 256, 2048, 16
    words = [f"width={width}", "dead_after_tokens=100000000", "optim.lr=1e-3", "optim.warmup_steps=0"]
    words += ["optim.start=drawn"]  # a fitted one is sparse until training makes it dense
    member_of = member(*words, *(["context=36"] if variant == "positional" else []), variant=variant)
    trainee = Trainee("one", member_of.config.build(d_model), 10)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, d_model, generator=generator)
    batch = Batch(x, side=battery.side_of(member_of.config.needs(), rows, generator))
    trainee.step(batch)
    with measured_memory() as profiler:
        trainee.step(batch)
    estimate = fits_in_memory.step_bytes(member_of, lambda _: d_model, rows)
    gradients = 4 * width * (2 * d_model + 1)
    assert 0.3 * estimate < peak_of(profiler) - gradients < estimate


@pytest.mark.parametrize("variant", ["topk", "gated", "clt"])
def test_rows_of_dead_latents_are_counted(battery, variant):
    """All are dead, of a dictionary that is large beside the batch."""
    rows, width, d_model = 16, 1024, 128
    words = [f"width={width}", "dead_after_tokens=1000000", "optim.start=drawn"]
    words += ["layers=0,1,2,3", "hook=mlp_in", "to_hook=mlp_out"] if variant == "clt" else []
    one = member(*words, variant=variant)
    trainee, needs = Trainee("one", one.config.build(d_model), 10), one.config.needs()
    x = torch.randn(rows, d_model * len(needs.inputs), generator=torch.Generator().manual_seed(0))
    trainee.step(Batch(x, x if needs.targets else None))
    trainee.counters.tokens_since_fired.fill_(10**9)
    with measured_memory() as profiler:
        trainee.step(Batch(x, x if needs.targets else None))
    estimate = fits_in_memory.step_bytes(one, lambda _: d_model, rows)
    gradients = 4 * sum(parameter.numel() for parameter in trainee.sae.parameters())
    assert 0.3 * estimate < peak_of(profiler) - gradients < estimate


def test_without_an_auxiliary_loss_none_are_copied():
    found = [fits_in_memory.step_bytes(member("width=1000", *words), of_64, 1) for words in ([], ["aux_weight=0"])]
    assert found[0] - found[1] == 1000 * 64 * 2 * 4


def measured_memory():
    """With all events, without which some versions of torch warn that others are forgotten."""
    return torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    )


def peak_of(profiler):
    """The most bytes that were allocated at once."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_refused_with_numbers(monkeypatch):
    monkeypatch.setattr(fits_in_memory, "free_bytes", lambda device: 2**30)
    fits_in_memory.require_room([member("width=1000")], of_64, 512, 10**6, 1, CPU)
    with pytest.raises(MemoryTooSmall, match=r"expected 4\.\d GiB of memory on cpu .* found 1\.0 GiB free"):
        fits_in_memory.require_room([member("width=200000")], lambda _: 512, 512, 10**6, 1, CPU)


def test_a_gpu_is_asked_what_is_free_and_the_largest_part_is_to_be_turned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ({0: 3 * 2**30, 1: 2**20}[device.index], 80 * 2**30))
    for free in ("_free_on_host", "_free_in_group"):
        monkeypatch.setattr(fits_in_memory, free, lambda: 2**42)
    one, small = member("width=200000"), member("width=1000")

    def refused(members, d_model, *asked, device=1):
        with pytest.raises(MemoryTooSmall) as refusal:
            fits_in_memory.require_room(members, lambda _: d_model, *asked, torch.device("cuda", device))
        return str(refusal.value)

    fits_in_memory.require_room([one], of_64, 64, 10**6, 1, torch.device("cuda", 0))
    assert "most of it for topk" in refused([one], 512, 64, 10**6, 1) and "found 0.0 GiB free" in refused(
        [one], 512, 64, 10**6, 1
    )
    assert "found 3.0 GiB free. Use a smaller --width" in refused([one], 5120, 64, 10**6, 1, device=0)
    assert "Use a smaller --set data.batch_tokens" in refused([small], 64, 10**6, 10**6, 1)
    assert "Use a smaller --set data.pool_tokens" in refused([small], 64, 64, 10**9, 1)


def test_a_gpu_s_checkpoint_needs_host_memory_in_powers_of_two(monkeypatch):
    """Two tables of 12.8 GB, in weights and two moments: 16 GiB each."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    monkeypatch.setattr(fits_in_memory, "_free_in_group", lambda: 2**42)

    def require(gib, parts=1, team=1):
        monkeypatch.setattr(fits_in_memory, "_free_on_host", lambda: gib * 2**30)
        device = torch.device("cuda")
        fits_in_memory.require_room([member("width=50000000")], of_64, 64, 0, parts, device, 0, team)

    require(96)
    with pytest.raises(MemoryTooSmall, match=r"expected 96\.0 GiB of host memory, .* found 95\.0 GiB free"):
        require(95)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    require(96, team=4)  # one of four that share rows writes for all
    with pytest.raises(MemoryTooSmall, match=r"96\.0 GiB of host"):
        require(96)  # each writes its own
    require(168, parts=4, team=4)  # a quarter each, and all of it once more
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    require(16 * 24, parts=16, team=16)
    with pytest.raises(MemoryTooSmall, match=r"23\.8 GiB of host memory, for each process to build a whole SAE"):
        require(16 * 23, parts=16, team=16)
    require(16 * 24, team=16)
    with pytest.raises(MemoryTooSmall, match=r"23\.8 GiB of host memory, for each process to build a whole SAE"):
        require(16 * 23, team=16)  # one writes for all, and all begin
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(MemoryTooSmall, match=r"41\.9 GiB of host"):
        require(167, parts=4, team=4)


def test_processes_on_one_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(fits_in_memory, "_free_on_host", lambda: 2**40)
    monkeypatch.setattr(fits_in_memory, "_free_in_group", lambda: 2**42)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fits_in_memory.free_bytes(CPU) == 2**38
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "abc")
    with pytest.raises(LaunchInvalid, match="LOCAL_WORLD_SIZE=abc: expected a number"):
        fits_in_memory.free_bytes(CPU)


def test_of_processes_that_share_a_memory_one_measures(monkeypatch):
    """Not so of SAEs that are spread: each process measures its own. Nor of GPUs: each has its memory."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(fits_in_memory, "_free_on_host", lambda: 4 * 2**30)
    monkeypatch.setattr(fits_in_memory, "_free_in_group", lambda: 2**42)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**40))
    wide = [member("width=40000")]  # 1.8 GiB to measure, and 0.03 of weights

    def require(team, device=CPU):
        fits_in_memory.require_room(wide, of_64, 64, 0, 1, device, 4096, team)

    require(4)
    for team, device in ((1, CPU), (4, torch.device("cuda"))):
        with pytest.raises(MemoryTooSmall, match="1.8 to measure and save"):
            require(team, device)


def test_a_team_are_those_that_share_rows_or_latents(big, sae_train, quick, monkeypatch):
    asked, real = [], preflight._require_memory

    def require(settled, store, members, *_):
        real(settled, store, members, 4, 1, CPU)
        real(settled, store, members, 1, 3, CPU)

    monkeypatch.setattr(preflight, "require_room", lambda *args: asked.append(args[-1]))
    monkeypatch.setattr(preflight, "_require_memory", require)
    sae_train("--variant", "topk", *quick, "--cache", big["path"], "--tokens", 640)
    assert asked == [4, 3]


@pytest.mark.parametrize("batch_tokens", [64, 5])
def test_as_many_rows_are_counted_for_the_end_as_are_measured_at_once(big, sae_train, quick, monkeypatch, batch_tokens):
    """A window at least, which may be longer than a batch."""
    counted, measured, real = [], [], Tally.add

    def add(tally, target, *rest):
        measured.append(len(target))
        real(tally, target, *rest)

    monkeypatch.setattr(preflight, "require_room", lambda *args: counted.append(args[-2]))
    monkeypatch.setattr(Tally, "add", add)
    words = ["--tokens", 128, "--set", f"data.batch_tokens={batch_tokens}"]
    sae_train("--variant", "topk", *quick, "--cache", big["path"], *words)
    assert max(measured) <= counted[0] < 2 * max(measured)


def test_free_memory_is_some_of_what_the_host_has_in_bytes():
    """Kibibytes that were taken for bytes would be less than a thousandth of it."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert there / 1000 < fits_in_memory._free_on_host() <= there
    assert 0 < fits_in_memory.free_bytes(CPU) <= there


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("tiered", []),
        ("positional", ["context=36", "range_encoders=true"]),
        ("positional", ["context=36", "adapters=true", "adapters_on=features"]),
        ("hierarchical", ["guidance=encode"]),
        ("skip_transcoder", []),
    ],
)
def test_matrices_beside_encoder_and_decoder_are_counted(variant, words):
    one = member("width=600", *words, variant=variant)
    trainee = Trainee("one", one.config.build(64), 10)
    numbers = sum(tensor.numel() for tensor in trainee.sae.parameters() if tensor.ndim > 1)
    assert numbers > 600 * 64 * 2
    assert fits_in_memory.weight_bytes(one, of_64) == 4 * 4 * numbers


@torch.no_grad()
@pytest.mark.parametrize("variant", ["topk", "batchtopk", "jumprelu"])
def test_to_measure_needs_no_more_than_is_counted(variant):
    rows, width, d_model = 256, 4096, 16
    one = member(f"width={width}", variant=variant)
    sae = one.config.build(d_model).sae
    x = torch.randn(rows, d_model, generator=torch.Generator().manual_seed(0))
    with measured_memory() as profiler:
        torch.linalg.vector_norm(sae.encode(x), 0, dim=1)
    assert peak_of(profiler) < 1.02 * fits_in_memory.end_bytes(one, lambda _: d_model, rows)


def test_the_narrowest_limit_of_a_job_counts(tmp_path):
    """Slurm's are some folders below the root, of both versions of groups."""
    own = tmp_path / "cgroup"
    own.write_text("5:cpu,memory:/job_7/step_0\n0::/slice/job_7/step_0\n")
    for folder, names, limit in (
        ("memory/job_7", ("memory.limit_in_bytes", "memory.usage_in_bytes"), 5000),
        ("slice/job_7", ("memory.max", "memory.current"), 4000),
        ("slice/job_7/step_0", ("memory.max", "memory.current"), "max"),
    ):
        group = tmp_path / "groups" / folder
        group.mkdir(parents=True)
        for name, value in zip(names, (limit, 1500), strict=True):
            (group / name).write_text(f"{value}\n")
        (group / "memory.stat").write_text("inactive_file 60\nactive_file 40\n")
    left = [fits_in_memory._room_in(group) for group in fits_in_memory._own_groups(own, tmp_path / "groups")]
    assert sorted(left) == [2600, 3600, *[2**62] * 5]
    assert fits_in_memory._own_groups(tmp_path / "none") == []
