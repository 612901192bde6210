r"""Super-resolution to 64x64 for two CPU cores, from 16x16 or 32x32 pixels: OpenAI's SuperResModel on Food-101.

    python run_train.py --config=configs/superres.py:16 --config.data.source=archive \
        --config.data.path=food-101.tar.gz --workdir=runs/superres16
    python -m fooddiff.eval superres --workdir=runs/superres16 --per_class=5 --inception=WEIGHTS

The network is ADM's, which also sees a small image, enlarged bilinearly: the mean of each block of 4x4 or 2x2 pixels of
the training image, with Gaussian noise. It predicts x_0 in continuous time, with food101_cheap.py's loss and AdamW.
3,045,795 parameters. Measured from 16 pixels, after 40 minutes on one CPU core: docs/adm.md.

A cascade draws small images with another model, for instance food101_tiny.py with --config.data.image_size=16, and
enlarges them:

    python run_sample.py --workdir=runs/tiny16 --upsample=runs/superres16
"""

from ml_collections import ConfigDict

from configs import adm_tiny, food101_cheap

SIZES = ("16", "32")


def get_config(size: str = "16") -> ConfigDict:
    """Returns the config; what is not here is as in adm_tiny.py.

    Args:
        size: of the small images in pixels, "16" or "32", given after a colon: --config=configs/superres.py:32.
    """
    if size not in SIZES:
        raise ValueError(f"superres takes the size {' or '.join(SIZES)}, got {size!r}")
    config, recipe = adm_tiny.get_config(), food101_cheap.get_config()
    config.data.image_size = 64
    config.low_res = ConfigDict()  # what makes a diffusion model one for super-resolution
    config.low_res.size = int(size)  # pixels
    config.low_res.max_noise = 0.2  # in training the small image gets noise of a level from 0 to this, at random
    config.low_res.noise = 0.05  # and this in sampling; a standard deviation, images being in [-1, 1]
    config.diffusion, config.objective, config.optimizer = recipe.diffusion, recipe.objective, recipe.optimizer
    config.objective.label_dropout = 0.0
    config.optimizer.name = "adamw"
    config.optimizer.warmup_steps = 100
    config.optimizer.cooldown_steps = 500
    config.model.model_channels = 16
    config.model.channel_mult = (1, 2, 4, 8)
    config.model.attention_resolutions = (8,)
    config.model.head_channels = 32
    config.model.norm_groups = 4  # of 4 channels
    config.model.dropout = 0.0
    config.train.steps = 1500  # 24,000 images
    config.train.batch_size = 16
    config.sample.sampler = "sde_dpmpp_2m"
    config.sample.steps = 16
    config.sample.spacing = "log_snr"
    return config
