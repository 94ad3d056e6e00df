"""probe.py: probes against plain loops, features against hand-made ones, the protocol, files, bad input."""
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import diffusion
import probe
import train
from diffusion import GaussianDiffusion, draw_shapes
from dit_selfcond import DiT
from probe import Part, Source
from test_sample import error, small_run, stamps

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TRAIN, TEST = 60, 40                                # images of shapes in these tests
EASY = dict(seed=0, augment=0, batch_size=500, task="classify")


def few_shapes(n, *args, **kwargs):
    """draw_shapes for impatient ones."""
    return draw_shapes(TRAIN if n == 50_000 else TEST, *args, **kwargs)


def options(**changes):
    """What the functions of probe.py read of the flags."""
    return SimpleNamespace(**{**EASY, **changes})


def fake(net, add_noise=lambda x0, t, noise: x0):
    """Source around a function (x, t) -> {layer: features}; without noise unless add_noise adds it."""
    return Source(lambda x, t, return_features: (x, net(x, t)), SimpleNamespace(add_noise=add_noise),
                  nullcontext, CPU)


def random_images(n, size, seed=0, channels=3):
    """Images (n, channels, size, size) uint8 of random pixels."""
    return torch.randint(256, (n, channels, size, size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def identities(part):
    """The images of a part as a list of bytes."""
    return [image.numpy().tobytes() for image in part.images]


def accuracy(W, b, x, y):
    """Of a linear layer, in percent, computed in float64."""
    said = F.linear(x.double(), W.double(), b.double()).argmax(1)
    return 100 * (said == y).double().mean().item()


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Few shapes, short training of probes, for the whole module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "draw_shapes", few_shapes)
        yield patch


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    """Two runs, trained for two steps: "classes", a DiT, and "free", a UNet without classes.

    EMA and raw weights differ.
    """
    return {name: small_run(tmp_path_factory.mktemp("runs") / name, flags, ["ema", "model"])
            for name, flags in dict(classes="dit", free="unet --no-conditional --schedule linear").items()}


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
    """What each use of probe.extract got and gave."""
    log, real = [], probe.extract

    def extract(source, part, levels, args, layers=None, view=0, pixels=0, learn=False):
        call = SimpleNamespace(source=source, part=part, levels=levels, layers=layers, view=view,
                               what="features" if learn else "scoring", given=[])
        log.append(call)
        for item in real(source, part, levels, args, layers, view, pixels, learn):
            call.given.append(item)
            yield item
    monkeypatch.setattr(probe, "extract", extract)
    return log


@pytest.fixture
def noisings(monkeypatch):
    """x0, t, noise and x_t of every noising."""
    log, real = [], GaussianDiffusion.add_noise

    def add_noise(self, x0, t, noise):
        log.append((x0, t, noise, real(self, x0, t, noise)))
        return log[-1][-1]
    monkeypatch.setattr(GaussianDiffusion, "add_noise", add_noise)
    return log


def refused(capsys, argv):
    """Runs probe.py, which must exit with code 2 and one line on stderr -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        probe.main(argv)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
             if line.strip() and "%|" not in line and "it/s]" not in line]          # bars of tqdm
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# --- probes ---

CLASSES, LEARN, CHECK = 6, 6_000, 20_000


@pytest.fixture(scope="module")
def frozen():
    """Features (N, D) of four places in two widths, labels; as ill-conditioned as those of real layers.

    What tells the classes apart lies in the directions of least variance, a hundred times less than the most.
    """
    def draw(D, seed):
        g = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)       # noqa: E731
        turn, centres = torch.linalg.qr(normal(D, D))[0], 0.8 * normal(CLASSES, D)
        centres[:, :D // 2] = 0
        x = (centres[y] + normal(len(y), D)) * torch.logspace(0, -2, D, dtype=torch.float64)
        return (x @ turn + 3).float()
    y = torch.randint(CLASSES, (LEARN + CHECK,), generator=torch.Generator().manual_seed(0))
    return {("a", 1): draw(16, 1), ("b", 1): draw(16, 2), ("a", 2): draw(24, 3), ("b", 2): draw(24, 4)}, y


def fit(frozen, places, penalties=tuple(probe.PENALTIES), n=LEARN):
    """probe.learn at some places, of both widths, from the first n rows -> {place: {penalty: (W, b)}}."""
    with pytest.MonkeyPatch.context() as patch:
        features = {place: frozen[0][place][:n].clone() for place in places}
        patch.setattr(probe, "collect", lambda *args: (features, frozen[1][:n]))
        return probe.learn(None, None, CLASSES, None, penalties, None)


@pytest.fixture(scope="module")
def fitted(frozen):
    return fit(frozen, list(frozen[0]))


def objective(W, b, x, y, penalty, std=1):
    """What a probe W (K, D), b (K,) on x (N, D) is to minimise; std (D,) where x is not standardised."""
    return F.cross_entropy(F.linear(x, W, b), y) + penalty / 2 * (W * std).square().sum()


def optimum(x, y, penalty, K=CLASSES):
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


@pytest.mark.parametrize("penalty", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("place", [("a", 1), ("b", 1), ("a", 2), ("b", 2)])
def test_fit_is_converged(frozen, fitted, place, penalty):
    """A probe is as good, within 0.3 points, as one alone that a plain loop trains to convergence.

    Its loss, penalty included, is the same, too.
    """
    raw, y = frozen[0][place].double(), frozen[1]
    std, mean = torch.std_mean(raw[:LEARN], 0)
    x = (raw - mean) / std
    W, b, loss = optimum(x[:LEARN], y[:LEARN], penalty)
    best = accuracy(W, b, x[LEARN:], y[LEARN:])
    assert 70 < best < 95 or penalty == 1e-2
    mine, bias = (value.double() for value in fitted[place][penalty])
    assert abs(accuracy(mine, bias, raw[LEARN:], y[LEARN:]) - best) < 0.3
    assert abs(objective(mine, bias, raw[:LEARN], y[:LEARN], penalty, std) - loss) < 1e-2 * loss


@pytest.mark.parametrize("n", [20, 40, 400])
def test_few_images(frozen, n):
    """Also where images are fewer than features (24), a probe becomes what the loop finds.

    There, all are told apart without error: without a penalty the weights would grow for ever.
    """
    raw, y = frozen[0]["a", 2].double(), frozen[1]
    std, mean = torch.std_mean(raw[:n], 0)
    x = (raw - mean) / std
    probes = fit(frozen, [("a", 2)], n=n)["a", 2]
    assert all(value.isfinite().all() for pair in probes.values() for value in pair)
    for penalty, close in {1e-2: 0.3, 1e-3: 2}.items():
        best = accuracy(*optimum(x[:n], y[:n], penalty)[:2], x[LEARN:], y[LEARN:])
        assert abs(accuracy(*probes[penalty], raw[LEARN:], y[LEARN:]) - best) < close, penalty


def test_fit_like_sklearn(frozen, fitted):
    """A probe is as accurate, within 0.3 points, as scikit-learn's LogisticRegression on scaled features."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = frozen[0]["a", 2].double().numpy(), frozen[1].numpy()
    std, mean = x[:LEARN].std(0), x[:LEARN].mean(0)
    x, raw = (x - mean) / std, frozen[0]["a", 2][LEARN:]
    for penalty in (1e-3, 1e-5):
        other = linear_model.LogisticRegression(C=1 / (penalty * LEARN), max_iter=3000)
        best = 100 * other.fit(x[:LEARN], y[:LEARN]).score(x[LEARN:], y[LEARN:])
        assert abs(accuracy(*fitted["a", 2][penalty], raw, frozen[1][LEARN:]) - best) < 0.3


@pytest.mark.parametrize("place", [("b", 1), ("a", 2)])
def test_alone_as_among_many(frozen, fitted, place):
    """Probes that learn at once share the images and nothing else: alone, each becomes the same."""
    for penalty, alone in fit(frozen, [place])[place].items():
        for mine, among in zip(alone, fitted[place][penalty]):
            assert mine.shape == among.shape and error(mine, among) < 2e-3 * among.abs().max().item()


def test_dead_features():
    """Features that are the same for all images do no harm."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.cat([F.one_hot(y, 3) + 0.1 * torch.randn(300, 3, generator=g), torch.full((300, 2), 7.0)], 1)
    for W, b in probe.fit([x], y, 3, probe.PENALTIES)[0].values():
        assert W.isfinite().all() and accuracy(W, b, x, y) > 99


def test_correlated_features():
    """1,500 features that are all but mixtures of 4 are no harder: rounding makes no probe diverge."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3000) % 3
    few = torch.cat([F.one_hot(y, 3) + 0.4 * torch.randn(3000, 3, generator=g),
                     3 * torch.randn(3000, 1, generator=g)], 1)
    x = few @ torch.randn(4, 1500, generator=g) + 1e-4 * torch.randn(3000, 1500, generator=g)
    best = accuracy(*probe.fit([few], y, 3, [1e-6])[0][1e-6], few, y)
    for W, b in probe.fit([x], y, 3, probe.PENALTIES)[0].values():
        assert abs(accuracy(W, b, x, y) - best) < 1


def test_outlier():
    """An image far out, on the wrong side, makes no probe diverge: each is as good as the loop's."""
    g = torch.Generator().manual_seed(0)
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
    y = torch.arange(260).repeat(3)
    x, K = F.one_hot(y, 260).float(), 260
    W, b = probe.fit([x], y, K, [1e-2, 1e-3, 1e-4])[0][1e-4]
    assert accuracy(W, b, x, y) == 100
    part = Part(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.full((3,), 255))
    wrong = {("x", 1): {0.1: (torch.zeros(K, 1), torch.arange(K).float())}}     # says 259
    scores = probe.score(wrong, K, fake(lambda x, t: {"x": x}), part, [1], options())
    assert scores["x", 1, 0.1]["accuracy"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_network(folders, capsys, monkeypatch, value):
    """Features that are not finite are one sentence; nothing is written."""
    before, real = stamps(folders["classes"]), probe.load_run

    def damaged(*args):
        state, net, diffusion = real(*args)
        next(net.parameters()).data[:] = value
        return state, net, diffusion
    monkeypatch.setattr(probe, "load_run", damaged)
    line = refused(capsys, [str(folders["classes"]), "--device", "cpu", "--t", "10"])
    assert "not finite" in line and "--precision" in line
    assert stamps(folders["classes"]) == before


def test_void_is_not_learned():
    """Pixels of no class (255) teach nothing: with other features there, the probes stay good."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(900) % 3
    x = F.one_hot(y, 3) + 0.1 * torch.randn(900, 3, generator=g)
    known = y.clone()
    y[::2], x[::2] = 255, x[::2].roll(1, 1)
    (found,) = probe.fit([x], y, 3, probe.PENALTIES)
    assert list(found) == probe.PENALTIES
    for W, b in found.values():
        assert W.shape == (3, 3) and b.shape == (3,) and accuracy(W, b, x[1::2], known[1::2]) > 99


# --- features ---

@pytest.mark.parametrize("run", ["classes", "free"])
def test_features(folders, run_probe, spied, noisings, run):
    """Features are those of the EMA network in eval mode, without class, at x_t, averaged over space."""
    run_probe(run)
    call = next(call for call in spied if call.what == "scoring")
    assert not any(module.training for module in call.source.net.modules())
    state = torch.load(folders[run] / "checkpoint.pt")
    cfg = SimpleNamespace(**state["config"])
    net_class = train.MODELS[cfg.model]
    abar = GaussianDiffusion(schedule=cfg.schedule).abar.double()
    x0 = call.part.images.double() / 127.5 - 1
    assert all(torch.equal(targets, call.part.targets) for _, _, _, targets in call.given)
    assert [t for _, t, _, _ in call.given] == sorted([10, 300] * (len(call.given) // 2))
    for n in (10, 300):
        found = {name: h for name, t, h, _ in call.given if t == n}
        noise = next(noise for x, ts, noise, _ in noisings if len(x) == len(x0) and ts[0] == n)
        x_t = (abar[n].sqrt() * x0 + (1 - abar[n]).sqrt() * noise.double()).float()
        off = {}
        for name in ("ema", "model"):
            net = net_class(16, 3, state["num_classes"], **net_class.SIZES["tiny"]).eval()
            net.load_state_dict(state[name])
            feats = {}
            for y in [None, call.part.targets] if run == "classes" else [None]:
                null = torch.full((len(x0),), state["num_classes"]) if run == "classes" else None
                _, feats = net(x_t, torch.full((len(x0),), n), null if y is None else y, return_features=True)
                assert list(found) == list(feats), "all layers, in depth order"
                off[name, y is None] = max(
                    error(found[key].detach(), h.detach().mean((2, 3))) for key, h in feats.items())
        assert all(h.dtype == torch.float32 for h in found.values())
        right = off.pop(("ema", True))
        assert right < 1e-3 and all(wrong > 100 * right for wrong in off.values()), (right, off)


def test_noise(run_probe, noisings):
    """The noise is normal, another one for every image, the same for all levels of an image."""
    run_probe("classes", "--batch-size 20")
    pairs = list(zip(noisings[:6:2], noisings[1:6:2]))               # of the first images to learn from
    for (x0, t, noise, _), (other, u, again, _) in pairs:
        assert (t[0], u[0]) == (10, 300) and torch.equal(x0, other) and torch.equal(noise, again)
    noise = torch.cat([pair[0][2] for pair in pairs])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert len({image.numpy().tobytes() for image in noise}) == len(noise) == 54


def test_test_noise_is_new():
    """Test and held-out images have noise that no probe has learned from: from noise alone nothing is known.

    Here images are black and sorted by class, as in a folder; all that could be recognised is the noise.
    """
    y = torch.arange(200) // 100
    source = fake(lambda x, t: {"x": x.flatten(1)[:, :, None, None]}, GaussianDiffusion().add_noise)
    part = Part(torch.zeros(200, 3, 16, 16, dtype=torch.uint8), y)
    result = probe.study(source, part, Part(*part), 2, [500], options())
    assert result["test"]["accuracy"] < 0.65, "the test images have the noise of the training images"
    assert probe.knn(source, part, Part(*part), ("x", 500), 2, options()) < 0.65


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_any_batch_size(task):
    """Each image of a part is passed once, in order, and has the same features for any --batch-size.

    Not the same noise, though: it is drawn batch by batch; so here there is none.
    """
    masks = torch.arange(7 * 64).view(7, 8, 8) % 5
    part = Part(random_images(7, 8), torch.arange(7) if task == "classify" else masks)
    source, got = fake(lambda x, t: {"a": F.avg_pool2d(x, 2), "b": x + t[:, None, None, None]}), {}
    for size in (500, 3, 1):
        items = list(probe.extract(source, part, [4, 9], options(batch_size=size)))
        places = [("a", 4), ("b", 4), ("a", 9), ("b", 9)]
        assert [item[:2] for item in items] == places * len(range(0, 7, size))
        got[size] = [torch.cat([h for *here, h, _ in items if tuple(here) == place]) for place in places]
        got[size].append(torch.cat([y for *here, _, y in items if tuple(here) == places[0]]))
        assert torch.equal(got[size][-1], part.targets.flatten())
        assert max(map(error, got[size], got[500])) < 1e-5
    assert abs(error(got[1][1], got[1][3]) - 5) < 1e-4, "t reaches the network"


def test_half_precision_features():
    """Under autocast, features are averaged in float32: hundreds of halves would lose the last digits."""
    x = torch.rand(2, 3, 32, 32)
    source = fake(lambda _, t: {"a": x.bfloat16()})
    (_, _, h, _), = probe.extract(source, Part(random_images(2, 32), torch.arange(2)), [1], options())
    assert h.dtype == torch.float32
    assert error(h, x.bfloat16().double().mean((2, 3))) < 1e-6


def test_seed(run_probe, spied):
    """The same seed gives the same probe.json but for the seconds; another one other noise and split."""
    results, held = [], []
    for seed in (0, 0, 3):
        spied.clear()
        results.append(run_probe("classes", f"--seed {seed}"))
        held.append(next(set(identities(call.part)) for call in spied if call.what == "scoring"))
        del results[-1]["seconds"]
    assert results[0] == results[1] and held[0] == held[1]
    assert results[0]["held_out"] != results[2]["held_out"] and held[0] != held[2]
    part = Part(random_images(4, 8), torch.arange(4))
    source = fake(lambda x, t: {"x": x}, lambda x0, t, noise: noise)
    a, b, c = (next(probe.extract(source, part, [1], options(seed=seed)))[2] for seed in (0, 0, 3))
    assert torch.equal(a, b) and error(a, c) > 0.01


# --- to segment ---

def test_pixels_are_interpolated():
    """A pixel's features are those of F.interpolate(mode="bilinear", align_corners=False) to the mask."""
    masks = torch.arange(3 * 256).view(3, 16, 16)   # every pixel has its own number
    g = torch.Generator().manual_seed(0)
    feats = {f"{side}": torch.randn(3, 5, side, side, generator=g) for side in (1, 2, 3, 8, 16)}
    source, part = fake(lambda x, t: feats), Part(random_images(3, 16), masks)
    for pixels in (0, 40):
        items = list(probe.extract(source, part, [1], options(), pixels=pixels))
        found, targets = {name: h for name, _, h, _ in items}, items[0][3]
        if pixels == 0:
            assert torch.equal(targets, masks.flatten()), "all pixels, in order"
        else:
            assert torch.equal(targets // 256, torch.arange(3).repeat_interleave(40))
            assert len(set(targets.tolist())) > 100 and len(set((targets % 256).tolist())) > 70
        for name, h in feats.items():
            whole = F.interpolate(h, size=(16, 16), mode="bilinear", align_corners=False)
            assert error(found[name], whole.movedim(1, 3).flatten(0, 2)[targets]) < 1e-5, (name, pixels)


@pytest.mark.parametrize("views", [0, 2])
def test_collect(monkeypatch, views):
    """The features to learn from lie by place, view after view and image by image, as they were extracted."""
    masks = torch.arange(5 * 64, dtype=torch.uint8).view(5, 8, 8) % 7
    feats = lambda x, t: {"a": x * t[0], "b": torch.cat([x, -x], 1) + t[0], "c": x - t[0]}  # noqa: E731
    for targets, m in (torch.arange(5), 0), (masks, 21), (masks, 1):
        monkeypatch.setattr(probe, "PIXELS", 5 * m + 2 if m > 1 else 3)     # m an image, but at least 1
        part, args = Part(random_images(5, 8), targets), options(batch_size=2, augment=views)
        x, y = probe.collect(fake(feats), part, [3, 8], args, ["a", "b"])
        assert list(x) == [("a", 3), ("b", 3), ("a", 8), ("b", 8)]
        items = [item for view in (range(1, views + 1) or [0]) for item in probe.extract(
            fake(feats), part, [3, 8], args, view=view, pixels=m, learn=True)]
        for place, h in x.items():
            expected = torch.cat([h for *here, h, _ in items if tuple(here) == place])
            assert h.dtype == torch.float32 and torch.equal(h, expected)
        assert torch.equal(y, torch.cat([targets for *here, _, targets in items if here == ["a", 3]]))
        assert len(y) == 5 * (m or 1) * max(views, 1) and y.dtype == torch.int64


def test_scores():
    """Accuracy and mean IoU are those of a plain loop over pixels and classes.

    Pixels of no class (255) do not count, nor do classes that do not occur, if only by the mean.
    """
    g, K = torch.Generator().manual_seed(0), 5
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
    ious = []
    assert 3 in [s for _, s in pairs], "class 3 is said but does not occur"
    for k in range(3):
        both, one = sum(a == k == s for a, s in pairs), sum(k in (a, s) for a, s in pairs)
        ious.append(both / one)
    assert abs(result[place]["accuracy"] - sum(a == s for a, s in pairs) / len(pairs)) < 1e-6
    assert abs(result[place]["miou"] - sum(ious) / 3) < 1e-6
    assert list(result) == [place, ("x", 7, 0.2)] and result[place] != result["x", 7, 0.2]
    assert 0.1 < result[place]["miou"] < 0.8


def test_segment(run_probe, capsys):
    """--task segment on shapes: mean IoU over background and classes; a file of its own; both scores told."""
    result = run_probe("free", "--task segment", "probe-segment")
    assert (result["metric"], result["classes"], result["task"]) == ("miou", 11, "segment")
    assert {"accuracy", "miou"} == set(result["test"]) and 0 < result["test"]["miou"] < 1
    out = capsys.readouterr().out
    miou, pixels = (100 * result["test"][name] for name in ("miou", "accuracy"))
    assert f"test {miou:.1f} % (pixel accuracy {pixels:.1f} %)" in out


# --- the protocol ---

def planted(n, seed):
    """Part whose first pixels have the colour of the class; the others are random."""
    y = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    images = random_images(n, 4, seed)
    images[:, :, 0, 0] = 255 * F.one_hot(y, 3).byte()
    return Part(images, y)


def reveal(x, t):
    """Features of a network that shows the first pixel in layer "b" at t = 30, and nowhere else."""
    other = {name: x[:, 1:, 1:3] for name in "ac"}                           # pixels that know nothing
    return {"a": other["a"], "b": x[:, :, :1, :1] if t[0] == 30 else x[:, :, 3:, 3:], "c": other["c"]}


def test_protocol(spied):
    """Layer and t are chosen on a tenth of the training images; the test set is scored once, there."""
    train_part, test_part, args = planted(205, 1), planted(80, 2), options()
    result = probe.study(fake(reveal), train_part, test_part, 3, [10, 30, 60], args)
    assert (result["best"]["layer"], result["best"]["t"]) == ("b", 30) and result["test"]["accuracy"] == 1
    assert result["layers"] == ["a", "b", "c"] and result["levels"] == [10, 30, 60]
    assert np.array(result["held_out"]).shape == (3, 3) and result["held_out"][1][1] == 1
    assert all(value < 0.75 for i, row in enumerate(result["held_out"]) for j, value in enumerate(row)
               if (i, j) != (1, 1))
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


def test_choice_ignores_test_set():
    """A test set with scrambled labels changes its own score and nothing else."""
    train_part, test_part = planted(100, 1), planted(300, 2)
    wrong = test_part._replace(targets=(test_part.targets + 1) % 3)
    results = [probe.study(fake(reveal), train_part, part, 3, [10, 30], options())
               for part in (test_part, wrong)]
    assert [result.pop("test")["accuracy"] for result in results] == [1, 0]
    assert results[0] == results[1]


def test_segment_is_chosen_by_miou(monkeypatch):
    """To segment, the place of the best mean IoU is chosen, not that of the best pixel accuracy."""
    scores = {("a", 1, 0.1): dict(accuracy=0.9, miou=0.3), ("b", 1, 0.1): dict(accuracy=0.8, miou=0.6)}
    monkeypatch.setattr(probe, "PENALTIES", [0.1])
    monkeypatch.setattr(probe, "score", lambda *args: scores)
    monkeypatch.setattr(probe, "learn", lambda *args: {})
    part = Part(random_images(20, 4), torch.zeros(20, 4, 4).long())
    for task, layer, values in ("segment", "b", [[0.3], [0.6]]), ("classify", "a", [[0.9], [0.8]]):
        result = probe.study(None, part, part, 2, [1], options(task=task))
        assert result["best"] == dict(layer=layer, t=1, penalty=0.1, **scores[layer, 1, 0.1])
        assert result["held_out"] == values


def test_penalty_is_chosen(monkeypatch):
    """Of each place the best penalty counts; the final probe has the chosen place's, reached as before."""
    scores = {("a", 1): [0.5, 0.7, 0.6], ("b", 1): [0.8, 0.3, 0.1]}
    learned, asked = [], []

    def learn(source, part, K, levels, penalties, args, layers=None):
        learned.append((penalties, layers))
        return "probes"

    def score(probes, K, source, part, levels, args, layers=None):
        asked.append(part)
        return {(*place, penalty): dict(accuracy=value) for place, values in scores.items()
                for penalty, value in zip([0.3, 0.2, 0.1], values)}
    monkeypatch.setattr(probe, "PENALTIES", [0.3, 0.2, 0.1])
    monkeypatch.setattr(probe, "learn", learn)
    monkeypatch.setattr(probe, "score", score)
    part = Part(random_images(20, 4), torch.zeros(20))
    for n, (best, some) in enumerate([(("b", 0.3), [0.3]), (("a", 0.2), [0.3, 0.2])]):
        result = probe.study(None, part, part, 2, [1], options())
        assert (result["best"]["layer"], result["best"]["penalty"]) == best
        assert result["held_out"] == [[0.7], [[0.8, 0.1][n]]]
        assert learned[-2:] == [([0.3, 0.2, 0.1], None), (some, [best[0]])] and asked[-1] is part
        assert result["test"] == dict(accuracy=0.8 if n == 0 else 0.7)
        scores["b", 1] = [0.1, 0.1, 0.1]


@pytest.mark.parametrize("flags, count", [("", TRAIN), ("--images 25", 25)])
def test_images(run_probe, spied, flags, count):
    """--images takes so many training images at random, and never fewer test images."""
    result = run_probe("classes", flags)
    assert (result["train_images"], result["test_images"]) == (count, TEST)
    learn, held, final, test = spied
    assert len(held.part.images) == count // 10 and len(final.part.images) == count
    assert len(learn.part.images) == count - count // 10 and len(test.part.images) == TEST
    whole = identities(Part(few_shapes(50_000, 0, 16)[0], None))
    some = identities(final.part)
    assert len(set(some)) == count and set(some) <= set(whole) and (some != whole[:25] or count != 25)


def test_shapes_are_limited(run_probe, monkeypatch):
    """Of shapes, 5,000 of the 50,000 are used unless --images asks for more."""
    assert probe.SOME_SHAPES == 5_000
    monkeypatch.setattr(probe, "SOME_SHAPES", 30)
    assert run_probe("classes")["train_images"] == 30
    assert run_probe("classes", "--images 40")["train_images"] == 40


# --- what is written ---

def test_result(folders, run_probe, capsys):
    """probe.json says what was done with what; the terminal shows the table, the best place and the files."""
    result = run_probe("classes")
    names = [f"block_{n}" for n in range(1, 7)]
    assert set(result) == set("""run data task bottleneck metric layers levels held_out best test classes
        train_images test_images trained_on seed augment device versions seconds""".split())
    assert (result["run"], result["data"], result["task"]) == ("classes", "shapes", "classify")
    assert (result["layers"], result["levels"], result["bottleneck"]) == (names, [10, 300], "block_3")
    assert (result["classes"], result["trained_on"], result["seed"], result["augment"]) == (10, 16, 0, 0)
    assert (result["metric"], result["device"]) == ("accuracy", "cpu")
    assert result["best"]["penalty"] in probe.PENALTIES
    assert torch.__version__ in result["versions"] and "Python 3" in result["versions"]
    assert 0 < result["seconds"] < 60
    values, best = np.array(result["held_out"]), result["best"]
    assert values.shape == (6, 2) and (0 <= values).all() and (values <= 1).all()
    i, j = names.index(best["layer"]), [10, 300].index(best["t"])
    assert values[i, j] == values.max() and abs(best["accuracy"] - values.max()) < 1e-4
    out = capsys.readouterr().out.splitlines()
    assert ["t", "10", "300"] in [line.split() for line in out]
    for n, name in enumerate(names):
        line = next(line for line in out if line.strip().startswith(name))
        assert [float(word.rstrip("*")) for word in line.split()[1 + (n == 2):]] == [
            round(100 * value, 1) for value in values[n].tolist()]
        assert line.split()[1].startswith("z") == (n == 2), "z marks the bottleneck"
        assert line.count("*") == (n == i)
    assert any(line == probe.summary(result) for line in out)
    assert f"test {100 * result['test']['accuracy']:.1f} %" in probe.summary(result)
    assert str(folders["classes"] / "probe.json") in out[-1]
    with Image.open(folders["classes"] / "probe.png") as picture:
        assert picture.format == "PNG" and np.ptp(np.array(picture)) == 255


def made(layers=4, levels=(1, 10, 30), run="made", **changes):
    """A result like those of study, with values that rise from layer to layer and level to level."""
    values = [[round(0.3 + 0.05 * i + 0.01 * j, 5) for j in range(len(levels))] for i in range(layers)]
    best = dict(layer=f"block_{layers}", t=levels[-1], accuracy=values[-1][-1], miou=0.2)
    result = dict(run=run, data="shapes", metric="accuracy", layers=[f"block_{n + 1}" for n in range(layers)],
                  levels=list(levels), held_out=values, best=best, bottleneck=f"block_{layers // 2 or 1}",
                  test=dict(accuracy=0.5, miou=0.25), train_images=5_000, augment=0, seed=0)
    return result | changes


def pixels_of(draw, result, file):
    """The picture that draw makes, as an array (H, W, 3) of int."""
    draw(result, file)
    with Image.open(file) as picture:
        return np.array(picture.convert("RGB")).astype(int)


def test_map_geometry(tmp_path):
    """probe.png grows with layers and levels; light cells are high, the best one is framed in red."""
    file, levels = tmp_path / "map.png", (1, 10, 30, 60, 100, 200, 300, 500)
    small, tall, wide = (pixels_of(probe.draw_map, made(*size), file)
                         for size in [(4, levels), (14, levels), (4, levels + (700, 900))])
    assert tall.shape[0] - small.shape[0] >= 10 * 18 and tall.shape[1] == small.shape[1]
    assert wide.shape[1] - small.shape[1] >= 2 * 40 and wide.shape[0] == small.shape[0]
    assert error(pixels_of(probe.draw_map, made(1, (1,)), file)[0, 0], 255) == 0, "one place is enough"

    def centre(image):                              # of the red frame: x, y
        y, x = np.nonzero((image[..., 0] > 200) & (image[..., 1:].max(2) < 60))
        return np.array([(x.min() + x.max()) / 2, (y.min() + y.max()) / 2])
    at = {}
    for i in range(4):
        for t in (1, 10, 500):
            best = dict(layer=f"block_{i + 1}", t=t, accuracy=0.4, miou=0.2)
            at[i, t] = centre(pixels_of(probe.draw_map, made(4, levels, best=best), file))
    step, down = at[0, 10] - at[0, 1], at[1, 1] - at[0, 1]
    assert step[0] > 40 and step[1] == 0 and down[0] == 0 and down[1] > 18
    for (i, t), place in at.items():
        assert error(place, at[0, 1] + i * down + levels.index(t) * step) <= 1
    for (i, t), colour in {(0, 1): probe.COLOURS[0], (3, 500): probe.COLOURS[-1]}.items():
        x, y = (at[i, t] - 0.3 * (step + down)).round().astype(int)          # beside the number
        assert error(small[y, x], colour) <= 3, (i, t)


@pytest.mark.parametrize("draw", [probe.draw_map, lambda result, file: probe.draw_curves([result], file)])
@pytest.mark.parametrize("result", [
    made(4, (10,), run="uvit-small-cifar10", data="folder:/home/me/pictures/birds-and-bees", metric="miou"),
    made(13, probe.LEVELS, run="unet-tiny-shapes-full-baseline", metric="miou", data="shapes:full")])
def test_picture_is_whole(tmp_path, draw, result):
    """No text of the pictures is cut off at the edges, also where the names of run and data are long."""
    image = pixels_of(draw, result, tmp_path / "map.png")
    for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
        assert error(edge, 255) == 0


@pytest.mark.parametrize("flags, name", [
    ("", "probe"), ("--task segment", "probe-segment"), ("--data shapes:full", "probe-shapes-full"),
    ("--task segment --data voc", "probe-segment-voc"), ("--data folder:/a/my-birds", "probe-a-my-birds")])
def test_file_names(flags, name):
    """Each task and each other data set has its own files, so that none overwrites another's."""
    assert probe.stem(probe.parse(["run", *flags.split()])) == name


def test_compare(tmp_path, capsys, monkeypatch):
    """--compare draws the curves of all runs as probe-compare.png in the first one's folder, and no more."""
    results = dict(A=made(4, run="A"), B=made(4, run="B"), C=made(7, run="C"))
    results["B"]["held_out"] = [[value - 0.1 for value in row] for row in results["B"]["held_out"]]
    for name, result in results.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "probe.json").write_text(json.dumps(result))
    monkeypatch.setattr(probe, "load_run", lambda *args: pytest.fail("it loads a network"))
    for names in ("AB", "BA", "ABC"):
        probe.main(["--compare", *(str(tmp_path / name) for name in names)])
        file = tmp_path / names[0] / "probe-compare.png"
        out = capsys.readouterr().out.splitlines()
        assert out == [*(probe.summary(results[name]) for name in names), f"curves: {file}"]
        with Image.open(file) as picture:
            image = np.array(picture).astype(int)
        rows = {}
        for name, colour in zip(names, ["d62728", "1f77b4", "2ca02c"]):
            near = np.abs(image - list(bytes.fromhex(colour))).max(2) < 30
            near[:56 + 24 * len(names)] = False                              # the legend
            y, x = np.nonzero(near)
            rows[name] = y.mean()
            left, right = (y[x < x.min() + 40].mean(), y[x > x.max() - 40].mean())
            assert left > right + 50 and np.ptp(x) > 400, "every curve rises from the first layer to the last"
        assert rows["B"] > rows["A"] + 30, "A is better than B, so its curve is higher"
        file.unlink()
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["probe.json"] * 3


def test_curve(tmp_path):
    """A curve shows the best held-out score of each layer over t, and a ring marks the bottleneck."""
    def draw(**changes):
        result = made(5, bottleneck="none") | changes
        return pixels_of(lambda one, file: probe.draw_curves([one], file), result, tmp_path / "curves.png")
    plain, values = draw(), made(5)["held_out"]
    for others in [[[0.1, 0.2, row[-1]] for row in values], [[row[-1], 0.0, 0.2] for row in values]]:
        assert error(draw(held_out=others), plain) == 0
    assert error(draw(held_out=[row[:1] + row[:1] for row in values[:1]] + values[1:]), plain) > 0
    rings = []
    for n in range(1, 6):
        y, x = np.nonzero(np.abs(draw(bottleneck=f"block_{n}") - plain).max(2))
        rings.append((x.mean(), y.mean()))
        assert 8 < np.ptp(x) < 30 and 8 < np.ptp(y) < 30
    assert np.ptp(np.diff([x for x, _ in rings])) < 4, "evenly spaced, one layer after the other"
    assert rings == sorted(rings) and [y for _, y in rings] == sorted((y for _, y in rings), reverse=True)


@pytest.mark.parametrize("content", [None, "", '{"run": "B"', "{}", "[]", "null", '{"best": 3}', "directory"])
def test_compare_needs_results(tmp_path, capsys, content):
    """A result that is missing, damaged or something else is named in a sentence; no picture is drawn."""
    for name in "AB":
        (tmp_path / name).mkdir()
    (tmp_path / "A/probe.json").write_text(json.dumps(made()))
    if content == "directory":
        (tmp_path / "B/probe.json").mkdir()
    elif content is not None:
        (tmp_path / "B/probe.json").write_text(content)
    line = refused(capsys, ["--compare", str(tmp_path / "A"), str(tmp_path / "B")])
    assert str(tmp_path / "B/probe.json") in line
    assert os.listdir(tmp_path / "A") == ["probe.json"]


def test_compare_same_task(tmp_path, capsys):
    """--compare with --task and --data reads the results of that task and data."""
    (tmp_path / "probe.json").write_text(json.dumps(made()))
    flags = ["--compare", str(tmp_path), "--task", "segment", "--data", "voc"]
    assert "probe-segment-voc.json" in refused(capsys, flags)
    (tmp_path / "probe-segment-voc.json").write_text(json.dumps(made(metric="miou")))
    probe.main(flags)
    assert (tmp_path / "probe-segment-voc-compare.png").exists()


@pytest.mark.parametrize("what, other", [
    ("data", "cifar10"), ("levels", [1, 10, 60]), ("train_images", 99), ("augment", 2), ("seed", 1)])
def test_compare_like_with_like(tmp_path, capsys, what, other):
    """Runs that were probed on different data, or otherwise, are not compared."""
    for name, result in dict(A=made(), B=made(**{what: other})).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "probe.json").write_text(json.dumps(result))
    line = refused(capsys, ["--compare", str(tmp_path / "A"), str(tmp_path / "B")])
    assert what in line and str(other) in line and str(made()[what]) in line
    assert os.listdir(tmp_path / "A") == ["probe.json"]


@pytest.mark.parametrize("where, kept", [("study", False), ("knn", True), ("references", True)])
def test_memory_of_the_gpu(folders, capsys, monkeypatch, where, kept):
    """A GPU whose memory is too small is one sentence; what was found before that is kept."""
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(probe, where, fail)
    monkeypatch.setattr(probe, "ITERATIONS", 1)
    file = folders["classes"] / "probe.json"
    file.unlink(missing_ok=True)
    flags = [str(folders["classes"]), "--device", "cpu", "--t", "10", "--knn", "--references"]
    line = refused(capsys, flags)
    assert "memory" in line and "--images" in line and "--t" in line and "--batch-size" in line
    assert file.exists() == kept and (not kept or "test" in json.loads(file.read_text()))


def test_full_disk(folders, run_probe, capsys, monkeypatch):
    """A disk that is full leaves the last results whole, and no remains beside them."""
    run_probe("classes")
    files = {file.name: file.read_bytes() for file in folders["classes"].iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    flags = [str(folders["classes"]), "--device", "cpu", "--t", "10", "--seed", "5"]
    assert "No space left" in refused(capsys, flags)
    assert {file.name: file.read_bytes() for file in folders["classes"].iterdir()} == files


# --- views ---

def test_flip_and_shift():
    """Half of the views are flipped, all moved by S / 8 at most, image and mask alike; edges reflect."""
    n, S = 400, 16
    masks = torch.arange(S * S).view(1, S, S).expand(n, -1, -1)
    g = torch.Generator().manual_seed(0)
    x, moved = probe.flip_and_shift(torch.stack([masks, -masks], 1).float(), masks, g)
    assert x.shape == (n, 2, S, S) and moved.shape == (n, S, S)
    assert torch.equal(x[:, 0].long(), moved) and torch.equal(x[:, 1].long(), -moved)
    plain, seen = np.arange(S * S).reshape(S, S), []
    for view in moved.numpy():
        for down in range(-3, 4):
            for right in range(-3, 4):
                at = np.pad(plain, 3, "reflect")[3 + down:, 3 + right:][:S, :S]
                seen += [(down, right, flip) for flip in (False, True)
                         if np.array_equal(view, at[:, ::-1] if flip else at)]
    assert len(seen) == n, "every view is one of these"
    assert {(down, right) for down, right, _ in seen} == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    assert 0.4 < np.mean([flip for _, _, flip in seen]) < 0.6
    labels = torch.arange(n)
    assert torch.equal(probe.flip_and_shift(x, labels, g)[1], labels), "classes stay"


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_views(run_probe, spied, noisings, task):
    """--augment VIEWS extracts that often to learn; held-out and test images are never moved."""
    name = "probe" if task == "classify" else "probe-segment"
    result = run_probe("classes", f"--augment 3 --task {task}", name)
    assert result["augment"] == 3
    assert [(call.what, call.view) for call in spied] == [
        *(("features", view) for view in (1, 2, 3)), ("scoring", 0)] * 2
    starts = [x0 for x0, _, _, _ in noisings if len(x0) == TRAIN]            # of the final probe's views
    plain = spied[4].part.images / 127.5 - 1
    assert len(starts) == 3
    assert all(error(a, b) > 0.1 for a, b in zip(starts, [*starts[1:], plain]))
    x0 = next(x0 for x0, _, _, _ in noisings if len(x0) == TEST)
    assert error(x0, spied[-1].part.images / 127.5 - 1) < 1e-6


# --- other judges ---

def test_knn():
    """--knn is what a plain loop in float64 finds: 20 neighbours by cosine that vote with exp(cos / 0.07)."""
    g, K = torch.Generator().manual_seed(0), 5
    centres = torch.randn(K, 8, generator=g)
    scale = torch.logspace(-1, 1, 8)

    def part(n):
        y = torch.randint(K, (n,), generator=g)
        images = torch.zeros(n, 8, 2, 2)
        images[:] = (128 + 12 * (centres[y] + 1.1 * torch.randn(n, 8, generator=g)))[:, :, None, None]
        return Part(images.round().clamp(0, 255).byte(), y)
    learn, test = part(300), part(400)
    source = fake(lambda x, t: {"a": -x, "b": x * scale[:, None, None] + t[0]})
    got = probe.knn(source, learn, test, ("b", 6), K, options(batch_size=150))
    x, other = ((p.images[:, :, 0, 0].double().numpy() / 127.5 - 1) * scale.double().numpy() + 6
                for p in (learn, test))
    mean, std = x.mean(0), x.std(0, ddof=1)
    x, other = ((z - mean) / (std + 1e-6) for z in (x, other))
    x, other = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, other))
    right = {}
    for count, temperature in (20, 0.07), (1, 0.07), (20, 1e9):
        right[count, temperature] = 0
        for z, label in zip(other, test.targets.tolist()):
            cosine, votes = x @ z, np.zeros(K)
            for i in np.argsort(-cosine)[:count]:
                votes[learn.targets[i]] += np.exp(cosine[i] / temperature)
            right[count, temperature] += int(votes.argmax()) == label
    assert got * 400 == pytest.approx(right.pop((20, 0.07)))
    assert got * 400 not in right.values(), "the case does not tell neighbours and temperatures apart"


def test_knn_line(run_probe, monkeypatch, capsys):
    """--knn is computed at the chosen place, printed and written."""
    seen = []
    monkeypatch.setattr(probe, "knn", lambda source, train, test, place, K, args: seen.append(place) or 0.375)
    result = run_probe("classes", "--knn")
    assert result["knn"] == 0.375 and seen == [(result["best"]["layer"], result["best"]["t"])]
    assert "20 nearest neighbours there: test 37.5 %" in capsys.readouterr().out


def test_references(folders, run_probe, monkeypatch, capsys):
    """--references prints what the network before training and the pixels reach, and which is not beaten."""
    scores, studied = [0.5, 0.5, 0.4], []

    def study(source, train, test, K, levels, args):
        studied.append((source, train, test, levels))
        result = made(test=dict(accuracy=scores[len(studied) - 1], miou=0))
        return {key: result[key] for key in "metric layers levels held_out best test".split()}
    monkeypatch.setattr(probe, "study", study)
    result = run_probe("classes", "--references")
    assert set(result["references"]) == {"untrained", "pixels"}
    assert [result["references"][name]["test"]["accuracy"] for name in ("untrained", "pixels")] == [0.5, 0.4]
    out = capsys.readouterr().out.splitlines()
    rows = {name: next(line for line in out if line.startswith(name)) for name in ("untrained", "pixels")}
    assert "50.0 %; NOT BEATEN" in rows["untrained"] and rows["pixels"].endswith("test 40.0 %")
    trained, untrained, pixels = (entry[0] for entry in studied)
    assert [levels for _, _, _, levels in studied] == [[10, 300], [10, 300], [10]]
    assert all(entry[1] is studied[0][1] and entry[2] is studied[0][2] for entry in studied)
    assert type(untrained.net) is type(trained.net) is DiT and not untrained.net.training
    torch.manual_seed(train.mix(0))
    config = SimpleNamespace(**torch.load(folders["classes"] / "checkpoint.pt")["config"])
    first = train.build(config, 3, 10, CPU)[0].state_dict()
    assert all(torch.equal(value, first[name]) for name, value in untrained.net.state_dict().items())
    gates = [net.proj[1].weight.detach().abs().max() for net in (untrained.net, trained.net)]
    assert gates[0] == 0 < gates[1], "it is as it was initialised"
    for side, pooled in (16, 16), (64, 32):
        x = torch.randn(2, 3, side, side)
        (name, h), = pixels.net(x, torch.zeros(2), return_features=True)[1].items()
        few = x.view(2, 3, pooled, side // pooled, pooled, side // pooled).mean((3, 5))
        assert name == "pixels" and error(h.mean((2, 3)), few.flatten(1)) < 1e-6
    assert pixels.diffusion is trained.diffusion, "with the same noise"


def test_pixels_reference_to_segment(monkeypatch):
    """To segment, the reference is each pixel's own channels."""
    studied = []
    monkeypatch.setattr(probe, "study", lambda source, *args: studied.append(source))
    cfg = train.parse_config("--model dit --size tiny --image-size 16".split())
    state, args = dict(channels=3, num_classes=0), options(task="segment", t=[1])
    probe.references(cfg, state, fake(lambda x, t: {}), None, None, 2, args)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(studied[1].net(x, torch.zeros(2), return_features=True)[1]["pixels"], x)


# --- other data ---

def draw_folder(root, sizes=((20, 24), (9, 9))):
    """train/<class>/ and test/<class>/ of blue and red images of several sizes."""
    for split, n in dict(train=30, test=10).items():
        for name, colour in dict(blue=(20, 40, 200), red=(200, 60, 30)).items():
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", sizes[i % len(sizes)], tuple(c + i for c in colour)).save(
                    root / split / name / f"{i}.png")
    return root


def test_other_data(folders, run_probe, spied, tmp_path, monkeypatch):
    """--data probes the network on other data, resized to the network's size, and its own classes."""
    draw_folder(tmp_path / "colours")
    monkeypatch.chdir(tmp_path)
    result = run_probe("classes", "--data folder:colours", "probe-colours")
    assert (result["data"], result["classes"]) == ("folder:colours", 2)
    assert (result["train_images"], result["test_images"]) == (60, 20)
    for call in spied:
        assert call.part.images.shape[1:] == (3, 16, 16)
        red = (call.part.images[:, 0] > call.part.images[:, 2]).all((1, 2))
        assert torch.equal(red.long(), call.part.targets)
    assert result["test"]["accuracy"] > 0.75
    assert (folders["classes"] / "probe-colours.png").exists()


@pytest.fixture
def give(monkeypatch):
    """give(images, ...): what load_data returns from now on."""
    def give(images, labels=None, masks=None, classes=("a", "b")):
        monkeypatch.setattr(probe, "load_data",
                            lambda *args: diffusion.Data(images, labels, masks, list(classes)))
    return give


CFG = SimpleNamespace(image_size=16, skip_bad=False)


def test_grey_data(give):
    """Grey images reach an RGB network three times; colours reach a grey network as their brightness."""
    labels = torch.arange(6) % 2
    grey, rgb = random_images(6, 16, channels=1), random_images(6, 16)
    give(grey, labels)
    images, targets = probe.load("some", "train", "classify", CFG, 3)[0]
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 16, 16) and torch.equal(targets, labels)
    assert all(torch.equal(images[:, k], grey[:, 0]) for k in range(3))
    assert probe.load("some", "train", "classify", CFG, 1)[0].images.equal(grey)
    give(rgb, labels)
    images = probe.load("some", "train", "classify", CFG, 1)[0].images
    light = 0.299 * rgb[:, 0].double() + 0.587 * rgb[:, 1].double() + 0.114 * rgb[:, 2].double()
    assert images.dtype == torch.uint8 and images.shape == (6, 1, 16, 16)
    assert error(images[:, 0], light) < 1.05


@pytest.mark.parametrize("images, words", [
    (random_images(6, 16, channels=4), "4 channels network 3"),
    (random_images(6, 16, channels=2), "2 channels network 3"),
    (random_images(6, 16).float(), "float32 uint8"),
    (random_images(6, 16).short(), "int16 uint8")])
def test_strange_images(folders, give, capsys, images, words):
    """Images of other channels, or not uint8, are refused in one sentence."""
    give(images, torch.arange(6) % 2)
    before = stamps(folders["classes"])
    line = refused(capsys, [str(folders["classes"]), "--device", "cpu"])
    assert not [word for word in words.split() if word not in line], line
    assert stamps(folders["classes"]) == before


def test_masks_and_background(give):
    """The classes of shapes' masks start at 1 for class 0: to segment, "background" comes before them."""
    masks = torch.arange(6 * 256).view(6, 16, 16).remainder(3).byte()
    give(random_images(6, 16), torch.arange(6) % 2, masks)
    part, classes = probe.load("some", "train", "segment", CFG, 3)
    assert classes == ["background", "a", "b"] and torch.equal(part.targets, masks)


def draw_voc(root, train=12, val=5):
    """A small folder like Pascal VOC's: images 60 x 40, left half "bird" (3), right half "tvmonitor" (20).

    The ten columns at either side are "sofa" (18), a stripe between the halves and the first row are void.
    """
    base = root / "data/VOCdevkit/VOC2012"
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (base / name).mkdir(parents=True)
    mask = np.full((40, 60), 18, np.uint8)
    mask[:, 10:30], mask[:, 30:50], mask[:, 29:31], mask[0] = 3, 20, 255, 255
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :30], picture[:, 30:] = (200, 40, 40), (40, 40, 200)
    for split, numbers in dict(train=range(train), val=range(train, train + val)).items():
        (base / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{i:06}\n" for i in numbers))
        for i in numbers:
            Image.fromarray(picture + np.uint8(i)).save(base / "JPEGImages" / f"{i:06}.jpg")
            file = Image.fromarray(mask).convert("P")
            file.putpalette([i * 37 % 256 for i in range(768)])
            file.save(base / "SegmentationClass" / f"{i:06}.png")


@pytest.fixture
def offline(monkeypatch):
    """Makes every download of torchvision fail."""
    def fail(*args, **kwargs):
        raise URLError("Name or service not known")
    monkeypatch.setattr(torchvision.datasets.voc, "download_and_extract_archive", fail)


@pytest.mark.parametrize("size", [16, 40, 64])
def test_voc(tmp_path, monkeypatch, offline, size):
    """voc is cropped to the centre and resized; masks keep their classes unmixed, and void (255).

    "test" is its val part; nothing is downloaded where it is there.
    """
    draw_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    for split, n in dict(train=12, test=5).items():
        (images, masks), classes = probe.load("voc", split, "segment",
                                              SimpleNamespace(image_size=size, skip_bad=False), 3)
        assert images.dtype == torch.uint8 and images.shape == (n, 3, size, size)
        assert masks.dtype == torch.uint8 and masks.shape == (n, size, size)
        assert set(masks.unique().tolist()) <= {3, 20, 255} and {3, 20} <= set(masks.unique().tolist())
        edge = -(-size // 16)
        assert (masks[:, edge:, :size // 2 - edge] == 3).all()
        assert (masks[:, edge:, size // 2 + edge:] == 20).all()
        far = images.float()[:, :, :, [2, -3]]
        red = far[:, 0] - far[:, 2]                 # (n, size, 2): at the left, at the right
        assert (red[..., 0] > 80).all() and (red[..., 1] < -80).all()
        assert len(classes) == 21
        assert [classes[k] for k in (0, 3, 20)] == ["background", "bird", "tvmonitor"]


def test_voc_is_probed(run_probe, tmp_path, monkeypatch, offline):
    """--task segment --data voc works from end to end: void pixels neither teach nor count."""
    draw_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = run_probe("free", "--task segment --data voc", "probe-segment-voc")
    assert (result["data"], result["classes"], result["train_images"]) == ("voc", 21, 12)
    assert result["test"]["accuracy"] > 0.7 and result["test"]["miou"] > 0.35


# --- bad input ---

@pytest.mark.parametrize("flags, words", [
    ("--t -1", "--t -1 0 999"), ("--t 5 1000", "--t 1000 999"), ("--t ten", "--t ten"),
    ("--task segment --data shapes --knn", "--knn --task"), ("--images 0", "--images 0 1"),
    ("--images 9", "9 10"), ("--augment -1", "--augment -1"),
    ("--seed -1", "--seed -1"),
    ("--batch-size 0", "--batch-size 0"), ("--compare runs/A", "run --compare"), ("--task paint", "paint"),
    ("--data cifar11", "cifar11"), ("--device toaster", "toaster cpu"), ("--nn 5", "--nn")])
def test_bad_flags(folders, capsys, flags, words):
    """A flag that cannot be followed gets one sentence with it and its value; nothing is written."""
    before = stamps(folders["classes"])
    device = [] if "--device" in flags else ["--device", "cpu"]
    line = refused(capsys, [str(folders["classes"]), *device, *flags.split()])
    assert not [word for word in words.split() if word not in line], line
    assert stamps(folders["classes"]) == before


def test_run_or_compare(capsys):
    """Neither a run nor --compare is one sentence, too."""
    assert "--compare" in refused(capsys, [])


def test_no_checkpoint(capsys, tmp_path):
    """A folder without checkpoint is named in the sentence."""
    assert str(tmp_path / "checkpoint.pt") in refused(capsys, [str(tmp_path), "--device", "cpu"])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("kind, words", [
    ("flat", "test"), ("one", "one class"), ("few", "6 2 10"), ("segment", "masks shapes:full")])
def test_bad_folder(folders, capsys, tmp_path, kind, words):
    """Data without classes, with one, with fewer images than classes, or without masks is refused."""
    root = tmp_path / "some"
    for split in ("train", "test"):
        for name in ("a",) if kind == "one" else "ab":
            for i in range(3):
                path = root / (f"{i}.png" if kind == "flat" else f"{split}/{name}/{i}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (i, 9, 9)).save(path)
    before = stamps(folders["classes"])
    task = "segment" if kind == "segment" else "classify"
    flags = ["--data", f"folder:{root}", "--task", task]
    line = refused(capsys, [str(folders["classes"]), "--device", "cpu", *flags])
    assert not [word for word in words.split() if word not in line], line
    assert stamps(folders["classes"]) == before


@pytest.mark.parametrize("there", [False, True])
def test_bad_voc(folders, capsys, tmp_path, monkeypatch, offline, there):
    """voc that is not there and cannot be downloaded is one sentence; so is voc to classify images."""
    if there:
        draw_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = stamps(folders["classes"])
    flags = ["--data", "voc", "--task", "classify" if there else "segment"]
    line = refused(capsys, [str(folders["classes"]), "--device", "cpu", *flags])
    assert ("--task segment" if there else "Name or service not known") in line
    assert stamps(folders["classes"]) == before


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_fewest_images(folders, run_probe, capsys, task):
    """Ten images are enough to hold one out; fewer are refused."""
    flags, name = f"--task {task} --data shapes --images", f"probe{'-segment' * (task == 'segment')}-shapes"
    assert run_probe("classes", f"{flags} 10", name)["train_images"] == 10
    assert "9" in refused(capsys, [str(folders["classes"]), "--device", "cpu", *flags.split(), "9"])


def test_one_process(folders, capsys, monkeypatch):
    """Under torchrun with two processes it is refused, in one sentence."""
    monkeypatch.setattr(probe, "setup", lambda name: (CPU, 0, 2))
    before = stamps(folders["classes"])
    assert "torchrun" in refused(capsys, [str(folders["classes"]), "--device", "cpu"])
    assert stamps(folders["classes"]) == before


# --- slow ---

@pytest.mark.slow
def test_two_minutes(tmp_path):
    """The tiny DiT on shapes is probed within two minutes on a CPU, with the default settings."""
    def python(*words):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    flags = "--model dit --size tiny --data shapes --images 640 --device cpu --out"
    python("train.py", *flags.split(), str(tmp_path / "run"))
    start = time.time()
    python("probe.py", str(tmp_path / "run"), "--device", "cpu")
    assert time.time() - start < 120
    result = json.loads((tmp_path / "run/probe.json").read_text())
    assert np.array(result["held_out"]).shape == (6, 8) and result["train_images"] == 5_000
