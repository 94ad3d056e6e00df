"""The diffusion transformer DiT, self-conditioned: the pooled tokens of its middle block condition the rest.

    x --> block_1 ... block_6 --+--> block_7 ... block_12 --> final --> eps        size "small"
                 ^              |            ^                  ^
    t --> c -----+--------------|----> c + abar proj(z) --------+                  to every block
                                |                 ^
                                +----> z ---------+                                z = mean over tokens

Self-conditioning here means: the features of one layer are *aggregated* into a vector z and *rerouted* to all
later layers (DDAE++, arXiv 2505.10999). It is not the "self-conditioning" of Analog Bits (arXiv 2208.04202),
which feeds the last estimate of the clean image back as extra input channels.

Baseline: DiT with adaLN-Zero (Peebles & Xie, ICCV 2023, arXiv 2212.09748).
Read from top to bottom: each class uses only what stands above it. torch is the only import.

Differs from the original by: attention through scaled_dot_product_attention; learn_sigma is off (the variance
is not predicted); no label table at all where num_classes = 0; label dropout is the training loop's; proj,
where self_cond is on.
Also tried: z behind block_8 of 12 (distance 0.13 higher, probe the same; see .github/results).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def sinusoid(t, dim):
    """Steps t (B,) -> (B, dim): cos | sin of t over frequencies from 1 down towards 1/10000."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) / half
                      * torch.arange(half, dtype=torch.float32, device=t.device))
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=1)


def to_map(tokens):
    """Patch tokens (B, N, D) -> feature map (B, D, h, w) with h = w = sqrt(N); no copy."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def unpatchify(tokens, patch):
    """Pixel tokens (B, N, p p C) -> images (B, C, h p, w p); a token is a patch row by row, channels last."""
    B, N, D = tokens.shape
    side, C = math.isqrt(N), D // patch ** 2
    x = tokens.reshape(B, side, side, patch, patch, C)                       # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, side * patch, side * patch)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D). H: heads."""

    def __init__(self, dim, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))                  # (B, N, 3, H, D / H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                 # 3 x (B, H, N, D / H)
        x = F.scaled_dot_product_attention(q, k, v)                          # (B, H, N, D / H)
        return self.out(x.transpose(1, 2).flatten(2))                        # (B, N, D)


class MLP(nn.Module):
    """Two linear layers with GELU between: (B, N, D) -> (B, N, D). approximate: "none" (exact) or "tanh"."""

    def __init__(self, dim, approximate):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.approximate = approximate

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))   # (B, N, 4D) -> (B, N, D)


def sincos_table(side, dim):
    """Fixed 2-D position table (side * side, dim), row by row: half of dim codes the column, half the row.

    As get_2d_sincos_pos_embed of the original, which has it from MAE (arXiv 2111.06377).
    """
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    args = torch.arange(side, dtype=torch.float64)[:, None] * omega          # (side, dim / 4)
    axis = torch.cat([args.sin(), args.cos()], dim=1)                        # (side, dim / 2)
    column = axis[None].expand(side, -1, -1)                                 # (side, side, dim / 2)
    row = axis[:, None].expand(-1, side, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()             # (side * side, dim)


def modulate(x, shift, scale):
    """Tokens x (B, N, D), shift and scale (B, D) -> (B, N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Transformer block with adaLN-Zero: c sets shift, scale and gate of both branches.

    Tokens x (B, N, D); c (B, D).
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, approximate="tanh")
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c):
        (shift1, scale1, gate1,
         shift2, scale2, gate2) = self.modulation(F.silu(c)).chunk(6, dim=1)              # 6 x (B, D)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))  # (B, N, D)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))     # (B, N, D)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear map to pixels: tokens (B, N, D), c (B, D) -> (B, N, p p C)."""

    def __init__(self, dim, dim_out):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, dim_out)
        self.modulation = nn.Linear(dim, 2 * dim)

    def forward(self, x, c):
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)            # 2 x (B, D)
        return self.linear(modulate(self.norm(x), shift, scale))             # (B, N, p p C)


class DiT(nn.Module):
    """Denoising transformer.

    image_size   side of the square images or latents; a multiple of patch
    channels     of the images (4 for the usual latents)
    num_classes  K > 0 makes it class-conditional; class K then means "no class"
    self_cond    False is the plain published baseline
    dim          width D, a multiple of 4 and of heads
    depth        number of blocks; z is pooled behind block depth // 2
    heads, patch attention heads; side of a patch in pixels
    Raises ValueError for sizes that do not fit.
    """

    SIZES = {
        "tiny": dict(dim=128, depth=6, heads=4, patch=4),
        "small": dict(dim=384, depth=12, heads=6, patch=2),
        "small-1": dict(dim=384, depth=12, heads=6, patch=1),                # latents of 16 x 16
        "base": dict(dim=768, depth=12, heads=12, patch=2),
        "large": dict(dim=1024, depth=24, heads=16, patch=2),
        "xlarge": dict(dim=1152, depth=28, heads=16, patch=2),
    }
    PUBLIC = [      # replaced in this order: names in models.py of github.com/facebookresearch/DiT, by ours
        ("x_embedder.proj.", "patch_embed."),
        ("pos_embed", "positions"),
        ("t_embedder.mlp.", "time_mlp."),
        ("y_embedder.embedding_table.", "label_embed."),
        (".attn.proj.", ".attention.out."),
        (".attn.", ".attention."),
        ("adaLN_modulation.1.", "modulation."),
        ("final_layer.", "final."),
    ]

    def __init__(self, image_size=32, channels=3, num_classes=0, self_cond=True,
                 dim=384, depth=12, heads=6, patch=2):
        super().__init__()
        if dim % heads or dim % 4 or depth < 2:
            raise ValueError(f"dim {dim}, heads {heads}, depth {depth} do not fit: use a dim that is a "
                             "multiple of heads and of 4, and 2 blocks or more.")
        if image_size % patch or image_size < patch:
            raise ValueError(f"image size {image_size} does not fit: "
                             f"patches have {patch} pixels, so use a multiple of {patch}.")
        self.image_size, self.channels = image_size, channels
        self.num_classes, self.self_cond = num_classes, self_cond
        self.patch, self.before_z = patch, depth // 2  # before_z: number of blocks up to z
        self.bottleneck = f"block_{self.before_z}"

        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.time_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))  # 256: sinusoid
        self.label_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.final = FinalLayer(dim, patch ** 2 * channels)
        # not in the state dict: after meta and to_empty fill it anew
        self.register_buffer("positions", sincos_table(image_size // patch, dim), persistent=False)
        self.init_weights()

        # last, so that the baseline's random initialisation is the same with and without
        if self_cond:
            D = dim
            self.proj = nn.Sequential(nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, dim))
            nn.init.zeros_(self.proj[1].weight)
            nn.init.zeros_(self.proj[1].bias)
            # 1 / (1 + sigma^2) at t = 0..1000; train.py fills in that of its path, in place of 1
            self.register_buffer("abar", torch.ones(1001))

    def init_weights(self):
        # generic: every linear layer, and the patch convolution as the linear layer it is
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.view(m.weight.shape[0], -1))
                nn.init.zeros_(m.bias)
        # embeddings of time and label
        for m in [self.time_mlp[0], self.time_mlp[2], self.label_embed]:
            if m is not None:
                nn.init.normal_(m.weight, std=0.02)
        # zeros: each block starts as the identity (adaLN-Zero), the network as the constant 0
        for m in [block.modulation for block in self.blocks] + [self.final.modulation, self.final.linear]:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    @property
    def parts(self):
        """What there is to compile, one by one."""
        return [*self.blocks, self.final]

    def aggregate(self, feats):
        """What z is: the encoder's features by name, each (B, D, h, w) -> (B, D) in float32."""
        return feats[self.bottleneck].float().mean((2, 3))

    def encoder(self, x, t, y=None):
        """Everything up to the bottleneck -> tokens (B, N, D), conditioning c (B, D), features."""
        if y is not None and not self.num_classes:
            raise ValueError("labels y were given, but this network was built with num_classes=0.")
        if x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"images {tuple(x.shape[2:])} do not fit a network for {self.image_size}.")
        c = self.time_mlp(sinusoid(t, 256).to(x.dtype))                      # (B,) -> (B, 256) -> (B, D)
        if self.num_classes:
            if y is None:                                                    # no class
                y = torch.full_like(t, self.num_classes, dtype=torch.int64)
            c = c + self.label_embed(y)                                      # (B,) -> (B, D)
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.positions  # (B, C, H, W) -> (B, N, D)
        feats = {}
        for n, block in enumerate(self.blocks[:self.before_z], 1):
            x = block(x, c)                                                  # (B, N, D)
            feats[f"block_{n}"] = to_map(x)
        return x, c, feats

    def decoder(self, x, c, feats=None):
        """Tokens x (B, N, D), conditioning c (B, D) -> prediction (B, C, H, W)."""
        for n, block in enumerate(self.blocks[self.before_z:], self.before_z + 1):
            x = block(x, c)                                                  # (B, N, D)
            if feats is not None:
                feats[f"block_{n}"] = to_map(x)
        return unpatchify(self.final(x, c), self.patch)                      # (B, N, p p C) -> (B, C, H, W)

    def forward(self, x, t, y=None, return_features=False, return_z=False):
        """x_t = x (B, C, H, W), t (B,), classes y (B,) or None (no class) -> eps, or v, (B, C, H, W).

        x is a noisy image, as the path makes it; t, int64 or float32, is in 0..1000; y is int64. With
        return_features also a dict: name -> feature map (B, D, h, w), in depth order; else, with return_z,
        also z (B, D).
        """
        x, c, feats = self.encoder(x, t, y)

        # --- self-conditioning: aggregate the bottleneck, reroute it to every later layer ---
        z = self.aggregate(feats)                                            # (B, D, h, w) -> (B, D)
        if self.self_cond:
            abar = self.abar[t.long(), None].to(c.dtype)                     # (B, 1): near 0 for noise
            c = c + abar * self.proj(z.to(c.dtype))                          # (B, D) -> (B, D)
        # -------------------------------------------------------------------------------------

        eps = self.decoder(x, c, feats if return_features else None)
        if return_features:
            return eps, feats
        if return_z:
            return eps, z
        return eps

    def encode(self, x, t, y=None):
        """x, t, y as above -> the aggregated bottleneck z (B, D) in float32; the decoder is not run."""
        *_, feats = self.encoder(x, t, y)
        return self.aggregate(feats)

    @staticmethod
    def from_public(state):
        """State dict of the original -> that of a DiT with self_cond=False, and its positions (N, D).

        The original's last layer says 2C numbers a pixel: eps, which is kept, then the variance.
        """
        for theirs, ours in DiT.PUBLIC:
            state = {name.replace(theirs, ours): w for name, w in state.items()}
        _, C, p, _ = state["patch_embed.weight"].shape
        for name in ("final.linear.weight", "final.linear.bias"):
            pixels = state[name].unflatten(0, (p ** 2, -1))                  # (p p 2C, ...) -> (p p, 2C, ...)
            state[name] = pixels[:, :C].flatten(0, 1)                        # (p p C, ...)
        state["positions"] = state["positions"][0]                           # (1, N, D) -> (N, D)
        return state
