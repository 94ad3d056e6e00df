"""The contract that the three networks share, and small independent references for their parts."""
import ast
import inspect
import math
import re

import pytest
import torch
from torch import nn

import dit_selfcond
import unet_selfcond
import uvit_selfcond
from dit_selfcond import DiT
from unet_selfcond import UNet
from uvit_selfcond import UViT

MODULES = {"unet": unet_selfcond, "uvit": uvit_selfcond, "dit": dit_selfcond}
NETS = {"unet": UNet, "uvit": UViT, "dit": DiT}
SMALL = {
    "unet": dict(dim=32, mults=(1, 2), attention=(1,), blocks=1, dropout=0.0),
    "uvit": dict(dim=32, depth=4, heads=2, patch=2),
    "dit": dict(dim=32, depth=4, heads=2, patch=2),
}
ENCODER_BLOCKS = {"unet": 4, "uvit": 3, "dit": 2}                # of SMALL's, up to z; the UNet's mid has two

each_net = pytest.mark.parametrize("name", NETS)
each_classes = pytest.mark.parametrize("classes", [0, 5])


def error(a, b):
    """Maximum absolute error."""
    return (a - b).abs().max().item()


def build(name, num_classes=0, **kwargs):
    """A small network for 8x8 images in eval mode, always from the same seed."""
    torch.manual_seed(0)
    return NETS[name](**{**SMALL[name], "image_size": 8, "num_classes": num_classes, **kwargs}).eval()


@torch.no_grad()
def perturb(net, proj=False):
    """Noise on every parameter, so that no zero gate hides a mistake; on those of proj only if asked."""
    generator = torch.Generator().manual_seed(1)
    for name, p in net.named_parameters():
        if proj or not name.startswith("proj."):
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return net


def inputs(net, B=3):
    """x, t and, for a class-conditional network, y."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, net.channels, net.image_size, net.image_size, generator=generator)
    t = torch.randint(1000, (B,), generator=generator)
    return (x, t, torch.randint(net.num_classes, (B,), generator=generator)) if net.num_classes else (x, t)


def record(modules, log, take=lambda args, out: out):
    """Append take(args, out) to log whenever one of the modules is called."""
    for module in modules:
        module.register_forward_hook(lambda module, args, out: log.append(take(args, out)))


# --- the published sizes ---

@pytest.mark.parametrize("name, size, kwargs, count", [
    ("unet", "base", {}, 35_746_307),
    ("uvit", "small", {}, 44_255_328),
    ("dit", "small", dict(channels=4, num_classes=1000), 32_858_896),
    ("dit", "base", dict(channels=4, num_classes=1000), 130_303_504),
    ("dit", "large", dict(channels=4, num_classes=1000), 457_824_272),
    ("dit", "xlarge", dict(channels=4, num_classes=1000), 674_816_272),
])
def test_parameter_counts(name, size, kwargs, count):
    """Without self-conditioning the sizes have the published parameter counts; with it at most 2 % more."""
    counts = {}
    for self_cond in (False, True):
        with torch.device("meta"):
            net = NETS[name](image_size=32, self_cond=self_cond, **kwargs, **NETS[name].SIZES[size])
        counts[self_cond] = sum(p.numel() for p in net.parameters())
    assert counts[False] == count
    assert 0 < counts[True] - count <= 0.02 * count


@pytest.mark.parametrize("name, size, expected", [
    ("unet", "base", {("group", 32, 1e-5, True), ("group", 8, 1e-5, True), ("dropout", 0.1)}),
    ("uvit", "small", {("layer", 1e-5, True), ("gelu", "none")}),
    ("dit", "small", {("layer", 1e-6, False), ("gelu", "tanh")}),
])
def test_published_constants(name, size, expected):
    """What no parameter count shows is as published too: epsilons, groups, affine norms, GELU, dropout."""
    with torch.device("meta"):
        net, found = NETS[name](self_cond=False, **NETS[name].SIZES[size]), set()
    for m in net.modules():
        if isinstance(m, nn.GroupNorm):
            found.add(("group", m.num_groups, m.eps, m.affine))
        elif isinstance(m, nn.LayerNorm):
            found.add(("layer", m.eps, m.elementwise_affine))
        elif isinstance(m, nn.Dropout):
            found.add(("dropout", m.p))
        elif hasattr(m, "approximate"):
            found.add(("gelu", m.approximate))
    assert found == expected


@pytest.mark.parametrize("name, size", [(name, size) for name in NETS for size in NETS[name].SIZES])
def test_sizes_run(name, size):
    """Every name in SIZES builds a network that maps images to their own shape; tiny is in all three."""
    with torch.device("meta"):
        net = NETS[name](image_size=32, **NETS[name].SIZES[size])
        assert net(torch.empty(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)).shape == (2, 3, 32, 32)
    assert "tiny" in NETS[name].SIZES


# --- initialisation ---

@each_net
@each_classes
def test_initialisation(name, classes):
    """proj starts at zero, comes on top of an unchanged baseline, and is not there when self_cond is off."""
    on, off = (build(name, classes, self_cond=self_cond).state_dict() for self_cond in (True, False))
    assert {key for key in on if key not in off} == {"proj.1.weight", "proj.1.bias"}
    assert not on.pop("proj.1.weight").any() and not on.pop("proj.1.bias").any()
    assert list(on) == list(off) and all(torch.equal(on[key], off[key]) for key in off)


def test_adaln_zero():
    """A fresh DiT's modulations and last layer are zero: every block is the identity, the output is 0."""
    net = build("dit")
    for m in [block.modulation for block in net.blocks] + [net.final.modulation, net.final.linear]:
        assert not m.weight.any() and not m.bias.any()
    out, feats = net(*inputs(net), return_features=True)
    assert not out.any() and all(torch.equal(h, feats["block_1"]) for h in feats.values())


def test_uvit_last_convolution():
    """A fresh U-ViT's last convolution is the identity, at the borders too."""
    net = build("uvit")
    x = inputs(net)[0]
    assert error(net.conv_out(x), x) < 1e-6


def test_position_table_is_fixed():
    """DiT's position table is neither trained nor saved."""
    net = build("dit")
    assert "positions" in dict(net.named_buffers())
    assert not any("positions" in key for key in [*net.state_dict(), *dict(net.named_parameters())])


# --- self-conditioning ---

@each_net
@each_classes
def test_off_equals_on_while_proj_is_zero(name, classes, monkeypatch):
    """With proj zero the output is the baseline's exactly; else it differs and its gradient reaches z."""
    on, off, seen = perturb(build(name, classes)), build(name, classes, self_cond=False), []
    off.load_state_dict({key: value for key, value in on.state_dict().items() if not key.startswith("proj.")})
    baseline = off(*inputs(on))
    assert torch.equal(on(*inputs(on)), baseline)
    assert torch.equal(on(*inputs(on)[:2]), off(*inputs(on)[:2]))

    def aggregate(h, original=MODULES[name].aggregate):
        seen.append(original(h))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(MODULES[name], "aggregate", aggregate)
    perturb(on.proj)
    out = on(*inputs(on))
    assert error(out, baseline) > 1e-3
    out.square().mean().backward()
    assert len(seen) == 1 and seen[0].grad.abs().max() > 0


@pytest.mark.parametrize("name, steps", [("unet", 1), ("uvit", 1), ("dit", 4)])
def test_proj_leaves_zero(name, steps):
    """Training moves proj off zero: at once in UNet and UViT, within 4 steps behind DiT's zero gates."""
    outputs = []
    for self_cond in (True, False):
        net = build(name, self_cond=self_cond)
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
        outputs.append([net(*inputs(net))])
        for _ in range(steps):
            optimiser.zero_grad()
            (net(*inputs(net)) - inputs(net)[0]).square().mean().backward()
            optimiser.step()
        outputs[-1].append(net(*inputs(net)))
        if self_cond:
            assert net.proj[1].weight.abs().max() > 1e-4
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert error(outputs[0][1], outputs[1][1]) > 1e-5


@each_net
@each_classes
def test_reroutes_to_all_later_layers(name, classes):
    """Every layer behind the bottleneck is conditioned on c + proj(z), no other one is."""
    net, log = perturb(build(name, classes), proj=True), []
    later = [*net.blocks[ENCODER_BLOCKS[name]:]] + ([net.final] if name == "dit" else [])
    earlier = [m for m in net.blocks if m not in later]
    record([*earlier, *later], log, take=lambda args, out: args[-1 if name == "uvit" else 1])
    _, feats = net(*inputs(net), return_features=True)
    assert len(log) == len(earlier) + len(later) and later
    z = feats[net.bottleneck].mean((2, 3))
    rerouted = nn.functional.layer_norm(z, z.shape[1:]) @ net.proj[1].weight.T + net.proj[1].bias
    assert rerouted.abs().max() > 0.1
    before = torch.zeros_like(rerouted) if name == "uvit" else log[0]     # U-ViT's encoder has tokens instead
    if name != "uvit":
        assert all(torch.equal(c, before) for c in log[:len(earlier)])
    assert all(error(c, before + rerouted) < 1e-5 for c in log[len(earlier):])


@each_net
@each_classes
def test_changes_only_later_features(name, classes):
    """proj changes all features behind the bottleneck and none before it."""
    net = perturb(build(name, classes))
    _, zero = net(*inputs(net), return_features=True)
    encoded = net.encode(*inputs(net))
    perturb(net.proj, proj=True)
    _, feats = net(*inputs(net), return_features=True)
    same = [torch.equal(feats[key], zero[key]) for key in feats]
    behind = list(feats).index(net.bottleneck) + 1
    assert same == behind * [True] + (len(feats) - behind) * [False] and behind < len(feats)
    assert torch.equal(net.encode(*inputs(net)), encoded)


# --- features ---

@pytest.mark.parametrize("image_size", [8, 16])
@pytest.mark.parametrize("mults", [(1,), (1, 2), (1, 2, 2), (1, 3, 2, 1)])
@pytest.mark.parametrize("blocks, channels, classes", [(1, 1, 0), (2, 3, 5), (3, 4, 0)])
def test_unet_features(image_size, mults, blocks, channels, classes):
    """The UNet's feature maps have their names, order and shapes at any depth."""
    levels = [(32 * m, image_size >> i) for i, m in enumerate(mults)]      # (D, h)
    expected, n = {}, 0
    for level in levels:
        for n in range(n + 1, n + 1 + blocks):
            expected[f"in_{n}"] = level
    expected["mid"], n = levels[-1], 0
    for level in reversed(levels):
        for n in range(n + 1, n + 2 + blocks):
            expected[f"out_{n}"] = level
    with torch.device("meta"):
        net = UNet(image_size, channels, classes, dim=32, mults=mults, attention=(1,), blocks=blocks)
    check_features(net, expected)


@pytest.mark.parametrize("name", ["uvit", "dit"])
@pytest.mark.parametrize("image_size, patch", [(8, 1), (8, 2), (16, 2), (24, 4), (8, 8)])
@pytest.mark.parametrize("depth, channels, classes", [(2, 1, 0), (4, 3, 5), (6, 4, 0)])
def test_transformer_features(name, image_size, patch, depth, channels, classes):
    """The transformers' feature maps have their names, order and shapes for any patch."""
    half = range(1, depth // 2 + 1)
    names = {"uvit": [f"in_{n}" for n in half] + ["mid"] + [f"out_{n}" for n in half],
             "dit": [f"block_{n}" for n in range(1, depth + 1)]}[name]
    with torch.device("meta"):
        net = NETS[name](image_size, channels, classes, dim=32, depth=depth, heads=2, patch=patch)
    assert net.bottleneck == {"uvit": "mid", "dit": f"block_{depth // 2}"}[name]
    check_features(net, {key: (32, image_size // patch) for key in names})


def check_features(net, expected, B=2):
    """Names, order and shapes of feats, the output's and z's shape; expected: name -> (D, h)."""
    x, t = torch.empty(B, net.channels, net.image_size, net.image_size, device="meta"), torch.empty(
        B, dtype=torch.int64, device="meta")
    for y in [None, t] if net.num_classes else [None]:
        out, feats = net(x, t, y, return_features=True)
        assert out.shape == x.shape and isinstance(feats, dict)
        assert [(key, tuple(h.shape)) for key, h in feats.items()] == [
            (key, (B, D, h, h)) for key, (D, h) in expected.items()]
        assert net.bottleneck in feats and net.encode(x, t, y).shape == (B, expected[net.bottleneck][0])


@each_net
@each_classes
def test_features_are_block_outputs(name, classes):
    """Feature maps are the blocks' outputs, without label and time token; asking for them changes nothing."""
    net, log = perturb(build(name, classes), proj=True), []
    expected = net(*inputs(net))
    record(net.blocks, log)
    out, feats = net(*inputs(net), return_features=True)
    assert torch.equal(out, expected)
    if name == "unet":
        del log[ENCODER_BLOCKS[name] - 2]                                 # the first half of mid has no name
    assert len(log) == len(feats)
    for tokens, h in zip(log, feats.values()):
        if name != "unet":                                                # 4x4 patches, row by row, come last
            tokens = torch.stack([tokens[:, i - 16] for i in range(16)], dim=2).view(h.shape)
        assert torch.equal(tokens, h)


@each_net
@each_classes
@pytest.mark.parametrize("self_cond", [False, True])
def test_encode(name, classes, self_cond):
    """encode is the mean over space of the bottleneck's features, and runs no block behind it."""
    net, log = perturb(build(name, classes, self_cond=self_cond), proj=True), []
    _, feats = net(*inputs(net), return_features=True)
    tail = [m for key in ("final", "end", "norm_out", "linear_out") if (m := getattr(net, key, None))]
    for i, m in enumerate([*net.blocks, *tail]):
        m.register_forward_hook(lambda module, args, out, i=i: log.append(i))
    z = net.encode(*inputs(net))
    assert log == list(range(ENCODER_BLOCKS[name])) and tail
    assert z.dtype == torch.float32 and torch.equal(z, feats[net.bottleneck].float().mean((2, 3)))


# --- inputs ---

@each_net
def test_no_class(name):
    """y = None means class num_classes; other classes, and other times, give another output."""
    net = perturb(build(name, 5), proj=True)
    x, t, _ = inputs(net)
    out, z = net(x, t), net.encode(x, t)
    null = torch.full_like(t, 5)
    assert torch.equal(out, net(x, t, null)) and torch.equal(z, net.encode(x, t, null))
    others = [net(x, t, torch.full_like(t, k)) for k in range(5)] + [net(x, (t + 100) % 1000)]
    assert all(error(other, out) > 1e-3 for other in others)


@each_net
def test_labels_without_classes(name):
    """Labels for a network without classes are a ValueError."""
    net = build(name)
    x, t = inputs(net)
    for call in (net, net.encode):
        with pytest.raises(ValueError, match="num_classes=0"):
            call(x, t, torch.zeros_like(t))


@pytest.mark.parametrize("name, kwargs, image_size, fits", [
    ("unet", dict(mults=(1, 2)), 9, 2), ("unet", dict(mults=(1, 2, 2, 2)), 28, 8), ("unet", {}, 0, 2),
    ("uvit", dict(patch=2), 9, 2), ("uvit", dict(patch=4), 30, 4), ("uvit", {}, 0, 2),
    ("dit", dict(patch=2), 9, 2), ("dit", dict(patch=4), 30, 4), ("dit", {}, 0, 2),
])
def test_image_size_that_does_not_fit(name, kwargs, image_size, fits):
    """An image size that does not fit is a ValueError that names it and what fits."""
    with pytest.raises(ValueError, match=rf"size {image_size} .*multiple of {fits}\b"):
        build(name, image_size=image_size, **kwargs)


def test_unet_width_that_does_not_fit():
    """A UNet width that GroupNorm cannot divide is a ValueError that names it and what fits."""
    with pytest.raises(ValueError, match=r"dim 48 .*multiple of 32\b"):
        build("unet", dim=48)


@each_net
@each_classes
def test_images_are_independent(name, classes):
    """No image of a batch sees another one, and the batch size does not matter."""
    net = perturb(build(name, classes), proj=True)
    out = net(*inputs(net))
    for i in range(len(out)):
        assert error(net(*(value[i:i + 1] for value in inputs(net))), out[i:i + 1]) < 1e-5


@each_net
def test_bfloat16(name):
    """Under bfloat16 autocast the output is finite and near float32's, and z stays float32."""
    net = perturb(build(name, 5), proj=True)
    out = net(*inputs(net))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, z = net(*inputs(net)), net.encode(*inputs(net))
    assert half.dtype == torch.bfloat16 and half.isfinite().all() and z.dtype == torch.float32
    assert 0 < error(half.float(), out) < 0.05 * out.abs().max()


# --- the parts, against references ---

@pytest.mark.parametrize("name", NETS)
def test_sinusoid(name):
    """The time embedding is cos | sin of t 10000^(-i / half); in the UNet sin | cos, with half - 1."""
    t, half = torch.tensor([0, 1, 37, 999]), 8
    out = MODULES[name].sinusoid(t, 2 * half)
    assert out.shape == (4, 2 * half) and out.dtype == torch.float32
    for b in range(4):
        for i in range(half):
            angle = t[b].item() * 10000 ** (-i / (half - 1 if name == "unet" else half))
            pair = math.cos(angle), math.sin(angle)
            first, second = pair[::-1] if name == "unet" else pair
            assert abs(out[b, i] - first) < 2e-4 and abs(out[b, half + i] - second) < 2e-4


def test_sincos_table():
    """DiT's position table has, row by row, sin | cos of the column, then sin | cos of the row."""
    table = dit_selfcond.sincos_table(3, 8)
    assert table.shape == (9, 8) and table.dtype == torch.float32
    for row in range(3):
        for column in range(3):
            expected = [f(at * w) for at in (column, row) for f in (math.sin, math.cos) for w in (1, 0.01)]
            assert error(table[3 * row + column], torch.tensor(expected)) < 1e-6


@pytest.mark.parametrize("patch, channels", [(1, 3), (2, 1), (2, 4), (4, 3)])
def test_unpatchify(patch, channels):
    """unpatchify undoes cutting images into patches: rows of patches, in each its rows, channels last."""
    images, side = torch.randn(2, channels, 3 * patch, 3 * patch), 3
    tokens = torch.stack([
        images[:, :, i * patch:(i + 1) * patch, j * patch:(j + 1) * patch].permute(0, 2, 3, 1).reshape(2, -1)
        for i in range(side) for j in range(side)], dim=1)                  # (B, N, p p C)
    assert torch.equal(dit_selfcond.unpatchify(tokens, patch), images)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v for (N, d) each."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    return weights @ v


@torch.no_grad()
@pytest.mark.parametrize("heads, qkv_bias", [(1, True), (2, False), (4, True)])
def test_attention(heads, qkv_bias):
    """The transformers' attention is softmax(q k^T / sqrt(d)) v, head by head."""
    torch.manual_seed(0)
    attention, d = perturb(dit_selfcond.Attention(16, heads, qkv_bias)), 16 // heads
    x = 3 * torch.randn(2, 5, 16)
    out = attention(x)
    for b in range(2):
        qkv = x[b] @ attention.qkv.weight.T + (attention.qkv.bias if qkv_bias else 0)
        q, k, v = qkv[:, :16], qkv[:, 16:32], qkv[:, 32:]
        parts = [attend(*(m[:, h * d:(h + 1) * d] for m in (q, k, v))) for h in range(heads)]
        expected = torch.cat(parts, dim=1) @ attention.out.weight.T + attention.out.bias
        assert error(out[b], expected) < 1e-5


@torch.no_grad()
def test_unet_attention():
    """The UNet's attention is x + out(softmax(q k^T / sqrt(C)) v) over the pixels of the normed map."""
    torch.manual_seed(0)
    attention, x = perturb(unet_selfcond.Attention(64)), 3 * torch.randn(2, 64, 3, 2)
    out = attention(x)
    for b in range(2):
        pixels = attention.norm(x)[b].reshape(64, 6).T
        q, k, v = (pixels @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=1)
        expected = (attend(q, k, v) @ attention.out.weight.T + attention.out.bias).T.reshape(64, 3, 2)
        assert error(out[b], x[b] + expected) < 1e-5


@torch.no_grad()
def test_dit_block():
    """A DiT block is adaLN-Zero: c gives shift, scale, gate of the attention, then the same of the MLP."""
    net = perturb(build("dit"))
    block, x, c = net.blocks[0], torch.randn(2, 5, 32), torch.randn(2, 32)
    m = block.modulation(c * c.sigmoid()).reshape(2, 6, 1, 32)

    def norm(x):
        return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()

    h = x + m[:, 2] * block.attention(norm(x) * (1 + m[:, 1]) + m[:, 0])
    h = h + m[:, 5] * block.mlp(norm(h) * (1 + m[:, 4]) + m[:, 3])
    assert error(block(x, c), h) < 1e-5
    m = net.final.modulation(c * c.sigmoid()).reshape(2, 2, 1, 32)
    assert error(net.final(x, c), net.final.linear(norm(x) * (1 + m[:, 1]) + m[:, 0])) < 1e-5


@torch.no_grad()
def test_uvit_block():
    """A U-ViT decoder block is fuse([x, skip]) + c, then attention and MLP, each on a normed copy, added."""
    net = perturb(build("uvit"))
    block, x, skip, c = net.out_blocks[1], torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(2, 32)

    def norm(x, m):
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * m.weight + m.bias

    h = torch.cat([x, skip], dim=2) @ block.fuse.weight.T + block.fuse.bias + c[:, None]
    h = h + block.attention(norm(h, block.norm1))
    h = h + block.mlp(norm(h, block.norm2))
    assert error(block(x, skip, c), h) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("index, attends", [(0, False), (1, True), (2, True), (3, False)])
def test_unet_block(index, attends):
    """A UNet block is norm, SiLU, conv, + c, norm, SiLU, conv, + input, then attention where it has any."""
    block = perturb(build("unet", mults=(1, 2))).blocks[index]            # in_1, in_2 (32 -> 64), both of mid
    x, c = torch.randn(2, block.conv1.in_channels, 4, 4), torch.randn(2, 128)

    def norm(x, m):
        groups = x.reshape(len(x), 32, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
        x = ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
        return x * m.weight[:, None, None] + m.bias[:, None, None]

    def silu(x):
        return x * x.sigmoid()

    h = block.conv1(silu(norm(x, block.norm1))) + block.embed(silu(c))[:, :, None, None]
    h = block.conv2(silu(norm(h, block.norm2)))
    wider = block.conv1.in_channels != block.conv1.out_channels
    h = h + (nn.functional.conv2d(x, block.shortcut.weight, block.shortcut.bias) if wider else x)
    assert wider == (index == 1) and attends == isinstance(block.attention, unet_selfcond.Attention)
    assert error(block(x, c), block.attention(h) if attends else h) < 1e-5


@torch.no_grad()
def test_unet_upsample():
    """Upsampling repeats every pixel 2x2, then convolves."""
    up, x = unet_selfcond.Upsample(4), torch.randn(2, 4, 3, 3)
    assert error(up(x), up.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_mlp(approximate):
    """The MLP's GELU is x Phi(x), or its tanh approximation."""
    torch.manual_seed(0)
    mlp, x = dit_selfcond.MLP(16, approximate), 3 * torch.randn(2, 5, 16)
    h = mlp.fc1(x)
    phi = {"none": (1 + torch.erf(h / 2 ** 0.5)) / 2,
           "tanh": (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h ** 3))) / 2}[approximate]
    assert error(mlp(x), mlp.fc2(h * phi)) < 1e-6


@each_net
@each_classes
def test_entry_and_exit(name, classes):
    """What enters the first block, and what becomes of the last features, is as published.

    U-ViT: tokens of label, time, patches, plus positions. DiT: patches plus positions. UNet: a convolution.
    In the latter two c is the MLP of the sinusoid of t itself, plus the label's embedding.
    """
    net, log = perturb(build(name, classes), proj=True), []
    record(net.blocks, log, take=lambda args, out: args)
    x, t, *y = inputs(net)
    out, feats = net(x, t, *y, return_features=True)
    last, sinusoid = [*feats.values()][-1], MODULES[name].sinusoid
    label = net.label_embed.weight[y[0]] if classes else 0
    if name == "unet":
        stem, expected = net.conv_in(x), net.end(last)
    else:
        patches, tokens = (h.flatten(2).transpose(1, 2) for h in (net.patch_embed(x), last))
        if name == "uvit":
            first = [label[:, None]] if classes else []
            stem = torch.cat([*first, sinusoid(t, 32)[:, None], patches], dim=1) + net.positions
            expected = net.conv_out(uvit_selfcond.unpatchify(net.linear_out(net.norm_out(tokens)), 2))
        else:
            stem = patches + net.positions
            expected = dit_selfcond.unpatchify(net.final(tokens, log[-1][1]), 2)
    assert error(log[0][0], stem) < 1e-5 and error(out, expected) < 1e-5
    if name != "uvit":
        assert error(log[0][1], net.time_mlp(sinusoid(t, 32 if name == "unet" else 256)) + label) < 1e-5


@each_net
def test_layers_follow_each_other(name):
    """Every layer takes what the one before it made; long skips come back last first."""
    net, log = perturb(build(name, **(dict(mults=(1, 1), blocks=2) if name == "unet" else {})), proj=True), []
    if name == "unet":
        down, up = ([m for level in levels for m in level if not isinstance(m, nn.Identity)]
                    for levels in (net.down, net.up))
        layers = [net.conv_in, *down, *net.mid, *up, net.end]
        sources, sinks = [net.conv_in, *down], [m for m in up if m in net.blocks]
    else:
        layers = [*net.blocks, net.norm_out if name == "uvit" else net.final]
        sources, sinks = (net.in_blocks, net.out_blocks) if name == "uvit" else ([], [])
    record(layers, log, take=lambda args, out: (args, out))
    net(*inputs(net))
    assert len(log) == len(layers)
    for (_, made), (args, _) in zip(log, log[1:]):
        assert torch.equal(args[0], made)
    entered = {m: args for m, (args, _) in zip(layers, log)}
    made = {m: out for m, (_, out) in zip(layers, log)}
    assert len(sources) == len(sinks) == {"unet": 6, "uvit": 2, "dit": 0}[name]
    for source, sink in zip(sources, reversed(sinks)):
        skip = entered[sink][2 if name == "unet" else 1]
        assert torch.equal(skip, made[source])


# --- the three files ---

def test_imports():
    """A network file imports nothing but torch and math."""
    for module in MODULES.values():
        found = set()
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert found == {"torch", "math"}, module.__name__


def test_copies_are_equal():
    """Functions and classes that several files hold are equal there, but for the UNet's own two."""
    sources = {}
    for name, module in MODULES.items():
        for key, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and key not in ("Block", NETS[name].__name__):
                sources.setdefault(key, {})[name] = inspect.getsource(value)
    for key in ("sinusoid", "Attention"):
        assert sources[key].pop("unet") not in sources[key].values()
    copies = {key: files for key, files in sources.items() if len(files) > 1}
    assert {key: set(files) for key, files in copies.items()} == {
        "aggregate": set(NETS), "keep": set(NETS),
        **{key: {"uvit", "dit"} for key in ("sinusoid", "to_map", "unpatchify", "Attention", "MLP")}}
    for key, files in copies.items():
        assert len(set(files.values())) == 1, f"{key} differs between files"


def test_mechanism_is_the_same_lines():
    """Self-conditioning is the same lines in the three files, but for the comments that give shapes."""
    hunks = []
    for module in MODULES.values():
        source = inspect.getsource(module)
        hunk = re.findall(r"# --- self-conditioning.*?\n(.*?)\n\s*# -----", source, re.DOTALL)
        assert len(hunk) == 1, module.__name__
        hunks.append([re.sub(r"\s+#.*", "", line) for line in hunk[0].splitlines()])
    assert hunks[0] == hunks[1] == hunks[2]
    assert "z = aggregate(h)" in hunks[0][0] and any("self.proj(z" in line for line in hunks[0])
