"""The benchmarks run and say what they should; how fast anything is, is not tested."""

import json
import math
import sys
from pathlib import Path

import pytest

from configs import food101_cheap
from fooddiff import build
from fooddiff.bench import data, measure, reference, sample, table, topology, train
from fooddiff.model.network import abstract_params
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def config(tmp_path):
    return tiny.config(tmp_path, sample__batch_size=4, sample__steps=2)


@pytest.fixture
def fake_peer(tmp_path, monkeypatch):
    """A peer that answers as the real worker does, and says what it was asked for."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import pathlib, sys\n"
        f"pathlib.Path({str(tmp_path / 'asked.json')!r}).write_text(sys.argv[1])\n"
        "for line in sys.stdin:\n    print(0.5, flush=True)\n"
    )
    monkeypatch.setattr(reference, "WORKER", worker)
    return reference.Peer(Path(sys.executable), tmp_path)


@pytest.mark.slow
def test_train_names_rate_work_memory_and_ratio(config, fake_peer, tmp_path):
    numbers = train.run(config, repetitions=2, peer=fake_peer)
    assert numbers["images"].median == pytest.approx(config.train.batch_size / numbers["one call"].median, rel=0.5)
    assert numbers["work"].median > 1e6
    assert 0 < numbers["utilisation"].median < 1
    assert numbers["improved-diffusion"].median == config.train.batch_size / 0.5
    assert numbers["ratio"].low <= numbers["ratio"].median <= numbers["ratio"].high
    assert all(math.isfinite(value) for number in numbers.values() for value in number[:3])
    asked = json.loads((tmp_path / "asked.json").read_text())
    assert asked["unet"]["model_channels"] == config.model.model_channels
    assert asked["unet"]["out_channels"] == 6
    assert (asked["task"], asked["batch_size"], asked["image_size"]) == ("train", config.train.batch_size, 8)


@pytest.mark.slow
def test_the_peer_of_a_uvit_is_told_its_size(fake_peer, tmp_path):
    config = food101_cheap.get_config()
    config.train.batch_size = 2
    config.model.update(conv_channels=8, width=16, depth=1, embed_dim=16)
    with pytest.raises(ValueError, match="the peer learns with AdamW"):
        train.run(config, repetitions=1, peer=fake_peer._replace(checkout=None))
    config.optimizer.name = "adamw"
    numbers = train.run(config, repetitions=1, peer=fake_peer._replace(checkout=None))
    assert numbers["PyTorch"].median == 2 / 0.5
    asked = json.loads((tmp_path / "asked.json").read_text())
    network = build.make_model(config).network
    assert asked["parameters"] == sum(leaf.size for leaf in abstract_params(network).values())
    assert (asked["task"], asked["averages"], asked["model"]["width"]) == ("train_uvit", 3, 16)


@pytest.mark.slow
def test_sample_and_data(config, fake_peer):
    numbers = sample.run(config, repetitions=1, peer=fake_peer)
    assert numbers["network calls"].median == pytest.approx(2 * numbers["images"].median)
    assert set(data.run(config, repetitions=1)) == {"as stored", "half of them mirrored"}


@pytest.mark.slow
def test_a_peer_that_fails_is_quoted(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("raise ImportError('no torch here')")
    monkeypatch.setattr(reference, "WORKER", worker)
    with (
        reference.started(reference.Peer(Path(sys.executable), None), {}) as run,
        pytest.raises(RuntimeError, match="no torch here"),
    ):
        run()


def test_rounds_alternate_and_the_first_does_not_count():
    calls = []
    seconds = measure.interleaved(
        {"a": lambda: calls.append("a") or len(calls), "b": lambda: calls.append("b") or 0}, 2
    )
    assert calls == ["a", "b"] * 3
    assert seconds == {"a": [3, 5], "b": [0, 0]}


def test_numbers_are_shown_and_written(tmp_path, capsys):
    numbers = {"images": measure.quantity([1.0, 3.0, 2.0], "images/s"), "work": measure.exactly(5.0, "FLOP")}
    table.show("bench", numbers, "3 repetitions")
    shown = capsys.readouterr().out
    assert "1 to 3" in shown
    assert "images/s" in shown
    table.write(tmp_path / "numbers.json", "bench train", numbers)
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written["numbers"]["images"] == {"median": 2.0, "low": 1.0, "high": 3.0, "unit": "images/s"}
    assert written["versions"]["jax"]


def test_the_bytes_of_collectives_are_read_from_the_program():
    text = """
  %all-reduce.1 = (f32[64,3]{1,0}, bf16[8]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%sum
  %ag = f32[16]{0} all-gather(%c), channel_id=2, dimensions={0}
  %again = f32[16]{0} all-gather(%d), channel_id=2, dimensions={0}
  %fusion = f32[1000]{0} fusion(%all-reduce.1), calls=%inner
"""
    assert topology.collective_bytes(text) == {"all-reduce": 64 * 3 * 4 + 8 * 2, "all-gather": 16 * 4}


def test_arrays_that_stay_on_the_chip_are_not_traffic_of_main_memory():
    text = """
%inner (x: f32[1000]) -> f32[1000] {
  ROOT %huge = f32[1000000]{0} add(%x, %x)
}

ENTRY %main (a: f32[100]) -> f32[10] {
  %a = f32[100]{0:T(128)} parameter(0)
  %near.start = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%a)
  %near = f32[100]{0:T(128)S(1)} copy-done(%near.start)
  %part.start = ((f32[100]{0:T(128)}), f32[20]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:20]}
  %part = f32[20]{0:T(128)S(1)} slice-done(%part.start)
  %pair = (bf16[50]{0}, f32[50]{0:S(1)}) fusion(%near, %a), kind=kLoop, calls=%inner
  %first = bf16[50]{0} get-tuple-element(%pair), index=0
  ROOT %out = f32[10]{0} fusion(%first, %part), kind=kLoop, calls=%inner
}
"""
    copied, pair, out = 400 + 80, 100 + 400, 40 + 100
    assert topology.main_memory_bytes(text) == copied + pair + out


def test_a_topology_that_nobody_knows_is_named(config):
    with pytest.raises(ValueError, match=r"--topology is 'v1:2x2', expected one of v5e"):
        topology.run(config, "v1:2x2")
