r"""An autoencoder of 64x64 dishes for two CPU cores, whose latents latent.py diffuses: 16x16x12.

    python run_train.py --config=configs/autoencoder.py:kl --config.data.source=archive \
        --config.data.path=food-101.tar.gz --workdir=runs/autoencoder

Measured of :kl, 47 minutes of one core for 25,600 images: PSNR 32.8 dB, and a distance of 0.204 between images and
reconstructions (docs/latent.md).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import classifier, hybrid


def get_config(variant: str = "kl") -> ConfigDict:
    """Returns the config; sections that are not here are those of hybrid.py.

    Args:
        variant: "kl", "vq", "perceptual" and "adversarial", which are KL with one and with two terms more, "gpu128"
            and "gpu256", which are for a GPU and KL, too, or "taesd" and "sd", to import; given after a colon:
            --config=configs/autoencoder.py:vq.
    """
    variants = {
        "kl": None, "vq": None, "perceptual": _perceptual, "adversarial": _adversarial,
        "gpu128": _gpu128, "gpu256": _gpu256, "taesd": _taesd, "sd": _sd,
    }  # fmt: skip
    if variant not in variants:
        raise ValueError(f"autoencoder takes the variant {', '.join(variants)}, got {variant!r}")
    bottleneck = "vq" if variant == "vq" else "kl"
    objectives = {"kl": dict(weight=1e-6), "vq": dict(weight=1.0, beta=0.25)}
    config = hybrid.get_config()
    config.task = "autoencoder"
    for section in ("diffusion", "sample"):
        del config[section]
    config.data.flip = True

    config.objective = ConfigDict()
    config.objective.name = bottleneck
    config.objective.error = "l1"  # mean over the image; or l2
    config.objective.update(objectives[bottleneck])  # weight: of the KL in nats, or the distance to codes, a dimension

    config.model = ConfigDict()
    config.model.network = "ldm"
    config.model.model_channels = 32
    config.model.channel_mult = (1, 2, 2)  # one level more halves the latents once more: this is f4, (1, 2) is f2
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = ()  # pixels; besides, the middle always attends
    config.model.z_channels = 8 if bottleneck == "vq" else 12
    config.model.latent_channels = config.model.z_channels
    config.model.num_codes = 4096 if bottleneck == "vq" else placeholder(int)
    config.model.norm_groups = 8
    config.model.dropout = 0.0
    config.model.dtype = "float32"

    config.optimizer.name = "muon"
    config.optimizer.lr = 1e-3
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 100
    config.optimizer.cooldown_steps = 350
    config.optimizer.clip_norm = 1.0
    config.ema.rates = (0.999,)
    config.train.steps = 800  # 25,600 images
    config.train.batch_size = 32
    config.train.checkpoint_every = 200

    config.eval = ConfigDict()  # during training, of the test split
    config.eval.every_steps = 200
    config.eval.count = 505  # images, spread evenly over the classes; None takes all
    config.eval.batch_size = 64
    config.log.every_steps = 50
    if (change := variants[variant]) is not None:
        change(config)
    return config


def _perceptual(config: ConfigDict) -> None:
    """The distance between features of a classifier, which is to be another one than judges samples."""
    config.perceptual = ConfigDict()
    config.perceptual.path = placeholder(str)  # its workdir or exported file; read when a run begins, which keeps it
    config.perceptual.model = classifier.get_config("clean").model  # what it must be
    config.perceptual.weight = 0.1  # of a distance from 0 to 4


def _adversarial(config: ConfigDict) -> None:
    """Besides, a discriminator of patches: latent-diffusion's loss."""
    _perceptual(config)
    config.adversary = ConfigDict()
    config.adversary.weight = 0.5  # how hard it pulls at the decoder's last layer; the image's differences pull by 1
    config.adversary.start_step = 2500  # the first step in which it learns and counts
    config.adversary.lr = 2e-4  # of its Adam, with b1 0.5 and b2 0.9
    config.adversary.channels = 64
    config.adversary.num_layers = 2  # a logit sees 34x34 pixels; with 3 70x70


def _sd(config: ConfigDict) -> None:
    """Stable Diffusion 1 and 2 and XL: 8 times smaller a side. A file's own sizes replace these."""
    config.model.model_channels = 128
    config.model.channel_mult = (1, 2, 4, 4)
    config.model.num_res_blocks = 2
    config.model.z_channels = 4
    config.model.latent_channels = 4
    config.model.norm_groups = 32
    config.optimizer.name = "adamw"
    config.optimizer.lr = 1e-5
    config.ema.warmup = False  # an average that starts at trained weights needs none


def _taesd(config: ConfigDict) -> None:
    """A published tiny autoencoder, 8 times smaller a side, whose files tell the channels of its latents."""
    config.objective = ConfigDict(dict(name="none", error="l1"))
    config.model = ConfigDict(dict(network="taesd", latent_channels=4, pools=False, channels=64, dtype="float32"))
    config.ema.warmup = False  # an average that starts at trained weights needs none


def _gpu128(config: ConfigDict) -> None:
    """128x128 pixels to 32x32x8."""
    config.data.image_size = 128
    config.model.z_channels = 8
    config.model.latent_channels = 8
    config.model.model_channels = 96
    config.model.channel_mult = (1, 2, 4)
    config.model.num_res_blocks = 2
    config.model.norm_groups = 32
    config.model.dtype = "bfloat16"
    config.optimizer.name = "adamw"
    config.optimizer.lr = 3e-4
    config.train.steps = 50_000
    config.train.batch_size = 64
    config.train.checkpoint_every = 5000
    config.eval.every_steps = 5000


def _gpu256(config: ConfigDict) -> None:
    """256x256 pixels to 32x32x8."""
    _gpu128(config)
    config.data.image_size = 256
    config.model.channel_mult = (1, 2, 4, 4)
