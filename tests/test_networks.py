"""The contract that the three networks share, and small independent references for their parts."""
import ast
import inspect
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dit_selfcond
import train
import unet_selfcond
import uvit_selfcond
from conftest import CPU, config, error, few_shapes
from diffusion import Student, make_projector
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


def each_case(test):
    return each_net(each_classes(test))


class TwoLayers:
    """Of a network's subclass: z is the mean of the encoder's last two layers; keeps what it said last."""

    def aggregate(self, feats):
        z = torch.stack([h.float().mean((2, 3)) for h in [*feats.values()][-2:]]).mean(0)
        self.said = z.detach()
        return z


PATCHED = {name: type(f"TwoLayer{net.__name__}", (TwoLayers, net), {}) for name, net in NETS.items()}


def build(name, num_classes=0, nets=NETS, **kwargs):
    """A small network for 8x8 images in eval mode, always from the same seed."""
    torch.manual_seed(0)
    return nets[name](**{**SMALL[name], "image_size": 8, "num_classes": num_classes, **kwargs}).eval()


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


def watch(*modules):
    """-> a list that gets (module, args, out) whenever one of the modules is called."""
    log = []
    for module in modules:
        module.register_forward_hook(lambda *call: log.append(call))
    return log


def normed(x, dims, eps):
    """x with mean 0 and variance 1 over dims."""
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def silu(x):
    return x * x.sigmoid()


# --- the published sizes ---

@pytest.mark.pins
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


@pytest.mark.pins
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

@each_case
def test_initialisation(name, classes):
    """proj starts at zero, comes on top of an unchanged baseline, and is not there when self_cond is off."""
    on, off = (build(name, classes, self_cond=self_cond).state_dict() for self_cond in (True, False))
    assert not on["proj.1.weight"].any() and not on["proj.1.bias"].any()
    assert not any(key.startswith("proj") for key in off) and off.keys() < on.keys()
    assert all(torch.equal(on[key], off[key]) for key in off)


@pytest.mark.pins
@pytest.mark.parametrize("name", NETS)
def test_proj_is_all_that_is_added(name):
    """Self-conditioning adds a linear layer, behind all others, and nothing else."""
    on, off = (list(build(name, self_cond=self_cond).state_dict()) for self_cond in (True, False))
    assert on == [*off, "proj.1.weight", "proj.1.bias"]


def test_fresh_transformers():
    """A fresh DiT is the identity, block by block, and 0 at the end; a fresh U-ViT ends with the identity."""
    net = build("dit")
    for m in [block.modulation for block in net.blocks] + [net.final.modulation, net.final.linear]:
        assert not m.weight.any() and not m.bias.any()
    out, feats = net(*inputs(net), return_features=True)
    assert not out.any() and all(torch.equal(h, feats["block_1"]) for h in feats.values())
    net = build("uvit")
    x = inputs(net)[0]
    assert error(net.conv_out(x), x) < 1e-6


# --- self-conditioning ---

@each_case
def test_off_equals_on_while_proj_is_zero(name, classes):
    """With proj zero the output is the baseline's exactly; else it differs and its gradient reaches z."""
    on, off, seen = perturb(build(name, classes)), build(name, classes, self_cond=False), []
    off.load_state_dict({key: value for key, value in on.state_dict().items() if key in off.state_dict()})
    baseline = off(*inputs(on))
    assert torch.equal(on(*inputs(on)), baseline)
    assert torch.equal(on(*inputs(on)[:2]), off(*inputs(on)[:2]))

    def aggregate(feats, original=on.aggregate):
        seen.append(original(feats))
        seen[-1].retain_grad()
        return seen[-1]

    on.aggregate = aggregate
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


@each_case
def test_reroutes_to_all_later_layers(name, classes):
    """Every layer behind the bottleneck is conditioned on c + proj(z), no other one is."""
    net = perturb(build(name, classes), proj=True)
    layers = [*net.blocks, *([net.final] if name == "dit" else [])]
    log, split = watch(*layers), ENCODER_BLOCKS[name]
    z = net.encode(*inputs(net))
    del log[:]
    net(*inputs(net))
    assert [m for m, _, _ in log] == layers and len(layers) > split
    given = [args[-1 if name == "uvit" else 1] for _, args, _ in log]
    rerouted = F.layer_norm(z, z.shape[1:]) @ net.proj[1].weight.T + net.proj[1].bias
    assert rerouted.abs().max() > 0.1
    before = torch.zeros_like(rerouted) if name == "uvit" else given[0]      # its encoder has tokens instead
    if name != "uvit":
        assert all(torch.equal(c, before) for c in given[:split])
    assert all(error(c, before + rerouted) < 1e-5 for c in given[split:])


@each_case
def test_changes_only_later_features(name, classes):
    """proj changes all features behind the encoder's and none of those; encode runs no layer behind them."""
    net = perturb(build(name, classes))
    _, zero = net(*inputs(net), return_features=True)
    perturb(net.proj, proj=True)
    _, feats = net(*inputs(net), return_features=True)
    *_, encoded = net.encoder(*inputs(net))
    same = [torch.equal(feats[key], zero[key]) for key in feats]
    assert same == len(encoded) * [True] + (len(feats) - len(encoded)) * [False] and len(encoded) < len(feats)
    later = [net.proj, *net.blocks[ENCODER_BLOCKS[name]:]]
    tails = "final", "end", "norm_out", "linear_out", "conv_out"
    later += [getattr(net, key) for key in tails if hasattr(net, key)]
    log = watch(*net.modules())
    assert torch.equal(net.encode(*inputs(net)), net.aggregate(encoded))
    assert log and not {m for m, _, _ in log} & {*later}


@pytest.mark.pins
@each_case
@pytest.mark.parametrize("self_cond", [False, True])
def test_z_is_the_mean(name, classes, self_cond):
    """z is the mean over space of mid's features, in the DiT of block depth / 2's; float32 under autocast."""
    net = perturb(build(name, classes, self_cond=self_cond), proj=True)
    _, feats = net(*inputs(net), return_features=True)
    z = net.encode(*inputs(net))
    expected = feats["block_2" if name == "dit" else "mid"].mean((2, 3))
    assert z.dtype == torch.float32 and torch.equal(z, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net.encode(*inputs(net)).dtype == torch.float32


@each_case
def test_all_follow_aggregate(name, classes):
    """With another aggregate, encode, forward, return_z and the distillation's Student all have its z."""
    net = perturb(build(name, classes, PATCHED), proj=True)
    x, t, *y = inputs(net)
    eps, feats = net(x, t, *y, return_features=True)
    *_, encoded = net.encoder(x, t, *y)
    expected = sum(h.mean((2, 3)) for h in [*encoded.values()][-2:]) / 2
    assert error(expected, feats[net.bottleneck].mean((2, 3))) > 1e-2
    log = watch(net.proj)
    again, z = net(x, t, *y, return_z=True)
    assert torch.equal(again, eps) and error(z, expected) < 1e-6
    assert torch.equal(log[0][1][0], z) and torch.equal(net.encode(x, t, *y), z)
    net.projector = make_projector(net)
    again, p = Student(net)(x, t, *y)
    assert torch.equal(again, eps) and torch.equal(p, net.projector(z))


@each_net
def test_training_follows_aggregate(name, monkeypatch):
    """With another aggregate, a step of --distill projects its z: the student's, and the EMA teacher's."""
    few_shapes(monkeypatch)
    monkeypatch.setitem(train.MODELS, name, PATCHED[name])
    cfg = config(f"--model {name} --distill 0.1")
    run = train.prepare(cfg, train.load_data(cfg.data, "train", cfg.image_size), CPU)
    log = watch(run.net.projector, run.ema.projector)
    train.train_step(run, 0)
    given = {m: args[0] for m, args, _ in log}
    assert len(log) == len(given) == 2
    for net in (run.net, run.ema):
        assert torch.equal(given[net.projector], net.said) and len(net.said) == cfg.batch_size


# --- features ---

@pytest.mark.parametrize("image_size", [8, 16])
@pytest.mark.parametrize("mults", [(1,), (1, 2), (1, 2, 2), (1, 3, 2, 1)])
@pytest.mark.parametrize("blocks, channels, classes", [(1, 1, 0), (2, 3, 5), (3, 4, 0)])
def test_unet_features(image_size, mults, blocks, channels, classes):
    """The UNet's feature maps have their names, order and shapes at any depth."""
    levels = [(32 * m, image_size >> i) for i, m in enumerate(mults)]        # (D, h)
    down = [level for level in levels for _ in range(blocks)]
    up = [level for level in reversed(levels) for _ in range(blocks + 1)]
    expected = {f"in_{n}": level for n, level in enumerate(down, 1)}
    expected["mid"] = levels[-1]
    expected |= {f"out_{n}": level for n, level in enumerate(up, 1)}
    with torch.device("meta"):
        net = UNet(image_size, channels, classes, dim=32, mults=mults, attention=(1,), blocks=blocks)
    check_features(net, expected, len(down) + 1)


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
    check_features(net, {key: (32, image_size // patch) for key in names}, len(half) + (name == "uvit"))


def check_features(net, expected, encoded, B=2):
    """expected: name -> (D, h) of all features, in order; so many of them are the encoder's, up to z."""
    shapes = [(key, (B, D, h, h)) for key, (D, h) in expected.items()]
    x = torch.empty(B, net.channels, net.image_size, net.image_size, device="meta")
    t = torch.empty(B, dtype=torch.int64, device="meta")
    for y in [None, t] if net.num_classes else [None]:
        out, feats = net(x, t, y, return_features=True)
        *_, early = net.encoder(x, t, y)
        assert out.shape == x.shape and [(key, tuple(h.shape)) for key, h in feats.items()] == shapes
        assert [(key, tuple(h.shape)) for key, h in early.items()] == shapes[:encoded]
        assert len(net.encode(x, t, y)) == B


@each_case
def test_features_are_block_outputs(name, classes):
    """Feature maps are the blocks' outputs, without label and time token; asking for them changes nothing."""
    net = perturb(build(name, classes), proj=True)
    expected, log = net(*inputs(net)), watch(*net.blocks)
    out, feats = net(*inputs(net), return_features=True)
    assert torch.equal(out, expected)
    made = [tokens for _, _, tokens in log]
    if name == "unet":
        del made[ENCODER_BLOCKS[name] - 2]                  # the first half of mid has no name
    assert len(made) == len(feats)
    for tokens, h in zip(made, feats.values()):
        if name != "unet":                                  # 4x4 patches, row by row, come last
            tokens = torch.stack([tokens[:, i - 16] for i in range(16)], dim=2).view(h.shape)
        assert torch.equal(tokens, h)


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


@pytest.mark.parametrize("name, kwargs, words", [
    ("unet", dict(image_size=9), r"size 9 .*multiple of 2\b"),
    ("unet", dict(image_size=28, mults=(1, 2, 2, 2)), r"size 28 .*multiple of 8\b"),
    ("unet", dict(dim=48), r"dim 48 .*multiple of 32\b"),
    *[(name, *refusal) for name in ("uvit", "dit") for refusal in [
        (dict(image_size=9), r"size 9 .*multiple of 2\b"),
        (dict(image_size=30, patch=4), r"size 30 .*multiple of 4\b"),
        (dict(heads=3), r"heads 3\b.*multiple of heads\b"),
        (dict(depth=1), r"depth 1\b.* (even depth|2 blocks)")]],
    *[(name, dict(image_size=0), r"size 0 .*multiple of 2\b") for name in NETS],
])
def test_sizes_that_do_not_fit(name, kwargs, words):
    """A size that does not fit is a ValueError that names it and what fits."""
    with pytest.raises(ValueError, match=words):
        build(name, **kwargs)


@each_net
def test_labels_without_classes(name):
    """Labels for a network without classes are a ValueError."""
    net = build(name)
    for call in (net, net.encode):
        with pytest.raises(ValueError, match="num_classes=0"):
            call(*inputs(net), torch.zeros(3, dtype=torch.int64))


@each_case
def test_images_are_independent(name, classes):
    """No image of a batch sees another one, and the batch size does not matter."""
    net = perturb(build(name, classes), proj=True)
    out = net(*inputs(net))
    for i in range(len(out)):
        assert error(net(*(value[i:i + 1] for value in inputs(net))), out[i:i + 1]) < 1e-5


@each_net
def test_bfloat16(name):
    """Under bfloat16 autocast output and z are finite and near float32's."""
    net = perturb(build(name, 5), proj=True)
    full = net(*inputs(net), return_z=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(*inputs(net), return_z=True)
    assert half[0].dtype == torch.bfloat16
    for a, b in zip(half, full):
        assert a.isfinite().all() and 0 < error(a, b) < 0.05 * b.abs().max()


# --- the parts, against references ---

@each_net
def test_sinusoid(name):
    """The time embedding is cos | sin of t 10000^(-i / half); in the UNet sin | cos, with half - 1."""
    t, n = torch.tensor([0, 1, 37, 999]), 7 if name == "unet" else 8
    order = (math.sin, math.cos) if name == "unet" else (math.cos, math.sin)
    expected = [[f(at * 10000 ** (-i / n)) for f in order for i in range(8)] for at in t.tolist()]
    out = MODULES[name].sinusoid(t, 16)
    assert out.dtype == torch.float32 and error(out, expected) < 2e-4


def test_position_table():
    """DiT's position table: row by row, sin | cos of column, then of row; neither trained nor saved."""
    table = dit_selfcond.sincos_table(3, 8)
    assert table.dtype == torch.float32
    expected = [[f(at * w) for at in (column, row) for f in (math.sin, math.cos) for w in (1, 0.01)]
                for row in range(3) for column in range(3)]
    assert error(table, expected) < 1e-6
    net = build("dit")
    assert "positions" in dict(net.named_buffers())
    assert not any("positions" in key for key in [*net.state_dict(), *dict(net.named_parameters())])


@pytest.mark.parametrize("patch, channels", [(1, 3), (2, 1), (2, 4), (4, 3)])
def test_unpatchify(patch, channels):
    """unpatchify undoes cutting images into patches: rows of patches, in each its rows, channels last."""
    images, side = torch.randn(2, channels, 3 * patch, 3 * patch), 3
    tokens = torch.stack([
        images[:, :, i * patch:(i + 1) * patch, j * patch:(j + 1) * patch].permute(0, 2, 3, 1).reshape(2, -1)
        for i in range(side) for j in range(side)], dim=1)                   # (B, N, p p C)
    assert torch.equal(dit_selfcond.unpatchify(tokens, patch), images)


def attend(attention, x, heads):
    """out(softmax(q k^T / sqrt(d)) v), head by head, of x (N, D)."""
    qkv = attention.qkv(x).chunk(3, dim=1)
    parts = []
    for q, k, v in zip(*(m.chunk(heads, dim=1) for m in qkv)):
        scores = (q @ k.T / math.sqrt(q.shape[1])).exp()
        parts.append(scores / scores.sum(dim=1, keepdim=True) @ v)
    return attention.out(torch.cat(parts, dim=1))


@pytest.mark.parametrize("heads, qkv_bias", [(1, True), (2, False), (4, True)])
def test_attention(heads, qkv_bias):
    """Attention is softmax(q k^T / sqrt(d)) v, head by head; the UNet's is of normed pixels, added to x."""
    torch.manual_seed(0)
    attention, x = perturb(dit_selfcond.Attention(16, heads, qkv_bias)), 3 * torch.randn(2, 5, 16)
    assert (attention.qkv.bias is not None) == qkv_bias
    assert error(attention(x), torch.stack([attend(attention, tokens, heads) for tokens in x])) < 1e-5
    attention, x = perturb(unet_selfcond.Attention(64)), 3 * torch.randn(2, 64, 3, 2)
    expected = [attend(attention, h.reshape(64, 6).T, 1).T.reshape(64, 3, 2) for h in attention.norm(x)]
    assert error(attention(x), x + torch.stack(expected)) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm(layout):
    """group_norm, the UNet's on CUDA, is nn.GroupNorm with its gradients; bfloat16 is rounded at the end."""
    torch.manual_seed(0)
    weights = torch.randn(2, 12).unbind()
    x = (3 * torch.randn(2, 12, 5, 5) + 2).to(memory_format=layout)
    for dtype, x in ((torch.float32, x), (torch.bfloat16, (x + 50).bfloat16())):
        leaves = [value.detach().requires_grad_() for value in (x, *weights)]
        out = unet_selfcond.group_norm(leaves[0], 4, *leaves[1:], 1e-5)
        exact = F.group_norm(leaves[0].double(), 4, *(w.double() for w in leaves[1:]), 1e-5)
        rounding = exact.abs() * (2 ** -8 if dtype == torch.bfloat16 else 0)
        assert out.dtype == dtype and ((out - exact).abs() <= rounding + 1e-5).all()
        if dtype == torch.float32:
            ours, theirs = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, exact))
            assert all(error(a, b) < 2e-5 * b.abs().max() for a, b in zip(ours, theirs))
    flat = torch.full((2, 12, 32, 32), 300.3)                                # of variance 0, but for rounding
    assert unet_selfcond.group_norm(flat, 4, *weights, 1e-5).isfinite().all()


def test_group_norm_is_for_cuda(monkeypatch):
    """The UNet's norms all call group_norm on CUDA, with what they are, and torch's own elsewhere."""
    norms = [m for m in build("unet").modules() if isinstance(m, nn.GroupNorm)]
    monkeypatch.setattr(unet_selfcond, "group_norm", lambda *args: args)
    for norm in norms:
        x = SimpleNamespace(device=torch.device("cuda"))
        assert norm(x) == (x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        x = torch.randn(2, norm.num_channels, 3, 3)
        assert torch.equal(norm(x), F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


def test_dit_block():
    """A DiT block is adaLN-Zero: c gives shift, scale, gate of the attention, then the same of the MLP."""
    net = perturb(build("dit"))
    block, x, c = net.blocks[0], torch.randn(2, 5, 32), torch.randn(2, 32)
    m = block.modulation(silu(c)).reshape(2, 6, 1, 32)
    h = x + m[:, 2] * block.attention(normed(x, 2, 1e-6) * (1 + m[:, 1]) + m[:, 0])
    h = h + m[:, 5] * block.mlp(normed(h, 2, 1e-6) * (1 + m[:, 4]) + m[:, 3])
    assert error(block(x, c), h) < 1e-5
    m = net.final.modulation(silu(c)).reshape(2, 2, 1, 32)
    assert error(net.final(x, c), net.final.linear(normed(x, 2, 1e-6) * (1 + m[:, 1]) + m[:, 0])) < 1e-5


def test_uvit_block():
    """A U-ViT decoder block is fuse([x, skip]) + c, then attention and MLP, each on a normed copy, added."""
    block = perturb(build("uvit")).out_blocks[1]
    x, skip, c = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    h = torch.cat([x, skip], dim=2) @ block.fuse.weight.T + block.fuse.bias + c[:, None]
    h = h + block.attention(normed(h, 2, 1e-5) * block.norm1.weight + block.norm1.bias)
    h = h + block.mlp(normed(h, 2, 1e-5) * block.norm2.weight + block.norm2.bias)
    assert error(block(x, skip, c), h) < 1e-5


@pytest.mark.parametrize("index, attends", [(0, False), (1, True), (2, True), (3, False)])
def test_unet_block(index, attends):
    """A UNet block is norm, SiLU, conv, + c, norm, SiLU, conv, + input, then attention where it has any."""
    block = perturb(build("unet", mults=(1, 2))).blocks[index]   # in_1, in_2 (32 -> 64), both of mid
    x, c = torch.randn(2, block.conv1.in_channels, 4, 4), torch.randn(2, 128)

    def norm(x, m):
        groups = normed(x.reshape(len(x), 32, -1), 2, 1e-5)
        return groups.reshape(x.shape) * m.weight[:, None, None] + m.bias[:, None, None]

    h = block.conv1(silu(norm(x, block.norm1))) + block.embed(silu(c))[:, :, None, None]
    h = block.conv2(silu(norm(h, block.norm2)))
    wider = block.conv1.in_channels != block.conv1.out_channels
    h = h + (F.conv2d(x, block.shortcut.weight, block.shortcut.bias) if wider else x)
    assert wider == (index == 1) and attends == isinstance(block.attention, unet_selfcond.Attention)
    assert error(block(x, c), block.attention(h) if attends else h) < 1e-5


def test_unet_upsample():
    """Upsampling repeats every pixel 2x2, then convolves."""
    up, x = unet_selfcond.Upsample(4), torch.randn(2, 4, 3, 3)
    assert error(up(x), up.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))) < 1e-6


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_mlp(approximate):
    """The MLP's GELU is x Phi(x), or its tanh approximation."""
    torch.manual_seed(0)
    mlp, x = dit_selfcond.MLP(16, approximate), 3 * torch.randn(2, 5, 16)
    h = mlp.fc1(x)
    phi = {"none": (1 + torch.erf(h / 2 ** 0.5)) / 2,
           "tanh": (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h ** 3))) / 2}[approximate]
    assert error(mlp(x), mlp.fc2(h * phi)) < 1e-6


@each_case
def test_entry_and_exit(name, classes):
    """What enters the first block, and what becomes of the last features, is as published.

    U-ViT: tokens of label, time, patches, plus positions. DiT: patches plus positions. UNet: a convolution.
    In the latter two c is the MLP of the sinusoid of t itself, plus the label's embedding.
    """
    net = perturb(build(name, classes), proj=True)
    log = watch(*net.blocks)
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
            expected = dit_selfcond.unpatchify(net.final(tokens, log[-1][1][1]), 2)
    (_, args, _), *_ = log
    assert error(args[0], stem) < 1e-5 and error(out, expected) < 1e-5
    if name != "uvit":
        assert error(args[1], net.time_mlp(sinusoid(t, 32 if name == "unet" else 256)) + label) < 1e-5


@each_net
def test_layers_follow_each_other(name):
    """Every layer takes what the one before it made; long skips come back last first."""
    net = perturb(build(name, **(dict(mults=(1, 1), blocks=2) if name == "unet" else {})), proj=True)
    if name == "unet":
        down, up = ([m for level in levels for m in level if not isinstance(m, nn.Identity)]
                    for levels in (net.down, net.up))
        layers = [net.conv_in, *down, *net.mid, *up, net.end]
        sources, sinks = [net.conv_in, *down], [m for m in up if m in net.blocks]
    else:
        layers = [*net.blocks, net.norm_out if name == "uvit" else net.final]
        sources, sinks = (net.in_blocks, net.out_blocks) if name == "uvit" else ([], [])
    log = watch(*layers)
    net(*inputs(net))
    assert [m for m, _, _ in log] == layers
    for (_, _, made), (_, args, _) in zip(log, log[1:]):
        assert torch.equal(args[0], made)
    entered = {m: args for m, args, _ in log}
    made = {m: out for m, _, out in log}
    assert len(sources) == len(sinks) == {"unet": 6, "uvit": 2, "dit": 0}[name]
    for source, sink in zip(sources, reversed(sinks)):
        assert torch.equal(entered[sink][2 if name == "unet" else 1], made[source])


# --- the three files ---

def test_imports():
    """A network file imports nothing but torch and math."""
    for module in MODULES.values():
        nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        assert {name.split(".")[0] for name in names} == {"torch", "math"}, module.__name__


@pytest.mark.pins
def test_copies_are_equal():
    """Functions and classes that several files hold are equal there, but for the UNet's own two."""
    sources = {key: {name: inspect.getsource(getattr(net, key)) for name, net in NETS.items()}
               for key in ("aggregate", "encode")}
    for name, module in MODULES.items():
        for key, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and key not in ("Block", NETS[name].__name__):
                sources.setdefault(key, {})[name] = inspect.getsource(value)
    for key in ("sinusoid", "Attention"):
        assert sources[key].pop("unet") not in sources[key].values()
    copies = {key: files for key, files in sources.items() if len(files) > 1}
    assert {key: set(files) for key, files in copies.items()} == {
        "aggregate": set(NETS), "encode": set(NETS),
        **{key: {"uvit", "dit"} for key in ("sinusoid", "to_map", "unpatchify", "Attention", "MLP")}}
    for key, files in copies.items():
        assert len(set(files.values())) == 1, f"{key} differs between files"


@pytest.mark.pins
def test_mechanism_is_the_same_lines():
    """Self-conditioning is the same lines in the three files, but for the comments that give shapes."""
    hunks = []
    for module in MODULES.values():
        source = inspect.getsource(module)
        hunk = re.findall(r"# --- self-conditioning.*?\n(.*?)\n\s*# -----", source, re.DOTALL)
        assert len(hunk) == 1, module.__name__
        hunks.append([re.sub(r"\s+#.*", "", line) for line in hunk[0].splitlines()])
    assert hunks[0] == hunks[1] == hunks[2]
    assert "z = self.aggregate(feats)" in hunks[0][0] and any("self.proj(z" in line for line in hunks[0])
