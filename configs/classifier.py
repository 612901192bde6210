r"""A classifier of dishes at 64x64 for two CPU cores: of noisy images, to guide sampling, or of clean ones, to judge.

    python run_train.py --config=configs/classifier.py:noisy --config.data.source=archive \
        --config.data.path=food-101.tar.gz --workdir=runs/classifier
    python run_train.py --config=configs/classifier.py:clean --config.data.source=archive \
        --config.data.path=food-101.tar.gz --workdir=runs/judge

ADM's classifier (guided-diffusion's EncoderUNetModel) on patches of 4x4 pixels: 3,438,341 parameters, 1.1 GFLOP per
image and training step. Measured of clean images, after some 33 minutes of one core, --config.model.dtype=bfloat16:
32.1 % of 2,020 held-out images are read at once, 61.2 % among the first five (chance: 1 and 5 %). With AdamW it was
19.2 and 44.7 % after 192,000 images and 64 minutes. What guidance by it does: docs/adm.md.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import food101_cheap, hybrid


def get_config(images: str = "noisy") -> ConfigDict:
    """Returns the config.

    Args:
        images: "noisy" or "clean", given after a colon: --config=configs/classifier.py:clean.
    """
    if images not in ("noisy", "clean"):
        raise ValueError(f"classifier takes the images noisy or clean, got {images!r}")
    config = hybrid.get_config()
    config.task = "classifier"
    config.data.flip = True
    del config.diffusion, config.sample

    if images == "noisy":
        config.diffusion = ConfigDict()  # the noise that images get; without this section, none
        config.diffusion.time = "continuous"  # fed the log SNR, it guides every model; or discrete, with timesteps
        config.diffusion.schedule = "cosine"

    config.objective = ConfigDict()
    config.objective.crop = 4  # pixels by which images are moved at the most, at random

    config.model = ConfigDict()
    config.model.network = "adm_encoder"
    config.model.num_classes = 101
    config.model.patch_size = 4  # pixels: 64x64x3 becomes 16x16x48; ADM's own is 1
    config.model.model_channels = 96
    config.model.channel_mult = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (8,)
    config.model.head_channels = 64
    config.model.pool = "attention"  # or adaptive: the mean
    config.model.norm_groups = 32
    config.model.dropout = 0.1
    config.model.dtype = "float32"

    config.optimizer = food101_cheap.get_config().optimizer  # Muon
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_steps = 200
    config.optimizer.cooldown_steps = 900
    config.optimizer.clip_norm = 1.0

    config.ema.rates = (0.999,)
    config.train.steps = 1200  # 76,800 images
    config.train.checkpoint_every = 400

    config.eval = ConfigDict()
    config.eval.every_steps = 400
    config.eval.batches = 10  # held-out images: so many batches of batch_size, evenly over the classes
    config.eval.batch_size = 202
    config.eval.weights = ("ema", "raw")  # the first one's error is what train.keep_best goes by
    config.eval.source = placeholder(str)  # where these are: the test split of another data.source; None: of the same
    config.eval.path = placeholder(str)
    config.log.every_steps = 50
    return config
