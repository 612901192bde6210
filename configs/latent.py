r"""Diffusion in the latents of an autoencoder: Food-101 at 64x64 for two CPU cores, at 128x128 or 256x256 for a GPU.

    python run_train.py --config=configs/latent.py --config.codec.path=runs/autoencoder \
        --config.data.source=archive --config.data.path=food-101.tar.gz --workdir=runs/latent

The autoencoder is one of autoencoder.py: :kl for cpu64, :taesd for taef2, else of the same variant. Measured beside
pixels for equal minutes, with an own autoencoder and a published one: docs/latent.md.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import autoencoder, food101_cheap


def get_config(variant: str = "cpu64") -> ConfigDict:
    """Returns the config; sections that are not here are those of food101_cheap.py.

    Args:
        variant: "cpu64", "taesd", "taef2" (taesd with the latents of FLUX.2), "sd", "gpu128" or "gpu256", given after a
            colon: --config=configs/latent.py:gpu256.
    """
    variants = {  # of autoencoder.py, and what changes here
        "cpu64": ("kl", _cpu64), "taesd": ("taesd", _cpu64), "taef2": ("taesd", _taef2), "sd": ("sd", _cpu64),
        "gpu128": ("gpu128", _gpu), "gpu256": ("gpu256", _gpu),
    }  # fmt: skip
    if variant not in variants:
        raise ValueError(f"latent takes the variant {', '.join(variants)}, got {variant!r}")
    autoencoders, change = variants[variant]
    of_images = autoencoder.get_config(autoencoders)
    config = food101_cheap.get_config()
    config.data.image_size = of_images.data.image_size
    config.codec = ConfigDict()
    config.codec.path = placeholder(str)  # its workdir or exported file; read when a run begins, which keeps a copy
    config.codec.model = of_images.model  # what it must be
    change(config)
    return config


def _cpu64(config: ConfigDict) -> None:
    config.model.patch_size = 1  # 16x16x12 latents: the transformer has 8x8 positions, as that of the pixels has


def _taef2(config: ConfigDict) -> None:
    """8x8x32 latents, so the transformer has 4x4 positions."""
    _cpu64(config)
    config.codec.model.latent_channels = 32
    config.codec.model.pools = True
    config.sample.guidance = 1.5  # with 3 colours are too strong


def _gpu(config: ConfigDict) -> None:
    """32x32 latents, and a transformer of 16x16 positions."""
    config.model.patch_size = 1
    config.model.conv_channels = 256
    config.model.width = 768
    config.model.depth = 16
    config.model.num_heads = 12
    config.model.embed_dim = 768
    config.model.dtype = "bfloat16"
    config.optimizer.lr = 3e-4
    config.optimizer.cooldown_steps = 20_000
    config.train.steps = 200_000
    config.train.batch_size = 256
    config.train.checkpoint_every = 10_000
    config.sample.every_steps = 10_000
    config.eval.every_steps = 10_000
