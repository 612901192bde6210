r"""The report's experiment at a size that two CPU cores can train: 32x32 images, a narrow UNet, either objective.

    python run_train.py --config=configs/food101_tiny.py:hybrid --config.data.source=archive \
        --config.data.path=food-101.tar.gz --workdir=runs/tiny_hybrid

Measured on two CPU cores with two seeds of either objective, 250 training images per class: docs/results.md. About 58
images per second; after 1,200 steps samples have colours and textures of food, and no dish that one would recognise.
With 32 groups in the norms, which are of one channel each here, FD-64[inception_stem_nsfwjs d11d89b6] was 144.9 after
5,000 steps (505 samples, 25 ancestral steps) and not about 5: such a norm takes away the mean colour. The full 20,000
steps are not yet measured.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from configs import hybrid, mse


def get_config(objective: str = "hybrid") -> ConfigDict:
    """Returns the config.

    Args:
        objective: "hybrid" or "mse", given after a colon: --config=configs/food101_tiny.py:mse.
    """
    reports = {"hybrid": hybrid, "mse": mse}
    if objective not in reports:
        raise ValueError(f"food101_tiny takes the objective {' or '.join(reports)}, got {objective!r}")
    steps = FieldReference(20_000)
    config = reports[objective].get_config()
    config.data.image_size = 32
    config.data.flip = True
    config.model.model_channels = 32
    config.model.channel_mult = (1, 2, 3)
    config.model.num_res_blocks = 1
    config.model.norm_groups = 8  # of 4 channels, as in the full model; in groups of one, samples have wild colours
    config.model.attention_resolutions = (8,)
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.anneal_steps = steps
    config.optimizer.clip_norm = 1.0
    config.ema.rates = (0.999,)
    config.train.steps = steps
    config.train.batch_size = 32
    config.train.checkpoint_every = 1000
    config.eval.every_steps = 1000
    config.sample.every_steps = 1000
    config.log.every_steps = 50
    return config
