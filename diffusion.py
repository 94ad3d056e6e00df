"""Gaussian diffusion: noise schedules, targets, the training loss, one sampler for DDIM and DDPM.

Below a line, contrastive self-distillation.

Conventions, used everywhere:
  data      x0 in [-1, 1] (latents: about unit variance)
  time      t is an int64 in 0..T-1; t = 0 is almost clean, t = T-1 almost pure noise; a network gets t itself
  noising   x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps    DDPM, arXiv 2006.11239, eq. 4
  target    what the network predicts: eps, or
            v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0      Progressive distillation, arXiv 2202.00512, eq. 9
  guidance  eps_null + w (eps_y - eps_null); w = 1 is off   arXiv 2207.12598, eq. 6, with w there = w - 1 here

A network is a callable net(x_t, t) or net(x_t, t, y) -> tensor like x_t. The diffusion knows no more of it.
This file needs torch and tqdm alone: copy it into a project of yours.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


# --- noise schedules ---

def linear_schedule(T):
    """abar (T,) float64 of betas that rise linearly; 1e-4 to 0.02 at T = 1000 (DDPM, section 4)."""
    betas = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)
    return torch.cumprod(1 - betas.clamp(max=0.999), dim=0)


def cosine_schedule(T, s=0.008):
    """abar (T,) float64 that falls like cos^2 of t / T, betas at most 0.999 (arXiv 2102.09672, eq. 17)."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    betas = 1 - f[1:] / f[:-1]
    return torch.cumprod(1 - betas.clamp(max=0.999), dim=0)


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}
TARGETS = ["eps", "v"]


class GaussianDiffusion:
    """A noise schedule and what follows from it; has no parameters.

    T         number of noise levels
    schedule  "linear" or "cosine"
    target    "eps" or "v"
    Raises ValueError for anything else. The tables abar, sqrt_abar and sqrt_1m_abar, each (T,), are computed
    in float64 and stored as float32.
    """

    def __init__(self, T=1000, schedule="linear", target="eps"):
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: use one of {', '.join(SCHEDULES)}.")
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}: use one of {', '.join(TARGETS)}.")
        abar = SCHEDULES[schedule](T)
        self.T = T
        self.target = target
        self.abar = abar.float()
        self.sqrt_abar = abar.sqrt().float()
        self.sqrt_1m_abar = (1 - abar).sqrt().float()

    def coefficients(self, t):
        """Steps t (B,) -> a = sqrt(abar_t), s = sqrt(1 - abar_t), each (B, 1, 1, 1) on the device of t."""
        if self.abar.device != t.device:                        # once: the tables move to where they are used
            self.abar = self.abar.to(t.device)
            self.sqrt_abar = self.sqrt_abar.to(t.device)
            self.sqrt_1m_abar = self.sqrt_1m_abar.to(t.device)
        a = self.sqrt_abar[t]
        s = self.sqrt_1m_abar[t]
        return a[:, None, None, None], s[:, None, None, None]

    def add_noise(self, x0, t, eps):
        """x0 and noise eps (B, C, H, W), t (B,) -> x_t."""
        a, s = self.coefficients(t)
        return a * x0 + s * eps

    def to_target(self, x0, t, eps):
        """What the network should say, (B, C, H, W)."""
        if self.target == "eps":
            return eps
        a, s = self.coefficients(t)
        return a * eps - s * x0

    def to_x0_eps(self, out, x_t, t):
        """What the network said, out, in terms of (x0, eps), each (B, C, H, W)."""
        a, s = self.coefficients(t)
        if self.target == "eps":
            return (x_t - s * out) / a, out
        return a * x_t - s * out, s * x_t + a * out

    def error(self, out, x0, t, eps):
        """Mean squared error of the network's answer out, over pixels, per image (B,) (DDPM, eq. 14).

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
        if y is None:
            return net(x, t).to(x.dtype)
        if guidance == 1:
            return net(x, t, y).to(x.dtype)
        both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))
        out_y, out_null = both.to(x.dtype).chunk(2)
        return out_null + guidance * (out_y - out_null)

    @torch.no_grad()
    def sample(self, net, noise, y=None, null=None, steps=50, eta=0.0, guidance=1.0, clip=True,
               randn=torch.randn_like, trace=None):
        """Images (B, C, H, W) from noise (B, C, H, W) ~ N(0, 1) (DDIM, arXiv 2010.02502, eq. 12 and 16).

        y         classes (B,) or None
        null      the class id that means "no class"; needed for guidance
        steps     1..T, evenly spaced from t = T-1; the last one goes to abar = 1
        eta       0: DDIM, deterministic. 1 with steps = T: ancestral DDPM with its smaller variance
        guidance  1: off
        clip      bound the predicted x0 to [-1, 1] at every step; False for latents
        randn     gives the noise of a step, called with a tensor like x_t (only where eta > 0)
        trace     a list that receives (t, x_t, predicted x0) of every step
        Raises ValueError for steps out of range and for guidance without y or null.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps = {steps} is out of range: use 1 to {self.T}.")
        if guidance != 1 and (y is None or null is None):
            raise ValueError(f"guidance = {guidance} needs classes: give y and null, or leave guidance at 1.")
        a = self.sqrt_abar.tolist() + [1.0]                     # at [-1] and so at t = -1: no noise is left
        s = self.sqrt_1m_abar.tolist() + [0.0]
        times = torch.linspace(self.T - 1, -1, steps + 1).round().long().tolist()         # T-1, ..., -1
        x = noise
        for t, r in zip(tqdm(times[:-1], desc="sampling", leave=False, delay=2, disable=None), times[1:]):
            ts = torch.full((len(x),), t, device=x.device)
            out = self.predict(net, x, ts, y, null, guidance)
            x0, eps = self.to_x0_eps(out, x, ts)
            if clip:
                x0 = x0.clamp(-1, 1)
                eps = (x - a[t] * x0) / s[t]                    # what then leads from x0 to x
            if trace is not None:
                trace.append((t, x, x0))
            var = (eta * s[r] / s[t]) ** 2 * (1 - (a[t] / a[r]) ** 2)                     # eq. 16
            x = a[r] * x0 + max(s[r] ** 2 - var, 0) ** 0.5 * eps                          # eq. 12
            if var > 0:
                x = x + var ** 0.5 * randn(x)
        return x


# --- contrastive self-distillation: z of an image against the EMA teacher's z of another view of it ---
#
# student  z of the denoising pass itself, at its t, through a projector
# teacher  z by the EMA network and its projector, of another view with less noise than at t = TEACHER_T
# loss     InfoNCE: the student's image is to be found among all the teacher's images

TEACHER_T = 100
TEMPERATURE = 0.2


class Student(nn.Module):
    """A network whose forward pass also gives the projection of its z, (B, 128): what DDP must see as one."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, y=None):
        eps, z = self.net(x, t, y, return_z=True)
        return eps, self.net.projector(z)


def make_projector(net):
    """An MLP for z of a network, from its width D to 128 (SimCLR, arXiv 2002.05709, section 2.1)."""
    x = torch.zeros(1, net.channels, net.image_size, net.image_size)
    D = net.encode(x, torch.zeros(1, dtype=torch.int64)).shape[1]
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
    return F.grid_sample(x0, grid, align_corners=False)


@torch.no_grad()
def teacher_keys(ema, x_t, t, micro):
    """What the teacher says of views x_t (b, C, H, W) at t (b,), micro at a time -> (b, 128) float32."""
    keys = [ema.projector(ema.encode(x, s)).float() for x, s in zip(x_t.split(micro), t.split(micro))]
    return torch.cat(keys)


def contrast(p, keys, own):
    """InfoNCE per image (n,): p (n, D) is to be like keys[own], unlike the rest (arXiv 1807.03748, eq. 4).

    keys (N, D); own (n,) int64. In float32: half precision overflows.
    """
    with torch.autocast(p.device.type, enabled=False):
        p = F.normalize(p.float(), dim=1)
        keys = F.normalize(keys.float(), dim=1)
        return F.cross_entropy(p @ keys.T / TEMPERATURE, own, reduction="none")
