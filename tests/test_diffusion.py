"""diffusion.py against the papers' formulas, written here a second time in another form."""
import math
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from conftest import ROOT, error
from diffusion import SCHEDULES, TEACHER_SIGMA, GaussianDiffusion

TABLES = ("linear", "cosine")
PATHS = [*((schedule, target) for schedule in TABLES for target in ("eps", "v")), ("edm", "v"), ("flow", "v")]
paths = pytest.mark.parametrize("schedule, target", PATHS)
samplers = pytest.mark.parametrize("sampler", ["ddim", "heun"])
scales = pytest.mark.parametrize("schedule, data", [("linear", 1), ("cosine", 1), ("edm", 0.5), ("edm", 1),
                                                    ("flow", 1)])               # data: sigma_data of edm
sampled = pytest.mark.parametrize("schedule, target, sampler", [
    *((*path, sampler) for path in PATHS for sampler in ("ddim", "heun")),
    *((*path, "ddpm") for path in PATHS if path[0] in TABLES)])


@cache
def abars(schedule, T=1000):
    """abar_0 ... abar_(T-1) as a list of Python floats, each a running product."""
    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    product, result = 1.0, []
    for t in range(T):
        if schedule == "linear":
            beta = (1e-4 + (0.02 - 1e-4) * t / (T - 1)) * 1000 / T
        else:
            beta = min(1 - f(t + 1) / f(t), 0.999)
        product *= 1 - beta
        result.append(product)
    return result


def angle(schedule, t, T=1000):
    """arctan(s / a) at t, a number or a tensor, in float64."""
    if schedule in TABLES:
        return torch.tensor(abars(schedule, T), dtype=torch.float64)[t].sqrt().acos()
    tau = torch.as_tensor(t, dtype=torch.float64) / T
    return math.pi / 2 * tau if schedule == "edm" else (tau / (1 - tau)).atan()


def curve(schedule, t, T=1000):
    """a, s, da, ds at t, each like t."""
    a, s = angle(schedule, t, T).cos(), angle(schedule, t, T).sin()
    one = torch.ones_like(a)
    return (a / (a + s), s / (a + s), -one, one) if schedule == "flow" else (a, s, -s, a)


def toy(x, t, y=None):
    """A network that is not linear in x and differs with t and y."""
    y = torch.zeros_like(t) if y is None else y
    t, y = (value.to(x.dtype)[:, None, None, None] for value in (t, y))
    return torch.tanh(1.5 * x + 0.002 * t - 1) - 0.3 * y * x.cos()


def images(*shape, seed=0, dtype=torch.float64):
    """Numbers ~ N(0, 1)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@scales
@pytest.mark.parametrize("T", [100, 1000])
def test_schedule(schedule, data, T):
    """At every t: a, s, da, ds, sigma in units of x0, and abar = 1 / (1 + sigma^2), to float32's precision.

    Relative error, so that a table computed in float32 fails: sqrt(1 - abar) loses four digits at t = 0.
    """
    path, table = GaussianDiffusion(T, schedule, sigma_data=data).path, schedule in TABLES
    t, precision = (torch.arange(T), 2e-7) if table else (torch.arange(1.0, T), 1e-4)
    a, s, da, ds = curve(schedule, t, T)
    sigma, abar = path.sigma(t), path.abar(t)
    expected = a, s, da, ds, 1 / (1 + (data * s / a) ** 2), data * s / a
    for found, values in zip((*path.coefficients(t), abar, sigma), expected):
        assert found.dtype == torch.float32 and found.shape == t.shape
        assert error(found / values, torch.ones(len(t))) < precision * (2 if found is sigma else 1)
    assert (abar.diff() < 0).all() and 0 < abar.min() and abar.max() < 1
    assert table or error([path.t_of(x) for x in sigma.tolist()], t) < 1e-6 * T


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_path(schedule):
    """What any path must keep, one of your own, too: from image to noise, at the pace by which v gives x0."""
    process = GaussianDiffusion(schedule=schedule)
    path = process.path
    t = torch.arange(1000) if process.discrete else torch.arange(1000.0)
    a, s, da, ds = path.coefficients(t)
    assert error(a * ds - s * da, torch.ones(len(t))) < 1e-6
    assert a[0] > 0.99 > 0.02 > s[0] and s[-1] > 0.99 > 0.02 > a[-1]
    assert (path.sigma(t).diff() > 0).all() and (path.abar(t).diff() < 0).all()
    if not process.discrete:
        assert error([path.t_of(sigma.item()) for sigma in path.sigma(t[1:-1])], t[1:-1]) < 0.01


@scales
def test_draw(schedule, data):
    """In training, t of tables is even, log sigma of edm ~ N(-1.2, 1.2^2) on images, logit(tau) ~ N(0, 1)."""
    path, n = GaussianDiffusion(400, schedule, sigma_data=data).path, 40_000
    t, again = (path.draw(n, generator=torch.Generator().manual_seed(0), device="cpu") for _ in range(2))
    assert torch.equal(t, again) and t.dtype == (torch.int64 if schedule in TABLES else torch.float32)
    assert schedule not in TABLES or t.min() == 0 and t.max() == 399
    even = t / 399                                          # the distribution function of t
    if schedule not in TABLES:
        z = angle(schedule, t, 400).tan().log()             # log(sigma / data); of flow logit(tau)
        z = (z + 1.2 - math.log(2)) / 1.2 if schedule == "edm" else z
        assert abs(z.mean()) < 0.015 and abs(z.std() - 1) < 0.015
        even = torch.special.ndtr(z)
    assert error(even.sort().values, torch.linspace(0, 1, n)) < 0.01


@scales
@pytest.mark.parametrize("sigma", [TEACHER_SIGMA, 2.0])
def test_draw_below(schedule, data, sigma):
    """draw_below is even among the times with less noise than sigma; TEACHER_SIGMA leaves linear 0 to 99."""
    path, n = GaussianDiffusion(schedule=schedule, sigma_data=data).path, 40_000
    t, again = (path.draw_below(sigma, n, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(t, again)
    most = math.atan(sigma / data) * 2000 / math.pi if schedule == "edm" else 1000 * sigma / (1 + sigma)
    if schedule in TABLES:
        most = sum(a > 1 / (1 + sigma ** 2) for a in abars(schedule)) - 1
        assert t.dtype == torch.int64 and t.min() == 0 and t.max() == most
        assert (schedule, sigma) != ("linear", TEACHER_SIGMA) or most == 99
    assert t.max() < most * 1.000001 and error((t / most).sort().values, torch.linspace(0, 1, n)) < 0.015


@paths
@pytest.mark.parametrize("T", [400, 1000])
def test_round_trip(schedule, target, T):
    """What the network should say, taken back apart, is x0 and noise; bounded or not, they lead to x_t."""
    diffusion, scale = GaussianDiffusion(T, schedule, target, 0.7), 0.7 if schedule == "edm" else 1
    t = torch.tensor([0, 1, T // 4, T // 2, T - 10, T - 1 if schedule in TABLES else T])
    x0, noise = (images(6, 2, 4, 4, seed=seed) for seed in (1, 2))
    a, s, da, ds = curve(schedule, t.view(6, 1, 1, 1), T)
    x_t = diffusion.add_noise(x0, t, noise)
    assert error(x_t, a * x0 / scale + s * noise) < 1e-6
    out = diffusion.to_target(x0, t, noise)
    assert error(out, noise if target == "eps" else da * x0 / scale + ds * noise) < 1e-6
    x0_back, noise_back = diffusion.to_x0_eps(out, x_t, t)
    assert error(x0_back, x0) < 1e-6 and error(noise_back, noise) < 1e-6
    x0_back, noise_back = diffusion.denoise(lambda x, t: out[1:], x_t[1:], t[1:])
    assert error(x0_back, x0[1:].clamp(-1, 1)) < 1e-6
    assert error(diffusion.add_noise(x0_back, t[1:], noise_back), x_t[1:]) < 1e-9


@pytest.mark.pins
@paths
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 2, 5, 5)])
@pytest.mark.parametrize("classes", [False, True])
def test_loss(schedule, target, shape, classes):
    """loss, and error of an answer at hand: each image's squared error, mean over pixels and channels."""
    diffusion, B = GaussianDiffusion(schedule=schedule, target=target, sigma_data=1), shape[0]
    x0, noise = (images(*shape, seed=seed, dtype=torch.float32) for seed in (1, 2))
    t, y = torch.tensor([10, 500, 900])[:B], torch.arange(1, 1 + B) if classes else None
    loss = diffusion.loss(toy, x0, t, noise, y)
    assert loss.shape == (B,)
    for i in range(B):
        (a, s, _, _), one = curve(schedule, t[i].item()), slice(i, i + 1)
        out = toy(a * x0[one] + s * noise[one], t[one], y[one] if classes else None)
        v = noise[one] - x0[one] if schedule == "flow" else a * noise[one] - s * x0[one]
        wrong = (out - (noise[one] if target == "eps" else v)).flatten().tolist()
        expected = sum(w * w for w in wrong) / len(wrong)
        assert abs(loss[i].item() - expected) < 1e-5
        assert abs(diffusion.error(out, x0[one], t[one], noise[one]).item() - expected) < 1e-5
    half = diffusion.loss(lambda *args: toy(*args).bfloat16(), x0, t, noise, y)
    assert half.dtype == torch.float32, "the error of a bfloat16 network is taken in float32"


@pytest.mark.pins
@pytest.mark.parametrize("data", [0.5, 1])
def test_loss_of_edm(data):
    """edm's loss is lambda |D - x0|^2 with D = c_skip x + c_out F(c_in x), F = -net (EDM, table 1, eq. 8)."""
    diffusion = GaussianDiffusion(400, "edm", sigma_data=data)
    x0, noise = data * images(5, 2, 4, 4, seed=1), images(5, 2, 4, 4, seed=2)
    sigma = torch.tensor([0.002, 0.1, data, 3, 80], dtype=torch.float64).view(5, 1, 1, 1)
    t = ((sigma / data).atan() * 2 / math.pi * 400).flatten().float()
    x, total = x0 + sigma * noise, sigma ** 2 + data ** 2
    c_skip, c_out, c_in = data ** 2 / total, sigma * data / total.sqrt(), 1 / total.sqrt()
    D = c_skip * x + c_out * -toy(c_in * x, t)
    expected = (total / (sigma * data) ** 2 * (D - x0) ** 2).mean((1, 2, 3))
    assert error(diffusion.loss(toy, x0, t, noise), expected) < 1e-5
    assert error(diffusion.denoise(toy, c_in * x, t, clip=False)[0], D) < 1e-5


@sampled
@pytest.mark.parametrize("steps", [1, 2, 7, 150])
def test_exact_denoiser(schedule, target, sampler, steps):
    """A network that knows one image brings it back at any number of steps.

    The first step of cosine with eps divides by sqrt(abar_999) = 5e-5, beyond float32: it runs in float64.
    """
    dtype = torch.float64 if (schedule, target) == ("cosine", "eps") else torch.float32
    diffusion = GaussianDiffusion(schedule=schedule, target=target)
    image = images(1, 2, 4, 4, dtype=dtype).tanh()

    def net(x, t):
        a, s, _, _ = diffusion.coefficients(t)
        return diffusion.to_target(image, t, (x - a * image / diffusion.path.scale) / s)

    result = diffusion.sample(net, images(3, 2, 4, 4, seed=1, dtype=dtype), steps=steps, sampler=sampler)
    assert result.dtype == dtype
    assert error(result, image.expand_as(result)) < 1e-3


@sampled
def test_gaussian_data(schedule, target, sampler):
    """Data ~ N(0, 0.3^2) with its exact denoiser gives that spread, but for an error of order 1, of heun 2.

    All is linear: noises are unit vectors, a length is a deviation. heun is compared before its last step.
    """
    diffusion, heun = GaussianDiffusion(schedule=schedule, target=target), sampler == "heun"
    data = 0.3 / diffusion.path.scale

    def net(x, t):
        a, s, da, ds = curve(schedule, t[0].item())
        x0, eps = (part * x / ((data * a) ** 2 + s ** 2) for part in (data ** 2 * a, s))        # E[. | x_t]
        return eps if target == "eps" else da * x0 + ds * eps

    def off(steps):
        trace = []
        noises = [*torch.eye(steps, dtype=torch.float64).view(steps, 1, 1, 1, steps)]
        x = diffusion.sample(net, noises.pop(), steps=steps, sampler=sampler, clip=False,
                             randn=lambda x: noises.pop(), trace=trace)
        assert len(noises) == (0 if sampler == "ddpm" else steps - 1)
        _, x, _ = trace[-1] if heun else (0, x, 0)
        a, s, _, _ = curve(schedule, trace[-1][0]) if heun else (1, 0, 0, 0)
        return abs(x.norm().item() / diffusion.path.scale / ((data * a) ** 2 + s ** 2) ** 0.5 - 1)

    few, more = (25, 50) if heun else (100, 500)
    order = math.log(off(few) / off(more)) / math.log(more / few)
    assert off(few) < 0.1 and abs(order - (2 if heun else 1)) < 0.2


@paths
@samplers
@pytest.mark.parametrize("steps", [1, 2, 30, 200])
def test_steps(schedule, target, sampler, steps):
    """In a step ddim keeps z = x0 + i eps, heun takes its mean of both ends; x = Re z e^(-i angle).

    So ddim is Euler's method for d(x / a) / dsigma = eps. On flow, they are Euler's, Heun's for dx/dtau = v.
    """
    diffusion, trace, x = GaussianDiffusion(schedule=schedule, target=target), [], images(2, 1, 4, 4)
    result = diffusion.sample(toy, x, steps=steps, sampler=sampler, clip=False, trace=trace)
    place = [t / 1000 if schedule == "flow" else torch.exp(-1j * angle(schedule, t)) for t, _, _ in trace]
    place.append(0 if schedule == "flow" else 1)

    def slope(x, i):                                        # z; flow: v
        out, at = toy(x, torch.full((2,), trace[i][0])), place[i]
        if target == "eps":
            return (x + at.imag * out) / at.real + 1j * out
        return out if schedule == "flow" else (x + 1j * out) / at

    for i in range(steps):
        z, step = slope(x, i), place[i + 1] - place[i]
        if sampler == "heun" and i + 1 < steps:
            z = (z + slope(x + torch.as_tensor(step * z).real, i + 1)) / 2
        x = x + torch.as_tensor(step * z).real
    assert error(result, diffusion.path.scale * x) < 2e-5 * x.abs().max()


@pytest.mark.parametrize("schedule", TABLES)
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_is_posterior(schedule, clip):
    """ddpm in T steps draws from DDPM's q(x_(t-1) | x_t, x0), eq. 6-7; the last step adds no noise."""
    noises, trace, abar = [], [], abars(schedule)

    def record(x):
        noises.append(images(*x.shape, seed=len(noises)))
        return noises[-1]

    diffusion = GaussianDiffusion(schedule=schedule, target="v")
    diffusion.sample(toy, images(2, 1, 4, 4), sampler="ddpm", clip=clip, randn=record, trace=trace)
    assert len(trace) == 1000 and len(noises) == 999
    for i, noise in enumerate(noises):
        (t, x, x0), (_, x_next, _) = trace[i], trace[i + 1]
        beta = 1 - abar[t] / abar[t - 1]
        mean = (abar[t - 1] ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - abar[t - 1]) * x) / (1 - abar[t])
        variance = (1 - abar[t - 1]) / (1 - abar[t]) * beta
        assert error(x_next, mean + variance ** 0.5 * noise) < 5e-5, f"t = {t}"


def asked(diffusion, sampler, steps=None):
    """The times at which a sampler asks the network; of heun, which asks twice at all but the first, once."""
    times = []

    def net(x, t):
        assert t.dtype == (torch.int64 if diffusion.discrete else torch.float32) and t.equal(t[:1].repeat(2))
        times.append(t[0].item())
        return x

    diffusion.sample(net, images(2, 1, 1, 1), sampler=sampler, steps=steps)
    assert sampler != "heun" or times[1::2] == times[2::2] and len(times) % 2
    return times[::2] if sampler == "heun" else times


def test_times():
    """In any number of steps a table's times go from T - 1 to -1 in even gaps; heun's are as t^1.5."""
    for steps in range(1, 41):
        times = asked(GaussianDiffusion(T=40), "ddim", steps)
        assert len({*times}) == steps and error(times, [39 - 40 / steps * i for i in range(steps)]) < 0.5001
        powers = [39 * (1 - i / steps) ** 1.5 for i in range(steps)]
        assert error(asked(GaussianDiffusion(T=40), "heun", steps), powers) < 0.5001


@pytest.mark.parametrize("schedule, data", [("edm", 0.5), ("edm", 1), ("flow", 1)])
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_continuous_times(schedule, data, steps):
    """From T on in even gaps that lead to 0; heun's are closer to 0, as t^1.5."""
    diffusion = GaussianDiffusion(400, schedule, sigma_data=data)
    left = [1 - i / steps for i in range(steps)]
    assert error(asked(diffusion, "ddim", steps), [400 * x for x in left]) < 1e-3
    assert error(asked(diffusion, "heun", steps), [400 * x ** 1.5 for x in left]) < 1e-3


@pytest.mark.pins
@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm", "flow"])
def test_defaults(schedule):
    """ddim takes 50 steps, ddpm T, heun 25, none more than T; tables learn eps, the others v."""
    diffusion, table = GaussianDiffusion(60, schedule), schedule in TABLES
    for sampler, steps in [("ddim", 50), ("heun", 25), *([("ddpm", 60)] if table else [])]:
        assert diffusion.default_steps(sampler) == len(asked(diffusion, sampler)) == steps
        assert GaussianDiffusion(20, schedule).default_steps(sampler) == 20
    assert diffusion.target == ("eps" if table else "v")


@paths
@samplers
@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 4.0])
def test_guidance(schedule, target, sampler, w):
    """eps_null + w (eps_y - eps_null), from one call with both halves; w = 1 never asks for class null."""
    diffusion, calls = GaussianDiffusion(schedule=schedule, target=target), []
    noise, y, how = images(3, 1, 4, 4), torch.tensor([0, 1, 2]), dict(steps=9, sampler=sampler, clip=False)

    def net(x, t, y):
        calls.append(y.tolist())
        return toy(x, t, y).bfloat16()

    def formula(x, t):
        return (1 - w) * net(x, t, torch.full_like(t, 5)).double() + w * net(x, t, y).double()

    result = diffusion.sample(net, noise, y=y, null=5, guidance=w, **how)
    once = [0, 1, 2] if w == 1 else [0, 1, 2, 5, 5, 5]
    assert [sorted(classes) for classes in calls] == (9 if sampler == "ddim" else 17) * [once]
    expected = diffusion.sample(formula, noise, **how)
    assert error(result, expected) < 1e-9 * max(1, expected.abs().max())


@sampled
def test_clip_and_trace(schedule, target, sampler):
    """clip bounds each predicted x0 to [-1, 1]; trace has each step's t, x_t, x0; the last is the result."""
    diffusion, noise, bounds = GaussianDiffusion(1000, schedule, target), images(2, 1, 4, 4), {}
    for clip in (False, True):
        trace, seen = [], []

        def net(x, t):
            seen.append((t[0], diffusion.path.scale * x))
            return 3 * toy(x, t).bfloat16()

        how = dict(steps=9, sampler=sampler, clip=clip, randn=torch.cos)
        result = diffusion.sample(net, noise, trace=trace, **how)
        seen = seen[::2] if sampler == "heun" else seen
        assert len(trace) == len(seen) == 9
        assert torch.equal(seen[0][1], diffusion.path.scale * noise) and torch.equal(trace[-1][2], result)
        assert all(t == entry[0] and torch.equal(x, entry[1]) for (t, x), entry in zip(seen, trace))
        assert target == "eps" or max(x.abs().max() for _, x, _ in trace) < 5, "it blows up"
        bounds[clip] = max(x0.abs().max().item() for _, _, x0 in trace)
        precise = diffusion.sample(lambda x, t: net(x, t).double(), noise, **how)
        assert torch.equal(result, precise), "only the network itself is in half precision"
    assert bounds[False] > 1.05 and bounds[True] == 1


@pytest.mark.parametrize("make, call, value", [
    (dict(schedule="sqrt"), {}, "sqrt"), (dict(target="x0"), {}, "x0"),
    (dict(schedule="flow", target="eps"), {}, "eps"), (dict(schedule="edm", target="eps"), {}, "eps"),
    (dict(schedule="edm"), dict(sampler="ddpm"), "ddpm"), ({}, dict(sampler="euler"), "euler"),
    (dict(schedule="flow"), dict(sampler="ddpm"), "ddpm"), ({}, dict(steps=0), "0"),
    ({}, dict(steps=1001), "1001"), ({}, dict(guidance=3.5), "3.5"), ({}, dict(guidance=0.5, null=5), "0.5"),
    ({}, dict(guidance=3.5, y=torch.tensor([0])), "3.5")])
def test_refusals(make, call, value):
    """Unknown names and pairs, steps out of range, guidance without y or null: a ValueError names it."""
    with pytest.raises(ValueError, match=rf"\b{re.escape(value)}\b"):
        GaussianDiffusion(**make).sample(toy, images(1, 1, 4, 4), **call)
    if "guidance" in call:
        with pytest.raises(ValueError, match=value):
            GaussianDiffusion(**make).denoise(toy, images(1, 1, 4, 4), torch.tensor([9]), **call)


def test_own_project(tmp_path, monkeypatch):
    """In an empty folder, diffusion.py and the exercises' block of at most 25 lines train one's own network.

    A loss of 1 is that of predicting 0. The toy's pixels are -1 or 1; of noise bounded to [-1, 1] the mean
    absolute value is 0.63.
    """
    page = ROOT / ".github/results/exercises.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if "from diffusion import GaussianDiffusion" in block]
    assert len(blocks) == 1 and blocks[0].count("nn.Conv2d(") == 3
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 25
    shutil.copy(ROOT / "diffusion.py", tmp_path)
    for name, module in [*sys.modules.items()]:
        if Path(getattr(module, "__file__", None) or "").parent == ROOT:
            monkeypatch.delitem(sys.modules, name)
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    own = {"__name__": "own"}
    exec(blocks[0], own)
    assert sys.modules["diffusion"].__file__ == str(tmp_path / "diffusion.py")
    assert own["loss"] < 0.2 and own["images"].shape[1:] == (1, 8, 8) and own["images"].abs().mean() > 0.75
