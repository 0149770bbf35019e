"""What a run writes about itself: metrics.jsonl and its views."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.runs.metrics import RunLog, read_metrics

LOSS = 1.3312345678901234


def config(**logging) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "run"},
            "model": {
                "hidden_size": 8,
                "num_layers": 1,
                "num_attention_heads": 1,
                "ffn_hidden_size": 8,
                "seq_length": 16,
            },
            "data": {"path": "data"},
            "train": {"global_batch_size": 2},
            "logging": logging,
        }
    )


def write(folder, steps, resume_step=0, **values):
    with RunLog(folder, config(), resume_step) as log:
        for step in steps:
            seen = {"step": step, "samples": 2 * step, "tokens": 32 * step}
            log.train(**seen, **{"loss": LOSS / step, **values})
            if step % 2 == 0:
                log.validation(**seen, loss=LOSS)


def steps_of(path) -> list[tuple[str, int]]:
    return [(entry["kind"], entry["step"]) for entry in read_metrics(path)]


def test_a_line_holds_the_numbers_in_full_precision(tmp_path):
    write(tmp_path, [1], grad_norm=0.1 + 0.2, lr=1e-4)
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {
            "kind": "train",
            "step": 1,
            "samples": 2,
            "tokens": 32,
            "loss": LOSS,
            "bits_per_base": LOSS / math.log(2),
            "grad_norm": 0.1 + 0.2,
            "lr": 1e-4,
        }
    ]


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path):
    with RunLog(tmp_path, config(), 0) as log:
        log.train(step=1, samples=2, tokens=32, loss=LOSS)
        assert steps_of(tmp_path / "metrics.jsonl") == [("train", 1)]


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    write(tmp_path, [1], loss=math.nan, grad_norm=math.inf, lr=-math.inf)
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    (entry,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(entry["loss"]) and entry["grad_norm"] == math.inf and entry["lr"] == -math.inf


def test_a_resumed_run_sets_the_lines_it_will_write_again_aside(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    before = read_metrics(tmp_path / "metrics.jsonl")
    write(tmp_path, [4, 5, 6], resume_step=3)
    train = [step for kind, step in steps_of(tmp_path / "metrics.jsonl") if kind == "train"]
    assert train == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path / "metrics.jsonl")[:4] == before[:4]
    discarded = tmp_path / "metrics.discarded.jsonl"
    assert steps_of(discarded) == [("train", 4), ("validation", 4), ("train", 5)]


def test_a_validation_that_is_left_is_known(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with RunLog(tmp_path, config(), resume_step=3) as log:
        log.train(step=4, samples=8, tokens=128, loss=LOSS)
        assert [log.has_validation(step) for step in (1, 2, 3, 4)] == [False, True, False, False]


def test_a_run_killed_before_its_first_checkpoint_starts_with_an_empty_file(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert steps_of(tmp_path / "metrics.jsonl") == [("train", 1)]
    assert len(steps_of(tmp_path / "metrics.discarded.jsonl")) == 3


def test_half_a_last_line_is_dropped_and_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, [1, 2])
    path.write_text(path.read_text() + '{"kind": "train", "st')
    assert len(read_metrics(path)) == 3
    write(tmp_path, [3], resume_step=2)
    assert steps_of(path) == [("train", 1), ("train", 2), ("validation", 2), ("train", 3)]
    path.write_bytes(path.read_bytes() + b'{"kind": "tr\xff\n')
    with pytest.raises(UserError, match="line 5 is not one that a run writes"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 5"):  # before anything is trained
        RunLog(tmp_path, config(), resume_step=2)


@pytest.mark.parametrize(
    "old, new",
    [
        ('"kind"', '"kine"'),
        ('"train"', '"trail"'),
        ('"step": 2', '"step": "2"'),
        ('"loss": 0', '"loss":\x100'),
        ('{"', '\x80"'),
        (', "samples"', '}{ "samples"'),
    ],
)
def test_a_changed_line_is_named(tmp_path, old, new):
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, [1, 2, 3])
    first, second, *rest = path.read_text().splitlines(keepends=True)
    assert old in second
    path.write_text(first + second.replace(old, new, 1) + "".join(rest), encoding="latin-1")
    with pytest.raises(UserError, match=rf"^{path}, line 2 is not one that a run writes: "):
        read_metrics(path)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [2, 3], resume_step=1)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Scalars("validation/loss")[0].value == pytest.approx(LOSS)


def test_missing_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install gengram-megatron\[wandb\]"):
        RunLog(tmp_path, config(wandb={"project": "dna"}), 0)


def test_wandb_goes_on_with_the_run_of_the_folder(tmp_path, monkeypatch):
    started, logged = [], []
    run = SimpleNamespace(
        log=logged.append, finish=lambda: None, define_metric=lambda *_, **__: None
    )
    fake = SimpleNamespace(init=lambda **settings: started.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (0, 1):
        with RunLog(tmp_path, config(wandb={"project": "dna"}), resume_step) as log:
            log.train(step=resume_step + 1, samples=2, tokens=32, loss=LOSS)
    assert started[0]["id"] == started[1]["id"] and started[0]["project"] == "dna"
    assert started[0]["config"]["model"]["seq_length"] == 16
    assert [entry["step"] for entry in logged] == [1, 2]
    assert logged[0]["train/loss"] == LOSS
