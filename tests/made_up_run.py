"""Workdirs as a training leaves them, with made-up numbers: for the report, which only reads files."""

import json
from pathlib import Path

import numpy as np

from fooddiff.sample.grid import class_grid, png_bytes

CLASSES = ("apple_pie", "sushi")


def evaluation(*, step=200, weights="raw", value=5.0, n=303, metric="FD-64[stem abc]", sampler="ancestral"):
    return {
        "results": [{"metric": metric, "value": value, "error": 0.5, "bias": 0.1, "n": n, "warnings": []}],
        "samples": {
            "name": f"step {step} {weights}",
            "identity": {"kind": "generated", "sha256": "1" * 64},
            "n": n,
            "made_by": {
                "step": step, "weights": weights, "sampling": {"sampler": sampler, "steps": 20}, "seed": 0,
            },
        },
        "reference": {"name": "archive test", "identity": {"sha256": "2" * 64}, "n": 6060},
        "resize": "tf1",
    }  # fmt: skip


def real_images(value=0.4, n=303, **changes):
    record = evaluation(value=value, n=n, **changes)
    record["samples"] |= {"name": "archive train", "made_by": {}}
    return record


def make_run(workdir: Path, *, objective="hybrid", seed=777, records=200, steps=(100, 200), value=5.0) -> Path:
    """Writes config.json, versions.json, metrics.jsonl, eval/*.json and samples/*.png."""
    for folder in ("eval", "samples"):
        (workdir / folder).mkdir(parents=True)
    config = {"seed": seed, "objective": {"name": objective}, "train": {"steps": records, "batch_size": 32}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "versions.json").write_text(json.dumps({"jax": "0.10.2", "devices": "1 x cpu"}))
    noise = np.random.default_rng(seed)
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(1, records + 1):
            loss = 1 / step + 0.1 + 0.01 * noise.random()
            quarters = {f"train/loss_q{number}": loss / number for number in (1, 2, 3, 4)}
            levels = {f"train/loss_log_snr_{name}": loss for name in ("-2_to_0", "0_to_2", "above_8", "below_-8")}
            speeds = {"perf/images_per_second": 60.0, "perf/input_wait": 0.001}
            file.write(json.dumps({"step": step, "train/loss": loss} | quarters | levels | speeds) + "\n")
    for step in steps:
        for weights in ("raw", "ema_0.999"):
            record = evaluation(step=step, weights=weights, value=value * 100 / step)
            (workdir / "eval" / f"step_{step}_{weights}.json").write_text(json.dumps(record))
            images = noise.integers(0, 256, (len(CLASSES), 2, 32, 32, 3), dtype=np.uint8)
            grid = png_bytes(class_grid(images, CLASSES))
            (workdir / "samples" / f"step_{step:07d}_{weights}.png").write_bytes(grid)
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, f"samples/{weights}/colour_spread_ratio": 1.5}) + "\n")
        (workdir / "samples" / f"step_{step:07d}_ema_0.999_one_step.png").write_bytes(grid)
    return workdir
