"""Samples from a trained run: a labelled grid, an npz of the pixels and, on request, single PNG files."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from fooddiff import build, parallel, processes
from fooddiff.chunks import stored_chunks
from fooddiff.commands import signals
from fooddiff.commands.companions import drawing, load_companions
from fooddiff.files.atomic import write_atomically
from fooddiff.files.hashes import sha256_of_json
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.load import class_ids, load_trained
from fooddiff.sample.generate import draw_batches, npz_bytes, sample_ids
from fooddiff.sample.grid import class_grid, png_bytes
from fooddiff.settings import check_counts

log = logging.getLogger(__name__)


def run(
    workdir: Path,
    *,
    step: int | None,
    weights: str,
    classes: Sequence[str],
    per_class: int,
    spec: Mapping[str, Any],
    seed: int,
    batch_size: int,
    single_files: bool,
    out: Path | None,
    guide: Path | None = None,
    guide_step: int | None = None,
    classifier: Path | None = None,
    upsample: Path | None = None,
) -> None:
    """Writes `<name>.png`, `<name>.npz` and `<name>/<class>/<i>.png` into `out`.

    The name ends in a hash of everything that the images depend on, so that other images never take their place. The
    npz holds `arr_0`, uint8[n, h, w, 3], and `arr_1`, the class ids, class by class. Until they are written, finished
    batches lie in `<name>.partial/`, and the same command goes on from them.

    Args:
        workdir: a run's directory.
        step: checkpoint; None takes the newest.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>".
        classes: class names; empty takes all.
        per_class: images per class.
        spec: fields of `SamplerSpec` that replace those of config.sample where they are not None.
        seed: image i of a class depends on (seed, class, i) only.
        batch_size: images per call of the compiled sampler, rounded up to the number of devices.
        single_files: also write every image as a PNG of its own.
        out: directory for the files; None takes workdir/samples.
        guide: a workdir or a file of weights, whose averaged weights guide in place of the null label; None for none.
        guide_step: checkpoint of the guide; None takes the newest.
        classifier: a run or file of a classifier of noisy images, whose averaged weights guide; None for none.
        upsample: a run or file of a model for super-resolution, whose averaged weights enlarge what is drawn; None for
            none.

    Raises:
        FileNotFoundError: no such workdir or checkpoint.
        ValueError: an unknown class, weights or sampler, a number out of range, or models that do not fit together.
        signals.Stopped: SIGTERM or SIGINT ended the sampling early.
    """
    check_counts("--", per_class=per_class, batch_size=batch_size)
    mesh = parallel.make_mesh()
    trained = load_trained(workdir, step=step, weights=weights, mesh=mesh)
    log.info("step %d, weights %s", trained.step, trained.weights)
    sampler = build.sampler_spec(trained.config.sample, **spec)
    companions = load_companions(
        trained, mesh, guide=guide, guide_step=guide_step, classifier=classifier, upsample=upsample
    )
    draw, params, recipe, _ = drawing(trained, mesh, sampler, companions)
    names = tuple(classes) or trained.class_names
    wanted = class_ids(trained.class_names, names)
    ids = sample_ids(wanted, per_class)

    batch_size = parallel.divisible(min(batch_size, len(ids)), mesh)
    out = workdirs.outputs(workdir) / "samples" if out is None else out
    made_by = {
        "weights_sha256": processes.sha256_of(params),
        "recipe": recipe,
        "sampling": sampler.to_json(),
        "seed": seed,
        "batch_size": batch_size,
        "ids": ids.tolist(),
    }
    what = f"step_{trained.step:07d}_{trained.weights}_{sampler.name}_seed{seed}_n{len(ids)}"
    stem = f"{what}_{sha256_of_json(made_by)[:8]}"
    unfinished = out / f"{stem}.partial"

    def draw_rows(rows: slice) -> dict[str, np.ndarray]:
        (images,) = draw_batches(draw, params, jax.random.key(seed), ids[rows], batch_size)
        return {"images": images}

    batches = []
    with (
        signals.graceful_stop() as stop_signal,
        tqdm(total=len(ids), unit="image", dynamic_ncols=True, disable=not processes.is_first()) as progress,
    ):
        for batch in stored_chunks(
            len(ids), batch_size, draw_rows, identity=made_by, folder=unfinished,
            after_chunk=lambda: signals.stop_if_asked(stop_signal),
        ):  # fmt: skip
            batches.append(batch["images"])
            progress.update(len(batch["images"]))
    if processes.is_first():
        _write(out, stem, np.concatenate(batches), ids[:, 0], names, single_files=single_files)
        shutil.rmtree(unfinished)


def _write(
    out: Path, stem: str, images: np.ndarray, labels: np.ndarray, names: Sequence[str], *, single_files: bool
) -> None:
    by_class = images.reshape(len(names), -1, *images.shape[1:])
    write_atomically(out / f"{stem}.png", png_bytes(class_grid(by_class, names)))
    write_atomically(out / f"{stem}.npz", npz_bytes(images, labels))
    if single_files:
        for name, column in zip(names, by_class, strict=True):
            directory = out / stem / name
            directory.mkdir(parents=True, exist_ok=True)
            for i, pixels in enumerate(column):
                write_atomically(directory / f"{i:05d}.png", png_bytes(Image.fromarray(pixels)))
    log.info("wrote %s.png and .npz: %d images of %d classes", out / stem, len(images), len(names))
