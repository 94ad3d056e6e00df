"""Public weights: networks from the originals' files say what the originals say; flags, errors, --init."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import probe
import sample
import train
from conftest import CPU, Program, argv, assert_same_run, error, few_latents, load, refused, run, tree
from dit_selfcond import sincos_table

SMALL = {
    "unet": dict(dim=32, mults=(1, 2, 2), attention=(1,), blocks=2, dropout=0.0),
    "uvit": dict(dim=32, depth=4, heads=2, patch=2),
    "dit": dict(dim=32, depth=4, heads=2, patch=2),
}
D, HEADS, SIDE, P, K = 32, 2, 8, 2, 10          # width, heads, sides of an image and of a patch, classes
EPS = "--schedule linear --target eps"          # tiny has another recipe

each_net = pytest.mark.parametrize("name", SMALL)
each_case = pytest.mark.parametrize("name, classes, channels", [
    ("unet", 0, 3), ("uvit", 0, 3), ("uvit", K, 3), ("dit", K, 3), ("dit", K, 4)])


@pytest.fixture(autouse=True)
def small(quick, monkeypatch):
    """--size tiny is SMALL, also where quick has a size of its own."""
    for name, size in SMALL.items():
        monkeypatch.setitem(train.MODELS[name].SIZES, "tiny", size)


# --- the originals: their names, with random weights, and their arithmetic ---

class Names(dict):
    """A state dict in the making."""

    def __init__(self):
        self.g = torch.Generator().manual_seed(3)

    def add(self, name, *shape):
        self[name] = torch.randn(shape, generator=self.g) / max(1, math.prod(shape[1:])) ** 0.5

    def linear(self, name, dim_in, dim_out, bias=True):
        self.conv(name, dim_in, dim_out, (), bias)

    def conv(self, name, dim_in, dim_out, kernel=(3, 3), bias=True):
        self.add(f"{name}.weight", dim_out, dim_in, *kernel)
        if bias:
            self.add(f"{name}.bias", dim_out)

    def norm(self, name, dim):
        self.add(f"{name}.weight", dim)
        self.add(f"{name}.bias", dim)


def dit_state(classes=K, channels=3, out=2, side=SIDE, depth=4):
    w = Names()
    w["pos_embed"] = sincos_table(side // P, D)[None]                        # test_networks has its formula
    w.conv("x_embedder.proj", channels, D, (P, P))
    w.linear("t_embedder.mlp.0", 256, D)
    w.linear("t_embedder.mlp.2", D, D)
    w.add("y_embedder.embedding_table.weight", classes + 1, D)
    for n in range(depth):
        w.linear(f"blocks.{n}.attn.qkv", D, 3 * D)
        w.linear(f"blocks.{n}.attn.proj", D, D)
        w.linear(f"blocks.{n}.mlp.fc1", D, 4 * D)
        w.linear(f"blocks.{n}.mlp.fc2", 4 * D, D)
        w.linear(f"blocks.{n}.adaLN_modulation.1", D, 6 * D)
    w.linear("final_layer.linear", D, P * P * out * channels)
    w.linear("final_layer.adaLN_modulation.1", D, 2 * D)
    return dict(w)


def uvit_state(classes=0, channels=3):
    w = Names()
    w.add("pos_embed", 1, (2 if classes else 1) + (SIDE // P) ** 2, D)
    w.conv("patch_embed.proj", channels, D, (P, P))
    if classes:
        w.add("label_emb.weight", classes + 1, D)
    for block in ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"):
        w.norm(f"{block}.norm1", D)
        w.linear(f"{block}.attn.qkv", D, 3 * D, bias=False)
        w.linear(f"{block}.attn.proj", D, D)
        w.norm(f"{block}.norm2", D)
        w.linear(f"{block}.mlp.fc1", D, 4 * D)
        w.linear(f"{block}.mlp.fc2", 4 * D, D)
        if block.startswith("out"):
            w.linear(f"{block}.skip_linear", 2 * D, D)
    w.norm("norm", D)
    w.linear("decoder_pred", D, P * P * channels)
    w.conv("final_layer", channels, channels)
    return dict(w)


def unet_state(classes=0, channels=3):
    """Three levels of two blocks, the middle one with attention: out of a checkpoint of ddae's train.py."""
    w = Names()

    def res(name, dim_in, dim_out):
        w.norm(f"{name}.norm1", dim_in)
        w.conv(f"{name}.conv1", dim_in, dim_out)
        w.norm(f"{name}.norm2", dim_out)
        w.conv(f"{name}.conv2.1", dim_out, dim_out)
        w.linear(f"{name}.time_emb.1", 4 * D, dim_out)
        if dim_in != dim_out:
            w.conv(f"{name}.shortcut", dim_in, dim_out, (1, 1))

    def attention(name, dim):
        w.norm(f"{name}.norm", dim)
        w.linear(f"{name}.projection", dim, 3 * dim)
        w.linear(f"{name}.output", dim, dim)

    w.conv("image_proj", channels, D)
    w.linear("time_emb.lin1", D, 4 * D)
    w.linear("time_emb.lin2", 4 * D, 4 * D)
    down = [(32, 32), (32, 32), 32, (32, 64), (64, 64), 64, (64, 64), (64, 64)]      # a number: a convolution
    up = [(128, 64), (128, 64), (128, 64), 64, (128, 64), (128, 64), (96, 64), 64,
          (96, 32), (64, 32), (64, 32)]
    for part, row, attends in (("down", down, [3, 4]), ("up", up, [4, 5, 6])):
        for n, dims in enumerate(row):
            if type(dims) is int:
                w.conv(f"{part}.{n}.conv", dims, dims)
                continue
            res(f"{part}.{n}.res", *dims)
            if n in attends:
                attention(f"{part}.{n}.attn", dims[1])
    res("middle.res1", 64, 64)
    attention("middle.attn", 64)
    res("middle.res2", 64, 64)
    w.norm("norm", D)
    w.conv("final", D, channels)
    online = {f"online_model.nn_model.{name}": value + 1 for name, value in w.items()}
    ema = {f"ema_model.nn_model.{name}": value for name, value in w.items()}
    model = {f"module.nn_model.{name}": value + 1 for name, value in w.items()}
    counts = dict(initted=torch.tensor(True), step=torch.tensor(7))
    return dict(MODEL=model, EMA=counts | online | ema, opt=dict(state={}, param_groups=[]))


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def conv(w, name, x, **how):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)


def embed(t, dim, last=0):
    """-> angles t 10000^(-i / (half - last))."""
    half = dim // 2
    return t.float()[:, None] * torch.exp(-math.log(10000) / (half - last) * torch.arange(half))


def attend(w, name, x):
    """timm's and U-ViT's attention: qkv (B, N, 3, H, d)."""
    B, N, _ = x.shape
    q, k, v = linear(w, f"{name}.qkv", x).reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    x = (q @ k.mT / math.sqrt(q.shape[3])).softmax(3) @ v
    return linear(w, f"{name}.proj", x.transpose(1, 2).reshape(B, N, -1))


def unpatched(x, channels):
    B, N, _ = x.shape
    h = math.isqrt(N)
    x = x.reshape(B, h, h, P, P, channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(B, channels, h * P, h * P)


def dit(w, x, t, y):
    """models.py of DiT: eps of what it says, (B, C, H, W)."""
    C = x.shape[1]
    x = conv(w, "x_embedder.proj", x, stride=P).flatten(2).mT + w["pos_embed"]
    angles = embed(t, 256)
    c = linear(w, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
    c = F.silu(linear(w, "t_embedder.mlp.2", F.silu(c)) + w["y_embedder.embedding_table.weight"][y])

    def modulated(x, shift, scale):
        return F.layer_norm(x, [D], eps=1e-6) * (1 + scale) + shift

    for n in range(4):
        m = linear(w, f"blocks.{n}.adaLN_modulation.1", c).reshape(-1, 6, 1, D).unbind(1)
        x = x + m[2] * attend(w, f"blocks.{n}.attn", modulated(x, m[0], m[1]))
        h = linear(w, f"blocks.{n}.mlp.fc1", modulated(x, m[3], m[4]))
        x = x + m[5] * linear(w, f"blocks.{n}.mlp.fc2", F.gelu(h, approximate="tanh"))
    m = linear(w, "final_layer.adaLN_modulation.1", c).reshape(-1, 2, 1, D).unbind(1)
    x = linear(w, "final_layer.linear", modulated(x, *m))
    return unpatched(x, x.shape[2] // P ** 2)[:, :C]


def uvit(w, x, t, y=None):
    """libs/uvit.py of U-ViT."""
    C, N = x.shape[1], (x.shape[2] // P) ** 2
    angles = embed(t, D)
    tokens = [torch.cat([angles.cos(), angles.sin()], 1)[:, None],
              conv(w, "patch_embed.proj", x, stride=P).flatten(2).mT]
    if y is not None:
        tokens = [w["label_emb.weight"][y][:, None], *tokens]
    x = torch.cat(tokens, 1) + w["pos_embed"]

    def norm(name, x):
        return F.layer_norm(x, [D], w[f"{name}.weight"], w[f"{name}.bias"])

    def block(name, x):
        x = x + attend(w, f"{name}.attn", norm(f"{name}.norm1", x))
        h = linear(w, f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
        return x + linear(w, f"{name}.mlp.fc2", F.gelu(h))

    skips = []
    for n in range(2):
        x = block(f"in_blocks.{n}", x)
        skips.append(x)
    x = block("mid_block", x)
    for n in range(2):
        x = linear(w, f"out_blocks.{n}.skip_linear", torch.cat([x, skips.pop()], 2))
        x = block(f"out_blocks.{n}", x)
    x = linear(w, "decoder_pred", norm("norm", x))[:, -N:]
    return conv(w, "final_layer", unpatched(x, C), padding=1)


def unet(w, x, t):
    """model/unet.py of ddae; a noise level that is t here is (t + 1) / 1000 there."""
    start = "ema_model.nn_model."
    w = {name.removeprefix(start): value for name, value in w["EMA"].items() if name.startswith(start)}
    angles = embed((t + 1) / 1000, D, last=1)
    c = linear(w, "time_emb.lin1", torch.cat([angles.sin(), angles.cos()], 1))
    c = linear(w, "time_emb.lin2", F.silu(c))

    def norm(name, x, groups=32):
        return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"])

    def res(name, x):
        h = conv(w, f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)), padding=1)
        h = h + linear(w, f"{name}.time_emb.1", F.silu(c))[:, :, None, None]
        h = conv(w, f"{name}.conv2.1", F.silu(norm(f"{name}.norm2", h)), padding=1)
        return h + (conv(w, f"{name}.shortcut", x) if f"{name}.shortcut.weight" in w else x)

    def attention(name, x):
        if f"{name}.norm.weight" not in w:
            return x
        q, k, v = linear(w, f"{name}.projection", norm(f"{name}.norm", x).flatten(2).mT).chunk(3, 2)
        h = (q @ k.mT / math.sqrt(q.shape[2])).softmax(2) @ v
        return x + linear(w, f"{name}.output", h).mT.reshape(x.shape)

    x = conv(w, "image_proj", x, padding=1)
    skips = [x]
    for n in range(8):
        if f"down.{n}.conv.weight" in w:
            x = conv(w, f"down.{n}.conv", x, stride=2, padding=1)
        else:
            x = attention(f"down.{n}.attn", res(f"down.{n}.res", x))
        skips.append(x)
    x = res("middle.res2", attention("middle.attn", res("middle.res1", x)))
    for n in range(11):
        if f"up.{n}.conv.weight" in w:
            x = conv(w, f"up.{n}.conv", F.interpolate(x, scale_factor=2), padding=1)
        else:
            x = attention(f"up.{n}.attn", res(f"up.{n}.res", torch.cat([x, skips.pop()], 1)))
    return conv(w, "final", F.silu(norm("norm", x, groups=8)), padding=1)


ORIGINAL = {"unet": (unet_state, unet), "uvit": (uvit_state, uvit), "dit": (dit_state, dit)}


def public(name, *args, **kwargs):
    """State dict of an original."""
    return ORIGINAL[name][0](*args, **kwargs)


def original(name, weights, x, t, y=None):
    """What the original says with these weights; without y, where it has classes, of the null class."""
    if y is None and name != "unet":
        table = weights.get("y_embedder.embedding_table.weight", weights.get("label_emb.weight"))
        y = None if table is None else torch.full_like(t, len(table) - 1)
    return ORIGINAL[name][1](weights, x, t) if y is None else ORIGINAL[name][1](weights, x, t, y)


def inputs(channels=3, B=4):
    g = torch.Generator().manual_seed(4)
    x = torch.randn(B, channels, SIDE, SIDE, generator=g)
    return x, torch.tensor([0, 7, 500, 999]), torch.tensor([0, 3, 8, 9])


def write(path, state):
    torch.save(state, path)
    return path


def flags(name, file, more=""):
    """Of probe.py and sample.py, and of train.py but for --weights: it says --init."""
    return ["--model", name, "--size", "tiny", "--device", "cpu", "--weights", str(file), *more.split()]


def no_vae(name, device):
    raise train.UserError(f"{name} is no autoencoder")


@pytest.fixture
def latents(tmp_path, monkeypatch):
    """Latents of ten classes, whose VAE is not there."""
    monkeypatch.setattr(train, "load_vae", no_vae)
    return few_latents(tmp_path / "latents", "abcdefghij", train=40, test=20)


# --- a network from a file is the original ---

@each_case
def test_says_what_the_original_says(tmp_path, latents, name, classes, channels):
    """--weights builds the original: the same eps for every class and for none; frozen, without z's path."""
    weights = public(name, classes, channels)
    data = f"--data latents:{latents}" if channels == 4 else f"--data shapes --image-size {SIDE}"
    args = probe.parse(flags(name, write(tmp_path / "file.pt", weights), data))
    state, net, diffusion = train.load_source(args, CPU)
    x, t, y = inputs(channels)
    expected = original(name, weights, x, t)
    assert error(net(x, t), expected) < 2e-5 * expected.abs().max()
    if classes:
        known = original(name, weights, x, t, y)
        assert error(net(x, t, y), known) < 2e-5 * known.abs().max() and error(known, expected) > 0.01
    assert not net.self_cond and not net.training and not any(w.requires_grad for w in net.parameters())
    assert (net.num_classes, net.channels, state["shape"]) == (classes, channels, [channels, SIDE, SIDE])
    assert diffusion.target == "eps" and error(diffusion.path.sigmas[0] ** 2, 1e-4 / (1 - 1e-4)) < 1e-9


def test_dit_without_variance(tmp_path):
    """A DiT that was trained with learn_sigma off has C channels a pixel, and all are kept."""
    weights = public("dit", out=1)
    found = train.DiT.from_public(weights)
    for part in ("weight", "bias"):
        assert torch.equal(found[f"final.linear.{part}"], weights[f"final_layer.linear.{part}"])


def test_unet_times():
    """At each of the 1000 times the UNet's first layer says what the original's says of (t + 1) / 1000."""
    weights = public("unet")
    found = train.UNet.from_public(weights)["time_mlp.0.weight"]
    t = torch.arange(1000)
    angles = embed((t + 1) / 1000, D, last=1)
    theirs = torch.cat([angles.sin(), angles.cos()], 1)
    expected = theirs @ weights["EMA"]["ema_model.nn_model.time_emb.lin1.weight"].T
    angles = embed(t, D, last=1)
    assert error(torch.cat([angles.sin(), angles.cos()], 1) @ found.T, expected) < 5e-6
    assert found.norm() < 2 * expected.norm(), "nothing large that cancels, as bf16 would show"


# --- probe.py and sample.py ---

@each_net
def test_probe_and_sample(tmp_path, monkeypatch, name):
    """Both programs run on a file and its flags, and write into runs/<name of the file>."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "ITERATIONS", 2)
    write(tmp_path / "file.pt", public(name))
    more = f"--data shapes --image-size {SIDE}"
    probe.main(flags(name, "file.pt", f"{more} --t 10 --references"))
    result = json.loads(Path("runs/file/probe-shapes.json").read_text())
    assert result["run"] == "file" and result["trained_on"] is None and "references" in result
    sample.main(flags(name, "file.pt", f"{more} -n 5 --npz --steps 2"))
    with np.load("runs/file/samples.npz") as found:
        assert found["arr_0"].shape == (5, SIDE, SIDE, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.pt", "runs"]


def test_latents_are_scaled(tmp_path, monkeypatch, latents, capsys):
    """The network sees latents * 0.18215, whatever their own moments; samples are latents again, guided."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "ITERATIONS", 2)
    weights, seen = public("dit", channels=4), []
    write(tmp_path / "file.pt", weights)
    monkeypatch.setattr(train.GaussianDiffusion, "add_noise", lambda self, x0, t, eps: seen.append(x0) or x0)
    probe.main(flags("dit", "file.pt", f"--data latents:{latents} --t 10"))
    stored = torch.from_numpy(np.load(latents / "test/latents.npy")[0]).float()
    assert any(len(x0) == len(stored) and error(x0, 0.18215 * stored) < 1e-5 for x0 in seen)
    given = {}

    def stand_in(self, net, noise, y, **kwargs):
        given.update(kwargs, y=y.tolist())
        return noise
    monkeypatch.setattr(train.GaussianDiffusion, "sample", stand_in)
    sample.main(flags("dit", "file.pt", f"--data latents:{latents} -n 4 --classes 3 9"))
    with np.load("runs/file/latents.npz") as found:
        assert error(found["arr_0"] * 0.18215, train.seeded_noise(range(4), [4, SIDE, SIDE])()) < 1e-5
    assert given["y"] == [3, 9, 3, 9] and given["null"] == K and given["guidance"] == train.GUIDANCE
    assert "public weights" in capsys.readouterr().out


# --- what does not fit ---

def changed(name, **new):
    weights = public(name)
    weights.update(new)
    return {key: w for key, w in weights.items() if w is not None}


@pytest.mark.parametrize("name, state, words", [
    ("dit", changed("dit", **{"blocks.2.mlp.fc1.bias": None}), ["missing: ['blocks.2.mlp.fc1.bias']"]),
    ("dit", changed("dit", odd=torch.ones(2)), ["left over: ['odd']"]),
    ("uvit", changed("uvit", **{"time_embed.0.weight": torch.ones(2)}), ["over: ['time_embed.0.weight']"]),
    ("uvit", changed("uvit", **{"norm.weight": torch.ones(5)}), ["norm_out.weight", "[5]", "[32]"]),
    ("dit", changed("dit", pos_embed=torch.ones(1, 16, D)), ["other positions"]),
    ("dit", changed("dit", pos_embed=torch.ones(1, 64, D)), ["images of 8 x 8", "other positions"]),
    ("uvit", uvit_state(channels=4), ["Stable Diffusion"]),
    ("uvit", changed("uvit", **{"norm.weight": torch.full((D,), torch.nan)}), ["not finite"]),
    ("unet", public("dit"), ["--model unet", "EMA"]), ("dit", public("unet"), ["--model dit"]),
    ("dit", public("uvit"), ["--model dit"]), ("uvit", public("dit"), ["--model uvit"]),
    ("dit", changed("dit", **{f"blocks.4.{n}": torch.ones(2) for n in range(9)}),
     ["left over: ['blocks.4.0', 'blocks.4.1', 'blocks.4.2']"]),
    ("unet", dict(EMA=dict(step=torch.tensor(1))), ["--model unet", "time_mlp"]),
    ("dit", [1, 2], ["--model dit"]), ("dit", Program(), ["--model dit"]), ("dit", None, ["--model dit"]),
])
def test_does_not_fit(tmp_path, monkeypatch, capsys, name, state, words):
    """What is missing, left over, of another shape or no weights at all is named, in one sentence."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "file.pt", state)
    if state is None:
        file.write_bytes(b"no torch file")
    for main in (probe.main, sample.main):
        with refused(capsys, "file.pt", *words):
            main(flags(name, "file.pt", f"--data shapes --image-size {SIDE}"))
    with refused(capsys, "file.pt", *words):
        init = f"--model {name} {EPS} --init file.pt --out run"
        train.main(argv("run", f"{init} {'--no-conditional' if name != 'dit' else ''}"))
    assert [*tree(tmp_path)] == ["file.pt"]


@pytest.mark.parametrize("main, more, words", [
    (probe.main, "--weights nowhere.pt --data shapes", ["nowhere.pt is no file:"]),
    (sample.main, "--weights nowhere.pt", ["nowhere.pt is no file:"]),
    (sample.main, "", ["either", "--weights"]), (sample.main, "run --weights a.pt", ["either", "--weights"]),
    (probe.main, "run --weights a.pt", ["either", "--weights"]),
    (probe.main, "--weights a.pt --compare run", ["either", "--weights"]),
    (sample.main, "run --data shapes", ["--data is for --weights"]),
    (sample.main, "run --size tiny", ["--size is for --weights"]),
    (probe.main, "run --image-size 8", ["--image-size is for --weights"]),
    (probe.main, "--weights a.pt --size huge", ["--size huge", "small"]),
    (probe.main, "--weights a.pt --image-size 0", ["--image-size 0", "more than 0"]),
])
def test_flags(tmp_path, monkeypatch, capsys, main, more, words):
    """A run or --weights, not both; what a run knows itself is no flag then."""
    monkeypatch.chdir(tmp_path)
    with refused(capsys, *words):
        main([*more.split(), "--device", "cpu"])
    assert not tree(tmp_path)


# --- train.py --init ---

def prepared(name, file, more=""):
    """A run at its start, from a file, on 8 px shapes."""
    cfg = train.parse_config(argv("nowhere", f"--model {name} {EPS} --init {file} {more}"))
    return train.Run(cfg, train.load_data("shapes", "train", SIDE), CPU, weights=train.read_public(cfg))


@each_net
@pytest.mark.parametrize("more", ["", "--no-self-cond", "--distill 0.1"])
@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.pins), 2])
def test_starts_as_the_original(tmp_path, name, more, steps):
    """At step 0 network and EMA say what the original says, with z as without; then steps move both."""
    weights, x = public(name), inputs()
    if name == "unet":
        x = x[:2]
    labels = "--conditional" if name == "dit" else "--no-conditional"
    r = prepared(name, write(tmp_path / "file.pt", weights), f"{labels} {more}")
    expected = original(name, weights, *x[:2])
    for net in (r.net, r.ema):
        assert net.self_cond == ("no-self" not in more)
        assert error(net.eval()(*x[:2]), expected) < 2e-5 * expected.abs().max()
    before = {key: w.clone() for key, w in r.net.state_dict().items()}
    r.optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(steps):
        train.train_step(r)
        r.images += r.cfg.batch_size
        train.update_ema(r)
    for net in (r.net, r.ema):
        still = [key for key, w in net.state_dict().items() if torch.equal(w, before[key])]
        assert still == (["abar"] if net.self_cond else []), "a step moves everything, proj too"


@pytest.mark.parametrize("name, classes, more, words", [
    ("dit", K, "--no-conditional", ["10 classes", "--conditional"]),
    ("dit", 4, "--conditional", ["4 classes", "network 10"]),
    ("uvit", 0, "--conditional", ["0 classes", "--no-conditional"]),
    ("dit", K, "--conditional --schedule cosine", ["--schedule linear"]),
    ("dit", K, "--conditional --target v", ["--target eps"])])
def test_init_does_not_fit(tmp_path, monkeypatch, capsys, name, classes, more, words):
    """Other classes than the file's, another path or target are refused before anything is written."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file.pt", public(name, classes))
    with refused(capsys, "file.pt", *words):
        train.main(argv("run", f"--model {name} {EPS} --init file.pt {more}"))
    assert [*tree(tmp_path)] == ["file.pt"]


def test_run_from_latents(tmp_path, monkeypatch, latents):
    """A run that starts from weights of latents keeps their moments, goes on without the file, bit for bit.

    What reads it, probe.py and sample.py, finds them there.
    """
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "file.pt", public("dit", channels=4))
    first = f"{EPS} --init file.pt --conditional --data latents:{latents}"
    whole = run("whole", f"{first} --images 64")
    run("run", f"{first} --images 32")
    file.unlink()
    train.main(["--resume", "--out", "run", "--images", "64"])
    state = load("run")
    assert_same_run(state, whole)
    assert state["latents"]["mean"] == [0.0] * 4 and state["latents"]["std"] == [1 / 0.18215] * 4
    moments = train.moments_of(train.load_run("run", CPU)[0]["latents"], CPU)
    assert error(train.to_x0(torch.ones(1, 4, 2, 2), moments), 0.18215 * torch.ones(1, 4, 2, 2)) < 1e-7


def test_resume_wins(tmp_path, monkeypatch, capsys):
    """With a checkpoint there --init is not read again; another one is refused; without one it is read."""
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "file.pt", public("dit"))
    words = f"{EPS} --init file.pt --conditional"
    run("run", f"{words} --images 16 --resume")
    file.unlink()
    assert run("run", f"{words} --images 32 --resume")["images"] == 32
    with refused(capsys, "init file.pt", "same flags"):
        train.main(argv("run", f"{words.replace('file', 'other')} --images 48 --resume"))
    with refused(capsys, "file.pt is no file"):
        train.main(argv("other", f"{words} --resume"))
