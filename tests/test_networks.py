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

import diffusion
import dit_selfcond
import train
import unet_selfcond
import uvit_selfcond
from conftest import CPU, config, error, few_shapes

MODULES = {"unet": unet_selfcond, "uvit": uvit_selfcond, "dit": dit_selfcond}
NETS = {"unet": unet_selfcond.UNet, "uvit": uvit_selfcond.UViT, "dit": dit_selfcond.DiT}
SMALL = {
    "unet": dict(dim=32, mults=(1, 2), attention=(1,), blocks=1, dropout=0.0),
    "uvit": dict(dim=32, depth=4, heads=2, patch=2),
    "dit": dict(dim=32, depth=4, heads=2, patch=2),
}

each_net = pytest.mark.parametrize("name", NETS)


def each_case(test):
    return each_net(pytest.mark.parametrize("classes", [0, 5])(test))


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
def perturb(net):
    """Noise on every parameter, so that no zero gate hides a mistake."""
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
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


# --- the published sizes ---

@pytest.mark.pins
@pytest.mark.parametrize("name, size, kwargs, count", [
    ("unet", "base", {}, 35_746_307),
    ("uvit", "small", {}, 44_255_328),
    ("uvit", "small-4", {}, 44_193_924),
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


@pytest.mark.parametrize("name, size", train.DEFAULT_SIZE.items())
def test_default_size(name, size):
    """A network of which no size is said is the same one in Python as on the command line."""
    net = train.MODELS[name]
    defaults = {key: p.default for key, p in inspect.signature(net.__init__).parameters.items()}
    assert defaults.items() >= net.SIZES[size].items()


@pytest.mark.pins
@pytest.mark.parametrize("name, size, expected", [
    ("unet", "base", {(32, 1e-5, True), (8, 1e-5, True), (0.1,)}),
    ("uvit", "small", {(1e-5, True), ("none",), (8,)}),
    ("dit", "small", {(1e-6, False), ("tanh",), (6,)}),
])
def test_published_constants(name, size, expected):
    """What no parameter count shows is as published: groups, epsilons, affine norms, dropout, GELU, heads."""
    keys = "num_groups", "eps", "affine", "elementwise_affine", "p", "approximate", "heads"
    with torch.device("meta"):
        net, found = NETS[name](self_cond=False, **NETS[name].SIZES[size]), set()
    for m in net.modules():
        found.add(tuple(getattr(m, key) for key in keys if hasattr(m, key)))
    assert found - {()} == expected


# --- initialisation ---

@each_case
def test_on_starts_as_off(name, classes):
    """proj starts at zero, on top of an unchanged baseline and with its output; z has a gradient."""
    on, off = (build(name, classes, self_cond=self_cond) for self_cond in (True, False))
    weights = on.state_dict()
    assert not weights["proj.1.weight"].any() and not weights["proj.1.bias"].any()
    assert not hasattr(off, "proj")
    assert all(torch.equal(weights[key], value) for key, value in off.state_dict().items())
    on.load_state_dict(perturb(off).state_dict(), strict=False)
    log = watch(on.proj)
    assert torch.equal(on(*inputs(on)), off(*inputs(on)))
    [(_, [z], _)] = log
    assert z.requires_grad


@pytest.mark.pins
@each_net
def test_proj_is_all_that_is_added(name):
    """Self-conditioning adds a linear layer, behind all others, and a fixed table; nothing else."""
    on, off = (build(name, self_cond=self_cond) for self_cond in (True, False))
    learned = [key for key, _ in off.named_parameters()]
    assert [key for key, _ in on.named_parameters()] == [*learned, "proj.1.weight", "proj.1.bias"]
    assert on.state_dict().keys() - off.state_dict().keys() == {"proj.1.weight", "proj.1.bias", "abar"}


def test_fresh_transformers():
    """A fresh DiT is the identity, block by block, then 0; a U-ViT has small weights, then the identity.

    The DiT's embeddings of time and label have small weights, too.
    """
    net = build("dit", 10)
    for m in (net.time_mlp[0], net.time_mlp[2], net.label_embed):
        assert 0.015 < m.weight.std() < 0.025
    for m in [block.modulation for block in net.blocks] + [net.final.modulation, net.final.linear]:
        assert not m.weight.any() and not m.bias.any()
    out, feats = net(*inputs(net), return_features=True)
    assert not out.any() and all(torch.equal(h, feats["block_1"]) for h in feats.values())
    net = build("uvit")
    x = inputs(net)[0]
    assert error(net.conv_out(x), x) < 1e-6
    for weight in [net.positions, *(m.weight for m in net.modules() if isinstance(m, nn.Linear))]:
        assert weight is net.proj[1].weight or 0.015 < weight.std() < 0.025


@pytest.mark.parametrize("name, steps", [("unet", 1), ("uvit", 1), ("dit", 4)])
def test_proj_leaves_zero(name, steps):
    """Training moves proj off zero: at once in UNet and UViT, within 4 steps behind DiT's zero gates."""
    net = build(name)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        (net(*inputs(net)) - inputs(net)[0]).square().mean().backward()
        optimiser.step()
    assert net.proj[1].weight.abs().max() > 1e-4


# --- the whole network, against a second forward pass ---

def unet_pass(net, x, t, label, rerouted):
    c = net.time_mlp(unet_selfcond.sinusoid(t, net.dim)) + label
    h = net.conv_in(x)
    made, skips = [], [h]
    for *blocks, downsample in net.down:
        for block in blocks:
            h = block(h, c)
            made.append(h)
            skips.append(h)
        h = downsample(h)
        skips.append(h)
    skips.pop()                                             # the last level does not downsample
    h = net.mid[1](net.mid[0](h, c), c)
    made.append(h)
    for *blocks, upsample in net.up:
        for block in blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), c + rerouted)
            made.append(h)
        h = upsample(h)
    return net.end(h), made


def uvit_pass(net, x, t, label, rerouted):
    tokens = [uvit_selfcond.sinusoid(t, net.dim)[:, None], net.patch_embed(x).flatten(2).transpose(1, 2)]
    if net.num_classes:
        tokens.insert(0, label[:, None])
    h = torch.cat(tokens, dim=1) + net.positions
    made = []
    for block in [*net.in_blocks, net.mid_block]:
        h = block(h)
        made.append(h)
    for block, skip in zip(net.out_blocks, made[-2::-1]):
        h = block(h, skip, rerouted)
        made.append(h)
    pixels = net.linear_out(net.norm_out(h))[:, len(tokens) - 1:]
    return net.conv_out(uvit_selfcond.unpatchify(pixels, net.patch)), made


def dit_pass(net, x, t, label, rerouted):
    c = net.time_mlp(dit_selfcond.sinusoid(t, 256)) + label
    h = net.patch_embed(x).flatten(2).transpose(1, 2) + net.positions
    made = []
    for block in net.blocks:
        if len(made) == len(net.blocks) // 2:
            c = c + rerouted
        h = block(h, c)
        made.append(h)
    return dit_selfcond.unpatchify(net.final(h, c), net.patch), made


PASSES = {"unet": unet_pass, "uvit": uvit_pass, "dit": dit_pass}


@pytest.mark.parametrize("name, kwargs, early, late, D, h", [
    ("unet", {}, 3, 4, 64, 4),
    ("unet", dict(num_classes=5), 3, 4, 64, 4),
    ("unet", dict(channels=1, mults=(1,), blocks=3), 4, 4, 32, 8),
    ("unet", dict(image_size=16, channels=4, mults=(1, 3, 1, 2), blocks=2), 9, 12, 64, 2),
    ("uvit", {}, 3, 2, 32, 4),
    ("uvit", dict(num_classes=5, depth=2, patch=1), 2, 1, 32, 8),
    ("uvit", dict(image_size=24, channels=4, depth=6, patch=8), 4, 3, 32, 3),
    ("dit", {}, 2, 2, 32, 4),
    ("dit", dict(num_classes=5, depth=2, patch=1), 1, 1, 32, 8),
    ("dit", dict(image_size=24, channels=4, depth=6, patch=8), 3, 3, 32, 3),
])
def test_forward(name, kwargs, early, late, D, h):
    """Output and features are those of the pass above, with abar proj(z) in all layers behind z.

    early, late: how many features up to z and behind it; D, h: width and side of the one that z is of.
    """
    net = perturb(build(name, **kwargs))
    net.abar.copy_(torch.linspace(1, 0, 1001))
    x, t, *y = inputs(net)
    label = net.label_embed.weight[y[0]] if y else 0
    z = net.encode(x, t, *y)
    rerouted = F.layer_norm(z, [D]) @ net.proj[1].weight.T + net.proj[1].bias
    rerouted = (1 - t.long() / 1000)[:, None] * rerouted
    expected, made = PASSES[name](net, x, t, label, rerouted)
    if name != "unet":                                      # the patches, row by row, come last
        made = [tokens[:, -h * h:].transpose(1, 2).unflatten(2, (h, h)) for tokens in made]
    names = [f"in_{n}" for n in range(1, early)] + ["mid"] + [f"out_{n}" for n in range(1, late + 1)]
    if name == "dit":
        names = [f"block_{n}" for n in range(1, early + late + 1)]
    out, feats = net(x, t, *y, return_features=True)
    assert out.shape == x.shape and error(out, expected) < 1e-5
    assert torch.equal(out, net(x, t, *y)), "asking for features changes nothing"
    assert [*feats] == names and error(feats, dict(zip(names, made))) < 1e-5
    assert feats[net.bottleneck].shape == (3, D, h, h)
    *_, encoded = net.encoder(x, t, *y)
    assert [*encoded] == names[:early]


@each_net
def test_encode_stops_early(name):
    """encode runs no layer behind z."""
    net = build(name)
    blocks = [m for m in net.modules() if isinstance(m, MODULES[name].Block)]
    log = watch(*blocks, net.proj)
    net.encode(*inputs(net))
    n = {"unet": 4, "uvit": 3, "dit": 2}[name]
    assert [m for m, _, _ in log] == blocks[:n]


# --- z ---

@pytest.mark.pins
@each_net
@pytest.mark.parametrize("self_cond", [False, True])
def test_z_is_the_mean(name, self_cond):
    """z is the mean over space of mid's features, in the DiT of block depth / 2's."""
    net = perturb(build(name, self_cond=self_cond))
    _, feats = net(*inputs(net), return_features=True)
    expected = feats["block_2" if name == "dit" else "mid"].mean((2, 3))
    assert torch.equal(net.encode(*inputs(net)), expected)


@each_case
def test_all_follow_aggregate(name, classes):
    """With another aggregate, encode, forward and return_z all have its z; eps is the same with return_z."""
    net = perturb(build(name, classes, PATCHED))
    x, t, *y = inputs(net)
    log = watch(net.proj)
    eps, z = net(x, t, *y, return_z=True)
    *_, encoded = net.encoder(x, t, *y)
    assert error(z, sum(h.mean((2, 3)) for h in [*encoded.values()][-2:]) / 2) < 1e-6
    assert torch.equal(log[0][1][0], z) and torch.equal(net.encode(x, t, *y), z)
    assert torch.equal(net(x, t, *y), eps)


@each_net
def test_training_follows_aggregate(name, monkeypatch):
    """With another aggregate, a step of --distill projects its z: the student's, and the EMA teacher's."""
    few_shapes(monkeypatch)
    monkeypatch.setitem(train.MODELS, name, PATCHED[name])
    cfg = config(f"--model {name} --distill 0.1")
    run = train.Run(cfg, train.load_data(cfg.data, "train", cfg.image_size), CPU)
    log = watch(run.net.projector, run.ema.projector)
    train.train_step(run)
    given = {m: args[0] for m, args, _ in log}
    assert len(log) == len(given) == 2
    for net in (run.net, run.ema):
        assert torch.equal(given[net.projector], net.said) and len(net.said) == cfg.batch_size


# --- inputs ---

@each_net
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_no_class(name, dtype):
    """y = None means class num_classes, whatever the type of t."""
    net = perturb(build(name, 5))
    x, t, _ = inputs(net)
    null = torch.full_like(t, 5)
    for call in (net, net.encode):
        assert torch.equal(call(x, t.to(dtype)), call(x, t, null))


@each_case
def test_times_between(name, classes):
    """t may be float32: a whole number is what it is as an int64, and between two there are others."""
    net = perturb(build(name, classes))
    x, t, *y = inputs(net)
    for call in (net, net.encode):
        here, there, between = (call(x, at, *y) for at in (t, t + 1, t + 0.5))
        assert torch.equal(call(x, t.float(), *y), here)
        assert all((between - other).flatten(1).abs().amax(1).min() > 1e-3 for other in (here, there))


@pytest.mark.parametrize("name, kwargs, words", [
    ("unet", dict(image_size=9), r"size 9 .*multiple of 2\b"),
    ("unet", dict(image_size=28, mults=(1, 2, 2, 2)), r"size 28 .*multiple of 8\b"),
    ("unet", dict(dim=48), r"dim 48 .*multiple of 32\b"),
    *[(name, *refusal) for name in ("uvit", "dit") for refusal in [
        (dict(image_size=9), r"size 9 .*multiple of 2\b"),
        (dict(image_size=30, patch=4), r"size 30 .*multiple of 4\b"),
        (dict(heads=3), r"heads 3\b.*multiple of heads\b"),
        (dict(dim=33, heads=3), r"dim 33\b.*of heads and of [24]\b"),
        (dict(depth=1), r"depth 1\b.* (even depth|2 blocks)")]],
    *[(name, dict(image_size=0), r"size 0 .*multiple of 2\b") for name in NETS],
])
def test_sizes_that_do_not_fit(name, kwargs, words):
    """A size that does not fit is a ValueError that names it and what fits."""
    with pytest.raises(ValueError, match=words):
        build(name, **kwargs)


@pytest.mark.parametrize("name", ["uvit", "dit"])
def test_images_of_another_side(name):
    """A transformer has positions for its own size: other images of as many patches are refused."""
    net = build(name, image_size=16)
    with pytest.raises(ValueError, match="8, 32.*network for 16"):
        net(torch.zeros(1, 3, 8, 32), torch.tensor([10]))


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
    net = perturb(build(name, classes))
    out = net(*inputs(net))
    for i in range(len(out)):
        assert error(net(*(value[i:i + 1] for value in inputs(net))), out[i:i + 1]) < 1e-5


@each_net
def test_methods_of_modules(name):
    """No attribute of a network hides a method of nn.Module: half() makes it one of float16."""
    net = build(name, 5)
    assert [key for key in vars(net) if callable(getattr(nn.Module, key, None))] == []
    assert {p.dtype for p in net.half().parameters()} == {torch.float16}


@each_net
def test_projector_is_where_the_network_is(name):
    """make_projector asks a network of any dtype, on any device, how wide z is."""
    net = build(name)
    for there in (net.double(), net.to("meta")):
        assert diffusion.make_projector(there)[1].in_features == net.proj[1].in_features


@each_net
def test_bfloat16(name):
    """Under bfloat16 autocast output and z are finite and near float32's; z is in float32."""
    net = perturb(build(name, 5))
    full = net(*inputs(net), return_z=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(*inputs(net), return_z=True)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32
    for a, b in zip(half, full):
        assert a.isfinite().all() and 0 < error(a, b) < 0.05 * b.abs().max()


# --- the parts, against references ---

@each_net
@pytest.mark.parametrize("times", [[0, 1, 37, 999], [0.25, 37.5, 999.75]])
def test_sinusoid(name, times):
    """The time embedding is cos | sin of t 10000^(-i / half); in the UNet sin | cos, with half - 1."""
    t, n = torch.tensor(times), 7 if name == "unet" else 8
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
    assert "positions" in dict(net.named_buffers()) and "positions" not in net.state_dict()


@pytest.mark.parametrize("patch, channels", [(1, 3), (2, 1), (2, 4), (4, 3)])
def test_unpatchify(patch, channels):
    """unpatchify undoes cutting images into patches: rows of patches, in each its rows, channels last."""
    images, side = torch.randn(2, channels, 3 * patch, 3 * patch), 3
    tokens = torch.stack([
        images[:, :, i * patch:(i + 1) * patch, j * patch:(j + 1) * patch].permute(0, 2, 3, 1).reshape(2, -1)
        for i in range(side) for j in range(side)], dim=1)                   # (B, N, p p C)
    assert torch.equal(dit_selfcond.unpatchify(tokens, patch), images)


def attend(attention, x, heads):
    """out(softmax(q k^T / sqrt(d)) v), head by head, of x (B, N, D)."""
    qkv = attention.qkv(x).chunk(3, dim=2)
    parts = []
    for q, k, v in zip(*(m.chunk(heads, dim=2) for m in qkv)):
        weight = (q @ k.mT / math.sqrt(q.shape[2])).softmax(dim=2)
        parts.append(weight @ v)
    return attention.out(torch.cat(parts, dim=2))


@pytest.mark.parametrize("heads, qkv_bias", [(1, True), (2, False), (4, True)])
def test_attention(heads, qkv_bias):
    """Attention is softmax(q k^T / sqrt(d)) v, head by head; the UNet's is of normed pixels, added to x."""
    torch.manual_seed(0)
    attention, x = perturb(dit_selfcond.Attention(16, heads, qkv_bias)), 3 * torch.randn(2, 5, 16)
    assert (attention.qkv.bias is not None) == qkv_bias
    assert error(attention(x), attend(attention, x, heads)) < 1e-5
    attention, x = perturb(unet_selfcond.Attention(64)), 3 * torch.randn(2, 64, 3, 2)
    added = attend(attention, attention.norm(x).flatten(2).mT, 1)
    assert error(attention(x), x + added.mT.unflatten(2, (3, 2))) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm(layout):
    """group_norm, the UNet's on CUDA, is nn.GroupNorm with its gradients; bfloat16 is rounded at the end."""
    torch.manual_seed(0)
    weights = torch.randn(2, 12).unbind()
    x = (3 * torch.randn(2, 12, 5, 5) + 2).to(memory_format=layout)
    for x in (x, x / 10, (x + 50).bfloat16()):
        coarse = [w.bfloat16() for w in weights]                             # of a network in bfloat16
        assert error(unet_selfcond.group_norm(x, 4, *coarse, 1e-5), F.group_norm(x, 4, *weights)) < 0.1
        leaves = [value.detach().requires_grad_() for value in (x, *weights)]
        out = unet_selfcond.group_norm(leaves[0], 4, *leaves[1:], 1e-5)
        exact = F.group_norm(leaves[0].double(), 4, *(w.double() for w in leaves[1:]), 1e-5)
        rounding = exact.abs() * (2 ** -8 if x.dtype == torch.bfloat16 else 0)
        assert out.dtype == x.dtype and ((out - exact).abs() <= rounding + 1e-5).all()
        if x.dtype == torch.float32:
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

    def normed(x):
        return F.layer_norm(x, [32], eps=1e-6)

    m = block.modulation(F.silu(c)).reshape(2, 6, 1, 32)
    h = x + m[:, 2] * block.attention(normed(x) * (1 + m[:, 1]) + m[:, 0])
    h = h + m[:, 5] * block.mlp(normed(h) * (1 + m[:, 4]) + m[:, 3])
    assert error(block(x, c), h) < 1e-5
    m = net.final.modulation(F.silu(c)).reshape(2, 2, 1, 32)
    assert error(net.final(x, c), net.final.linear(normed(x) * (1 + m[:, 1]) + m[:, 0])) < 1e-5


def test_uvit_block():
    """A U-ViT decoder block is fuse([x, skip]) + c, then attention and MLP, each on a normed copy, added."""
    block = perturb(build("uvit")).out_blocks[1]
    x, skip, c = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    h = block.fuse(torch.cat([x, skip], dim=2)) + c[:, None]
    h = h + block.attention(block.norm1(h))
    h = h + block.mlp(block.norm2(h))
    assert error(block(x, skip, c), h) < 1e-5


@pytest.mark.parametrize("index, attends", [(0, False), (1, True), (2, True), (3, False)])
def test_unet_block(index, attends):
    """A UNet block is norm, SiLU, conv, + c, norm, SiLU, conv, + input, then attention where it has any."""
    net = perturb(build("unet"))
    block = [net.down[0][0], net.down[1][0], *net.mid][index]                # in_1, in_2 (32 -> 64), mid
    x, c = torch.randn(2, block.conv1.in_channels, 4, 4), torch.randn(2, 128)
    h = block.conv1(F.silu(block.norm1(x))) + block.embed(F.silu(c))[:, :, None, None]
    h = block.conv2(F.silu(block.norm2(h)))
    h = h + (block.shortcut(x) if index == 1 else x)
    assert attends == isinstance(block.attention, unet_selfcond.Attention)
    assert error(block(x, c), block.attention(h) if attends else h) < 1e-5


def test_unet_upsample():
    """Upsampling repeats every pixel 2x2, then convolves."""
    up, x = unet_selfcond.Upsample(4), torch.randn(2, 4, 3, 3)
    assert error(up(x), up.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))) < 1e-6


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_mlp(approximate):
    """The MLP's GELU is exact, or its tanh approximation."""
    mlp, x = dit_selfcond.MLP(16, approximate), 3 * torch.randn(2, 5, 16)
    assert torch.equal(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate=approximate)))


# --- the files ---

@pytest.mark.parametrize("module, more", [
    (diffusion, {"tqdm"}), (unet_selfcond, set()), (uvit_selfcond, set()), (dit_selfcond, set())])
def test_imports(module, more):
    """A network file imports nothing but torch and math, diffusion.py also tqdm."""
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} == {"torch", "math"} | more


def own(module):
    """Its functions and classes: name -> source."""
    return {key: inspect.getsource(value) for key, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__}


@pytest.mark.pins
def test_copies_are_equal():
    """Functions and classes that several files hold are equal there, but for the UNet's own two."""
    unet, uvit, dit = (own(module) for module in MODULES.values())
    shared = {"sinusoid", "to_map", "unpatchify", "Attention", "MLP"}
    assert uvit.keys() & dit.keys() == shared | {"Block"}
    assert unet.keys() & (uvit.keys() | dit.keys()) == {"sinusoid", "Attention", "Block"}
    for key in shared:
        assert uvit[key] == dit[key], key
    for key in ("aggregate", "encode"):
        assert len({inspect.getsource(getattr(net, key)) for net in NETS.values()}) == 1, key


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
