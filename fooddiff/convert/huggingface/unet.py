"""A UNet2DModel whose heads of attention have another width on every level."""

from functools import wraps

from diffusers import UNet2DModel


class UNet2DModelWithHeads(UNet2DModel):
    """A UNet2DModel with a list as its `attention_head_dim`: the width of a head on each level, the finest first.

    The middle is as the last level.
    """

    @wraps(UNet2DModel.__init__)
    def __init__(self, *args, attention_head_dim, **settings):
        """Builds the network; the other settings are those of a UNet2DModel."""
        super().__init__(*args, attention_head_dim=None, **settings)
        self.register_to_config(attention_head_dim=attention_head_dim)
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        for block, width in zip(
            blocks, [*attention_head_dim, attention_head_dim[-1], *attention_head_dim[::-1]], strict=True
        ):
            for attention in getattr(block, "attentions", ()):
                attention.heads = attention.inner_dim // width
                attention.scale = width**-0.5
