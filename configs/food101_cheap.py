r"""Real dishes at 64x64 for a seventieth of the reference's cost: a U-ViT that predicts x_0, for two CPU cores.

    python run_train.py --config=configs/food101_cheap.py --config.data.source=archive \
        --config.data.path=food-101.tar.gz --workdir=runs/cheap

10,854,640 parameters. What each choice is worth, and the curves of a long run: docs/cheap.md.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import hybrid


def get_config() -> ConfigDict:
    """Returns the config; sections that are not here are those of hybrid.py."""
    config = hybrid.get_config()
    config.data.flip = True

    config.diffusion = ConfigDict()
    config.diffusion.time = "continuous"
    config.diffusion.schedule = "cosine"  # or linear: the log SNR as a function of time
    config.diffusion.prediction = "x_0"  # or eps, v, flow, edm
    config.diffusion.log_snr_range = (-9.0, 9.0)  # where sampling begins and ends

    config.objective = ConfigDict()
    config.objective.name = "weighted"  # squared error of x_0 times
    config.objective.weight = "capped"  # min(SNR + 1, cap); or constant, snr, min_snr, p2, sigmoid, edm
    config.objective.weight_options = ConfigDict({"cap": 5.0})
    config.objective.density = "stratified"  # of time; or uniform, logit_normal, log_sigma_normal
    config.objective.density_options = ConfigDict()
    config.objective.label_dropout = 0.1  # share of labels that training hides, for guidance

    config.model = ConfigDict()
    config.model.network = "uvit"
    config.model.num_classes = 101
    config.model.patch_size = 4  # pixels: 64x64x3 becomes 16x16x48
    config.model.conv_channels = 96
    config.model.num_res_blocks = 2  # before the transformer, and as many after it
    config.model.width = 256
    config.model.depth = 8
    config.model.num_heads = 4
    config.model.embed_dim = 256
    config.model.dtype = "float32"  # bfloat16 is 1.5 to 2 times as fast on a CPU with AMX: docs/performance.md

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"  # kernels at 10 times the rate lr; or adamw, which takes longer: docs/cheap.md
    config.optimizer.lr = 1e-3
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 500
    config.optimizer.cooldown_steps = 7000  # the rate falls linearly to zero over the last so many of train.steps
    config.optimizer.clip_norm = placeholder(float)

    config.ema.rates = (0.999,)
    config.ema.power_lengths = (0.05, 0.1)  # of two power averages, from which one of any length can be rebuilt

    config.train.steps = 47_000  # 3 million images
    config.train.checkpoint_every = 500

    config.sample.every_steps = 500
    config.sample.steps = 50
    config.sample.spacing = "log_snr"
    config.sample.guidance = 3.0
    config.sample.interval = (-4.0, 4.0)
    config.eval.every_steps = 2000
    config.log.every_steps = 50
    return config
