"""Files of weights to workdirs: what comes out is a run at step 0, like any other."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fooddiff import build, keys, parallel
from fooddiff.arrays import Params
from fooddiff.convert import diffusers
from fooddiff.data.sources.source import read_class_names
from fooddiff.files.hashes import sha256_of
from fooddiff.files.safetensors_file import read_tensors
from fooddiff.files.torch_file import load_state_dict
from fooddiff.model import ldm
from fooddiff.model.openai import check_is_openais, from_openai
from fooddiff.model.taesd import from_taesd, settings_of
from fooddiff.runs import workdir as workdirs
from fooddiff.runs.checkpoint import Checkpoints
from fooddiff.runs.codec_file import sha256_of_codec, split_codec, write_codec
from fooddiff.runs.load import load_trained

log = logging.getLogger(__name__)

OF_TRAINING = ("perceptual", "adversary")  # sections whose networks only a training has
UNCONDITIONAL = ("unconditional",)  # the one class name of a model without classes


def import_openai(file: Path, workdir: Path, config: ConfigDict, class_names: Path | None) -> None:
    """Makes a workdir from a `.pt` state dict of improved-diffusion. Nothing that the file says is run.

    Args:
        file: the state dict, of raw or of averaged weights: it does not say which, and every average starts there.
        workdir: an empty or new directory.
        config: the model, and how to go on training it.
        class_names: a text file with the name of class 0, of class 1, ..., one per line; None numbers them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the workdir is not empty, the file is not a state dict or is of another architecture, the config's
            network is not OpenAI's, or the class names are not those of config.model.num_classes.
    """
    _check_free(workdir)
    check_is_openais(config.model)
    training = build.make_training(config, parallel.make_mesh())
    names = _class_names(config.model.num_classes, class_names)
    params = from_openai(load_state_dict(file), training.abstract_state.params)
    _write_run(workdir, config, training, params, names, _origin(file))


def import_diffusers(folder: Path, workdir: Path, config: ConfigDict, class_names: Path | None) -> None:
    """Makes a workdir from a folder with a `UNet2DModel` of diffusers: its config.json and its safetensors file.

    Args:
        folder: the model's own folder, `unet` of a pipeline's.
        workdir: an empty or new directory.
        config: the model, and how to go on training it.
        class_names: as in `import_openai`.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the workdir is not empty, the folder's network is not that of the config, or a file is damaged.
    """
    _check_free(workdir)
    training = build.make_training(config, parallel.make_mesh())
    names = _class_names(config.model.num_classes, class_names)
    params = diffusers.read_folder(folder, config, training.abstract_state.params)
    _write_run(workdir, config, training, params, names, _origin(folder / diffusers.WEIGHTS))


def import_taesd(encoder: Path, decoder: Path, workdir: Path, config: ConfigDict) -> None:
    """Makes a workdir from the two files of a published TAESD: an autoencoder like any other.

    Args:
        encoder: its state dict.
        decoder: its state dict, which tells the channels.
        workdir: an empty or new directory.
        config: of an autoencoder; the fields of config.model that the files tell are replaced.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the workdir is not empty, a file is not a state dict or is of another architecture, or the config
            is none of such an autoencoder.
    """
    _check_free(workdir)
    _check_autoencoder(config, "taesd")
    halves = [load_state_dict(file) for file in (encoder, decoder)]
    config.model.update(settings_of(halves[1]))
    training = build.make_training(config, parallel.make_mesh())
    params = from_taesd(*halves, training.abstract_state.params)
    origin = _origin(encoder) | {"decoder": _origin(decoder)}
    _write_run(workdir, config, training, params, UNCONDITIONAL, origin)


def import_ldm(file: Path, workdir: Path, config: ConfigDict) -> None:
    """Makes a workdir from an autoencoder of latent-diffusion, Stable Diffusion or diffusers.

    Args:
        file: its state dict, a checkpoint that holds one, or a whole latent diffusion model; `.safetensors`, or else as
            `torch.save` writes it.
        workdir: an empty or new directory.
        config: of an autoencoder; the fields of config.model that names and shapes in the file tell are replaced.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the workdir is not empty, the file is not a state dict or is of another architecture, or the config
            is none of such an autoencoder.
    """
    _check_free(workdir)
    _check_autoencoder(config, "ldm")
    read = read_tensors if file.suffix == ".safetensors" else load_state_dict
    state_dict = read(file, wanted=ldm.is_of_autoencoder)
    config.model.update(ldm.settings_of(state_dict, config.data.image_size))
    training = build.make_training(config, parallel.make_mesh())
    params = ldm.from_state_dict(state_dict, training.abstract_state.params)
    _write_run(workdir, config, training, params, UNCONDITIONAL, _origin(file))


def import_safetensors(file: Path, workdir: Path) -> None:
    """Makes a workdir from a file of `exporting.export`, which holds config and class names, too.

    Args:
        file: the `.safetensors` file.
        workdir: an empty or new directory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the workdir is not empty, or the file is not one of ours or is not whole.
    """
    _check_free(workdir)
    mesh = parallel.make_mesh()
    trained = load_trained(file, step=None, weights="ema", mesh=mesh, task=None)
    config = trained.config
    for section in OF_TRAINING:
        if section in config:
            log.info("the file does not hold the network of config.%s: the run will go on without it", section)
            del config[section]
    try:
        training = build.make_training(config, mesh)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has a config that describes no training: {error}") from error
    origin = _origin(file) | {"step": trained.step, "weights": trained.weights, "images_seen": trained.images_seen}
    _write_run(workdir, config, training, trained.params, trained.class_names, origin)


def _check_autoencoder(config: ConfigDict, network: str) -> None:
    if build.task_of(config) != "autoencoder" or config.model.get("network") != network:
        variant = {"taesd": "taesd", "ldm": "sd"}[network]
        raise ValueError(
            f"this is for autoencoders whose config.model.network is {network!r}: give a config of one, for instance "
            f"--config=configs/autoencoder.py:{variant}"
        )
    if given := [section for section in OF_TRAINING if section in config]:
        raise ValueError(
            f"no file of weights holds the network of config.{given[0]}: import with a config without it; a training "
            f"with it starts from the imported run by --config.init_from"
        )


def _check_free(workdir: Path) -> None:
    if workdir.exists() and any(workdir.iterdir()):
        raise workdirs.WorkdirError(f"{workdir} is not empty: give another --workdir to import into")


def _class_names(num_classes: int | None, path: Path | None) -> tuple[str, ...]:
    if num_classes is None:
        if path is not None:
            raise ValueError(f"--class_names is {path}, but config.model.num_classes is None: the model has no classes")
        return UNCONDITIONAL
    if path is None:
        log.info("no --class_names: the classes are called 0 to %d", num_classes - 1)
        return tuple(str(y) for y in range(num_classes))
    names = read_class_names(path)
    if len(names) != num_classes:
        raise ValueError(f"{path} names {len(names)} classes, but config.model.num_classes is {num_classes}")
    return names


def _origin(file: Path) -> dict[str, Any]:
    return {"file": file.name, "sha256": sha256_of(file)}


def _write_run(
    workdir: Path,
    config: ConfigDict,
    training: build.Training,
    params: Params,
    class_names: tuple[str, ...],
    origin: Mapping[str, Any],
) -> None:
    """Writes a run before its first step, whose parameters and averages are the given ones."""
    if bad := [name for name, value in params.items() if not np.isfinite(value).all()]:
        raise ValueError(f"{origin['file']} has numbers that are not finite in {len(bad)} tensors, first {bad[0]}")
    key = keys.root(config.seed, training.replicated)
    network, codec = split_codec(params, build.codec_tensors(config))
    meta = {
        "config": workdirs.to_json(config),
        "class_names": list(class_names),
        "data_sha256": None,  # of no data: training accepts any that have these classes
        "versions": workdirs.versions(),
        "origin": dict(origin),
        "codec_sha256": sha256_of_codec(codec),
    }
    write_codec(workdir, codec)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(build.first_state(training, key, network), meta)
        checkpoints.wait()
    # Named last: without a checkpoint, a workdir with a config would let training start at random.
    workdirs.write_identity(workdir, config)
    log.info("imported %s into %s", origin["file"], workdir)
