import json
import math

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from fooddiff.files.atomic import write_atomically
from fooddiff.files.lock import locked
from fooddiff.runs.record import Recorder, read_scalars


def test_scalars_come_back(tmp_path):
    with Recorder(tmp_path, resume_step=0) as recorder:
        recorder.scalars(10, {"train/loss": 0.5, "train/grad_norm": math.inf})
    assert read_scalars(tmp_path) == [{"step": 10, "train/loss": 0.5, "train/grad_norm": None}]


def test_resuming_drops_later_records(tmp_path):
    with Recorder(tmp_path, resume_step=0) as recorder:
        for step in (10, 20, 30):
            recorder.scalars(step, {"train/loss": step / 10})
    with Recorder(tmp_path, resume_step=20) as recorder:
        recorder.scalars(30, {"train/loss": 7.0})
    assert [(record["step"], record["train/loss"]) for record in read_scalars(tmp_path)] == [(10, 1), (20, 2), (30, 7)]


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "tra')
    assert read_scalars(tmp_path) == [{"step": 1}]
    with Recorder(tmp_path, resume_step=1) as recorder:
        recorder.scalars(2, {"train/loss": 1.0})
    assert [record["step"] for record in read_scalars(tmp_path)] == [1, 2]


def test_a_process_beside_the_training_leaves_out_a_line_that_was_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"step": 2, "tra')
    with Recorder(tmp_path, resume_step=None) as recorder:
        recorder.scalars(1, {"eval/distance": 3.0})
    assert read_scalars(tmp_path) == [{"step": 1}, {"step": 1, "eval/distance": 3.0}]


def test_a_process_beside_a_training_under_way_cuts_nothing(tmp_path):
    whole = json.dumps({"step": 1}) + "\n"
    with Recorder(tmp_path, resume_step=0) as training, locked(tmp_path):
        training.scalars(1, {"train/loss": 1.0})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(whole[:5])  # what the training has written of a line so far
        with Recorder(tmp_path, resume_step=None):
            assert (tmp_path / "metrics.jsonl").read_text().endswith(whole[:5])


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "grid.png")
    with Recorder(tmp_path, resume_step=0) as recorder:
        recorder.scalars(3, {"train/loss": 0.25})
        recorder.picture(3, "samples/raw", tmp_path / "grid.png")
    tags = {}
    for event in events(tmp_path / "tb"):
        for value in event.summary.value:
            tags[value.tag] = (event.step, value.simple_value, value.image.height)
    assert tags["train/loss"] == (3, 0.25, 0)
    assert tags["samples/raw"] == (3, 0.0, 4)


def events(directory):
    """Parses TensorBoard's record files: length u64, crc u32, payload, crc u32."""
    for path in directory.iterdir():
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def full(_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_an_error_of_the_record_that_does_not_fit(tmp_path, monkeypatch):
    with Recorder(tmp_path, resume_step=0) as recorder:
        recorder.scalars(1, {"train/loss": 1.0})
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            with pytest.raises(OSError, match=r"record could not be written .*No space"):
                recorder.scalars(2, {"train/loss": 2.0})
        recorder.scalars(3, {"train/loss": 3.0})


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
