"""Gaussian diffusion: four paths from images to noise, targets, the training loss, three samplers.

Below a line, contrastive self-distillation.

Conventions, used everywhere:
  data      x0 in [-1, 1] (latents: about unit variance)
  scale     of edm sigma_data, the deviation of x0; else 1
  time      t from the image to noise: 0..T, of linear and cosine 0..T-1; a network gets t itself
  noising   x_t = a x0 / scale + s eps, a and s being functions of t
  velocity  v = da x0 / scale + ds eps, the derivative of x_t by the angle arctan(s / a) (arXiv 2202.00512,
            appendix D); of flow by t / T
  target    what the network predicts: eps or v
  sigma     scale s / a = 1 / sqrt(SNR): the noise in units of x0, by which levels of two paths compare
  guidance  eps_null + w (eps_y - eps_null); w = 1 is off   arXiv 2207.12598, eq. 6, with w there = w - 1 here

A network is a callable net(x_t, t) or net(x_t, t, y) -> tensor like x_t. The diffusion knows no more of it.
This file needs torch and tqdm alone: copy it into a project of yours.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

TARGETS = ["eps", "v"]
SAMPLERS = ["ddim", "ddpm", "heun"]


# --- paths: a, s and their derivatives da, ds by the angle arctan(s / a), of flow by t / T ---
#
# On all of them a ds - s da = 1, so that x0 / scale = ds x_t - s v and eps = a v - da x_t.

class Path:
    """What paths have in common; where they don't say otherwise, t is continuous, a float32 in 0..T.

    Each path says coefficients(t) = (a, s, da, ds); draw(n), times for n images in training; and, where t is
    continuous, t_of(sigma). on: generator= and device=, as of torch.rand.
    """

    scale = 1.0

    def __init__(self, T):
        self.T = T

    def sigma(self, t):
        """How large the noise is at t (B,) < T, in units of x0: 1 / sqrt(SNR)."""
        a, s, _, _ = self.coefficients(t)
        return self.scale * s / a

    def abar(self, t):
        """1 / (1 + sigma^2) at t (B,): the image's share of the variance, were that of x0 1."""
        return 1 / (1 + self.sigma(t) ** 2)

    def draw_below(self, sigma, n, **on):
        """n times, evenly drawn among those with less noise than sigma."""
        return torch.rand(n, **on) * self.t_of(sigma)

    def grid(self, steps, sampler):
        """The times at which a sampler asks the network, from noise on; heun's are closest at the image."""
        left = torch.linspace(1, 0, steps + 1)[:-1]
        return self.T * (left ** 1.5 if sampler == "heun" else left)


class Table(Path):
    """DDPM: a^2 = abar_t, s^2 = 1 - abar_t (arXiv 2006.11239, eq. 4); t is an int64 in 0..T-1.

    It is one less than the paper's: at 0 there is the first beta's noise. betas (T,) float64, bounded by
    0.999 here. The tables are float32, and move to the device of the latest t.
    """

    def __init__(self, betas):
        super().__init__(len(betas))
        abar = torch.cumprod(1 - betas.clamp(max=0.999), dim=0)
        self.tables = torch.stack([abar.sqrt(), (1 - abar).sqrt()]).float()
        self.sigmas = ((1 - abar) / abar).sqrt()

    def coefficients(self, t):
        self.tables = self.tables.to(t.device)
        a, s = self.tables[:, t]
        return a, s, -s, a

    def abar(self, t):
        a, *_ = self.coefficients(t)
        return a.square()

    def draw(self, n, **on):
        return torch.randint(self.T, (n,), **on)

    def draw_below(self, sigma, n, **on):
        levels = torch.searchsorted(self.sigmas, sigma).item()
        return torch.randint(levels, (n,), **on)

    def grid(self, steps, sampler):
        if sampler == "heun":
            return (super().grid(steps, sampler) * (self.T - 1) / self.T).round().long()
        return torch.linspace(self.T - 1, -1, steps + 1).round().long()[:-1]


def linear_betas(T):
    """Betas (T,) float64 that rise linearly; 1e-4 to 0.02 at T = 1000 (DDPM, section 4)."""
    return torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)


def cosine_betas(T, s=0.008):
    """Betas (T,) float64 with which abar falls like cos^2 of (t + 1) / T (arXiv 2102.09672, eq. 17)."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return 1 - f[1:] / f[:-1]


class EDM(Path):
    """EDM (arXiv 2206.00364): t = T arctan(sigma / sigma_data) / (pi / 2).

    x_t has unit variance, if x0 has the deviation sigma_data. The mean squared error of v is EDM's loss with
    its preconditioning and weight (table 1), v being -F. Other than there, the network gets t, not
    ln(sigma) / 4; sampling starts at pure noise, not at sigma = 80; heun has times of its own, and averages
    x0 and eps where EDM averages dx / dsigma (algorithm 1).
    """

    def __init__(self, T, sigma_data):
        super().__init__(T)
        self.scale = sigma_data

    def coefficients(self, t):
        angle = t * (math.pi / 2 / self.T)
        a, s = angle.cos(), angle.sin()
        return a, s, -s, a

    def t_of(self, sigma):
        return math.atan(sigma / self.scale) * (self.T / (math.pi / 2))

    def draw(self, n, **on):
        # ln sigma has mean -1.2 and deviation 1.2 where the data's deviation is 0.5 (EDM, table 1)
        log_ratio = -1.2 - math.log(0.5) + 1.2 * torch.randn(n, **on)
        return log_ratio.exp().atan() * (self.T / (math.pi / 2))


class Flow(Path):
    """Straight lines (rectified flow, arXiv 2209.03003); tau is logit-normal (arXiv 2403.03206, 3.1)."""

    def coefficients(self, t):
        tau = t / self.T
        one = torch.ones_like(tau)
        return 1 - tau, tau, -one, one

    def t_of(self, sigma):
        return sigma / (1 + sigma) * self.T

    def draw(self, n, **on):
        return torch.randn(n, **on).sigmoid() * self.T


SCHEDULES = {
    "linear": lambda T, sigma_data: Table(linear_betas(T)),
    "cosine": lambda T, sigma_data: Table(cosine_betas(T)),
    "edm": EDM,
    "flow": lambda T, sigma_data: Flow(T),
}


class GaussianDiffusion:
    """A path and what follows from it; has no parameters.

    T           number of noise levels, or where the scale of t ends
    schedule    "linear", "cosine", "edm" or "flow": the path
    target      "eps" or "v"; edm and flow know v alone [v there, else eps]
    sigma_data  of edm: the standard deviation that data is taken to have; 0.5 for images, 1 for latents
    Raises ValueError for another schedule or target.
    """

    def __init__(self, T=1000, schedule="linear", target=None, sigma_data=0.5):
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: use one of {', '.join(SCHEDULES)}.")
        self.T = T
        self.path = SCHEDULES[schedule](T, sigma_data)
        self.discrete = isinstance(self.path, Table)
        self.target = target or ("eps" if self.discrete else "v")
        if self.target not in TARGETS:
            raise ValueError(f"unknown target {target!r}: use one of {', '.join(TARGETS)}.")
        if self.target == "eps" and not self.discrete:
            raise ValueError(f"schedule {schedule} goes with target v alone, not {target}: leave it out.")

    def coefficients(self, t):
        """Times t (B,) -> a, s, da, ds, each (B, 1, 1, 1) on the device of t."""
        return [c[:, None, None, None] for c in self.path.coefficients(t)]

    def abar_table(self):
        """1 / (1 + sigma^2) at t = 0, 1 .. T, (T + 1,), for a network that weighs z by it."""
        t = torch.arange(self.T + 1)
        return self.path.abar(t.clamp(max=self.T - 1) if self.discrete else t.float())

    def add_noise(self, x0, t, eps):
        """x0 and noise eps (B, C, H, W), t (B,) -> x_t."""
        a, s, _, _ = self.coefficients(t)
        return a * x0 / self.path.scale + s * eps

    def to_target(self, x0, t, eps):
        """What the network should say, (B, C, H, W)."""
        if self.target == "eps":
            return eps
        _, _, da, ds = self.coefficients(t)
        return da * x0 / self.path.scale + ds * eps

    def to_x0_eps(self, out, x_t, t):
        """What the network said, out, in terms of (x0, eps), each (B, C, H, W)."""
        a, s, da, ds = self.coefficients(t)
        if self.target == "eps":
            return (x_t - s * out) / a, out
        return self.path.scale * (ds * x_t - s * out), a * out - da * x_t

    def error(self, out, x0, t, eps):
        """Mean squared error of the network's answer out, over pixels, per image (B,) (of eps: DDPM, eq. 14).

        A weight for each t would stand here: it is what loss and train.py call.
        """
        difference = out.float() - self.to_target(x0, t, eps)
        return difference.square().mean((1, 2, 3))

    def loss(self, net, x0, t, eps, y=None):
        """The training loss per image (B,): noise x0 (B, C, H, W) to t (B,), ask the network, compare."""
        x_t = self.add_noise(x0, t, eps)
        out = net(x_t, t) if y is None else net(x_t, t, y)
        return self.error(out, x0, t, eps)

    def predict(self, net, x, t, y=None, null=None, guidance=1.0):
        """The network's answer, with classifier-free guidance in one batch of 2B where it is on."""
        if guidance != 1 and (y is None or null is None):
            raise ValueError(f"guidance = {guidance} needs classes: give y and null, or leave guidance at 1.")
        if y is None:
            return net(x, t).to(x.dtype)
        if guidance == 1:
            return net(x, t, y).to(x.dtype)
        both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))
        out_y, out_null = both.to(x.dtype).chunk(2)
        return out_null + guidance * (out_y - out_null)

    def denoise(self, net, x, t, y=None, null=None, guidance=1.0, clip=True):
        """x_t = x (B, C, H, W) at t (B,) -> what the network takes for x0 and eps; clip: with t > 0 alone."""
        x0, eps = self.to_x0_eps(self.predict(net, x, t, y, null, guidance), x, t)
        if clip:
            a, s, _, _ = self.coefficients(t)
            x0 = x0.clamp(-1, 1)
            eps = (x - a * x0 / self.path.scale) / s                         # what then leads from x0 to x
        return x0, eps

    def default_steps(self, sampler):
        """How many steps a sampler takes here. Raises ValueError where there is none of that name."""
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}: use one of {', '.join(SAMPLERS)}.")
        if sampler == "ddpm" and not self.discrete:
            raise ValueError("sampler ddpm needs schedule linear or cosine: use ddim or heun.")
        return {"ddim": min(50, self.T), "ddpm": self.T, "heun": min(25, self.T)}[sampler]

    @torch.no_grad()
    def sample(self, net, noise, y=None, null=None, steps=None, sampler="ddim", guidance=1.0, clip=True,
               randn=torch.randn_like, trace=None):
        """Images (B, C, H, W) from noise (B, C, H, W) ~ N(0, 1), float32, with a network in eval mode.

        A step adds (change of a) x0 / scale + (change of s) eps, which the network has predicted; ddpm puts
        fresh noise in the place of a part of eps. For bf16, call it under torch.autocast.

        y         classes (B,) or None
        null      the class id that means "no class"; needed for guidance
        steps     1..T [ddim: 50, ddpm: T, heun: 25; at most T]
        sampler   ddim  x0 and eps stand still in a step: Euler's of x / a by s / a (arXiv 2010.02502, eq. 13)
                  heun  their mean over both ends of the step; asks the network twice, in the last step once
                  ddpm  ancestral, with its smaller variance (arXiv 2006.11239, eq. 7); of linear and cosine
        guidance  1: off
        clip      bound the predicted x0 to [-1, 1] at every step; False for latents (cosine: with v alone)
        randn     gives the noise of a step of ddpm, called with a tensor like x_t
        trace     a list that receives (t, scale x_t, predicted x0) of every step
        Raises ValueError for a sampler that is unknown here, steps out of range, guidance without y or null.
        """
        usual = self.default_steps(sampler)
        steps = usual if steps is None else steps
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps = {steps} is out of range: use 1 to {self.T}.")
        scale = self.path.scale
        times = self.path.grid(steps, sampler).to(noise.device)
        a, s, _, _ = [c.tolist() for c in self.path.coefficients(times)]
        a, s = a + [1.0], s + [0.0]                             # the last step leads to no noise at all
        asked = dict(y=y, null=null, guidance=guidance, clip=clip)
        x = noise
        for i in tqdm(range(steps), desc="sampling", leave=False, delay=2, disable=None):
            x0, eps = self.denoise(net, x, times[i].repeat(len(x)), **asked)
            if trace is not None:
                trace.append((times[i].item(), scale * x, x0))
            var = 0.0                                           # of fresh noise
            if sampler == "ddpm":
                var = (s[i + 1] / s[i]) ** 2 * (1 - (a[i] / a[i + 1]) ** 2)
            ahead = a[i + 1] * x0 / scale + max(s[i + 1] ** 2 - var, 0) ** 0.5 * eps
            if var > 0:
                ahead = ahead + var ** 0.5 * randn(x)
            if sampler == "heun" and i + 1 < steps:             # again, with the mean of here and there
                x0_there, eps_there = self.denoise(net, ahead, times[i + 1].repeat(len(x)), **asked)
                ahead = (x + (a[i + 1] - a[i]) * (x0 + x0_there) / (2 * scale)
                         + (s[i + 1] - s[i]) * (eps + eps_there) / 2)
            x = ahead
        return scale * x


# --- contrastive self-distillation: z of an image against the EMA teacher's z of another view of it ---
#
# student  z of the denoising pass itself, at its t, through a projector
# teacher  z by the EMA network and its projector, of another view with less noise than TEACHER_SIGMA
# loss     InfoNCE: the student's image is to be found among all the teacher's images

TEACHER_SIGMA = 0.341        # between t = 99 and 100 on linear's path
TEMPERATURE = 0.2


def make_projector(net):
    """An MLP for z of a network, from its width D to 128 (SimCLR, arXiv 2002.05709, section 2.1)."""
    x = next(net.parameters()).new_zeros(1, net.channels, net.image_size, net.image_size)
    D = net.encode(x, torch.zeros(1, dtype=torch.int64, device=x.device)).shape[1]
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 1024), nn.GELU(), nn.Linear(1024, 128))


def augment(x0, u):
    """Another view of each image x0 (B, C, H, W): half to all of its area, mirrored or not.

    u (B, 4) in [0, 1) chooses the part's size, its place in x and y, and the mirror.
    """
    side = (0.5 + 0.5 * u[:, 0]).sqrt()
    place = (1 - side)[:, None] * (2 * u[:, 1:3] - 1)                                     # of its middle
    mirror = torch.where(u[:, 3] < 0.5, 1, -1)
    zero = torch.zeros_like(side)
    theta = torch.stack([side * mirror, zero, place[:, 0],
                         zero, side, place[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, x0.shape, align_corners=False)                            # (B, H, W, 2)
    # outside by half a pixel at most, where reflection repeats the border; "border" needs torch 2.13 on MPS
    return F.grid_sample(x0, grid, padding_mode="reflection", align_corners=False)


def contrast(p, keys, own):
    """InfoNCE per image (n,): p (n, D) is to be like keys[own], unlike the rest (arXiv 1807.03748, eq. 4).

    keys (N, D), made without a gradient; own (n,) int64. In float32: float16 makes NaN of a vector near zero.
    """
    with torch.autocast(p.device.type, enabled=False):
        p = F.normalize(p.float(), dim=1)
        keys = F.normalize(keys.float(), dim=1)
        return F.cross_entropy(p @ keys.T / TEMPERATURE, own, reduction="none")
