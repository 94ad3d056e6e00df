"""diffusion.py against the papers' formulas, written here a second time in another form."""
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, error
from diffusion import GaussianDiffusion

SCHEDULES, TARGETS = ("linear", "cosine"), ("eps", "v")
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
targets = pytest.mark.parametrize("target", TARGETS)


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


def toy(x, t, y=None):
    """A network that is not linear in x and differs with t and y."""
    y = torch.zeros_like(t) if y is None else y
    t, y = (value.to(x.dtype)[:, None, None, None] for value in (t, y))
    return torch.tanh(1.5 * x + 0.002 * t - 1) - 0.3 * y * x.cos()


def images(*shape, seed=0, dtype=torch.float64):
    """Numbers ~ N(0, 1)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@schedules
@pytest.mark.parametrize("T", [100, 1000])
def test_schedule(schedule, T):
    """The tables are the running product of 1 - beta, to float32's precision.

    Relative error, so that a table computed in float32 fails: sqrt(1 - abar) loses four digits at t = 0.
    """
    diffusion, abar = GaussianDiffusion(T, schedule), torch.tensor(abars(schedule, T), dtype=torch.float64)
    expected = {"abar": abar, "sqrt_abar": abar.sqrt(), "sqrt_1m_abar": (1 - abar).sqrt()}
    for name, values in expected.items():
        table = getattr(diffusion, name)
        assert table.dtype == torch.float32 and table.shape == (T,)
        assert error(table / values, torch.ones(T)) < 2e-7, name
    assert (diffusion.abar.diff() < 0).all(), "abar must fall"
    assert 0 < diffusion.abar.min() and diffusion.abar.max() < 1


@schedules
@targets
def test_round_trip(schedule, target):
    """What the network should say, taken back apart, is x0 and the noise."""
    diffusion = GaussianDiffusion(schedule=schedule, target=target)
    t = torch.tensor([0, 1, 250, 500, 900, 990])
    x0, noise = (images(6, 2, 4, 4, seed=seed) for seed in (1, 2))
    abar = torch.tensor(abars(schedule), dtype=torch.float64)[t][:, None, None, None]
    x_t = diffusion.add_noise(x0, t, noise)
    assert error(x_t, abar.sqrt() * x0 + (1 - abar).sqrt() * noise) < 1e-6
    out = diffusion.to_target(x0, t, noise)
    assert error(out, noise if target == "eps" else abar.sqrt() * noise - (1 - abar).sqrt() * x0) < 1e-6
    x0_back, noise_back = diffusion.to_x0_eps(out, x_t, t)
    assert error(x0_back, x0) < 1e-6 and error(noise_back, noise) < 1e-6


@targets
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 2, 5, 5)])
@pytest.mark.parametrize("classes", [False, True])
def test_loss(target, shape, classes):
    """loss, and error of an answer at hand: each image's squared error, mean over pixels and channels."""
    diffusion, B = GaussianDiffusion(target=target), shape[0]
    x0, noise = (images(*shape, seed=seed, dtype=torch.float32) for seed in (1, 2))
    t, y = torch.tensor([10, 500, 900])[:B], torch.arange(1, 1 + B) if classes else None
    loss, abar = diffusion.loss(toy, x0, t, noise, y), abars("linear")
    assert loss.shape == (B,)
    for i in range(B):
        a, s, one = abar[t[i]] ** 0.5, (1 - abar[t[i]]) ** 0.5, slice(i, i + 1)
        out = toy(a * x0[one] + s * noise[one], t[one], y[one] if classes else None)
        pixels = zip(*(values.flatten().tolist() for values in (out, x0[i], noise[i])))
        wrong = [o - (e if target == "eps" else a * e - s * x) for o, x, e in pixels]
        expected = sum(w * w for w in wrong) / len(wrong)
        assert abs(loss[i].item() - expected) < 1e-5
        assert abs(diffusion.error(out, x0[one], t[one], noise[one]).item() - expected) < 1e-5
    half = diffusion.loss(lambda *args: toy(*args).bfloat16(), x0, t, noise, y)
    assert half.dtype == torch.float32, "the error of a bfloat16 network is taken in float32"


@schedules
@targets
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_exact_denoiser(schedule, target, eta, steps):
    """A network that knows one image brings it back at any number of steps.

    One step of cosine with eps divides by sqrt(abar_999) = 5e-5, beyond float32: that case runs in float64.
    """
    dtype = torch.float64 if (schedule, target, steps) == ("cosine", "eps", 1) else torch.float32
    diffusion = GaussianDiffusion(schedule=schedule, target=target)
    image = images(1, 2, 4, 4, dtype=dtype).tanh()

    def net(x, t):
        a, s = diffusion.coefficients(t)
        eps = (x - a * image) / s
        return eps if target == "eps" else a * eps - s * image

    result = diffusion.sample(net, images(3, 2, 4, 4, seed=1, dtype=dtype), steps=steps, eta=eta)
    assert result.dtype == dtype
    assert error(result, image.expand_as(result)) < 1e-3


@pytest.mark.parametrize("eta, tolerance", [(0.0, 0.004), (1.0, 0.008)])
def test_gaussian_data(eta, tolerance):
    """Data ~ N(0, 0.5^2) with its exact denoiser gives samples of that spread; fewer steps are worse.

    All is linear: each noise is a unit vector of its own, and the result's length the standard deviation.
    """
    diffusion, abar = GaussianDiffusion(), abars("linear")

    def net(x, t):
        a = abar[t[0]]
        return x * ((1 - a) ** 0.5 / (0.25 * a + 1 - a))                        # E[eps | x_t]

    def off(steps):
        noises = [*torch.eye(steps).view(steps, 1, 1, 1, steps)]
        x = diffusion.sample(net, noises.pop(), steps=steps, eta=eta, clip=False,
                             randn=lambda x: noises.pop())
        assert len(noises) == (0 if eta else steps - 1)
        return abs(x.norm().item() / 0.5 - 1)

    assert off(1000) < tolerance
    assert off(50) > off(1000)


@schedules
@targets
@pytest.mark.parametrize("steps", [3, 50, 1000])
def test_ddim_is_euler(schedule, target, steps):
    """DDIM is Euler's method for dx'/dsigma = eps: x' = x / sqrt(abar), sigma = sqrt((1 - abar) / abar)."""
    diffusion, noise = GaussianDiffusion(schedule=schedule, target=target), images(2, 1, 4, 4)
    scale = [1 / a ** 0.5 for a in abars(schedule)] + [1.0]                     # [-1]: no noise
    sigma = [((1 - a) / a) ** 0.5 for a in abars(schedule)] + [0.0]
    times = [round(999 - 1000 / steps * i) for i in range(steps + 1)]
    x = scale[999] * noise                                                      # x'
    for t, s in zip(times, times[1:]):
        eps = toy(x / scale[t], torch.full((2,), t))
        if target == "v":
            eps = (sigma[t] * x / scale[t] + eps) / scale[t]
        x = x + (sigma[s] - sigma[t]) * eps
    result = diffusion.sample(toy, noise, steps=steps, clip=False)
    assert error(result, x) < 2e-5 * x.abs().max()          # float32 tables; x is large where toy is eps


@schedules
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_is_posterior(schedule, clip):
    """eta = 1 with steps = T draws from DDPM's q(x_(t-1) | x_t, x0), eq. 6-7; the last step adds no noise."""
    noises, trace, abar = [], [], abars(schedule)

    def record(x):
        noises.append(images(*x.shape, seed=len(noises)))
        return noises[-1]

    diffusion = GaussianDiffusion(schedule=schedule, target="v")
    diffusion.sample(toy, images(2, 1, 4, 4), steps=1000, eta=1.0, clip=clip, randn=record, trace=trace)
    assert len(trace) == 1000 and len(noises) == 999
    for i, noise in enumerate(noises):
        (t, x, x0), (_, x_next, _) = trace[i], trace[i + 1]
        beta = 1 - abar[t] / abar[t - 1]
        mean = (abar[t - 1] ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - abar[t - 1]) * x) / (1 - abar[t])
        variance = (1 - abar[t - 1]) / (1 - abar[t]) * beta
        assert error(x_next, mean + variance ** 0.5 * noise) < 5e-5, f"t = {t}"


def test_times():
    """With any number of steps the times run from T - 1 to -1 in even gaps and never repeat."""
    diffusion, noise = GaussianDiffusion(T=60), images(2, 1, 1, 1)
    for steps in range(1, 61):
        times = []

        def net(x, t):
            assert t.dtype == torch.int64 and t.shape == (2,) and t[0] == t[1]
            times.append(t[0].item())
            return x

        diffusion.sample(net, noise, steps=steps)
        gaps = [t - s for t, s in zip(times, times[1:] + [-1])]
        assert times[0] == 59 and len(times) == steps
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1, (steps, times)


@targets
@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 4.0])
def test_guidance(target, w):
    """Guidance is eps_null + w (eps_y - eps_null), from one call of the network a step with both halves.

    w = 1 is the conditional network, never asked for the null class.
    """
    diffusion, calls = GaussianDiffusion(target=target), []
    noise, y = images(3, 1, 4, 4), torch.tensor([0, 1, 2])

    def net(x, t, y):
        calls.append(y.tolist())
        return toy(x, t, y)

    def formula(x, t):
        return (1 - w) * toy(x, t, torch.full_like(t, 5)) + w * toy(x, t, y)

    result = diffusion.sample(net, noise, y=y, null=5, steps=10, guidance=w, clip=False)
    assert error(result, diffusion.sample(formula, noise, steps=10, clip=False)) < 1e-9
    asked = [0, 1, 2] if w == 1 else [0, 1, 2, 5, 5, 5]
    assert [sorted(classes) for classes in calls] == 10 * [asked]


@targets
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_clip_and_trace(target, eta):
    """clip bounds each predicted x0 to [-1, 1]; trace has each step's t, x_t, x0; the last is the result."""
    diffusion, noise, bounds = GaussianDiffusion(target=target), images(2, 1, 4, 4), {}
    for clip in (False, True):
        trace, seen = [], []

        def net(x, t):
            seen.append(x)
            return 3 * toy(x, t)

        result = diffusion.sample(net, noise, steps=9, eta=eta, clip=clip, trace=trace)
        assert len(trace) == 9 and torch.equal(trace[0][1], noise) and torch.equal(trace[-1][2], result)
        assert all(torch.equal(x, entry[1]) for x, entry in zip(seen, trace))
        bounds[clip] = max(x0.abs().max().item() for _, _, x0 in trace)
    assert bounds[False] > 1.05 and bounds[True] == 1


@pytest.mark.parametrize("make, call, value", [
    (dict(schedule="sqrt"), {}, "sqrt"), (dict(target="x0"), {}, "x0"),
    ({}, dict(steps=0), "0"), ({}, dict(steps=1001), "1001"), ({}, dict(guidance=3.5), "3.5"),
    ({}, dict(guidance=3.5, y=torch.tensor([0])), "3.5"), ({}, dict(guidance=0.5, null=5), "0.5")])
def test_refusals(make, call, value):
    """Unknown names, steps out of range, guidance without y or null: a ValueError that names the value."""
    with pytest.raises(ValueError, match=rf"\b{re.escape(value)}\b"):
        GaussianDiffusion(**make).sample(toy, images(1, 1, 4, 4), **call)


def test_own_project(tmp_path, monkeypatch):
    """In an empty folder, diffusion.py and the README's block of at most 25 lines train one's own network.

    A loss of 1 is that of predicting 0. The toy's pixels are -1 or 1; of noise bounded to [-1, 1] the mean
    absolute value is 0.63.
    """
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
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
