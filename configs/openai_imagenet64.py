r"""OpenAI's published ImageNet 64x64 models (improved-diffusion, March 2021), to import, to sample and to fine-tune.

    python -m fooddiff.convert import imagenet64_cond_270M_250K.pt \
        --config=configs/openai_imagenet64.py:cond --workdir=runs/imagenet64

The class-conditional model has 273,049,350 parameters. Expected result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import hybrid


def get_config(model: str = "cond") -> ConfigDict:
    """Returns the config.

    Args:
        model: "cond" or "uncond", given after a colon: --config=configs/openai_imagenet64.py:uncond.
    """
    models = {"cond": _conditional, "uncond": _unconditional}
    if model not in models:
        raise ValueError(f"openai_imagenet64 takes the model {' or '.join(models)}, got {model!r}")
    config = hybrid.get_config()
    config.data.source = "folder"  # ImageNet is not downloaded: config.data.path is a folder of class folders
    config.diffusion.timesteps = 4000
    config.model.num_res_blocks = 3
    config.ema.rates = (0.9999,)
    config.ema.warmup = False  # an average that starts at trained weights needs none
    config.train.checkpoint_every = 10_000
    config.sample.every_steps = 10_000
    config.sample.steps = 250
    models[model](config)
    return config


def _conditional(config: ConfigDict) -> None:
    config.diffusion.rescale_timesteps = False
    config.objective.vb_weight = 1.0
    config.model.model_channels = 192
    config.model.num_classes = 1000
    config.optimizer.lr = 3e-4
    config.train.batch_size = 2048
    config.train.steps = 250_000


def _unconditional(config: ConfigDict) -> None:
    config.model.num_classes = None
    config.optimizer.lr = 1e-4
    config.train.batch_size = 128
    config.train.steps = 1_500_000
