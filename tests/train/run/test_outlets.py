"""Progress, trackers, groups: what a run speaks through."""

import errno
import io
import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from saemill.cache_schema import LaunchInvalid
from saemill.train.data.device_copies import take_device
from saemill.train.disk.atomic_files import encode_line, replace_written
from saemill.train.errors import ConfigInvalid, TrackerMissing
from saemill.train.parallel.processes import SOLO, choose_device, join
from saemill.train.run.log_and_show_progress import Progress, Trackers, Watch, require_trackers
from saemill.train.run.run_folder import MetricsLog
from saemill.train.run.validate_and_save_results import Tally
from saemill.train.train_runs import open_process

NUMBERS = {"loss": 0.25, "l0": 31.7, "explained_variance": 0.81234, "dead_share": 0.015}


def test_a_terminal_gets_a_line_a_sae():
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=True, width=150), ["a", "b"], 100, 10)
    progress.show(40, {"a": NUMBERS, "b": NUMBERS}, 1234.0)
    progress.close()
    for said in (" 40%", "loss 0.25", "L0 31.7", "EV 0.812", "dead 1.5%", "1,234 tok/s"):
        assert said in out.getvalue()


def test_a_log_gets_plain_lines_and_the_last_one_always():
    out = io.StringIO()
    progress = Progress(Console(file=out, width=40), ["a"], 100, 0)
    progress.show(40, {"a": NUMBERS}, 1234.0)
    progress.show(100, {"a": NUMBERS}, 1234.0)
    assert out.getvalue().count("\n") == 1 and out.getvalue().startswith("a 100/100 loss 0.25")


def test_numbers_are_asked_for_where_they_are_shown(monkeypatch):
    """Each time costs a wait for a GPU."""
    now = [0.0]
    monkeypatch.setattr("saemill.train.run.log_and_show_progress.time.perf_counter", lambda: now[0])
    log = io.StringIO()
    plain = Progress(Console(file=log), ["a"], 100, 0)
    bars = Progress(Console(file=io.StringIO(), force_terminal=True), ["a"], 100, 0)
    for now[0], due in ((1.0, [False, True]), (31.0, [True, True])):
        assert [one.is_due() for one in (plain, bars)] == due
    for one in (plain, bars):
        one.show(40, {"a": NUMBERS}, 1234.0)
    assert log.getvalue().endswith("1,234 tok/s 46 seconds left\n")
    assert not plain.is_due() and not bars.is_due()
    now[0] = 60.0
    plain.show(60, {"a": NUMBERS}, 1234.0)  # too soon for a line; its numbers were there, those of all ranks
    now[0] = 62.0
    assert not plain.is_due()
    bars.close()


def test_the_clock_of_a_run_stops_with_its_last_step(monkeypatch):
    now = iter([0.0, 1.0, 5.0])
    monkeypatch.setattr("saemill.train.run.log_and_show_progress.time.perf_counter", lambda: next(now))
    feed = SimpleNamespace(ideal_share=0.5, loader=SimpleNamespace(first_wait_seconds=0.5, waited_seconds=0.0))
    watch = Watch(None, None, None, feed, None, ["a"], 1, 10)
    watch.begin()
    watch.end()
    assert watch.seconds == 3.5 and watch.seconds == 3.5


def test_spread_over_one_process_says_so():
    out = io.StringIO()
    with open_process("cpu", Console(file=out, width=200), spread=True):
        pass
    assert "--spread divides SAEs among several processes, but there is only one" in out.getvalue()


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    assert json.loads(encode_line({"a": float("nan"), "b": 1.0})) == {"a": None, "b": 1.0}
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"a": 1})
    size = log.size
    log.write({"a": 2})
    log.cut(size)
    log.write({"a": 3})
    log.close()
    assert [json.loads(line)["a"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [1, 3]


def test_trackers_are_accelerates_and_optional(tmp_path, monkeypatch):
    """What was configured and logged reaches the tracker."""
    from accelerate import tracking

    told = []

    class Heard:
        requires_logging_directory = True

        def __init__(self, name, logging_dir):
            told.append(("init", name, logging_dir))

        def start(self):
            told.append("start")

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step):
            told.append((values, step))

        def finish(self):
            told.append("finish")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "heard", Heard)
    trackers = Trackers(["heard"], tmp_path / "run_1", {"data": {"seed": 0}, "saes": {"a": {"k": None}}})
    trackers.log({"a/loss": 1.0}, 3)
    trackers.close()
    assert told[0] == ("init", "run_1", str(tmp_path / "run_1/trackers"))
    assert told[1:] == ["start", {"data.seed": 0, "saes.a.k": "None"}, ({"a/loss": 1.0}, 3), "finish"]


def test_a_tracker_that_refuses_is_named_and_those_before_it_are_finished(tmp_path, monkeypatch):
    """As without a login."""
    from accelerate import tracking

    first = Mock(requires_logging_directory=False)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "first", first)

    class Refuses:
        requires_logging_directory = False

        def __init__(self, name):
            raise LookupError("no login\nsee elsewhere")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "refuses", Refuses)
    with pytest.raises(TrackerMissing, match="the tracker refuses could not be started: no login$"):
        Trackers(["first", "refuses"], tmp_path / "run_1", {})
    first.return_value.finish.assert_called_once_with()


def test_trackers_that_are_not_there_are_refused(monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "get_available_trackers", list)
    for name in ("wandb", "mlflow"):
        with pytest.raises(TrackerMissing, match=f"{name} is not installed: pip install {name}$"):
            require_trackers([name])
    with pytest.raises(ConfigInvalid, match="found 'wandbb'"):
        require_trackers(["wandbb"])
    require_trackers([])


def test_one_process_is_a_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: int("no MASTER_ADDR"))  # as it refuses, in a ValueError
    with pytest.raises(LaunchInvalid, match="^WORLD_SIZE=2: .* to connect, found: .*MASTER_ADDR.*. Start them all"):
        join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1.5")
    with pytest.raises(LaunchInvalid, match="^WORLD_SIZE=1.5: expected a number as torchrun sets it"):
        join("cpu")
    assert (SOLO.rank, SOLO.size, SOLO.any(True), SOLO.texts("x")) == (0, 1, True, ["x"])


def test_devices(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigInvalid, match="found no CUDA device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigInvalid, match="found 2 CUDA devices"):
        choose_device("cuda:2")
    for kind in ("meta", "mps", "xpu"):  # NumPy reads into the memory of none
        with pytest.raises(ConfigInvalid, match=f"found '{kind}': it is not supported"):
            choose_device(kind)


def test_a_gpu_has_its_number_which_torch_must_have_to_take_it(monkeypatch):
    """What torch does with a device is torch's own here, but for the driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    taken: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    for name in ("auto", "cuda", "cuda:0", "cpu"):
        take_device(choose_device(name))
    take_device(torch.device("cuda"))  # the thread's own, whichever that is
    assert taken == [1, 1, 0]


def test_a_full_disk_keeps_no_part_of_a_file(tmp_path):
    def fill(beside):
        beside.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_written(tmp_path / "sae.safetensors", fill)
    assert not list(tmp_path.iterdir())


def test_processes_of_the_same_number_write_files_of_their_own(tmp_path):
    """As on a disk that containers share: here two writes of one process, one within the other."""

    def write(beside):
        beside.write_bytes(b"first, and longer")
        replace_written(tmp_path / "cfg.json", lambda other: other.write_bytes(b"second"))
        assert (tmp_path / "cfg.json").read_bytes() == b"second"

    replace_written(tmp_path / "cfg.json", write)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first, and longer"]


def test_a_tally_is_the_formula_over_all_tokens():
    generator = torch.Generator().manual_seed(0)
    x, acts = torch.randn(90, 5, generator=generator) + 3, torch.rand(90, 7, generator=generator) - 0.5
    x_hat = x + 0.1 * torch.randn(90, 5, generator=generator)
    tally = Tally()
    for part in (slice(0, 20), slice(20, 21), slice(21, 90)):
        tally.add(x[part], x_hat[part], acts[part].count_nonzero(dim=1))
    expected = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert tally.explained_variance == pytest.approx(float(expected), rel=1e-4)
    assert tally.l0 == pytest.approx(float((acts != 0).sum() / 90))
    assert tally.tokens == 90
