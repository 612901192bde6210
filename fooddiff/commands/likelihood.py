"""Bits per dimension of a split under a trained model: the bound, its terms per timestep, and what they depend on."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm.auto import tqdm

from fooddiff import build, parallel, processes
from fooddiff.arrays import Array, Int, Key, Params, Pixels
from fooddiff.data.cache import Dataset
from fooddiff.diffusion.denoiser import clipped
from fooddiff.diffusion.discrete import transitions
from fooddiff.diffusion.likelihood import Likelihood, bits_per_dim
from fooddiff.eval.results import write_record
from fooddiff.keys import sample_noise, stream
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.load import check_classes, load_trained
from fooddiff.settings import check_counts
from fooddiff.xla import jit

log = logging.getLogger(__name__)

Bound = Callable[[Params, Key, Pixels, Int[Array, "n 2"]], Likelihood]


def run(
    workdir: Path,
    *,
    step: int | None,
    weights: str,
    split: str,
    count: int | None,
    batch_size: int,
    seed: int,
    data_path: str | None,
    cache_dir: str | None,
    out: Path | None,
    stop_if_asked: Callable[[], None],
) -> None:
    """Writes the mean bound of IDDPM eq. 4 over images, in bits/dim, as JSON.

    Every timestep of the process is evaluated once per image, with the predicted x_0 clipped to [-1, 1].

    Args:
        workdir: a run's directory.
        step: checkpoint; None takes the newest.
        weights: "raw", "ema", "ema_<rate>" or "power_<length>".
        split: "train" or "test".
        count: how many images, spread evenly over the classes (see `balanced_rows`); None takes all.
        batch_size: images per call of the compiled bound, rounded up to the number of devices; changes nothing but
            rounding.
        seed: the noise of an image depends on (seed, class, row, timestep) only.
        data_path: where the data are now; None takes config.data.path of the checkpoint.
        cache_dir: where decoded pixels go; None takes config.data.cache_dir of the checkpoint.
        out: the file to write; None takes a name in workdir/eval that says what was evaluated.
        stop_if_asked: called after every batch; ends the command by what it raises. Nothing is kept then.

    Raises:
        FileNotFoundError: no such workdir, checkpoint or data.
        ValueError: a process in continuous time or in latents, no such weights or split, a number out of range, data
            with other classes than the model's, or a bound that is not finite.
    """
    check_counts("--", count=count, batch_size=batch_size)
    mesh = parallel.make_mesh()
    trained = load_trained(workdir, step=step, weights=weights, mesh=mesh)
    if "codec" in trained.config:
        raise ValueError(
            "bits per dimension are those of pixels, but this model diffuses the latents of an autoencoder, whose "
            "decoder gives images no probability"
        )
    if trained.model.process is None:
        raise ValueError("bits per dimension need a discrete process with a modelled variance; this one is continuous")
    config = trained.config
    config.data.update({"path": data_path or config.data.path, "cache_dir": cache_dir or config.data.cache_dir})
    dataset = build.make_dataset(config, split)
    check_classes(trained, dataset.class_names, "the data")
    rows = balanced_rows(dataset.labels, count)
    log.info("step %d, weights %s, %d images of split %s", trained.step, trained.weights, len(rows), split)

    bound = make_bound(trained.model, mesh)
    batches = []
    batch_size = parallel.divisible(min(batch_size, len(rows)), mesh)
    with tqdm(total=len(rows), unit="image", dynamic_ncols=True, disable=not processes.is_first()) as progress:
        for batch in bound_batches(bound, trained.params, jax.random.key(seed), dataset, rows, batch_size):
            batches.append(batch)
            progress.update(len(batch.prior))
            progress.set_postfix_str(f"{np.mean(np.concatenate([b.total for b in batches])):.3f} bits/dim")
            stop_if_asked()
    terms = Likelihood(*map(np.concatenate, zip(*batches, strict=True)))

    if bad := int((~np.isfinite(terms.total)).sum()):
        raise ValueError(f"the bound of {bad} of {len(rows)} images is not finite: nothing was written")
    error = float(terms.total.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else None
    record = {
        "bits_per_dim": float(terms.total.mean()),
        "standard_error": error,  # of the mean, over images
        "prior": float(terms.prior.mean()),
        **{name: getattr(terms, name).mean(axis=0).tolist() for name in ("vb", "x0_mse", "eps_mse")},  # [T] each
        "n": len(rows),
        "n_per_class": np.bincount(dataset.labels[rows], minlength=len(dataset.class_names)).tolist(),
        "clip": True,
        "seed": seed,
        "workdir": str(workdir),
        "step": trained.step,
        "weights": trained.weights,
        "config": workdirs.to_json(config),
        "origin": trained.meta.get("origin"),
        "data": {"source": config.data.source, "split": split, "sha256": dataset.manifest["sha256"]},
        "versions": workdirs.versions(),
    }
    data = dataset.manifest["sha256"][:8]
    name = f"bpd_step_{trained.step:07d}_{trained.weights}_{split}_n{len(rows)}_seed{seed}_{data}.json"
    path = workdirs.outputs(workdir) / "eval" / name if out is None else out
    processes.on_first(lambda: write_record(path, record))
    log.info("%.4f ± %s bits/dim", record["bits_per_dim"], "unknown" if error is None else f"{error:.2g} (1 se)")
    log.info("wrote %s", path)


def balanced_rows(labels: Int[np.ndarray, " N"], count: int | None) -> Int[np.ndarray, " n"]:
    """Picks images evenly over classes: the first image of every class, then the second of every class, and so on.

    Args:
        labels: i32[N], the class of every image.
        count: how many images; None takes all.

    Returns:
        The rows of these images, ascending. A larger count has those of a smaller one among its own.

    Raises:
        ValueError: there are fewer images.
    """
    if count is not None and count > len(labels):
        raise ValueError(f"{count} images are asked for, but the split has {len(labels)}")
    by_class = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    index_in_class = np.empty(len(labels), int)
    index_in_class[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(np.lexsort((labels, index_in_class))[:count])


def make_bound(model: build.DiffusionModel, mesh: jax.sharding.Mesh) -> Bound:
    """Compiles pixels to the terms of the bound, spread over the devices of a mesh.

    Returns:
        (params, key, pixels u8[n, h, w, c], ids i32[n, 2]) -> Likelihood in bits/dim; ids are (class, row) and n must
        be a multiple of the number of devices.
    """
    batch = parallel.over_data(mesh)
    replicated = parallel.replicated(mesh)

    @partial(jit, out_shardings=replicated)  # every process gets every bound
    def bound(params, key, pixels, ids):
        pixels, ids = jax.lax.with_sharding_constraint((pixels, ids), batch)
        x_0 = model.codec.encode(pixels)
        return bits_per_dim(
            clipped(model.denoiser(partial(model.network.apply, params))),
            transitions(model.process),
            x_0,
            lambda t: sample_noise(stream(key, "likelihood", t), ids, model.codec.shape),
            model.cond(key, ids, x_0),
        )

    return bound


def bound_batches(
    bound: Bound, params: Params, key: Key, dataset: Dataset, rows: Int[np.ndarray, " N"], batch_size: int
) -> Iterator[Likelihood]:
    """Evaluates any number of images with one compiled batch size.

    Yields:
        The terms of up to `batch_size` images in the order of `rows`, as float64 NumPy arrays; the total is summed
        over timesteps in float64.
    """
    all_ids = np.stack([dataset.labels[rows], rows], axis=1).astype(np.int32)

    def of_ids(ids: Int[np.ndarray, "n 2"]) -> Likelihood:
        return bound(params, key, dataset.images[ids[:, 1]], ids)

    for terms in parallel.in_batches(of_ids, all_ids, batch_size=batch_size):
        terms = Likelihood(*(term.astype(np.float64) for term in terms))
        yield terms._replace(total=terms.prior + terms.vb.sum(axis=1))
