"""probe.py: probes against plain loops, features against hand-made ones, the protocol, files, bad input."""
import json
import os
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw

import probe
import train
from conftest import CPU, draw_shapes, error, few_shapes, picture, precision, probed, refused, small_run, tree
from diffusion import GaussianDiffusion
from probe import Part, Source

TRAIN, TEST = 60, 40                                # images of shapes in these tests
LEARN = 6_000                                       # images in those of the solver


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def options(**changes):
    """What the functions of probe.py read of the flags."""
    return SimpleNamespace(**dict(seed=0, augment=0, batch_size=500, task="classify") | changes)


def fake(net, add_noise=lambda x0, t, eps: x0):
    """Source around a function (x, t) -> {layer: features}; without noise unless add_noise adds it."""
    return Source(lambda x, t, return_features: (x, net(x, t)), SimpleNamespace(add_noise=add_noise),
                  nullcontext, CPU, None)


def random_images(n, size, seed=0, channels=3):
    """Images (n, channels, size, size) uint8 of random pixels."""
    return torch.randint(256, (n, channels, size, size), dtype=torch.uint8, generator=generator(seed))


def identities(part):
    """The images of a part as a list of bytes."""
    return [image.numpy().tobytes() for image in part.images]


def by_place(items):
    """What extract gave, joined -> {(layer, t): features}, targets of the first place."""
    places = list(dict.fromkeys((layer, t) for layer, t, _, _ in items))
    features = {place: torch.cat([h for *here, h, _ in items if tuple(here) == place]) for place in places}
    return features, torch.cat([y for *here, _, y in items if tuple(here) == places[0]])


def accuracy(W, b, x, y):
    """Of a linear layer, in percent, computed in float64."""
    said = F.linear(x.double(), W.double(), b.double()).argmax(1)
    return 100 * (said == y).double().mean().item()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs of two steps: "classes", a DiT, and "free", a UNet without classes; few shapes from now on.

    "linear" and "flow" are the first one, said to be of these paths.
    """
    with pytest.MonkeyPatch.context() as patch:
        few_shapes(patch, TRAIN, TEST)
        runs = dict(classes="dit", free="unet --no-conditional --schedule linear")
        found = {name: small_run(tmp_path_factory.mktemp("runs") / name, flags)
                 for name, flags in runs.items()}
        state = torch.load(found["classes"] / "checkpoint.pt")
        for name in ("linear", "flow"):
            found[name] = tmp_path_factory.mktemp("paths") / name
            found[name].mkdir()
            state["config"]["schedule"] = name
            torch.save(state, found[name] / "checkpoint.pt")
        yield found


@pytest.fixture
def run_probe(folders, monkeypatch):
    """run_probe(run, flags) -> result that it wrote, of probes that learn for 5 steps a penalty only."""
    def run_probe(run, flags="", name="probe"):
        file = folders[run] / f"{name}.json"
        file.unlink(missing_ok=True)
        monkeypatch.setattr(probe, "ITERATIONS", 5)
        monkeypatch.setattr(probe, "PIXELS", 4_000)
        probe.main([str(folders[run]), "--device", "cpu", "--t", "10", "300", *flags.split()])
        return json.loads(file.read_text())
    return run_probe


@pytest.fixture
def spied(monkeypatch):
    """What each use of probe.extract got and gave: features to learn from, or those that are scored."""
    log, real = [], probe.extract

    def extract(source, part, levels, args, layers=None, view=0, pixels=None, training=False):
        call = SimpleNamespace(part=part, levels=levels, layers=layers, view=view, given=[],
                               what="features" if training else "scoring")
        log.append(call)
        for item in real(source, part, levels, args, layers, view, pixels, training):
            call.given.append(item)
            yield item
    monkeypatch.setattr(probe, "extract", extract)
    return log


# --- the solver ---

def ill_conditioned(y, D, seed):
    """Features (N, D) of six classes, told apart in the directions of least variance, as of real layers."""
    normal = partial(torch.randn, generator=generator(seed), dtype=torch.float64)
    turn = torch.linalg.qr(normal(D, D))[0]
    centres = 0.8 * normal(6, D)
    centres[:, :D // 2] = 0
    x = (centres[y] + normal(len(y), D)) * torch.logspace(0, -2, D, dtype=torch.float64)
    return (x @ turn + 3).float()


def objective(W, b, x, y, penalty, std=1):
    """What a probe W (K, D), b (K,) on x (N, D) is to minimise; std (D,) where x is not standardised."""
    return F.cross_entropy(F.linear(x, W, b), y) + penalty / 2 * (W * std).square().sum()


def optimum(x, y, penalty, K=6):
    """The linear layer that a plain loop in float64 trains to convergence on standardised x (N, D).

    -> W (K, D), b (K,), loss. The penalty is penalty / 2 |W|^2; the loop runs in whitened coordinates.
    """
    R = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x) + penalty * torch.eye(x.shape[1])))
    V = torch.zeros(K, x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([V, b], max_iter=600, history_size=50, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-8, tolerance_change=0)

    def loss():
        optimizer.zero_grad()
        value = objective(V @ R, b, x, y, penalty)
        value.backward()
        return value
    optimizer.step(loss)
    assert V.grad.abs().max() < 1e-6, "the loop has not converged"
    return (V @ R).detach(), b.detach(), loss().item()


@pytest.mark.parametrize("n, cases", [
    (LEARN, [("b", 1, 1e-2), ("b", 1, 1e-4), ("a", 2, 1e-4), ("a", 2, 1e-6)]),
    (400, [("a", 2, 1e-3)]), (20, [("a", 2, 1e-2)])])
def test_fit_is_converged(monkeypatch, n, cases):
    """A probe has the accuracy and the loss of one that a plain loop trains alone; images may be few."""
    y = torch.randint(6, (LEARN + 20_000,), generator=generator())
    widths = {("a", 1): 16, ("b", 1): 16, ("a", 2): 24, ("b", 2): 24}
    features = {place: ill_conditioned(y, D, 1 + i) for i, (place, D) in enumerate(widths.items())}
    few = {place: x[:n] for place, x in features.items()}
    monkeypatch.setattr(probe, "collect", lambda *args: (few, y[:n]))
    probes = probe.learn(None, None, 6, None, probe.PENALTIES, None)
    for layer, t, penalty in cases:
        raw = features[layer, t].double()
        std, mean = torch.std_mean(raw[:n], 0)
        x = (raw - mean) / std
        W, b, loss = optimum(x[:n], y[:n], penalty)
        best = accuracy(W, b, x[LEARN:], y[LEARN:])
        W, b = (value.double() for value in probes[layer, t][penalty])
        close = 0.3 if n != 400 else 2              # few, told apart without error: it goes on for long
        assert abs(accuracy(W, b, raw[LEARN:], y[LEARN:]) - best) < close
        if n == LEARN:
            assert 70 < best < 95 or penalty == 1e-2
            assert abs(objective(W, b, raw[:n], y[:n], penalty, std) - loss) < 1e-2 * loss


def test_bias_is_free():
    """The bias has no penalty: whatever the penalty, classes are said as often as they occur."""
    y = torch.cat([torch.zeros(270), torch.ones(30)]).long()
    x = torch.randn(300, 4, generator=generator())
    W, b = probe.fit([x], y, 2, [1.0])[0][1.0]
    assert abs(F.linear(x, W, b).softmax(1).mean(0)[1] - 0.1) < 1e-3


def test_outlier():
    """An image far out, on the wrong side, makes no probe diverge: each is as good as the loop's."""
    g = generator()
    y = torch.randint(2, (400,), generator=g)
    x = 0.05 * torch.randn(400, 5, generator=g) + (2 * y - 1)[:, None]
    x[0] *= -30
    std, mean = torch.std_mean(x.double(), 0)
    for penalty, pair in probe.fit([x], y, 2, probe.PENALTIES)[0].items():
        W, b = (value.double() for value in pair)
        loss = objective(W, b, x.double(), y, penalty, std)
        best = optimum((x - mean) / std, y, penalty, 2)[2]
        assert best - 1e-6 < loss < 1.01 * best + 1e-4, penalty


def test_many_classes():
    """Class 255 of more than 256 classes is a class like the others."""
    K = 260
    y = torch.arange(K).repeat(3)
    x = F.one_hot(y, K).float()
    W, b = probe.fit([x], y, K, [1e-2, 1e-3, 1e-4])[0][1e-4]
    assert accuracy(W, b, x, y) == 100
    part = Part(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.full((3,), 255))
    wrong = {("x", 1): {0.1: (torch.zeros(K, 1), torch.arange(K).float())}}     # says 259
    scores = probe.score(wrong, K, fake(lambda x, t: {"x": x}), part, [1], options())
    assert scores["x", 1, 0.1]["accuracy"] == 0


@pytest.mark.parametrize("void", [3, 255])
def test_dead_and_void(void):
    """Features that are the same for all images do no harm; pixels of no class (K or more) teach nothing."""
    y = torch.arange(900) % 3
    x = F.one_hot(y, 3) + 0.1 * torch.randn(900, 3, generator=generator())
    known = y.clone()
    y[::2], x[::2] = void, x[::2].roll(1, 1)
    x = torch.cat([x, torch.full((900, 2), 7.0)], 1)
    (found,) = probe.fit([x], y, 3, probe.PENALTIES)
    assert list(found) == probe.PENALTIES
    for W, b in found.values():
        assert W.shape == (3, 5) and b.shape == (3,) and accuracy(W, b, x[1::2], known[1::2]) > 99


def test_features_not_finite():
    """Features that are not finite, of whichever place, are refused."""
    x = torch.randn(30, 4)
    x[7, 2] = float("nan")
    with pytest.raises(train.UserError, match="not finite.*--precision"):
        probe.fit([torch.randn(30, 4), x], torch.arange(30) % 3, 3, [1e-2])


# --- features ---

@pytest.mark.parametrize("run", ["classes", "free", "flow"])
def test_features(folders, run):
    """Features are those of the EMA network in eval mode, without class, at x_t, averaged over space."""
    _, mine, diffusion = train.load_run(folders[run], CPU)
    assert not any(module.training for module in mine.modules())
    noises, part = [], Part(random_images(6, 16), torch.arange(6))

    def add_noise(x0, t, eps):
        noises.append(eps.double())
        return diffusion.add_noise(x0, t, eps)
    source = Source(mine, SimpleNamespace(add_noise=add_noise), nullcontext, CPU, None)
    found, _ = by_place(list(probe.extract(source, part, [10, 300], options())))
    state = torch.load(folders[run] / "checkpoint.pt")
    cfg, K = SimpleNamespace(**state["config"]), state["num_classes"]
    net_class = train.MODELS[cfg.model]
    net = net_class(16, 3, K, **net_class.SIZES["tiny"]).eval()
    net.load_state_dict(state["ema"])
    if run == "flow":
        a, s = {10: 0.99, 300: 0.7}, {10: 0.01, 300: 0.3}
    else:
        a, s = GaussianDiffusion(schedule=cfg.schedule).path.tables.double()
    y = torch.full((6,), K) if run != "free" else None
    expected = {}
    for t, noise in zip([10, 300], noises, strict=True):
        x_t = a[t] * (part.images / 127.5 - 1) + s[t] * noise
        _, feats = net(x_t.float(), torch.full((6,), t), y, return_features=True)
        expected |= {(name, t): h.mean((2, 3)) for name, h in feats.items()}
    assert list(found) == list(expected), "all layers, in depth order"
    assert error(found, expected) < 1e-3


def test_noise():
    """The noise is normal, the same for all levels, and another one for every image, seed and view.

    Images have another one to score than to learn from, or probes would recognise them by it.
    """
    part = Part(random_images(60, 16), torch.arange(60))
    source = fake(lambda x, t: {"x": x.flatten(1)[:, :, None, None]}, lambda x0, t, eps: eps)

    def draw(seed=0, **how):
        items = probe.extract(source, part, [10, 300], options(seed=seed, batch_size=20), **how)
        features, _ = by_place(list(items))
        assert torch.equal(features["x", 10], features["x", 300])
        return features["x", 10]
    noise = torch.cat([draw(), draw(seed=3), draw(view=1), draw(view=2), draw(training=True)])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len({image.numpy().tobytes() for image in noise}) == len(noise) == 300


@pytest.mark.parametrize("size, batches", [(500, 1), (2, 2)])
def test_extract(size, batches):
    """Each image is passed once, in order; a layer's features are its means, or those of pixels.

    A pixel's are those of F.interpolate(mode="bilinear", align_corners=False) to the mask. Both in float32,
    also under autocast: means of many halves would lose the last digits.
    """
    def net(x, t):
        layers = {side: F.adaptive_avg_pool2d(x, side) + t[:, None, None, None] for side in (1, 2, 3, 8, 16)}
        return layers | {"half": x.bfloat16()}
    images, layers = random_images(3, 16), [1, 2, 3, 8, 16, "half"]
    masks = torch.arange(3 * 256).view(3, 16, 16)   # every pixel has its own number
    for targets, pixels in (torch.arange(3), None), (masks, None), (masks, 40):
        part, args = Part(images, targets), options(batch_size=size)
        items = list(probe.extract(fake(net), part, [4, 9], args, pixels=pixels))
        assert [item[:2] for item in items] == [(layer, t) for t in (4, 9) for layer in layers] * batches
        found, y = by_place(items)
        if pixels:
            assert torch.equal(y // 256, torch.arange(3).repeat_interleave(40))
            assert len(set(y.tolist())) > 100 and len(set((y % 256).tolist())) > 70
        else:
            assert torch.equal(y, targets.flatten()), "all, in order"
        for (layer, t), h in found.items():
            maps = net(images / 127.5 - 1, torch.full((3,), t))[layer].float()
            whole = F.interpolate(maps, size=(16, 16), mode="bilinear", align_corners=False)
            right = whole.movedim(1, 3).flatten(0, 2)[y] if targets is masks else maps.mean((2, 3))
            assert h.dtype == torch.float32 and error(h, right) < 1e-5, (layer, pixels)


@pytest.mark.parametrize("views", [0, 2])
def test_collect(monkeypatch, views):
    """The features to learn from lie by place, view after view and image by image, as they were extracted."""
    masks = torch.arange(5 * 64, dtype=torch.uint8).view(5, 8, 8) % 7
    source = fake(lambda x, t: {"a": x * t[0], "b": torch.cat([x, -x], 1) + t[0], "c": x - t[0]})
    for targets, m in (torch.arange(5), None), (masks, 21), (masks, 1):
        monkeypatch.setattr(probe, "PIXELS", 5 * 21 + 2 if m == 21 else 3)  # m an image, but at least 1
        part, args = Part(random_images(5, 8), targets), options(batch_size=2, augment=views)
        x, y = probe.collect(source, part, [3, 8], args, ["a", "b"])
        expected, targets = by_place([
            item for view in (range(1, views + 1) or [0])
            for item in probe.extract(source, part, [3, 8], args, ["a", "b"], view, m, training=True)])
        assert list(x) == [("a", 3), ("b", 3), ("a", 8), ("b", 8)]
        assert all(torch.equal(h, expected[place]) for place, h in x.items())
        assert torch.equal(y, targets) and y.dtype == torch.int64


def test_flip_and_shift():
    """Half of the views are flipped, all moved by S / 8 at most, image and mask alike; edges reflect."""
    n, S, g = 400, 16, generator()
    masks = torch.arange(S * S).view(1, S, S).expand(n, -1, -1)
    x, moved = probe.flip_and_shift(torch.stack([masks, -masks], 1).float(), masks, g)
    assert x.shape == (n, 2, S, S) and moved.shape == (n, S, S)
    assert torch.equal(x[:, 0].long(), moved) and torch.equal(x[:, 1].long(), -moved)
    plain, views = np.pad(np.arange(S * S).reshape(S, S), 2, "reflect"), {}
    for down in range(5):
        for right in range(5):
            at = plain[down:, right:][:S, :S]
            views[at.tobytes()] = down, right, False
            views[at[:, ::-1].tobytes()] = down, right, True
    seen = [views[view.numpy().tobytes()] for view in moved]
    assert len({(down, right) for down, right, _ in seen}) == 25
    assert 0.4 < np.mean([flip for _, _, flip in seen]) < 0.6
    labels = torch.arange(n)
    assert torch.equal(probe.flip_and_shift(x, labels, g)[1], labels), "classes stay"


def test_views(spied):
    """--augment VIEWS extracts that often to learn, masks moved alike; what is scored is never moved."""
    masks = random_images(20, 16) % 3
    part, seen = Part(100 * masks, masks[:, 0]), []
    source = fake(lambda x, t: seen.append(x) or {"x": x})
    probe.study(source, part, part, 3, [10], options(task="segment", augment=2))
    calls = [(call.what, call.view) for call in spied]
    assert calls == 2 * [("features", 1), ("features", 2), ("scoring", 0)]
    first, second, plain = seen[3:]                 # of the final probe
    assert error(plain, part.images / 127.5 - 1) < 1e-6
    assert min(error(first, second), error(first, plain), error(second, plain)) > 0.1
    for call in spied:
        for _, _, h, targets in call.given:
            assert error(h[:, 0], targets / 1.275 - 1) < 1e-5


# --- the protocol ---

def test_scores():
    """Accuracy and mean IoU are those of a plain loop; void and classes that do not occur do not count."""
    g, K = generator(), 5
    masks = torch.randint(3, (6, 8, 8), generator=g)                 # classes 3 and 4 do not occur
    images = random_images(6, 8)
    masks[:, :3], images[:, :, :3] = 255, 0                          # there, what is said is always class 1
    W, b = torch.randn(K, 3, generator=g), torch.tensor([0, 0.5, 0, 0.5, -99])     # class 4 is never said
    args, place = options(batch_size=4, task="segment"), ("x", 7, 0.1)
    probes = {("x", 7): {0.1: (W, b), 0.2: (-W, b)}}
    part = Part(images, masks.byte())
    result = probe.score(probes, K, fake(lambda x, t: {"x": x}), part, [7], args)
    said = F.linear((images / 127.5 - 1).movedim(1, 3), W, b).argmax(3)
    pairs = [(a, s) for a, s in zip(masks.flatten().tolist(), said.flatten().tolist()) if a != 255]
    ious = [sum(a == k == s for a, s in pairs) / sum(k in (a, s) for a, s in pairs) for k in range(3)]
    assert abs(result[place]["accuracy"] - sum(a == s for a, s in pairs) / len(pairs)) < 1e-6
    assert abs(result[place]["miou"] - sum(ious) / 3) < 1e-6
    assert list(result) == [place, ("x", 7, 0.2)] and result[place] != result["x", 7, 0.2]


def test_protocol(spied):
    """Layer and t are chosen on a tenth of the training images; the test set is scored once, there."""
    def draw(n, seed):                              # images with the colour of the class in the first pixel
        y = torch.randint(3, (n,), generator=generator(seed))
        images = random_images(n, 4, seed)
        images[:, :, 0, 0] = 255 * F.one_hot(y, 3).byte()
        return Part(images, y)

    def net(x, t):                                  # which shows it in layer "b" at t = 30, nowhere else
        nothing = x[:, 1:, 1:3]
        return {"c": nothing, "b": x[:, :, :1, :1] if t[0] == 30 else x[:, :, 3:, 3:], "a": nothing}
    train_part, test_part = draw(205, 1), draw(80, 2)
    result = probe.study(fake(net), train_part, test_part, 3, [10, 30, 60], options())
    assert (result["best"]["layer"], result["best"]["t"]) == ("b", 30) and result["test"]["accuracy"] == 1
    assert result["layers"] == ["c", "b", "a"] and result["levels"] == [10, 30, 60]
    held_out = np.array(result["held_out"])
    assert held_out.shape == (3, 3) and held_out[1, 1] == 1 and (held_out < 0.75).sum() == 8
    learn, held, final, test = spied
    assert [call.what for call in spied] == ["features", "scoring"] * 2
    assert result["best"]["penalty"] == probe.PENALTIES[0], "of equals, the strongest"
    assert learn.levels == held.levels == [10, 30, 60] and not learn.layers and not held.layers
    assert len(held.part.images) == 20 and len(learn.part.images) == 185
    assert sorted(identities(held.part) + identities(learn.part)) == sorted(identities(train_part))
    for call in (held, learn):                      # and every image keeps its target
        assert torch.equal(call.part.images[:, :, 0, 0].argmax(1), call.part.targets)
    assert identities(final.part) == identities(train_part) and identities(test.part) == identities(test_part)
    for call in (final, test):
        assert (call.levels, call.layers) == ([30], ["b"])


def test_choice(monkeypatch):
    """The best place and penalty count, to segment by mean IoU; the final probe reaches them as before."""
    said = {("a", 1): [(0.5, 0.1), (0.7, 0.2), (0.6, 0.3)], ("b", 1): [(0.8, 0.25), (0.3, 0.1), (0.1, 0.1)]}
    scores = {(*place, penalty): dict(accuracy=accuracy, miou=miou) for place, values in said.items()
              for penalty, (accuracy, miou) in zip([0.3, 0.2, 0.1], values)}
    said_by = {place: dict.fromkeys([0.3, 0.2, 0.1], "a probe") for place in said}
    learned, asked = [], []
    monkeypatch.setattr(probe, "PENALTIES", [0.3, 0.2, 0.1])
    monkeypatch.setattr(probe, "learn", lambda *args: learned.append(args) or said_by)
    monkeypatch.setattr(probe, "score", lambda *args: asked.append(args) or scores)
    part, test = Part(random_images(20, 4), torch.zeros(20)), Part(random_images(5, 4), torch.zeros(5))
    for task, best, way, held_out in [("classify", ("b", 0.3), [0.3], [[0.7], [0.8]]),
                                      ("segment", ("a", 0.1), [0.3, 0.2, 0.1], [[0.3], [0.25]])]:
        result = probe.study(None, part, test, 2, [1], options(task=task))
        assert (result["best"]["layer"], result["best"]["penalty"]) == best
        assert result["held_out"] == held_out and result["test"] == scores[best[0], 1, best[1]]
        everywhere, there = learned[-2:]
        assert everywhere[3:5] == ([1], [0.3, 0.2, 0.1]) and len(everywhere) == 6
        assert there[3:5] == ([1], way) and there[6] == [best[0]] and asked[-1][3] is test
        assert asked[-1][0] == {(best[0], 1): {best[1]: "a probe"}}, "no other is scored on the test images"


def test_images(folders, monkeypatch):
    """--images takes so many training images at random, without it SOME_SHAPES; test images are all used."""
    monkeypatch.setattr(probe, "SOME_SHAPES", 50)
    state, _, _ = train.load_run(folders["classes"], CPU)
    whole, chosen = identities(Part(draw_shapes(TRAIN, 0, 16)[0], None)), []
    for flags, count in ("", 50), ("", 50), ("--seed 3", 50), ("--images 10", 10), ("--images 60", 60):
        args = probe.parse(["run", *flags.split()])
        learn, test, _ = probe.load_parts("shapes", state, args, CPU)
        chosen.append(identities(learn))
        assert len(set(chosen[-1])) == len(learn.images) == count and len(test.images) == TEST
        assert set(chosen[-1]) <= set(whole) and chosen[-1] != whole[:count]
    assert chosen[0] == chosen[1] and set(chosen[0]) != set(chosen[2])


@pytest.mark.pins
def test_defaults():
    """Eight noise levels, five penalties that fall, 5,000 shapes, 20 neighbours at temperature 0.07."""
    assert probe.parse(["run"]).t == probe.LEVELS == [1, 10, 30, 60, 100, 200, 300, 500]
    assert probe.PENALTIES == [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    assert (probe.SOME_SHAPES, probe.NEIGHBOURS, probe.TEMPERATURE) == (5_000, 20, 0.07)


# --- other judges ---

def test_knn(spied):
    """--knn is what a plain loop in float64 finds: 20 neighbours by cosine that vote with exp(cos / 0.07)."""
    g, K = generator(), 5
    centres = torch.randn(K, 8, generator=g)
    scale = torch.logspace(-1, 1, 8)
    y = torch.randint(K, (700,), generator=g)
    colours = (128 + 12 * (centres[y] + 1.1 * torch.randn(700, 8, generator=g))).round().clamp(0, 255).byte()
    images = colours[:, :, None, None].expand(-1, -1, 2, 2)
    learn, test = Part(images[:300], y[:300]), Part(images[300:], y[300:])
    source = fake(lambda x, t: {"a": -x, "b": x * scale[:, None, None] + t[0]})
    got = probe.knn(source, learn, test, ("b", 6), K, options(batch_size=150))
    x = (colours.double() / 127.5 - 1) * scale + 6
    x = F.normalize((x - x[:300].mean(0)) / (x[:300].std(0) + 1e-6))
    right = 0
    for z, label in zip(x[300:], y[300:]):
        cosine, votes = x[:300] @ z, torch.zeros(K)
        for i in cosine.argsort(descending=True)[:20]:
            votes[y[i]] += (cosine[i] / 0.07).exp()
        right += int(votes.argmax() == label)
    assert got * 400 == pytest.approx(right)
    assert [call.what for call in spied] == ["features", "scoring"], "so with other noise"


def sigmas_of(schedule, levels):
    """The noise-to-signal ratios at these t, of linear's or flow's path."""
    if schedule == "flow":
        return [t / (1000 - t) for t in levels]
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return [((1 - abar[t]) / abar[t]) ** 0.5 for t in levels]


def test_other_judges(folders, run_probe, monkeypatch, capsys):
    """--knn judges the chosen place, --references an untrained network and the pixels; both are told."""
    scores, studied, seen = [0.5, 0.5, 0.4], [], []

    def study(*args):
        studied.append(args)
        result = probed(test=dict(accuracy=scores[len(studied) - 1], miou=0))
        return {key: result[key] for key in "metric layers levels held_out best test".split()}
    monkeypatch.setattr(probe, "study", study)
    monkeypatch.setattr(probe, "knn", lambda source, train, test, place, K, args: seen.append(place) or 0.375)
    result = run_probe("classes", "--knn --references")
    assert result["knn"] == 0.375 and seen == [("block_4", 30)]
    told = {name: part["test"]["accuracy"] for name, part in result["references"].items()}
    assert told == dict(untrained=0.5, pixels=0.4)
    out = capsys.readouterr().out
    assert "20 nearest neighbours there: test 37.5 %" in out
    rows = {line.split(":")[0]: line for line in out.splitlines()}
    assert "50.0 +- 7.9 % (standard error) of 40 images; NOT BEATEN" in rows["untrained"]
    assert rows["pixels"].endswith("test 40.0 +- 7.7 % (standard error) of 40 images")
    (trained, *first), (untrained, *second), (pixels, *third) = studied
    assert [args[3] for args in (first, second, third)] == [[10, 300], [10, 300], [10]]
    assert all(args[0] is first[0] and args[1] is first[1] for args in (second, third))
    assert not untrained.net.training
    torch.manual_seed(train.mix(0))
    config = train.Config(**torch.load(folders["classes"] / "checkpoint.pt")["config"])
    start = train.build(config, (3, 16, 16), 10, CPU)[0].state_dict()
    assert error(dict(untrained.net.state_dict()), dict(start)) == 0
    assert pixels.diffusion is trained.diffusion, "with the same noise"
    assert pixels.net.keywords == dict(dense=False)
    scores += [0.5] * 3
    run_probe("classes", "--task segment --references", "probe-segment")
    pixels, *_ = studied[-1]
    assert pixels.net.keywords == dict(dense=True)


@pytest.mark.parametrize("side, pooled", [(16, 16), (64, 32)])
def test_pixels(side, pooled):
    """The reference to classify is all pixels, of at most 32 x 32; to segment, each pixel's own channels."""
    x = torch.randn(2, 3, side, side)
    h = probe.raw_pixels(x, None, True, dense=False)[1]["pixels"]
    few = x.view(2, 3, pooled, side // pooled, pooled, side // pooled).mean((3, 5))
    assert error(h.mean((2, 3)), few.flatten(1)) < 1e-6
    assert probe.raw_pixels(x, None, True, dense=True)[1]["pixels"] is x


# --- what is written ---

@pytest.mark.parametrize("run, sigmas", [("linear", ["0.047", "1.240"]), ("flow", ["0.010", "0.429"])])
def test_result(folders, run_probe, capsys, run, sigmas):
    """probe.json says what was done with what, the same again the second time, but for the seconds.

    The terminal shows the table, with noise-to-signal ratios, the best place and the files.
    """
    result = run_probe(run, "--seed 1 --augment 1")
    names = [f"block_{n}" for n in range(1, 7)]
    expected = dict(run=run, data="shapes", task="classify", layers=names, levels=[10, 300],
                    bottleneck="block_3", classes=10, trained_on=16, seed=1, augment=1, batch_size=500,
                    device="cpu", metric="accuracy", versions=train.VERSIONS, train_images=TRAIN,
                    test_images=TEST)
    assert {key: result[key] for key in expected} == expected and 0 < result["seconds"] < 60
    values, best = np.array(result["held_out"]), result["best"]
    i, j = names.index(best["layer"]), [10, 300].index(best["t"])
    assert values[i, j] == values.max() and abs(best["accuracy"] - values.max()) < 1e-4
    assert result["sigmas"] == pytest.approx(sigmas_of(run, [10, 300]), abs=1e-5)
    head, noise, *rows, said, files = capsys.readouterr().out.splitlines()
    assert head.split() == ["t", "10", "300"] and noise.split() == ["sigma", *sigmas]
    assert all(line.endswith(" ") and len(line) == len(rows[0]) for line in (head, noise))
    for n, (name, row) in enumerate(zip(names, rows, strict=True)):
        assert row.split()[0] == name and (" z " in row) == (n == 2) and row.count("*") == (n == i)
        numbers = [float(word.rstrip("*")) for word in row.split()[-2:]]
        assert numbers == [round(100 * value, 1) for value in values[n].tolist()]
    assert said == probe.summary(result) and f"test {100 * result['test']['accuracy']:.1f} +- " in said
    assert str(folders[run] / "probe.json") in files
    assert (folders[run] / "probe.png").exists()
    assert run_probe(run, "--seed 1 --augment 1") | dict(seconds=0) == result | dict(seconds=0)


@pytest.mark.parametrize("flags, name", [
    ("", "probe"), ("--task segment", "probe-segment"), ("--data shapes:full", "probe-shapes-full"),
    ("--task segment --data voc", "probe-segment-voc"), ("--data folder:/a/my-birds", "probe-a-my-birds")])
def test_file_names(flags, name):
    """Each task and each other data set has its own files, so that none overwrites another's."""
    assert probe.stem(probe.parse(["run", *flags.split()])) == name


def drawn(draw, what, file):
    """The picture that draw makes as an array (H, W, 3) of int; it has a white edge, so it is whole."""
    draw(what, file)
    with Image.open(file) as opened:
        assert opened.format == "PNG"
        image = np.array(opened).astype(int)
    assert min(edge.min() for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:])) == 255
    return image


def near(image, colour):
    """-> y, x of the pixels of about this colour."""
    return np.nonzero(np.abs(image - colour).max(2) < 30)


@pytest.mark.parametrize("result", [
    probed(4, (10,), run="uvit-small-cifar10", data="folder:/home/me/pictures/birds-and-bees", metric="miou"),
    probed(13, probe.LEVELS, run="unet-tiny-shapes-full-baseline", metric="miou"),
    probed(1, (1,), run="a" * 99)])
def test_pictures(tmp_path, monkeypatch, result):
    """Both are whole, also where names are long: a red frame is around the map's best cell, the darkest.

    Above each column are t and the noise-to-signal ratio. In the curves a layer's best score over t counts;
    a large dot marks z.
    """
    texts, write = {}, ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, words, *more, **how:
                        texts.update({xy: words}) or write(self, xy, words, *more, **how))
    image = drawn(probe.draw_maps, [result], tmp_path / "map.png")
    above = [texts[240 + 92 * j, y] for y in (118, 146) for j in range(len(result["levels"]))]
    assert above == [f"t = {t}" for t in result["levels"]] + [f"{sigma:.3f}" for sigma in result["sigmas"]]
    y, x = near(image, (255, 0, 0))
    rows, columns = np.array(result["held_out"]).shape
    assert (np.ptp(x), np.ptp(y)) == (88, 36)
    assert (x.min(), y.min()) == (196 + 92 * (columns - 1), 172 + 40 * (rows - 1))
    blue = image[y.min() + 6, x.min() + 6, 2]
    assert blue < 60 or rows == columns == 1

    def curves(**changes):
        return drawn(probe.draw_curves, [result | changes], tmp_path / "curves.png")
    plain = curves(bottleneck=None)
    _, x = near(plain, (214, 39, 40))
    assert rows == 1 or set(range(130, 1030)) <= set(x.tolist())             # a line leads from dot to dot
    others = [[0.1, row[-1], 0.2] for row in result["held_out"]]
    assert (curves(bottleneck=None, held_out=others) == plain).all()
    ends = [curves(bottleneck=result["layers"][n]) for n in (0, -1)]
    first, last = (np.argwhere((image != plain).any(2)).mean(0) for image in ends)
    assert rows == 1 or (first[0] > last[0] + 99 and first[1] < last[1] - 99)
    more = result | dict(layers=[f"block_{n}" for n in range(12)], held_out=[[0.5] * columns] * 12)
    shapes = {drawn(probe.draw_curves, pair, tmp_path / "curves.png").shape
              for pair in ([result, more], [more, result])}
    assert len(shapes) == 1, "as wide as the longest curve"
    texts.clear()
    curves(held_out=[[1.0] * columns] * rows)
    assert max(float(words) for (x, _), words in texts.items() if x == 90) == 100, "no axis beyond 100 %"


@pytest.mark.parametrize("low, high, ends", [
    (83.7, 100, (80, 100)), (54.8, 78.5, (54, 79)), (99.4, 99.4, (95, 100)), (0, 0, (0, 5)),
    (0, 100, (0, 100)), (3.2, 97.9, (3, 98)), (2.5, 98.5, (0, 100))])
def test_axis(low, high, ends):
    """Whole numbers, around what is shown, at most 0 to 100, in five whole steps."""
    assert probe.axis(low, high) == ends


def test_maps(tmp_path):
    """Maps side by side are each that of a run alone, but for the colours, which have one scale."""
    high, low = probed(run="high"), probed(run="low", best=dict(probed()["best"], t=probed()["levels"][0]))
    low["held_out"] = [[value / 2 for value in row] for row in low["held_out"]]
    both = drawn(probe.draw_maps, [high, low], tmp_path / "both.png")
    y, x = near(both, (255, 0, 0))
    left, right = x[x < both.shape[1] / 2], x[x > both.shape[1] / 2]
    columns = len(high["levels"])
    assert np.ptp(left) == np.ptp(right) == 88
    assert right.min() - left.min() == both.shape[1] / 2 - 92 * (columns - 1)
    swapped = drawn(probe.draw_maps, [low, high], tmp_path / "swapped.png")[:, :both.shape[1] // 2]
    y2, x2 = near(swapped, (255, 0, 0))
    assert swapped[y2.min() + 6, x2.min() + 6, 2] > 100, "the scale is that of all, not of the first"
    blue = both[y.min() + 6, [left.min() + 6, left.min() + 6 + both.shape[1] // 2], 2]
    assert blue[0] < 60 < 100 < blue[1], "half as high is paler"
    alone = drawn(probe.draw_maps, [high], tmp_path / "alone.png")
    height, width = alone.shape[0] - 110, both.shape[1] // 2                 # below the headings
    words = [(image[-height:, :width] < 40).all(2) for image in (alone, both)]
    assert words[0].sum() > 1000 and (words[0] == words[1]).all()


def write(folder, result, name="probe"):
    """A result as that of a run in this folder -> the folder, as a word of a command."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(result if type(result) is str else json.dumps(result))
    return str(folder)


def test_compare(tmp_path, capsys):
    """--compare draws curves and maps of all runs, two pictures in the first one's folder, and no more."""
    lower = [[value - 0.1 for value in row] for row in probed()["held_out"]]
    results = dict(A=probed(run="A"), B=probed(run="B", held_out=lower), C=probed(7, run="C"))
    runs = {name: write(tmp_path / name, result) for name, result in results.items()}
    for names in ("BA", "ABC"):
        probe.main(["--compare", *(runs[name] for name in names)])
        file, maps = (tmp_path / names[0] / f"probe-compare{what}.png" for what in ("", "-maps"))
        out = capsys.readouterr().out.splitlines()
        assert out == [*(probe.summary(results[name]) for name in names), f"curves: {file}; maps: {maps}"]
        assert Image.open(maps).width == len(names) * (210 + 92 * len(probed()["levels"]))
        image, top = np.array(Image.open(file)).astype(int), 100 + 36 * len(names)   # below the heading
        heights = {name: near(image[top:top + 450], list(bytes.fromhex(colour[1:])))[0].mean()
                   for name, colour in zip(names, probe.LINES)}
        assert heights["B"] > heights["A"] + 30, "A is better than B, so its curve is higher"
        file.unlink()
        maps.unlink()
    write(tmp_path / "A", probed(metric="miou"), "probe-segment-voc")
    probe.main(["--compare", runs["A"], "--task", "segment", "--data", "voc"])
    assert (tmp_path / "A/probe-segment-voc-compare.png").exists()


OLDER = {name: value for name, value in probed().items() if name != "test_set"}
UNDRAWN = {name: value for name, value in probed().items() if name != "layers"}
IMPOSSIBLE = [probed(held_out=[[1.5] * 3] * 4), probed(held_out=[[-1] * 3] * 4)]
UNLIKE = dict(data="cifar10", test_set="ab12", levels=[1, 10, 60], train_images=99, augment=2, seed=1,
              batch_size=64)


@pytest.mark.parametrize("content, words", [
    (None, ["B/probe.json does not exist", "make it with python probe.py"]),
    *[(odd, ["B/probe.json is no result of probe.py"]) for odd in ("{", "{}", "[]", "directory", UNDRAWN)],
    *[(odd, ["B/probe.json is no result of probe.py", "a score that cannot be"]) for odd in IMPOSSIBLE],
    (OLDER, ["B/probe.json is no result of probe.py", "without test_set"]),
    *[(probed(**{what: other}), [what, str(other), str(probed()[what])]) for what, other in UNLIKE.items()]])
def test_compare_refuses(tmp_path, capsys, content, words):
    """Results that are missing, damaged or of runs that were probed otherwise; no picture is drawn."""
    a, b = write(tmp_path / "A", probed()), write(tmp_path / "B", content)
    file = tmp_path / "B/probe.json"
    if content in (None, "directory"):
        file.unlink()
    if content == "directory":
        file.mkdir()
    with refused(capsys, *words):
        probe.main(["--compare", a, b])
    assert os.listdir(tmp_path / "A") == ["probe.json"]


@pytest.mark.parametrize("flags, dtype", [("", torch.float32), ("--precision bf16", torch.bfloat16)])
def test_precision(run_probe, monkeypatch, flags, dtype):
    """The passes run in --precision."""
    seen, forward = set(), train.DiT.forward

    def watch(self, *args, **kwargs):
        seen.add(precision())
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(train.DiT, "forward", watch)
    run_probe("classes", flags)
    assert seen == {dtype}


@pytest.mark.parametrize("where, kept", [("study", False), ("knn", True), ("references", True)])
def test_memory(folders, run_probe, capsys, monkeypatch, where, kept):
    """Too little memory, of a GPU or the host, is one sentence; what was found before that is kept."""
    def fail(*args):
        if where == "knn":
            torch.empty(2 ** 50)
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(probe, where, fail)
    with refused(capsys, "memory", "--images", "--t", "--batch-size"):
        run_probe("classes", "--images 20 --knn --references")
    file = folders["classes"] / "probe.json"
    assert file.exists() == kept
    if kept:
        assert ("knn" in json.loads(file.read_text())) == (where == "references")


def test_digest():
    """Images of one number are told from others, of many by some of them."""
    for n in (5, 2_500):
        images = random_images(n, 8)
        others = torch.cat([images[:n // 2], random_images(n - n // 2, 8, seed=1)])       # not from the first
        assert probe.digest(images) == probe.digest(images.clone()) != probe.digest(others)


# --- other data ---

def test_transfer(run_probe, spied, photos, monkeypatch):
    """--data probes the network on other data, resized to the network's size, and its own classes."""
    monkeypatch.chdir(photos.parent)
    result = run_probe("classes", "--data folder:photos/", "probe-photos")
    expected = dict(data="folder:photos", classes=2, train_images=40, test_images=10)
    assert {key: result[key] for key in expected} == expected
    for call in spied:
        assert call.part.images.shape[1:] == (3, 16, 16)
        red = call.part.images[:, 0].float().mean((1, 2)) > 100
        assert torch.equal(red.long(), call.part.targets)
    assert result["test"]["accuracy"] > 0.75


def load(patch, images, task="classify", channels=3):
    """probe.load of such images, in two classes and with masks, for a network of so many channels."""
    labels, masks = torch.arange(len(images)) % 2, images[:, 0] % 3
    patch.setattr(probe, "load_data", lambda *args: train.Data(images, labels, masks, ["a", "b"]))
    cfg = SimpleNamespace(image_size=16, skip_bad=False)
    return probe.load("some", "train", task, dict(config=cfg, shape=[channels, 16, 16], latents=None), CPU)


def test_load(monkeypatch):
    """Images and labels, or masks with a background, as they are; other channels are refused."""
    grey, rgb = random_images(6, 16, channels=1), random_images(6, 16)
    part, classes = load(monkeypatch, grey, channels=1)
    assert torch.equal(part.images, grey) and torch.equal(part.targets, torch.arange(6) % 2)
    assert classes == ["a", "b"]
    part, classes = load(monkeypatch, rgb, "segment")
    assert torch.equal(part.targets, rgb[:, 0] % 3) and classes == ["background", "a", "b"]
    with pytest.raises(train.UserError, match="1 channels, the network 3"):
        load(monkeypatch, grey)


def test_data_of_latents(monkeypatch):
    """A network of latents gets images encoded by its VAE, and latents as they are, but none of another.

    Of latents from elsewhere there is no VAE to encode images: these are refused before they are decoded.
    """
    asked, meta = [], dict(vae="some/vae")
    monkeypatch.setattr(probe, "load_data", lambda *args: asked.append(args) or train.Data(
        torch.zeros(4, 4, 8, 8).half(), torch.arange(4) % 2, None, ["a", "b"], None, meta))
    cfg = SimpleNamespace(image_size=64, skip_bad=False, vae="some/vae")
    state = dict(config=cfg, shape=[4, 8, 8], latents=dict(vae="some/vae"))
    for spec in ("folder:a", "latents:b"):
        assert probe.load(spec, "test", "classify", state, CPU)[0].images.shape == (4, 4, 8, 8)
    assert asked == [("folder:a", "test", 64, False, "some/vae", CPU), ("latents:b", "test", 8, False)]
    for wrong in (None, dict(vae="another")):
        with pytest.raises(train.UserError, match="kind that was trained on"):
            probe.load("latents:b", "test", "classify", dict(state, latents=wrong), CPU)
    cfg.vae = None
    with pytest.raises(train.UserError, match="folder:a is not of the kind that was trained on"):
        probe.load("folder:a", "test", "classify", state, CPU)
    assert len(asked) == 4


def draw_voc(root):
    """A small folder like Pascal VOC's: images 60 x 40, left half "bird" (3), right half "tvmonitor" (20).

    The ten columns at either side are "sofa" (18), a stripe between the halves and the first row are void.
    """
    base = root / "data/VOCdevkit/VOC2012"
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (base / name).mkdir(parents=True)
    mask = np.full((40, 60), 18, np.uint8)
    mask[:, 10:30], mask[:, 30:50], mask[:, 29:31], mask[0] = 3, 20, 255, 255
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[:, :30], photo[:, 30:] = (200, 40, 40), (40, 40, 200)
    for split, numbers in dict(train=range(12), val=range(12, 17)).items():
        (base / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{i:06}\n" for i in numbers))
        for i in numbers:
            Image.fromarray(photo + np.uint8(i)).save(base / "JPEGImages" / f"{i:06}.jpg")
            file = Image.fromarray(mask).convert("P")
            file.putpalette([i * 37 % 256 for i in range(768)])
            file.save(base / "SegmentationClass" / f"{i:06}.png")


@pytest.fixture
def offline(monkeypatch):
    """Makes every download of torchvision fail."""
    def fail(*args, **kwargs):
        raise URLError("Name or service not known")
    monkeypatch.setattr(torchvision.datasets.voc, "download_and_extract_archive", fail)


def test_voc(run_probe, tmp_path, monkeypatch, offline, capsys):
    """voc is cropped and resized, its masks unmixed, "test" is its val part; it can be probed, offline.

    Both scores are told, in a file of their own; void pixels (255) neither teach nor count.
    """
    draw_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    images, _, masks, classes = probe.load_voc("train", 64)[:4]
    assert images.dtype == torch.uint8 and images.shape == (12, 3, 64, 64)
    assert masks.dtype == torch.uint8 and masks.shape == (12, 64, 64)
    assert set(masks.unique().tolist()) == {3, 20, 255}
    assert (masks[:, 4:, :28] == 3).all() and (masks[:, 4:, 36:] == 20).all()
    assert (images[:, 0, :, 2] > 120).all() and (images[:, 2, :, -3] > 120).all()
    assert [classes[k - 1] for k in (3, 20)] == ["bird", "tvmonitor"]
    result = run_probe("free", "--task segment --data voc", "probe-segment-voc")
    expected = dict(data="voc", task="segment", metric="miou", classes=21, train_images=12, test_images=5)
    assert {key: result[key] for key in expected} == expected
    miou, pixels = (100 * result["test"][name] for name in ("miou", "accuracy"))
    assert pixels > 70 and miou > 35
    assert f"test {miou:.1f} % (pixel accuracy {pixels:.1f} %)" in capsys.readouterr().out


# --- bad input ---

@pytest.mark.parametrize("flags, words", [
    ("RUN --t -1", "--t -1 0 999"), ("RUN --t 5 1000", "--t 1000 999"), ("RUN --t ten", "--t ten"),
    ("RUN --task segment --data shapes --knn", "--knn --task"), ("RUN --task paint", "paint"),
    ("RUN --images 0", "--images 0 1"), ("RUN --images 9", "9 10"),
    ("RUN --task segment --images 9", "9 10"), ("RUN --augment -1", "--augment -1"),
    ("RUN --seed -1", "--seed -1"), ("RUN --batch-size 0", "--batch-size 0"), ("RUN --nn 5", "--nn"),
    ("RUN --compare runs/A", "run --compare"), ("", "run --compare"),
    ("--compare runs/A --size tiny", "--size probing"), ("--compare runs/A --t 10 30", "--t probing"),
    ("--compare runs/A --task segment --references", "--references probing"),
    ("RUN --data cifar11", "cifar11"), ("RUN --device toaster", "toaster cpu"),
    ("empty", "empty/checkpoint.pt"),
    ("RUN --data folder:bare", "bare has no test images"), ("RUN --data folder:one", "one class"),
    ("RUN --data folder:few", "6 2 10"), ("RUN --data folder:few --task segment", "masks shapes:full"),
    ("RUN --data voc --task segment", "Name or service not known"), ("RUN --data voc", "--task segment")])
def test_refused(folders, capsys, tmp_path, monkeypatch, offline, flags, words):
    """What cannot be done gets one sentence with the flag, its value and what to do; nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    bare = "bare/train/a bare/train/b"
    for name in f"{bare} one/train/a one/test/a few/train/a few/train/b few/test/a few/test/b".split():
        for i in range(3):
            picture(tmp_path / name / f"{i}.png", "red")
    before = tree(folders["classes"])
    argv = flags.replace("RUN", f"{folders['classes']}").split()
    with refused(capsys, *words.split()):
        probe.main(argv if "--device" in flags or "--compare" in flags else [*argv, "--device", "cpu"])
    assert tree(folders["classes"]) == before and not os.listdir(tmp_path / "empty")


def test_test_images_first(folders, tmp_path, capsys, monkeypatch):
    """That there are no test images is said before any training image is read."""
    for name in "ab":
        (tmp_path / "bare/train" / name).mkdir(parents=True)
        (tmp_path / "bare/train" / name / "1.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    with refused(capsys, "bare has no test images"):
        probe.main([str(folders["classes"]), "--data", "folder:bare", "--device", "cpu"])


def test_one_process(folders, capsys, monkeypatch):
    """Under torchrun with two processes it is refused, in one sentence."""
    monkeypatch.setattr(probe, "setup", lambda name: (CPU, 0, 2))
    with refused(capsys, "torchrun"):
        probe.main([str(folders["classes"]), "--device", "cpu"])


# --- slow ---

@pytest.mark.slow
def test_two_minutes(tmp_path):
    """The tiny DiT on shapes is probed within two minutes on a CPU, with the default settings."""
    run = str(tmp_path / "run")
    train.main([*"--model dit --size tiny --data shapes --images 640 --device cpu --out".split(), run])
    start = time.time()
    probe.main([run, "--device", "cpu"])
    assert time.time() - start < 120
    result = json.loads((tmp_path / "run/probe.json").read_text())
    assert np.array(result["held_out"]).shape == (6, 8) and result["train_images"] == 5_000
