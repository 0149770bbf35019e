"""The line on the screen: what it shows at which width, and how it counts the time left."""

import io
import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from rich.console import Console

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.training.report import GpuUse
from gengram_megatron.runs.progress import Progress, duration

STEP = {
    "loss": 1.3312,
    "lr": 9.1e-5,
    "grad_norm": 0.83,
    "tokens_per_second": 12345.4,
    "seconds": 0.7,
    "data_wait": 0.01,
}
LONG = {**STEP, "step": 123_456, "tokens_per_second": 1_234_567.0}
GPU = {"model_flops_utilisation": 0.4132, "peak_memory_bytes": 62_100_000_000}


class Screen(Progress):
    """A progress line on a screen of this test, whose clock stands still unless it is set."""

    def __init__(self, total_steps: int, interval=1, terminal=False, width=160, **settings):
        self.screen, self.now = io.StringIO(), 0.0
        console = Console(
            file=self.screen,
            force_terminal=terminal,
            width=width,
            highlight=False,
            _environ={"TERM": "xterm"},
        )
        super().__init__(total_steps, interval, console, clock=lambda: self.now, **settings)

    @property
    def lines(self) -> list[str]:
        return self.screen.getvalue().splitlines()

    def left(self) -> str:
        """The time left of the last line."""
        return next(part for part in self.lines[-1].split("  ") if part.endswith(" left"))


def show(terminal: bool, steps=range(1, 121), interval=60) -> Screen:
    with Screen(400, interval, terminal) as progress:
        for step in steps:
            slow = step % 10 == 0
            times = {"seconds": 60.0, "data_wait": 0.0} if slow else {}
            progress.step(**{**STEP, "step": step, **times})
        progress.validation(step=120, loss=1.3, of_sets={})
        progress.validation(step=120, loss=1.3, of_sets={"human": 1.2, "apes": 1.4})
        progress.end()
    return progress


LINE = (
    "step 120/400  loss 1.3312  1.9205 bits  12,345 tokens/s  3m16s left  "
    "lr 9.1e-05  grad 0.83  wait 0.0%"
)


def test_a_log_gets_a_line_at_each_interval_and_one_a_validation():
    lines = show(terminal=False).lines
    assert len(lines) == 5
    assert lines[1] == LINE
    validation = "step 120/400  validation loss 1.3000 nats  1.8755 bits/base"
    assert lines[2:4] == [validation, f"{validation}  human 1.2000  apes 1.4000"]
    # 108 steps of 0.7 s, a hundredth of it waiting, and 12 of a minute
    assert lines[4] == "120 steps in 13m16s, 0.10% of it waiting for samples"


def test_a_log_gets_the_last_step_too():
    assert show(terminal=False, steps=[399, 400]).lines[0].startswith("step 400/400")


def test_a_terminal_gets_one_line_that_changes():
    screen = show(terminal=True).screen.getvalue()
    assert LINE in screen and "step 7/400" in screen
    assert "validation loss" in screen


@pytest.mark.parametrize(
    "width, last",
    [
        (200, "62.1 GB"),
        (121, "MFU 41.3%"),
        (120, "wait 1.0%"),
        (80, "1h12m left"),
        (79, "1h12m left"),
        (60, "bits"),
    ],
)
def test_what_matters_fits_into_80_columns_and_the_rest_is_left_out_whole(width, last):
    with Screen(125_000, terminal=True, width=width) as progress:
        progress.step(**{**LONG, "seconds": 2.8}, **GPU)
    line = progress.screen.getvalue().split("\r")[-1]
    shown = re.sub("\x1b.*?[a-zA-Z]", "", line).strip()
    assert shown.endswith(last) and len(shown) <= width
    whole = (
        "step 123456/125000  loss 1.3312  1.9205 bits  1,234,567 tokens/s  1h12m left  "
        "lr 9.1e-05  grad 0.83  wait 1.0%  MFU 41.3%  62.1 GB"
    )
    assert whole.startswith(shown)


def test_a_log_is_not_cut():
    progress = Screen(125_000, width=40)
    progress.step(**LONG, **GPU)
    assert len(progress.lines) == 1 and progress.lines[0].endswith("62.1 GB")


@pytest.mark.parametrize(
    "seconds, shown",
    [(0, "0s"), (59.6, "1m00s"), (192, "3m12s"), (18_420, "5h07m"), (183_600, "2d03h")],
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


# The time left


@pytest.mark.parametrize(
    "interval, step, due",
    [
        (None, 1, 1),
        (None, 100, 1),
        (10, 1, 10),
        (10, 10, 10),
        (10, 11, 9),
        (10, 100, 1),
        (30, 1, 4),
        (30, 91, 1),
        (30, 90, 2),
        (1000, 5, 1),
    ],
)
def test_time_left_counts_the_validations_that_are_due(interval, step, due):
    """Of 100 steps of 2 s each: before any validation was made, its 60 batches are taken to need
    a third of a step each; then it is as long as it was."""
    progress = Screen(100, validation_interval=interval, validation_steps=60)
    progress.step(**{**STEP, "step": step, "seconds": 2.0})
    assert progress.left() == f"{duration((100 - step) * 2 + due * 40)} left"
    progress.validating(step=step, done=0, total=60)
    progress.now = 100
    progress.validation(step=step, loss=1.3, of_sets={})
    progress.step(**{**STEP, "step": step, "seconds": 2.0})
    assert progress.left() == f"{duration((100 - step) * 2 + due * 100)} left"


def test_a_slow_validation_now_and_then_does_not_move_the_time_left():
    progress = Screen(100, validation_interval=10, validation_steps=60)
    for seconds in (100, 100, 1000):
        progress.validating(step=50, done=0, total=60)
        progress.now += seconds
        progress.validation(step=50, loss=1.3, of_sets={})
    progress.step(**{**STEP, "step": 51, "seconds": 2.0})
    assert progress.left() == f"{duration(49 * 2 + 5 * 100)} left"


def test_a_validation_shows_its_progress_at_a_terminal():
    with Screen(100, terminal=True, validation_interval=10, validation_steps=120) as progress:
        progress.step(**{**STEP, "step": 90, "seconds": 3.0})
        for done in range(120):
            progress.validating(step=90, done=done, total=120)
            progress.now += 2
        progress.validation(step=90, loss=1.3, of_sets={})
    # 10 steps of 3 s, a whole validation of 120 s, and what is left of this one
    shown = progress.screen.getvalue()
    assert f"step 90/100  validating 37/120  {duration(30 + 120 + 83)} left" in shown
    # Two lines: the result, and the live one, which is that of the step again. Now a validation
    # is known to take 240 s.
    assert shown.count("\n") == 2
    last = shown.split("\r")[-1]
    assert "step 90/100  loss 1.3312" in last and f"  {duration(30 + 240)} left  lr" in last


def test_a_log_gets_a_line_a_minute_of_a_long_validation_and_none_of_a_short_one():
    progress = Screen(100, validation_steps=300)
    for _ in range(2):
        for done in range(300):
            progress.validating(step=100, done=done, total=300)
            progress.now += 0.5
    assert [line.split("  ")[1] for line in progress.lines] == [
        f"validating {done}/300" for done in (120, 240)
    ] * 2
    short = Screen(100, validation_steps=300)
    for done in range(300):
        short.validating(step=100, done=done, total=300)
        short.now += 0.1
    assert short.lines == []


def test_a_validation_before_the_first_step_has_no_time_left():
    with Screen(100, terminal=True, validation_interval=10, validation_steps=2) as progress:
        progress.validating(step=10, done=0, total=2)
    assert "validating 0/2" in progress.screen.getvalue()
    assert "left" not in progress.screen.getvalue()


# Real terminals and pipes

PROGRAM = f"""
import sys
from gengram_megatron.runs.progress import Progress
with Progress(total_steps=400, interval=2) as progress:
    for step in range(1, 5):
        progress.step(step=step, **{STEP})
    progress.validating(step=4, done=0, total=3)
    progress.validation(step=4, loss=1.3, of_sets={{}})
    print("ready", file=sys.__stderr__, flush=True)
    sys.stdin.readline()
"""


def shown_at(output: int, reader: int, term: str, **variables: str) -> str:
    """What the program has written to `output` while it still runs."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "TERM": term, **variables},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr.readline() == b"ready\n"
        shown = os.read(reader, 65536).decode()
        process.stdin.close()
    return shown


@pytest.mark.parametrize("term, live", [("dumb", False), ("xterm", True)])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines_as_they_come(term, live):
    reader, output = pty.openpty()
    try:
        termios.tcsetwinsize(output, (24, 80))
        shown = shown_at(output, reader, term)
    finally:
        os.close(output)
        os.close(reader)
    assert ("\x1b" in shown) == live
    if not live:
        lines = shown.replace("\r\n", "\n").splitlines()
        starts = ["step 2/400  loss", "step 4/400  loss", "step 4/400  validation"]
        assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [
            True
        ] * 3
        assert all(len(line) <= 80 for line in lines) and "\r" not in "".join(lines)


def test_a_pipe_gets_plain_lines_as_they_come_even_where_colour_is_forced():
    reader, output = os.pipe()
    try:
        shown = shown_at(output, reader, "xterm", FORCE_COLOR="1")
    finally:
        os.close(output)
        os.close(reader)
    assert "\x1b" not in shown and "\r" not in shown
    assert len(shown.splitlines()) == 3 and "wait 1.0%" in shown.splitlines()[0]


# Model FLOP utilisation

MODEL = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "num_experts": 4,
    "moe_router_topk": 2,
    "seq_length": 128,
    "vocab_size": 256,
    "gengram": {"enabled": True, "layers": [2], "kmer_sizes": [1, 2, 3], "dim": 32},
}
FORWARD = (
    2 * 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64)  # query, key and value, output
    + 2 * 2 * 2 * (128 / 2) * 64  # scores and their use, half of the square
    + 2 * 2 * 64 * 4  # router
    + 2 * 2 * 2 * 3 * 64 * 96  # two experts of three maps each
    + 2 * 2 * 96 * 64  # the memory's key and value, of three tables of 32 columns, in one layer
    + 2 * 64 * 256  # logits
)
"""FLOPs a token, a multiplication and an addition counting as two, of two layers where not said."""


def gpu_use(device: str | None, **train) -> GpuUse:
    config = Config.model_validate(
        {
            "run": {"dir": "run"},
            "model": MODEL,
            "data": {"path": "data"},
            "train": {"global_batch_size": 8, "steps": 1, **train},
        }
    )
    one = GpuUse.of_run(config, devices=16)
    return GpuUse(device, one.devices, one.flops_per_token)


def test_utilisation_is_that_of_hand_counted_flops():
    expected = 1e9 * 3 * FORWARD / (16 * 989e12)
    for precision in ("bf16", "fp32"):  # recomputation and precision change nothing
        h100 = gpu_use("NVIDIA H100 80GB HBM3", precision=precision, recompute="full")
        assert h100.utilisation(1e9) == pytest.approx(expected, rel=1e-12)
    a100 = gpu_use("NVIDIA A100-SXM4-80GB")
    assert a100.utilisation(1e9) == pytest.approx(expected * 989 / 312, rel=1e-12)


def test_the_metrics_of_a_step_on_a_known_and_an_unknown_gpu(one_process):
    """The memory is that of torch's counter, which is 0 where there is no GPU."""
    known = gpu_use("NVIDIA H200").of_step(1e9)
    assert known.keys() == {"peak_memory_bytes", "model_flops_utilisation"}
    assert known["model_flops_utilisation"] == gpu_use("NVIDIA H200").utilisation(1e9)
    assert isinstance(known["peak_memory_bytes"], int)
    assert gpu_use("NVIDIA GeForce RTX 9999").of_step(1e9).keys() == {"peak_memory_bytes"}


def test_an_unknown_device_has_no_utilisation_and_a_cpu_nothing_at_all():
    assert gpu_use("NVIDIA GeForce RTX 9999").utilisation(1e9) is None
    assert gpu_use(None).of_step(1e9) == {}
