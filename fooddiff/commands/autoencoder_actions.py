"""What the training of an autoencoder does beside its steps: it reconstructs images of the test split."""

import logging
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from fooddiff import build, parallel, processes
from fooddiff.commands.actions import Actions, Surroundings
from fooddiff.commands.likelihood import balanced_rows
from fooddiff.commands.reconstructions import Reconstruct
from fooddiff.data.cache import Dataset
from fooddiff.eval.reconstruction import check_size, psnr, ssim
from fooddiff.files.atomic import write_atomically
from fooddiff.sample.grid import class_grid, png_bytes
from fooddiff.settings import ConfigError, check_batch_size, check_positive
from fooddiff.train.loop import Periodic
from fooddiff.train.state import TrainState

log = logging.getLogger(__name__)

PAIRS = 36  # of an image with its reconstruction, in the grid


def make_actions(config: ConfigDict, model: build.AutoencoderModel, mesh: jax.sharding.Mesh) -> Actions:
    """The actions that config.eval asks for.

    Raises:
        ConfigError: a value that cannot be.
    """
    settings = config.eval
    check_positive("eval.every_steps", settings.every_steps)
    if settings.count is not None:
        check_positive("eval.count", settings.count)
    check_batch_size("eval.batch_size", settings.batch_size, mesh.size)
    try:
        check_size(config.data.image_size, config.data.image_size)
    except ValueError as error:
        raise ConfigError(f"config.data.image_size: {error}") from error
    reconstruct = build.make_reconstruct(model, mesh)

    def chosen() -> tuple[Dataset, np.ndarray]:
        heldout = build.make_dataset(config, "test")
        return heldout, balanced_rows(heldout.labels, settings.count)

    def periodic(around: Surroundings) -> list[Periodic]:
        heldout, rows = chosen()
        return [Periodic(settings.every_steps, partial(_reconstruct, config, reconstruct, heldout, rows, around))]

    return Actions(
        check_data=lambda dataset: chosen(),
        periodic=periodic,
        next_command="python -m fooddiff.eval reconstructions --workdir={}",
    )


def _reconstruct(
    config: ConfigDict, reconstruct: Reconstruct, heldout: Dataset, rows: np.ndarray, around: Surroundings,
    step: int, state: TrainState,
) -> None:  # fmt: skip
    """Records PSNR and SSIM of the raw weights and of the first average, and draws each with the real images above."""
    averages = {f"ema_{rate}": state.ema[str(rate)] for rate in config.ema.rates[:1]}
    for name, params in ({"raw": state.params} | averages).items():
        real = heldout.images[rows]
        batches = parallel.in_batches(partial(reconstruct, params), real, batch_size=config.eval.batch_size)
        ours = np.concatenate(list(batches))
        found = {"PSNR": psnr(real, ours), "SSIM": ssim(real, ours)}
        numbers = {f"eval/{name}/{metric}, n={len(rows)}": float(values.mean()) for metric, values in found.items()}
        around.recorder.scalars(step, numbers)
        log.info("step %d, %s: %s", step, name, ", ".join(f"{what} {number:.4g}" for what, number in numbers.items()))
        if processes.is_first():
            path = around.workdir / "samples" / f"step_{step:07d}_{name}_reconstructions.png"
            grid = pairs_grid(real, ours, heldout.labels[rows], heldout.class_names)
            write_atomically(path, png_bytes(grid))
            around.recorder.picture(step, f"reconstructions/{name}", path)
    around.add_score(step, -float(found["PSNR"].mean()))  # of the average, if there is one; the lower the better


def pairs_grid(real: np.ndarray, ours: np.ndarray, labels: np.ndarray, class_names: list[str]) -> Image.Image:
    """Lays out the first image of each of the first classes, above its reconstruction and its class.

    Args:
        real: uint8[n, h, w, 3].
        ours: uint8[n, h, w, 3], their reconstructions.
        labels: i32[n].
        class_names: of all classes.

    Returns:
        A grid that `read_grid` reads, of at most PAIRS columns of two.
    """
    shown = np.unique(labels, return_index=True)[1][:PAIRS]
    pairs = np.stack([real[shown], ours[shown]], axis=1)
    return class_grid(pairs, [class_names[y] for y in labels[shown]])
