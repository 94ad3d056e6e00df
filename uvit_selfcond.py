"""The U-ViT, self-conditioned: the pooled tokens of its middle block are added in the whole decoder.

    x, t --> in_1 ... in_6 --> mid --+--> out_1 ... out_6 --> eps        size "small"
                   |                 |       ^    ^
                   +--- long skips --|-------+    |                      in_i -> out_(7 - i)
                                     |     + abar proj(z)                where a decoder block fuses its skip
                                     |            ^
                                     +----> z ----+                      z = mean over patch tokens

Self-conditioning here means: the features of one layer are *aggregated* into a vector z and *rerouted* to all
later layers (DDAE++, arXiv 2505.10999). It is not the "self-conditioning" of Analog Bits (arXiv 2208.04202),
which feeds the last estimate of the clean image back as extra input channels.

Baseline: U-ViT (Bao et al., CVPR 2023, arXiv 2209.12152): time and label are tokens, long skips concatenated.
Read from top to bottom: each class uses only what stands above it. torch is the only import.

Differs from the original by: discrete times (see from_public); attention through
scaled_dot_product_attention, not forced to float32; one row more in the label table, "no class"; the last
convolution starts as the identity: undoing a random one costs a short training many images; proj,
where self_cond is on.
Also tried: one proj a decoder block, z added once to all tokens, z behind out_2 (see .github/results).
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


class Block(nn.Module):
    """Pre-norm transformer block; in the decoder it first fuses a long skip with the conditioning c.

    Tokens x, skip (B, N, D), N being all of them here; c (B, D) or, in the encoder, absent.
    """

    def __init__(self, dim, heads, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, approximate="none")
        self.fuse = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, skip=None, c=None):
        if self.fuse is not None:
            x = self.fuse(torch.cat([x, skip], dim=2)) + c[:, None]          # (B, N, 2D) -> (B, N, D)
        x = x + self.attention(self.norm1(x))                                # (B, N, D)
        return x + self.mlp(self.norm2(x))                                   # (B, N, D)


class UViT(nn.Module):
    """Denoising transformer with long skips.

    image_size   side of the square images; a multiple of patch
    channels     of the images
    num_classes  K > 0 makes it class-conditional; class K then means "no class"
    self_cond    False is the plain published baseline
    dim          width D, a multiple of heads
    depth        number of blocks in encoder and decoder together, even; one middle block comes on top
    heads, patch attention heads; side of a patch in pixels
    Raises ValueError for sizes that do not fit.
    """

    SIZES = {
        "tiny": dict(dim=128, depth=4, heads=4, patch=4),
        "small": dict(dim=512, depth=12, heads=8, patch=2),
        "small-4": dict(dim=512, depth=12, heads=8, patch=4),       # the original's for CelebA, 64 x 64
    }
    PUBLIC = [      # replaced in this order: names in libs/uvit.py of github.com/baofff/U-ViT, by ours
        ("patch_embed.proj.", "patch_embed."),
        ("pos_embed", "positions"),
        ("label_emb.", "label_embed."),
        (".attn.proj.", ".attention.out."),
        (".attn.", ".attention."),
        ("skip_linear.", "fuse."),
        ("norm.", "norm_out."),
        ("decoder_pred.", "linear_out."),
        ("final_layer.", "conv_out."),
    ]

    def __init__(self, image_size=32, channels=3, num_classes=0, self_cond=True,
                 dim=512, depth=12, heads=8, patch=2):
        super().__init__()
        if dim % heads or dim % 2 or depth % 2:
            raise ValueError(f"dim {dim}, heads {heads}, depth {depth} do not fit: use a dim that is a "
                             "multiple of heads and of 2, and an even depth.")
        if image_size % patch or image_size < patch:
            raise ValueError(f"image size {image_size} does not fit: "
                             f"patches have {patch} pixels, so use a multiple of {patch}.")
        self.image_size, self.channels = image_size, channels
        self.num_classes, self.self_cond = num_classes, self_cond
        self.dim, self.patch = dim, patch
        self.bottleneck = "mid"
        self.extras = 2 if num_classes else 1  # label and time, before the patches

        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.label_embed = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.positions = nn.Parameter(torch.empty(1, self.extras + (image_size // patch) ** 2, dim))
        self.in_blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth // 2))
        self.mid_block = Block(dim, heads)
        self.out_blocks = nn.ModuleList(Block(dim, heads, skip=True) for _ in range(depth // 2))
        self.norm_out = nn.LayerNorm(dim)
        self.linear_out = nn.Linear(dim, patch ** 2 * channels)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
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
        # positions, linear layers and the last convolution; the rest keeps PyTorch's default
        nn.init.trunc_normal_(self.positions, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.dirac_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    @property
    def blocks(self):
        """All transformer blocks in depth order."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    @property
    def parts(self):
        """What there is to compile, one by one."""
        return self.blocks

    def patch_map(self, x):
        """All tokens (B, extras + N, D) -> feature map (B, D, h, w) of the patch tokens."""
        return to_map(x[:, self.extras:])

    def aggregate(self, feats):
        """What z is: the encoder's features by name, each (B, D, h, w) -> (B, D) in float32."""
        return feats[self.bottleneck].float().mean((2, 3))

    def encoder(self, x, t, y=None):
        """Everything up to the bottleneck -> all tokens (B, extras + N, D), c (B, D), skips, features.

        The tokens: label (if any), time, patches. c is 0: U-ViT conditions by tokens only.
        """
        if y is not None and not self.num_classes:
            raise ValueError("labels y were given, but this network was built with num_classes=0.")
        if x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"images {tuple(x.shape[2:])} do not fit a network for {self.image_size}.")
        time = sinusoid(t, self.dim)[:, None].to(x.dtype)                    # (B,) -> (B, 1, D)
        tokens = [time, self.patch_embed(x).flatten(2).transpose(1, 2)]      # (B, C, H, W) -> (B, N, D)
        if self.num_classes:
            if y is None:                                                    # no class
                y = torch.full_like(t, self.num_classes, dtype=torch.int64)
            tokens.insert(0, self.label_embed(y)[:, None])                   # (B,) -> (B, 1, D)
        x = torch.cat(tokens, dim=1) + self.positions                        # (B, extras + N, D)
        feats, skips = {}, []
        for n, block in enumerate(self.in_blocks, 1):
            x = block(x)                                                     # (B, extras + N, D)
            skips.append(x)
            feats[f"in_{n}"] = self.patch_map(x)
        x = self.mid_block(x)                                                # (B, extras + N, D)
        feats["mid"] = self.patch_map(x)
        c = x.new_zeros(x.shape[0], self.dim)                                # (B, D)
        return x, c, skips, feats

    def decoder(self, x, c, skips, feats=None):
        """All tokens x (B, extras + N, D), conditioning c (B, D), skips -> prediction (B, C, H, W)."""
        for n, block in enumerate(self.out_blocks, 1):
            x = block(x, skips.pop(), c)                                     # (B, extras + N, D)
            if feats is not None:
                feats[f"out_{n}"] = self.patch_map(x)
        x = self.linear_out(self.norm_out(x))[:, self.extras:]               # (B, N, p p C)
        return self.conv_out(unpatchify(x, self.patch))                      # (B, C, H, W)

    def forward(self, x, t, y=None, return_features=False, return_z=False):
        """x_t = x (B, C, H, W), t (B,), classes y (B,) or None (no class) -> eps, or v, (B, C, H, W).

        x is a noisy image, as the path makes it; t, int64 or float32, is in 0..1000; y is int64. With
        return_features also a dict: name -> feature map (B, D, h, w), in depth order; else, with return_z,
        also z (B, D).
        """
        x, c, skips, feats = self.encoder(x, t, y)

        # --- self-conditioning: aggregate the bottleneck, reroute it to every later layer ---
        z = self.aggregate(feats)                                            # (B, D, h, w) -> (B, D)
        if self.self_cond:
            abar = self.abar[t.long(), None].to(c.dtype)                     # (B, 1): near 0 for noise
            c = c + abar * self.proj(z.to(c.dtype))                          # (B, D) -> (B, D)
        # -------------------------------------------------------------------------------------

        eps = self.decoder(x, c, skips, feats if return_features else None)
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
        """State dict of the original -> that of a UViT with self_cond=False.

        The last row of a label table is "no class". The original's times are continuous: at our noise levels
        they are 0.5 (t = 100) to 3.4 (t = 999) above t, which stays so.
        """
        for theirs, ours in UViT.PUBLIC:
            state = {name.replace(theirs, ours): w for name, w in state.items()}
        if state["patch_embed.weight"].shape[1] != 3:
            raise ValueError("its networks of latents are trained on Stable Diffusion's noise levels, "
                             "a schedule that is not here")
        return state
