"""`model/uvit.py` in PyTorch, to be timed beside it. Runs in the peer's environment, never in ours.

Written as PyTorch does it fastest on a CPU: channels last, fused attention and norms. Its parameters are those of
`UViT`, tensor for tensor, which the worker checks by their number.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

TIME_FEATURES = 128
MAX_PERIOD = 1000.0


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, norm scaled and shifted by the embedding, SiLU, convolution."""

    def __init__(self, inputs, outputs, embed_dim, groups):
        """Builds the block."""
        super().__init__()
        self.norm_in, self.norm_out = nn.GroupNorm(groups, inputs), nn.GroupNorm(groups, outputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.embed = nn.Linear(embed_dim, 2 * outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, embedding):
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        scale, shift = self.embed(F.silu(embedding))[:, :, None, None].chunk(2, 1)
        h = self.norm_out(self.conv_in(F.silu(self.norm_in(x))))
        return self.skip(x) + self.conv_out(F.silu(h * (1 + scale) + shift))


class TransformerBlock(nn.Module):
    """Attention and an MLP, scaled, shifted and gated by the embedding."""

    def __init__(self, width, embed_dim, heads, mlp_ratio):
        """Builds the block."""
        super().__init__()
        self.modulation = nn.Linear(embed_dim, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, mlp_ratio * width), nn.Linear(mlp_ratio * width, width)
        self.heads = heads

    def forward(self, x, embedding):
        """[n, positions, width] to the same."""
        n, positions, width = x.shape
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(F.silu(embedding))[:, None].chunk(6, -1)
        h = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
        q, k, v = self.qkv(h).view(n, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, q.shape[-1:], eps=1e-6), F.rms_norm(k, k.shape[-1:], eps=1e-6)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, positions, width)
        x = x + gate * self.out(h)
        h = F.layer_norm(x, (width,), eps=1e-6) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.mlp_out(F.gelu(self.mlp_in(h), approximate="tanh"))


class UViT(nn.Module):
    """Patches, residual blocks, a transformer at half the resolution, residual blocks, patches."""

    def __init__(
        self, *, image_size, num_classes, patch_size, conv_channels, num_res_blocks, width, depth, num_heads, embed_dim,
        mlp_ratio=4, norm_groups=8,
    ):  # fmt: skip
        """Builds the network from the fields of config.model."""
        super().__init__()
        c, pixels = conv_channels, 3 * patch_size**2
        self.time_in, self.time_out = nn.Linear(TIME_FEATURES, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.label = nn.Embedding(num_classes + 1, embed_dim)
        self.conv_in, self.conv_out = nn.Conv2d(pixels, c, 3, padding=1), nn.Conv2d(c, pixels, 3, padding=1)
        self.down = nn.ModuleList([ResBlock(c, c, embed_dim, norm_groups) for _ in range(num_res_blocks)])
        self.to_tokens = nn.Conv2d(c, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn((image_size // (2 * patch_size)) ** 2, width))
        blocks = [TransformerBlock(width, embed_dim, num_heads, mlp_ratio) for _ in range(depth)]
        self.transformer = nn.ModuleList(blocks)
        self.from_tokens = nn.Linear(width, 4 * c)
        inputs = [2 * c] + [c] * (num_res_blocks - 1)
        self.up = nn.ModuleList([ResBlock(channels, c, embed_dim, norm_groups) for channels in inputs])
        self.norm_out = nn.GroupNorm(norm_groups, c)
        self.patch_size = patch_size

    def forward(self, x_t, log_snr, y):
        """[n, 3, h, w], [n], [n] to [n, 3, h, w]."""
        half = TIME_FEATURES // 2
        angles = log_snr[:, None] * torch.exp(-math.log(MAX_PERIOD) * torch.arange(half) / half)
        features = torch.cat([angles.cos(), angles.sin()], -1)
        embedding = self.time_out(F.silu(self.time_in(features))) + self.label(y)
        h = self.conv_in(F.pixel_unshuffle(x_t, self.patch_size))
        for block in self.down:
            h = block(h, embedding)
        skip, tokens = h, self.to_tokens(h)
        n, width, height, _ = tokens.shape
        tokens = tokens.flatten(2).transpose(1, 2) + self.positions
        for block in self.transformer:
            tokens = block(tokens, embedding)
        tokens = self.from_tokens(F.layer_norm(tokens, (width,), eps=1e-6))
        h = F.pixel_shuffle(tokens.transpose(1, 2).reshape(n, -1, height, height), 2)
        h = torch.cat([h, skip], 1)
        for block in self.up:
            h = block(h, embedding)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch_size)
