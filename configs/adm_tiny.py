r"""ADM's network at a size that two CPU cores can train: Food-101 at 32x32 or, with a config field, at 64x64.

    python run_train.py --config=configs/adm_tiny.py --config.data.source=archive \
        --config.data.path=food-101.tar.gz --workdir=runs/adm_tiny

As in adm.py blocks resample by themselves, heads have a fixed width and attention is at two resolutions. It is narrower
and shallower, knows 101 classes, has T = 200 and smaller groups in its norms, and is trained as food101_tiny.py is.
4,934,454 parameters. Expected result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import food101_tiny


def get_config() -> ConfigDict:
    """Returns the config; what is not here is as in food101_tiny.py:hybrid."""
    config = food101_tiny.get_config("hybrid")
    config.model.model_channels = 48
    config.model.channel_mult = (1, 2, 3)
    config.model.attention_resolutions = (16, 8)  # pixels
    config.model.head_channels = 48  # of every attention head, whose number follows
    config.model.new_attention_order = True
    config.model.resblock_updown = True  # halve and double inside of residual blocks
    config.model.norm_groups = 12  # of 4 channels
    config.model.dropout = 0.1
    config.optimizer.lr = 5e-4
    return config
