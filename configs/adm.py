r"""The networks that OpenAI released with ADM (guided-diffusion), at their size: to import, to sample, to fine-tune.

    python -m fooddiff.convert import 64x64_diffusion.pt --config=configs/adm.py --workdir=runs/adm64
    python -m fooddiff.convert import 64x64_classifier.pt --config=configs/adm.py:64x64_classifier \
        --workdir=runs/classifier64
    python run_sample.py --workdir=runs/adm64 --classifier=runs/classifier64 --classifier_scale=1

The argument after the colon is a file's name without .pt; the default, 64x64_diffusion, has 295,904,454 parameters.
Networks and processes are those of the flags in their README. config.optimizer, config.ema and config.train are a start
for fine-tuning and not their recipe. adm_tiny.py is the same kind of network for two CPU cores. Expected result: not
yet measured.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import classifier, hybrid

MULTS = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}  # of the width, by image size

MODELS = {  # name: image size, and what of config.model is not as in _diffusion
    "64x64_diffusion": (64, dict(model_channels=192, num_res_blocks=3, new_attention_order=True, dropout=0.1)),
    "128x128_diffusion": (128, dict(head_channels=None)),
    "256x256_diffusion": (256, {}),
    "256x256_diffusion_uncond": (256, dict(num_classes=None)),
    "512x512_diffusion": (512, dict(stem_channels=128)),
    "lsun_bedroom": (256, dict(num_classes=None, dropout=0.1)),
    "lsun_cat": (256, dict(num_classes=None, dropout=0.1)),
    "lsun_horse": (256, dict(num_classes=None, dropout=0.1)),
    "lsun_horse_nodropout": (256, dict(num_classes=None)),
    "64_256_upsampler": (256, dict(model_channels=192, head_channels=None)),
    "128_512_upsampler": (
        512, dict(model_channels=192, channel_mult=MULTS[256], attention_resolutions=(32, 16)),
    ),
    "upsample_cond_500K": (
        256, dict(model_channels=192, head_channels=None, attention_resolutions=(16, 8), resblock_updown=False),
    ),
}  # fmt: skip

LOW_RES = {"64_256_upsampler": 64, "128_512_upsampler": 128, "upsample_cond_500K": 64}  # pixels that upsamplers take

CLASSIFIERS = {f"{size}x{size}_classifier": (size, dict(num_res_blocks=4 if size == 64 else 2)) for size in MULTS}


def get_config(name: str = "64x64_diffusion") -> ConfigDict:
    """Returns the config.

    Args:
        name: of a released file, without .pt; upsample_cond_500K is improved-diffusion's.
    """
    if name in CLASSIFIERS:
        config = _classifier(*CLASSIFIERS[name])
    elif name in MODELS:
        config = _diffusion(*MODELS[name])
    else:
        raise ValueError(f"adm takes the name of a released file, {', '.join([*MODELS, *CLASSIFIERS])}, got {name!r}")
    config.data.source = "folder"  # ImageNet is not downloaded: config.data.path is a folder of class folders
    config.ema.warmup = False  # an average that starts at trained weights needs none
    config.train.batch_size = 256
    config.train.steps = 100_000
    config.train.checkpoint_every = 10_000
    if name in LOW_RES:
        config.low_res = ConfigDict()
        config.low_res.size = LOW_RES[name]
        config.low_res.max_noise = 0.0  # they were trained without
        config.low_res.noise = 0.0
    if name == "upsample_cond_500K":
        config.diffusion.timesteps = 4000
        config.objective.vb_weight = 1.0
    return config


def _diffusion(size: int, model: dict[str, Any]) -> ConfigDict:
    config = hybrid.get_config()
    config.data.image_size = size
    config.diffusion.schedule = _schedule(size)
    config.diffusion.timesteps = 1000
    config.diffusion.rescale_timesteps = False
    config.model.model_channels = 256
    config.model.channel_mult = MULTS[size]
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (32, 16, 8)
    config.model.num_heads = 4  # where head_channels does not say it
    config.model.head_channels = 64
    config.model.new_attention_order = False
    config.model.resblock_updown = True
    config.model.num_classes = 1000
    config.model.update(model)
    config.ema.rates = (0.9999,)
    config.sample.every_steps = 10_000
    config.sample.steps = 250
    return config


def _classifier(size: int, model: dict[str, Any]) -> ConfigDict:
    config = classifier.get_config("noisy")
    config.data.image_size = size
    config.diffusion.time = "discrete"
    config.diffusion.schedule = _schedule(size)
    config.diffusion.timesteps = 1000
    config.diffusion.rescale_timesteps = False
    config.objective.crop = 0
    config.model.num_classes = 1000
    config.model.patch_size = 1
    config.model.model_channels = 128
    config.model.channel_mult = MULTS[size]
    config.model.attention_resolutions = (32, 16, 8)
    config.model.dropout = 0.0
    config.model.update(model)
    config.optimizer.lr = 3e-4
    return config


def _schedule(size: int) -> str:
    return "cosine" if size == 64 else "linear"
