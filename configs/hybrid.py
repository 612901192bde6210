"""The report's hybrid model: L_simple + T/1000 L_vlb with learned variance, on Food-101 at 64x64.

    python run_train.py --config=configs/hybrid.py --workdir=runs/hybrid

92,080,902 parameters. The original experiment reports FID-64 0.35 at 60k steps; not yet measured here.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder


def get_config() -> ConfigDict:
    """Returns the config; every value can be overridden, for instance with --config.optimizer.lr=3e-4."""
    timesteps = FieldReference(200)
    config = ConfigDict()
    config.seed = 777
    config.init_from = placeholder(str)  # fine-tuning: a run or a file, from whose averaged weights a new run starts

    config.data = ConfigDict()
    config.data.source = "food101"  # food101 (downloads 5 GB through TFDS), archive, folder or digits
    config.data.path = placeholder(str)  # the archive or folder; for food101 where TFDS keeps its data
    config.data.cache_dir = "data/cache"  # decoded pixels: 0.93 GB for the training split at 64 pixels
    config.data.image_size = 64  # pixels
    config.data.flip = False  # mirror half of the images, at random
    config.data.max_unreadable = 0  # images that may be left out because they cannot be decoded

    config.diffusion = ConfigDict()
    config.diffusion.time = "discrete"  # or continuous, as in food101_cheap.py
    config.diffusion.schedule = "cosine"  # or linear
    config.diffusion.timesteps = timesteps
    config.diffusion.rescale_timesteps = True  # the network is fed t * 1000 / T
    config.diffusion.prediction = "eps"  # or x_0, v
    config.diffusion.variance = "learned_range"  # or fixed_small, fixed_large

    config.objective = ConfigDict()
    config.objective.name = "hybrid"  # or mse, vlb, which have no vb_weight
    config.objective.vb_weight = (
        timesteps.to_float() / 1000
    )  # of the bound's term in bits/dim; follows config.diffusion.timesteps
    config.objective.timestep_sampling = "uniform"  # or loss_second_moment
    config.objective.label_dropout = 0.0  # share of labels that training hides, for guidance; needs model.null_label

    config.model = ConfigDict()
    config.model.network = "unet"  # or uvit
    config.model.model_channels = 128
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16, 8)  # pixels
    config.model.num_heads = 4
    config.model.num_classes = 101
    config.model.null_label = False  # know a label that means none
    config.model.norm_groups = 32
    config.model.scale_shift_norm = True
    config.model.dropout = 0.0
    config.model.dtype = "float32"  # of convolutions and matmuls; or bfloat16. Parameters stay float32
    config.model.remat = False  # recompute activations in the backward pass to save memory

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # or adamw, muon
    config.optimizer.lr = 1e-4
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.warmup_steps = 0
    config.optimizer.anneal_steps = placeholder(int)  # the rate falls linearly to zero at this step; None: it stays
    config.optimizer.cooldown_steps = placeholder(int)  # or it falls to zero over the last so many of train.steps
    config.optimizer.inverse_sqrt_after = placeholder(int)  # or with the inverse root of the step, from this one on
    config.optimizer.clip_norm = placeholder(float)  # global gradient norm

    config.ema = ConfigDict()
    config.ema.rates = (0.9999, 0.999)  # the first is the one that "ema" means
    config.ema.warmup = True
    config.ema.power_lengths = ()  # of power averages

    config.train = ConfigDict()
    config.train.steps = 90_000
    config.train.batch_size = 64  # images per step over all devices
    config.train.accumulate = 1  # microbatches per step
    config.train.shard = "nothing"  # of the state among devices; or averages (ema and Adam's), or all
    config.train.checkpoint_every = 15_000  # steps
    config.train.keep_checkpoints = placeholder(int)  # the newest so many; None keeps all
    config.train.keep_best = 0  # besides, so many with the lowest distance: config.eval's first weights and feature
    config.train.max_skipped = 20  # gradients in a row that are not finite; looked at when something is recorded

    config.sample = ConfigDict()  # grids during training; also what run_sample.py does unless told otherwise
    config.sample.every_steps = 15_000
    config.sample.classes = ()  # class names; empty takes the first 12
    config.sample.per_class = 4
    config.sample.batch_size = 48
    config.sample.sampler = "ancestral"  # or ddim, dpmpp_2m, sde_dpmpp_2m, heun
    config.sample.steps = placeholder(int)  # levels of noise along the way; None takes every timestep
    config.sample.spacing = "time"  # of these levels: evenly in time or in log_snr, or karras
    config.sample.eta = 0.0  # stochasticity of ddim and heun, from 0 to 1
    config.sample.guidance = 1.0  # scale of classifier-free guidance; 1 is off
    config.sample.interval = placeholder(tuple)  # log SNRs between which to guide; None: everywhere
    config.sample.rescale = 0.0  # share of a guided image's deviation that is brought back, from 0 to 1

    config.eval = ConfigDict()  # during training; samples are drawn as config.sample says
    config.eval.every_steps = 15_000
    config.eval.inception = placeholder(str)  # path or URL of the Inception weights; None: no evaluation in training
    config.eval.features = ("64",)  # 64, 192, 768, 2048
    config.eval.resize = "tf1"  # or half_pixel, clean_bicubic
    config.eval.per_class = placeholder(int)  # samples of each class; None takes as many as the test split has
    config.eval.weights = ("raw", "ema")
    config.eval.cache_dir = "data/cache"  # features and reference statistics

    config.log = ConfigDict()
    config.log.every_steps = 100
    config.log.wandb_project = placeholder(str)  # also log to Weights & Biases
    return config
