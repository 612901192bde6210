"""The report's baseline: L_simple with fixed-large variance, all else as in hybrid.py.

    python run_train.py --config=configs/mse.py --workdir=runs/mse

92,077,443 parameters. The original experiment reports FID-64 0.87 at 75k steps; not yet measured here.
"""

from ml_collections import ConfigDict

from configs import hybrid


def get_config() -> ConfigDict:
    """Returns the config."""
    config = hybrid.get_config()
    config.diffusion.variance = "fixed_large"
    config.objective.name = "mse"
    del config.objective.vb_weight
    return config
