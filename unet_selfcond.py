"""The DDPM UNet, self-conditioned: the pooled output of its middle block conditions the whole decoder.

    x --> in_1 ... in_8 --> mid --+--> out_1 ... out_12 --> eps        size "base"
               ^             ^    |            ^
    t --> c ---+-------------+----|----> c + abar proj(z)              to every block
                                  |                 ^
                                  +----> z ---------+                  z = mean over space

Not drawn: skips lead from conv_in, each in_i and each downsampling to the decoder's blocks, last to first.

Self-conditioning here means: the features of one layer are *aggregated* into a vector z and *rerouted* to all
later layers (DDAE++, arXiv 2505.10999). It is not the "self-conditioning" of Analog Bits (arXiv 2208.04202),
which feeds the last estimate of the clean image back as extra input channels.

Baseline: the 35.7M UNet of DDPM (Ho et al., arXiv 2006.11239) in the form of DDAE (Xiang et al., ICCV 2023,
arXiv 2303.09769).
Read from top to bottom: each class uses only what stands above it. torch is the only import.

Differs from the original by: t itself, where DDAE gives (t + 1) / 1000; attention through
scaled_dot_product_attention; a class embedding added to c where num_classes > 0 (the original has no
classes); on CUDA a GroupNorm of its own, the same up to rounding; proj, where self_cond is on.
Also tried: z behind out_3 instead of mid (the same distance, probe 1.2 points lower; see .github/results).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def sinusoid(t, dim):
    """Steps t (B,) -> (B, dim): sin | cos of t over frequencies from 1 to exactly 1/10000, hence half - 1."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) / (half - 1)
                      * torch.arange(half, dtype=torch.float32, device=t.device))
    args = t.float()[:, None] * freqs
    return torch.cat([args.sin(), args.cos()], dim=1)


def group_norm(x, groups, weight, bias, eps):
    """F.group_norm of x (B, C, H, W), computed from the first two moments of each channel. G: groups."""
    dtype = x.dtype
    x = x.to(torch.promote_types(weight.dtype, torch.float32))               # squares of bf16 are too coarse
    moments = torch.stack([x.mean((2, 3)), x.square().mean((2, 3))])         # (2, B, C)
    moments = moments.unflatten(2, (groups, -1))                             # (2, B, G, C / G)
    moments = moments.mean(3, keepdim=True).expand_as(moments)               # of each group, for its channels
    mean, square = moments.flatten(2)                                        # 2 x (B, C)
    scale = weight * ((square - mean.square()).clamp(min=0) + eps).rsqrt()
    shift = bias - mean * scale
    return (x * scale[:, :, None, None] + shift[:, :, None, None]).to(dtype)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm; on CUDA by the function above, where it saves a fifth of a step.

    There torch's own copies every channels_last map into the other layout and back, in float32, compiled or
    not. On a CPU torch's own is the faster one.
    """

    def forward(self, x):
        if x.device.type != "cuda":
            return super().forward(x)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Single-head self-attention over the pixels of a map, with residual. C: channels, N = H W: pixels."""

    def __init__(self, dim):
        super().__init__()
        self.norm = GroupNorm(32, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)                     # (B, N, C)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)             # 3 x (B, 1, N, C)
        tokens = F.scaled_dot_product_attention(q, k, v).squeeze(1)          # (B, N, C)
        return x + self.out(tokens).transpose(1, 2).reshape(B, C, H, W)      # (B, C, H, W)


class Block(nn.Module):
    """Residual block, its conditioning c added between the two convolutions; then attention, if any.

    In the decoder x comes with a skip. I, O: channels in (of both) and out; E: width of c.
    """

    def __init__(self, dim_in, dim_out, dim_c, dropout, attention):
        super().__init__()
        self.norm1 = GroupNorm(32, dim_in)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm2 = GroupNorm(32, dim_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()
        self.embed = nn.Linear(dim_c, dim_out)
        self.attention = Attention(dim_out) if attention else nn.Identity()

    def forward(self, x, c, skip=None):
        if skip is not None:
            x = torch.cat([x, skip], dim=1)                                  # (B, I, H, W)
        h = self.conv1(F.silu(self.norm1(x)))                                # (B, I, H, W) -> (B, O, H, W)
        h = h + self.embed(F.silu(c))[:, :, None, None]                      # (B, E) -> (B, O, 1, 1)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))                  # (B, O, H, W)
        return self.attention(self.shortcut(x) + h)                          # (B, O, H, W)


class Upsample(nn.Module):
    """Nearest-neighbour x2, then a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """Denoising UNet.

    image_size   side of the square images; a multiple of 2 ** (len(mults) - 1)
    channels     of the images
    num_classes  K > 0 makes it class-conditional; class K then means "no class"
    self_cond    False is the plain published baseline
    dim          width, a multiple of 32; level i, of half the resolution of i - 1, has d = dim * mults[i];
                 in the middle that is D, at h x w pixels; c has E = 4 dim
    attention    the levels whose blocks attend (0 is full resolution)
    blocks       residual blocks a level on the way down; one more on the way up
    dropout      in every block, before its second convolution
    Raises ValueError for sizes that do not fit.
    """

    SIZES = {
        "tiny": dict(dim=32, mults=(1, 2, 2), attention=(2,), blocks=1, dropout=0.0),
        "base": dict(dim=128, mults=(1, 2, 2, 2), attention=(1,), blocks=2, dropout=0.1),
    }
    PUBLIC = [      # replaced in this order: names in model/ of github.com/FutureXiang/ddae, by ours
        ("nn_model.image_proj.", "conv_in."),
        ("nn_model.time_emb.lin1.", "time_mlp.0."),
        ("nn_model.time_emb.lin2.", "time_mlp.2."),
        ("nn_model.middle.res1.", "mid.0."),
        ("nn_model.middle.attn.", "mid.0.attention."),
        ("nn_model.middle.res2.", "mid.1."),
        ("nn_model.norm.", "end.0."),
        ("nn_model.final.", "end.2."),
        ("nn_model.", ""),
        (".res.", "."),
        (".conv2.1.", ".conv2."),
        (".time_emb.1.", ".embed."),
        (".attn.", ".attention."),
        (".projection.", ".qkv."),
        (".output.", ".out."),
    ]

    def __init__(self, image_size=32, channels=3, num_classes=0, self_cond=True,
                 dim=128, mults=(1, 2, 2, 2), attention=(1,), blocks=2, dropout=0.1):
        super().__init__()
        if dim % 32:
            raise ValueError(f"dim {dim} does not fit: GroupNorm has 32 groups, so use a multiple of 32.")
        stride = 2 ** (len(mults) - 1)
        if image_size % stride or image_size < stride:
            raise ValueError(f"image size {image_size} does not fit: "
                             f"this UNet halves it {len(mults) - 1} times, so use a multiple of {stride}.")
        self.image_size, self.channels = image_size, channels
        self.num_classes, self.self_cond = num_classes, self_cond
        self.dim, dim_c = dim, 4 * dim
        self.bottleneck = "mid"
        dims = [dim * m for m in mults]

        self.conv_in = nn.Conv2d(channels, dim, 3, padding=1)
        self.time_mlp = nn.Sequential(nn.Linear(dim, dim_c), nn.SiLU(), nn.Linear(dim_c, dim_c))
        self.label_embed = nn.Embedding(num_classes + 1, dim_c) if num_classes else None

        self.down, width, skips = nn.ModuleList(), dim, []      # skips: the widths that the decoder will find
        for i, d in enumerate(dims):
            level = nn.ModuleList()
            skips.append(width)
            for _ in range(blocks):
                level.append(Block(width, d, dim_c, dropout, i in attention))
                width = d
                skips.append(width)
            last = i == len(dims) - 1
            level.append(nn.Identity() if last else nn.Conv2d(d, d, 3, stride=2, padding=1))
            self.down.append(level)

        self.mid = nn.ModuleList([Block(width, width, dim_c, dropout, True),
                                  Block(width, width, dim_c, dropout, False)])

        self.up = nn.ModuleList()
        for i, d in reversed(list(enumerate(dims))):
            level = nn.ModuleList()
            for _ in range(blocks + 1):
                level.append(Block(width + skips.pop(), d, dim_c, dropout, i in attention))
                width = d
            level.append(Upsample(d) if i else nn.Identity())
            self.up.append(level)

        self.end = nn.Sequential(GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

        # last, so that the baseline's random initialisation is the same with and without
        if self_cond:
            D = dims[-1]
            self.proj = nn.Sequential(nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, dim_c))
            nn.init.zeros_(self.proj[1].weight)
            nn.init.zeros_(self.proj[1].bias)
            # 1 / (1 + sigma^2) at t = 0..1000; train.py fills in that of its path, in place of 1
            self.register_buffer("abar", torch.ones(1001))

    @property
    def parts(self):
        """What there is to compile: as hardly two blocks are of one shape, the whole."""
        return [self]

    def aggregate(self, feats):
        """What z is: the encoder's features by name, each (B, D, h, w) -> (B, D) in float32."""
        return feats[self.bottleneck].float().mean((2, 3))

    def encoder(self, x, t, y=None):
        """Everything up to the bottleneck -> h (B, D, h, w), conditioning c (B, E), skips, features."""
        if y is not None and not self.num_classes:
            raise ValueError("labels y were given, but this network was built with num_classes=0.")
        c = self.time_mlp(sinusoid(t, self.dim).to(x.dtype))                 # (B,) -> (B, dim) -> (B, E)
        if self.num_classes:
            if y is None:                                                    # no class
                y = torch.full_like(t, self.num_classes, dtype=torch.int64)
            c = c + self.label_embed(y)                                      # (B,) -> (B, E)
        h = self.conv_in(x)                                                  # (B, dim, H, W)
        feats, skips, n = {}, [], 0
        for *blocks, downsample in self.down:
            skips.append(h)
            for n, block in enumerate(blocks, n + 1):
                h = block(h, c)                                              # (B, d, H / 2^i, W / 2^i)
                skips.append(h)
                feats[f"in_{n}"] = h
            h = downsample(h)                                                # to level i + 1, if there is one
        for block in self.mid:
            h = block(h, c)                                                  # (B, D, h, w)
        feats["mid"] = h
        return h, c, skips, feats

    def decoder(self, h, c, skips, feats=None):
        """Features h (B, D, h, w), conditioning c (B, E), skips -> prediction (B, C, H, W)."""
        n = 0
        for *blocks, upsample in self.up:
            for n, block in enumerate(blocks, n + 1):
                h = block(h, c, skips.pop())                                 # (B, d, H / 2^i, W / 2^i)
                if feats is not None:
                    feats[f"out_{n}"] = h
            h = upsample(h)                                                  # to level i - 1, if there is one
        return self.end(h)                                                   # (B, d, H, W) -> (B, C, H, W)

    def forward(self, x, t, y=None, return_features=False, return_z=False):
        """x_t = x (B, C, H, W), t (B,), classes y (B,) or None (no class) -> eps, or v, (B, C, H, W).

        x is a noisy image, as the path makes it; t, int64 or float32, is in 0..1000; y is int64. With
        return_features also a dict: name -> feature map (B, d, H / 2^i, W / 2^i) of its level i, in depth
        order; else, with return_z, also z (B, D).
        """
        h, c, skips, feats = self.encoder(x, t, y)

        # --- self-conditioning: aggregate the bottleneck, reroute it to every later layer ---
        z = self.aggregate(feats)                                            # (B, D, h, w) -> (B, D)
        if self.self_cond:
            abar = self.abar[t.long(), None].to(c.dtype)                     # (B, 1): near 0 for noise
            c = c + abar * self.proj(z.to(c.dtype))                          # (B, D) -> (B, E)
        # -------------------------------------------------------------------------------------

        eps = self.decoder(h, c, skips, feats if return_features else None)
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
        """Checkpoint of the original -> state dict, of its EMA network, of a UNet with self_cond=False.

        Of its DDPM: its EDM saves tensors of the same names, which say another thing and can't be told apart.
        """
        start = "ema_model."
        state = {name[len(start):]: w for name, w in state["EMA"].items() if name.startswith(start)}
        for theirs, ours in UNet.PUBLIC:
            state = {name.replace(theirs, ours): w for name, w in state.items()}

        # theirs are numbered in one row, n = size of a level * level + k; what ends a level is a convolution
        ends = [int(name.split(".")[1]) for name in state if name.startswith("down.") and ".conv." in name]
        blocks = min(ends, default=1)
        of_level = {"down": blocks + 1, "up": blocks + 2}
        found = {}
        for name, w in state.items():
            part, *rest = name.split(".")
            if part in of_level:
                level, k = divmod(int(rest[0]), of_level[part])
                name = ".".join([part, str(level), str(k), *rest[1:]])
            if part == "down":
                name = name.replace(".conv.", ".")
            found[name] = w

        # their times are (t + 1) / 1000: what their first linear layer says of these, ours shall say of t
        w = found["time_mlp.0.weight"]                                       # (E, dim)
        t = torch.arange(1000)
        ours = sinusoid(t, w.shape[1]).double()                              # (1000, dim)
        theirs = sinusoid((t + 1) / 1000, w.shape[1]).double()
        change = torch.linalg.lstsq(ours, theirs, driver="gelsd").solution   # ours @ change = theirs, to 1e-7
        found["time_mlp.0.weight"] = (w.double() @ change.T).float()
        return found
