"""Hooks and writers: when they are called, what they remember, what they leave on disk."""

import csv
import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tiny import examples, trainer

from curvtrain._text import human_bytes, table
from curvtrain.trainer import Call, EarlyStopping, Hook, Profiler, Run, read_jsonl
from curvtrain.trainer.watch.progress import Clock, duration
from curvtrain.trainer.watch.writers import Csv, JsonLines, TensorBoard, open_writers

pytestmark = pytest.mark.usefixtures("quick_compile")


def view(written=None):
    """A run without a loop."""
    run = Run(lambda: None, None)
    run.begin(lambda step, scalars: (written if written is not None else []).append((step, scalars)), print)
    return run


class Recording(Hook):
    """Remembers its calls."""

    def __init__(self, every=1):
        self.every, self.calls, self.closed = every, [], 0

    def __call__(self, run):
        self.calls.append((run.step, int(run.state.step), run.last))

    def close(self):
        self.closed += 1


# -- when --------------------------------------------------------------------------------------------------------------


def test_hooks_are_called_every_so_often_and_once_at_the_end():
    each, some, rare = Recording(), Recording(every=3), Recording(every=100)
    trainer(steps=7, hooks=[each, some, rare]).fit()
    assert each.calls == [(t, t, t == 7) for t in range(1, 8)]
    assert some.calls == [(3, 3, False), (6, 6, False), (7, 7, True)]
    assert rare.calls == [(7, 7, True)]
    assert each.closed == some.closed == rare.closed == 1


def test_a_hook_stops_the_run_and_writes():
    recording = Recording(every=3)

    def stop(run):
        run.write({"mine/twice": np.float32(2 * run.step)})
        if run.step == 4:
            run.stop("enough")

    result = trainer(steps=9, log_every=2, eval_data=examples(20), hooks=[Call(stop, every=2), recording]).fit()
    assert (result.step, result.stopped) == (4, "enough")
    assert recording.calls == [(3, 3, False), (4, 4, True)]
    assert [row["mine/twice"] for row in result.history if "mine/twice" in row] == [4.0, 8.0, 8.0]
    assert result.metrics["mine/twice"] == 8.0
    assert result.metrics["eval/loss"] > 0  # it ends as at its last step: evaluated, once
    assert [row["step"] for row in result.history if "eval/loss" in row] == [4]


def test_hooks_are_closed_when_the_run_fails():
    def fail(run):
        raise ZeroDivisionError

    recording = Recording()
    with pytest.raises(ZeroDivisionError):
        trainer(hooks=[recording, Call(fail)]).fit()
    assert recording.closed == 1


def test_call_is_checked():
    with pytest.raises(ValueError, match=r"hooks\.Call\(every\) should be at least 1, not 0"):
        Call(print, every=0)


# -- early stopping ----------------------------------------------------------------------------------------------------


def feed(hook, values, metric="eval/loss", every=2, run=None):
    """Calls `hook` at every step, a value being logged every second one: the step at which it stops, or None."""
    run = run or view()
    for i, value in enumerate(values):
        for _ in range(every):
            run.step += 1
            if run.step % every == 0:
                run.record(run.step, {metric: value})
            hook(run)
            if run.stop_reason is not None:
                return i
    return None


@pytest.mark.parametrize(
    ("options", "values", "stops_at"),
    [
        (dict(patience=2), [3, 2, 2, 1, 1.5, 1.2, 0], 5),  # two evaluations after the best one
        (dict(patience=1), [3, 2, 2], 2),  # equal is no improvement
        (dict(patience=3), [3, 2, 1, 1, 0.9, 0.9, 0.9], None),
        (dict(patience=2, mode="max"), [1, 2, 1.5, 3, 2.9, 2.8], 5),
        (dict(patience=2, min_delta=0.5), [3, 2.8, 2.4, 2.3, 2.2], 4),
        (dict(patience=2), [1, math.nan, math.nan], 2),
        (dict(patience=2, metric="train/loss"), [2, 1, 1, 1], 3),  # counted per logged value, not per step
    ],
)
def test_early_stopping(options, values, stops_at):
    metric = options.get("metric", "eval/loss")
    assert feed(EarlyStopping(**options), values, metric) == stops_at


def test_early_stopping_says_why():
    run = view()
    feed(EarlyStopping(patience=2, mode="max", metric="eval/accuracy"), [0.5, 0.4, 0.4], "eval/accuracy", run=run)
    assert run.stop_reason == "eval/accuracy has not improved on 0.5 for 2 evaluations"


def test_early_stopping_remembers_over_a_restart():
    values = [3, 2, 2.5, 2.4, 2.3]
    whole = EarlyStopping(patience=3)
    assert feed(whole, values) == 4
    before, after = EarlyStopping(patience=3), EarlyStopping(patience=3)
    assert feed(before, values[:3]) is None
    memory = json.loads(json.dumps(before.state_dict()))  # as in a checkpoint
    after.load_state_dict(memory)
    run = view()
    run.step = 6
    assert feed(after, values[3:], run=run) == 1
    fresh = EarlyStopping()
    fresh.load_state_dict(json.loads(json.dumps(EarlyStopping().state_dict())))
    assert feed(fresh, [1, 2, 2]) is None


def test_early_stopping_warns_of_a_metric_that_is_not_logged():
    run, hook = view(), EarlyStopping(metric="eval/los")
    run.record(1, {"train/loss": 1.0})
    hook(run)  # evaluations may come
    run.record(2, {"eval/loss": 1.0})
    with pytest.warns(UserWarning, match=r"EarlyStopping\(metric='eval/los'\) is not among the logged \['eval/loss',"):
        hook(run)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(patience=0), ValueError, r"EarlyStopping\(patience\) should be at least 1, not 0"),
        (dict(mode="lower"), ValueError, r"EarlyStopping\(mode\) should be one of 'min', 'max', not 'lower'"),
        (dict(min_delta=-1.0), ValueError, r"EarlyStopping\(min_delta\) should be at least 0.0, not -1.0"),
    ],
)
def test_early_stopping_is_checked(options, error, message):
    with pytest.raises(error, match=message):
        EarlyStopping(**options)


def test_early_stopping_ends_a_run():
    constant = trainer(steps=40, eval_every=2, eval_data=examples(20), hooks=[EarlyStopping(patience=3, min_delta=9.0)])
    result = constant.fit()
    assert result.step == 8  # the first evaluation is the best, and three more follow
    assert result.stopped.startswith("eval/loss has not improved on ")


# -- profiler ----------------------------------------------------------------------------------------------------------


def test_profiler_writes_a_trace(tmp_path, capsys):
    trainer(steps=5, progress=True, hooks=[Profiler(tmp_path / "trace", start=2, steps=2)]).fit()
    assert list((tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb"))
    assert f"profile of steps 2 to 4 written to {tmp_path / 'trace'}" in capsys.readouterr().out


def test_profiler_stops_when_the_run_does(tmp_path):
    profiler = Profiler(tmp_path / "trace", start=2, steps=100)
    trainer(steps=3, hooks=[profiler]).fit()
    assert list((tmp_path / "trace").glob("plugins/profile/*/*.xplane.pb"))
    profiler.close()  # again is nothing


# -- writers -----------------------------------------------------------------------------------------------------------

ROWS = [(t, {"train/loss": 1 / t, "eval/loss": float(t)}) for t in range(1, 7)]


def write(kind, folder, rows, first_step=0):
    writer = kind(folder, first_step)
    for step, scalars in rows:
        writer.write(step, scalars)
    writer.close()


def read_csv(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]


def read_events(folder):
    """The events of each event file, oldest first. A record is length, its checksum, data, its checksum."""
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at, events = path.read_bytes(), 0, []
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
        yield events


def flat(rows):
    return [(step, name, value) for step, scalars in rows for name, value in scalars.items()]


def test_json_lines(tmp_path):
    write(JsonLines, tmp_path, ROWS)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": step, **scalars} for step, scalars in ROWS]
    write(JsonLines, tmp_path, ROWS[4:], first_step=4)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": step, **scalars} for step, scalars in ROWS]


def test_json_lines_know_no_nan(tmp_path):
    write(JsonLines, tmp_path, [(1, {"a": math.nan, "b": -math.inf})])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line == '{"step": 1, "a": null, "b": null}'


def test_csv(tmp_path):
    write(Csv, tmp_path, ROWS)
    assert read_csv(tmp_path) == flat(ROWS)
    write(Csv, tmp_path, ROWS[4:], first_step=4)
    assert read_csv(tmp_path) == flat(ROWS)


@pytest.mark.parametrize(("kind", "name"), [(JsonLines, "metrics.jsonl"), (Csv, "metrics.csv")])
def test_a_line_that_a_kill_cut_short_is_dropped(kind, name, tmp_path):
    write(kind, tmp_path, ROWS[:3])
    whole = (tmp_path / name).read_text()
    (tmp_path / name).write_text(whole[:-3])
    write(kind, tmp_path, [], first_step=10)
    kept = (tmp_path / name).read_text()
    assert whole.startswith(kept) and kept.endswith("\n") and kept.count("\n") == whole.count("\n") - 1
    write(kind, tmp_path, [], first_step=0)
    assert (tmp_path / name).read_text() == {"metrics.jsonl": "", "metrics.csv": Csv.HEADER}[name]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_tensorboard(tmp_path):
    write(TensorBoard, tmp_path, ROWS[:2])
    write(TensorBoard, tmp_path, ROWS[2:], first_step=2)
    files = [
        [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
        for events in read_events(tmp_path)
    ]
    as_float32 = lambda rows: [(step, name, np.float32(value)) for step, name, value in flat(rows)]
    assert files == [as_float32(ROWS[:2]), as_float32(ROWS[2:])]
    *_, resumed = read_events(tmp_path)
    # TensorBoard drops what it has from here on
    assert [event.step for event in resumed if event.session_log.status == event_pb2.SessionLog.START] == [3]


def test_writers_are_opened_by_name(tmp_path):
    writer = open_writers(("jsonl", "csv"), tmp_path, 0)
    writer.write(1, {"a": 1.0})
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]
    nowhere = open_writers(("jsonl",), None, 0)
    nowhere.write(1, {"a": 1.0})
    nowhere.close()


def test_logs_of_a_resumed_run_are_those_of_a_straight_one(tmp_path):
    fail = [True]

    def trip(run):
        run.write({"mine/step": run.step})
        if run.step == 7 and fail[0]:
            fail[0] = False
            raise ZeroDivisionError

    make = lambda: trainer(
        steps=10,
        save_every=4,
        log_every=1,
        workdir=tmp_path,
        writers=["jsonl", "csv", "tensorboard"],
        hooks=[Call(trip)],
    )
    with pytest.raises(ZeroDivisionError):
        make().fit()
    make().fit()
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "mine/step" in row] == list(range(1, 11))
    assert [step for step, name, _ in read_csv(tmp_path) if name == "train/loss"] == list(range(1, 11))
    *_, resumed = read_events(tmp_path)
    assert [event.step for event in resumed if event.session_log.status == event_pb2.SessionLog.START] == [5]


# -- what progress is made of ------------------------------------------------------------------------------------------


def test_durations_bytes_and_tables():
    assert [duration(s) for s in (0, 59.6, 61, 3600, 36061)] == ["0:00", "1:00", "1:01", "1:00:00", "10:01:01"]
    assert [human_bytes(b) for b in (0, 1023, 1536, 3 * 2**20, 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "1024.0 GiB",
    ]
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"


def test_a_clock_does_not_count_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("curvtrain.trainer.watch.progress.time.perf_counter", lambda: now[0])
    clock = Clock()
    now[0] += 2
    with clock.pause():
        now[0] += 50
    now[0] += 1
    assert clock.seconds == 3
    clock.restart()
    now[0] += 4
    assert clock.seconds == 4
