"""Gaussian diffusion: the noise schedule, the training loss and one sampler for DDIM and DDPM.

Below it, in this order: contrastive self-distillation, tools of all programs, and the data sets.

Conventions, used everywhere:
  data      x0 in [-1, 1] (latents: about unit variance)
  time      t is an int64 in 0..T-1; t = 0 is almost clean, t = T-1 almost pure noise; a network gets t itself
  noising   x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps    DDPM, arXiv 2006.11239, eq. 4
  target    what the network predicts: eps, or
            v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0      Progressive distillation, arXiv 2202.00512, eq. 9
  guidance  eps_null + w (eps_y - eps_null); w = 1 is off   arXiv 2207.12598, eq. 6, with w there = w - 1 here

A network is a callable net(x_t, t) or net(x_t, t, y) -> tensor like x_t. The diffusion knows no more of it.
"""
import json
import math
import os
import shlex
import shutil
import signal
import sys
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm


def linear_schedule(T):
    """abar (T,) float64 of betas that rise linearly; 1e-4 to 0.02 at T = 1000 (DDPM, section 4)."""
    betas = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def cosine_schedule(T, s=0.008):
    """abar (T,) float64 that falls like cos^2 of t / T, betas at most 0.999 (arXiv 2102.09672, eq. 17)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


SCHEDULES = {"linear": linear_schedule, "cosine": cosine_schedule}
TARGETS = ("eps", "v")


class GaussianDiffusion:
    """Noise schedule and what follows from it; has no parameters.

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
        self.T, self.target = T, target
        abar = SCHEDULES[schedule](T)
        self.abar = abar.float()
        self.sqrt_abar = abar.sqrt().float()
        self.sqrt_1m_abar = (1 - abar).sqrt().float()

    def coefficients(self, t):
        """Steps t (B,) -> sqrt(abar_t), sqrt(1 - abar_t), each (B, 1, 1, 1) on the device of t."""
        if self.abar.device != t.device:                        # once: the tables move to where they are used
            self.abar, self.sqrt_abar, self.sqrt_1m_abar = (
                table.to(t.device) for table in (self.abar, self.sqrt_abar, self.sqrt_1m_abar))
        return self.sqrt_abar[t][:, None, None, None], self.sqrt_1m_abar[t][:, None, None, None]

    def add_noise(self, x0, t, noise):
        """x0 and noise (B, C, H, W), t (B,) -> x_t."""
        a, s = self.coefficients(t)
        return a * x0 + s * noise

    def to_target(self, x0, t, noise):
        """What the network should have said, (B, C, H, W)."""
        if self.target == "eps":
            return noise
        a, s = self.coefficients(t)
        return a * noise - s * x0

    def to_x0_eps(self, out, x_t, t):
        """What the network said, out, in terms of (x0, eps), each (B, C, H, W)."""
        a, s = self.coefficients(t)
        if self.target == "eps":
            return (x_t - s * out) / a, out
        return a * x_t - s * out, s * x_t + a * out

    def loss(self, net, x0, t, noise, y=None):
        """Mean squared error of the prediction per image (B,): the mean over pixels (DDPM, eq. 14).

        A network that answers with more than its prediction, a tuple, gets the rest back behind the loss.
        """
        x_t = self.add_noise(x0, t, noise)
        out = net(x_t, t) if y is None else net(x_t, t, y)
        out, *rest = out if type(out) is tuple else (out,)
        loss = (out.float() - self.to_target(x0, t, noise)).square().mean((1, 2, 3))
        return (loss, *rest) if rest else loss

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
        a, s = self.sqrt_abar.tolist() + [1.0], self.sqrt_1m_abar.tolist() + [0.0]      # at [-1]: no noise
        times = torch.linspace(self.T - 1, -1, steps + 1).round().long().tolist()       # T-1, ..., -1
        x = noise
        for t, r in zip(tqdm(times[:-1], desc="sampling", leave=False, delay=2), times[1:]):
            ts = torch.full((len(x),), t, device=x.device)
            x0, eps = self.to_x0_eps(self.predict(net, x, ts, y, null, guidance), x, ts)
            if clip:
                x0 = x0.clamp(-1, 1)
                eps = (x - a[t] * x0) / s[t]
            if trace is not None:
                trace.append((t, x, x0))
            var = (eta * s[r] / s[t]) ** 2 * (1 - (a[t] / a[r]) ** 2)                   # eq. 16
            x = a[r] * x0 + max(s[r] ** 2 - var, 0) ** 0.5 * eps                        # eq. 12
            if var > 0:
                x = x + var ** 0.5 * randn(x)
        return x

    def predict(self, net, x, t, y, null, guidance):
        """The network's answer, with classifier-free guidance in one batch of 2B where it is on."""
        if y is None:
            return net(x, t).to(x.dtype)
        if guidance == 1:
            return net(x, t, y).to(x.dtype)
        both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))
        out_y, out_null = both.to(x.dtype).chunk(2)
        return out_null + guidance * (out_y - out_null)


# --- contrastive self-distillation: z of an image against the EMA teacher's z of another view of it ---

class Student(nn.Module):
    """A network whose forward pass also gives the projection of its z, (B, 128): what DDP must see as one."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, y=None):
        eps, feats = self.net(x, t, y, return_features=True)
        return eps, self.net.projector(feats[self.net.bottleneck].float().mean((2, 3)))


def projector(net):
    """An MLP for z of a network, from its width to 128 (SimCLR, arXiv 2002.05709, section 2.1)."""
    one = torch.zeros(1, net.channels, net.image_size, net.image_size)
    D = net.encode(one, torch.zeros(1, dtype=torch.int64)).shape[1]
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 1024), nn.GELU(), nn.Linear(1024, 128))


def augment(x0, u):
    """Another view of each image x0 (B, C, H, W): half to all of its area, mirrored or not.

    u (B, 4) in [0, 1) chooses the part's size, its place in x and y, and the mirror.
    """
    side = (0.5 + 0.5 * u[:, 0]).sqrt()
    place = (1 - side)[:, None] * (2 * u[:, 1:3] - 1)                                   # of its middle
    mirror = torch.where(u[:, 3] < 0.5, 1, -1)
    zero = torch.zeros_like(side)
    theta = torch.stack([side * mirror, zero, place[:, 0], zero, side, place[:, 1]], dim=1).view(-1, 2, 3)
    return F.grid_sample(x0, F.affine_grid(theta, x0.shape, align_corners=False), align_corners=False)


@torch.no_grad()
def teacher_keys(ema, x_t, t, micro):
    """What the teacher says of a view, of all processes: x_t (b, C, H, W), t (b,) -> (B, 128) float32."""
    parts = zip(x_t.split(micro), t.split(micro))
    keys = torch.cat([ema.projector(ema.encode(*part)).float() for part in parts])
    if dist.is_initialized():
        every = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
        dist.all_gather(every, keys)
        keys = torch.cat(every)
    return keys


def contrast(p, keys, own, temperature=0.2):
    """InfoNCE per image (n,): p (n, D) is to be like keys[own], unlike the rest (arXiv 1807.03748, eq. 4).

    keys (N, D); own (n,) int64. In float32: half precision overflows.
    """
    with torch.autocast(p.device.type, enabled=False):
        p, keys = F.normalize(p.float(), dim=1), F.normalize(keys.float(), dim=1)
        return F.cross_entropy(p @ keys.T / temperature, own, reduction="none")


# --- tools of all programs ---

class UserError(Exception):
    """Bad input: one sentence that says what was wrong, with which value, and what to do. Exit code 2."""


def require(ok, message):
    if not ok:
        raise UserError(message)


def say(message, file=None):          # one line on the console, from the first process only
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=file)


def command(body):
    """Makes a main(argv) of body(argv): bad input ends with one sentence and exit code 2."""
    def main(argv=None):
        before = {number: signal.getsignal(number) for number in STOPS}
        try:
            body(argv)
        except (UserError, OSError) as e:           # OSError: a full disk, a folder that may not be written
            say(f"error: {e}", file=sys.stderr)
            sys.exit(2)
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) != handler:
                    signal.signal(number, handler)
            if dist.is_initialized():
                dist.destroy_process_group()
    return main


def setup(name=None):
    """Device name -> torch.device, rank, world size; joins the others under torchrun. Raises UserError."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = name or next(kind for kind in there if there[kind])
    require(there.get(name), f"--device {name} is not there: use {', '.join(k for k in there if there[k])}.")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    torch.cuda.set_device(device) if name == "cuda" else None
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    return device, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_autocast(name, device):
    """-> a maker of autocast contexts, its dtype. What does not work here gives way to fp32, said once."""
    if name is None and device.type == "cuda":      # below capability 8, bf16 is only emulated
        name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    try:
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item()
    except Exception as e:
        say(f"{name} does not work on {device} ({e}): going on in fp32")
        dtype = None
    # no cache: each weight is used once, and CUDA graphs forbid it
    return lambda: torch.autocast(device.type, dtype, cache_enabled=False) if dtype else nullcontext(), dtype


STOPS = signal.SIGTERM, signal.SIGINT


def collect_stops():
    """-> a list; from now on SIGTERM and Ctrl-C are put there. A second Ctrl-C ends the process at once."""
    asked = []

    def ask(number, frame):                         # SIGTERM may come twice: torchrun passes it on
        asked.append(int(number))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:          # as of a job in the background
            signal.signal(number, ask)
    return asked


def resume_command():
    """The command line that goes on with this run of train.py."""
    start = sys.orig_argv
    if "RANK" in os.environ:
        start = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}", *sys.argv]
    return shlex.join(start + ["--resume"] * ("--resume" not in start))


def save_file(path, write):
    """Atomic: write(file) into a temporary file, flush it to the disk, rename it. Raises UserError."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:            # torch.save turns a full disk into a RuntimeError
        part.unlink(missing_ok=True)
        raise UserError(f"could not write {path} ({e}), it is as it was: make room, go on (train: --resume).")


def seeded_noise(seeds, shape):
    """-> a function that gives the next noise (n, *shape), each image from a CPU generator of its own seed.

    So image i is the same for any batch size, number of processes and device, as in EDM (arXiv 2206.00364).
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators])


def to_uint8(x):
    """Images (N, C, H, W) in [-1, 1] -> uint8 on the CPU."""
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).byte().cpu()


def save_grid(images, file, columns):
    """Images (N, C, H, W) in [-1, 1] -> a PNG file, row by row; small ones are enlarged for the eye."""
    zoom = max(1, 64 // images.shape[-1])
    tiles = to_uint8(images).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = make_grid(tiles, nrow=columns, padding=4, pad_value=255)
    to_pil_image(grid).save(file, format="PNG")


# --- data ---

# images (N, C, H, W) uint8; labels (N,) int64; masks (N, H, W) uint8, k + 1 for class k, 0 around; or None.
# Latents: images (N, C, h, w) float16; both: these and the flipped images' (2, N, C, h, w); meta: see encode.
Data = namedtuple("Data", "images labels masks classes both meta", defaults=[None, None])


def load_data(spec, split, image_size=None, skip_bad=False):
    """Data of a spec (see --data); split is "train" or "test". Raises UserError."""
    if spec in ("cifar10", "cifar100"):
        try:
            found = getattr(torchvision.datasets, spec.upper())("data", split == "train", download=True)
        except (OSError, RuntimeError) as e:        # URLError is an OSError
            raise UserError(f"{spec} is not in ./data and could not be downloaded ({e}): go online, or use "
                            "--data shapes (built in) or --data folder:PATH (images of yours).")
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        data = Data(images, torch.tensor(found.targets), None, found.classes)
    elif spec.startswith("folder:"):
        data = load_folder(Path(spec[len("folder:"):]).resolve(), split, image_size or 32, skip_bad)
    elif spec.startswith("latents:"):
        data = load_latents(Path(spec[len("latents:"):]), split)
        side = data.images.shape[-1]
        require(image_size in (None, side), f"{spec} has latents of {side} x {side}, not of {image_size} x "
                                            f"{image_size}: leave --image-size out.")
    elif spec == "random":                          # of --bench
        g, size = torch.Generator().manual_seed(0), image_size or 32
        images = torch.randint(256, (4_096, 3, size, size), dtype=torch.uint8, generator=g)
        data = Data(images, torch.arange(4_096) % 10, None, [str(k) for k in range(10)])
    else:
        require(spec in ("shapes", "shapes:full"),
                f"unknown data {spec!r}: use cifar10, cifar100, folder:PATH, latents:PATH, shapes or "
                "shapes:full.")
        n, seed = (50_000, 0) if split == "train" else (5_000, 1)
        data = Data(*draw_shapes(n, seed, image_size or 16, full=spec == "shapes:full"))
    if image_size and data.images.shape[-1] != image_size:
        data = data._replace(images=resize(data.images, [image_size, image_size], antialias=True))
    return data


def list_folder(root, split):
    """-> image files, labels, class names, of train/<class>/* and test or val, or of a flat folder."""
    train, test = root / "train", root / ("test" if (root / "test").is_dir() else "val")
    part = (train if split == "train" else test) if train.is_dir() else root
    require(part.is_dir() and (part != root or split == "train"),
            f"{root} has no {split} images: it needs {split}/<class>/*; for training, images alone do.")
    classes, found = ["image"], [(p, 0) for p in sorted(root.iterdir()) if p.suffix.lower() in IMG_EXTENSIONS]
    if part != root:
        classes, others = [sorted(p.name for p in d.glob("*") if p.is_dir()) for d in (train, test)]
        extra = sorted(set(others) - set(classes))
        require(not extra, f"{test} has a class that {train} lacks, {extra[:1]}: add it there or remove it.")
        index = {name: k for k, name in enumerate(classes)}
        found = classes and make_dataset(part, index, IMG_EXTENSIONS, allow_empty=True)
    require(found, f"{part} has no images: put some there, or into train/<class>/ and test/<class>/.")
    return [Path(path) for path, _ in found], torch.tensor([k for _, k in found]), classes


def open_image(path):
    """Image file -> RGB, upright where EXIF says how it was held. Raises what Pillow raises."""
    with Image.open(path) as image:
        if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))     # 16 bits of grey
        if image.mode in ("I", "F"):
            raise ValueError("its pixels are numbers without a white")
        image = image.convert("RGB")
    with suppress(Exception):                       # EXIF that is broken says nothing
        image = ImageOps.exif_transpose(image)
    return image


def decode(path, size, skip_bad):
    """Image file -> its centre, (size, size, 3) uint8; None if broken, with skip_bad. Raises UserError."""
    try:
        return np.asarray(ImageOps.fit(open_image(path), (size, size)))
    except Exception as e:                          # Pillow raises many kinds for broken files
        require(skip_bad, f"cannot read the image {path} ({e}): repair or remove it, or pass --skip-bad.")


def load_folder(root, split, size, skip_bad):
    """Decoded in parallel; kept in <root>-<split>-<size>px.npz beside the folder until its files change."""
    files, labels, classes = list_folder(root, split)
    stamp = json.dumps(["upright"] + [[str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns]
                                      for p in files])
    cache = root.with_name(f"{root.name}-{split}-{size}px.npz")
    with suppress(Exception):                       # no cache yet, or a damaged one
        if str((kept := np.load(cache))["stamp"]) == stamp:
            return Data(torch.from_numpy(kept["images"]), labels, None, classes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(lambda path: decode(path, size, skip_bad), files)
        images = list(tqdm(decoded, f"decoding {split}", len(files), unit="img", delay=1))
    good = [i for i, image in enumerate(images) if image is not None]
    require(good, f"none of the {len(files)} images in {root} can be read: check the files.")
    if len(good) < len(files):
        say(f"left out {len(files) - len(good)} unreadable images of {root}")
    images = torch.from_numpy(np.stack([images[i] for i in good])).permute(0, 3, 1, 2).contiguous()
    try:
        if len(good) == len(files):
            save_file(cache, lambda file: np.savez(file, images=images.numpy(), stamp=stamp))
    except UserError as e:
        say(f"these images will be decoded again next time: {e}")
    return Data(images, labels[good], None, classes)


# --- latents: images, encoded by a frozen VAE ---

VAE_PIXELS = 16 * 256 ** 2          # that a VAE works on at a time


def load_vae(name, device):
    """A frozen diffusers.AutoencoderKL, by its name on the hub or its folder. Raises UserError."""
    try:
        from diffusers import AutoencoderKL
        vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
    except ImportError:
        raise UserError("latents need diffusers, which is not installed: pip install diffusers")
    except Exception as e:                          # no network, no such folder, another kind of model ...
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"{name} is no AutoencoderKL that can be loaded ({why}): name one of the hub, while "
                        "online, or the folder of one.")
    return vae.to(device).eval().requires_grad_(False)


def scale_of(vae):
    """How many pixels of an image make one of its latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def vae_of(meta, device):
    """The VAE of latents, where it can be loaded; else None, and one line says so. None for images."""
    try:
        return meta and load_vae(meta["vae"], device)
    except UserError as e:
        say(f"latents will not be decoded: {e}")


def read_images(spec, split, size, skip_bad, batch):
    """-> class names, number of images, iterator over (images (n, C, size, size) uint8, labels (n,)).

    A folder is decoded as it goes, so that it may be larger than the memory. Raises UserError.
    """
    if not spec.startswith("folder:"):
        data = load_data(spec, split, size)
        return data.classes, len(data.images), zip(data.images.split(batch), data.labels.split(batch))
    files, labels, classes = list_folder(Path(spec[len("folder:"):]).resolve(), split)

    def read():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for k in range(0, len(files), batch):
                images = list(pool.map(lambda path: decode(path, size, skip_bad), files[k:k + batch]))
                good = [i for i, image in enumerate(images) if image is not None]
                if good:
                    images = torch.from_numpy(np.stack([images[i] for i in good])).permute(0, 3, 1, 2)
                    yield images, labels[k:k + batch][good]
    return classes, len(files), read()


@torch.no_grad()
def encode(spec, out, size, name, device, skip_bad=False):
    """Writes the latents of a data set into the new folder out. Raises UserError.

    <split>/latents.npy (2, N, C, h, w) float16: posterior means of all images, then of the flipped images, so
    that flips in training are true ones; <split>/labels.npy (N,) int64; meta.json: vae, image_size, classes,
    shape [C, h, w], and mean and std of each channel over the training part.
    """
    out, part = Path(out), Path(f"{Path(out)}.part")                 # part is renamed once it is whole
    require(not out.exists(), f"{out} exists: choose another folder, or remove it.")
    require(not spec.startswith("latents:"), f"{spec} is encoded already: give images.")
    vae, sums = load_vae(name, device), 0
    factor, batch = scale_of(vae), max(1, VAE_PIXELS // size ** 2)
    require(size % factor == 0, f"--image-size {size} does not fit {name}: use a multiple of {factor}.")
    shutil.rmtree(part, ignore_errors=True)                          # of an encoding that was killed
    try:
        for split in ("test", "train"):                             # small one first: its errors cost less
            try:
                classes, total, batches = read_images(spec, split, size, skip_bad, batch)
            except UserError as e:
                require(split == "test", str(e))
                say(f"without a test part, which probes need: {e}")
                continue
            labels, paths = [], [part / split / half for half in ("images", "flipped")]
            (part / split).mkdir(parents=True)
            with open(paths[0], "wb") as images, open(paths[1], "wb") as flipped:
                for x, y in tqdm(batches, f"encoding {split}", math.ceil(total / batch), unit="batch"):
                    require(x.shape[1] == (C := vae.config.in_channels),
                            f"{spec} has {x.shape[1]} channels, {name} {C}: choose another --vae.")
                    x = x.to(device).float() / 127.5 - 1
                    for file, view in ((images, x), (flipped, x.flip(3))):
                        z = vae.encode(view).latent_dist.mean.half().cpu()
                        require(bool(z.isfinite().all()), f"{name} makes latents that float16 does not hold.")
                        file.write(z.numpy().tobytes())
                        if split == "train":                         # number, sum and sum of squares, (3, C)
                            z = z.double()
                            sums = sums + torch.stack([z ** 0, z, z ** 2]).sum((1, 3, 4))
                    labels.append(y)
            require(labels, f"none of the {total} {split} images of {spec} can be read: check the files.")
            labels = torch.cat(labels).numpy()
            if len(labels) < total:
                say(f"left out {total - len(labels)} unreadable {split} images of {spec}")
            np.save(part / split / "labels.npy", labels)
            with open(part / split / "latents.npy", "wb") as file:
                form = dict(descr="<f2", fortran_order=False, shape=(2, len(labels), *z.shape[1:]))
                np.lib.format.write_array_header_1_0(file, form)
                for path in paths:
                    with open(path, "rb") as half:
                        shutil.copyfileobj(half, file)
                    path.unlink()
                file.flush()
                os.fsync(file.fileno())
        mean, square = sums[1] / sums[0], sums[2] / sums[0]
        std = (square - mean ** 2).sqrt()
        require(bool((std > 0).all()), f"{name} makes latents that are constant: use another.")
        meta = dict(vae=str(Path(name).resolve()) if Path(name).is_dir() else name, image_size=size,
                    classes=classes, shape=list(z.shape[1:]), mean=mean.tolist(), std=std.tolist())
        (part / "meta.json").write_text(json.dumps(meta, indent=1))
        os.replace(part, out)
    except OSError as e:
        raise UserError(f"could not encode {spec} into {part} ({e}): make room, or choose another folder.")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def right_meta(meta):
    """Is this, of meta.json or a checkpoint, what encode writes? Raises anything where it is far from it."""
    moments = np.array([meta["mean"], meta["std"]])
    return (moments.shape == (2, meta["shape"][0]) and np.isfinite(moments).all() and moments[1].min() > 0
            and type(meta["vae"]) is str and meta["vae"] != "" and type(meta["classes"]) is list
            and all(type(name) is str for name in meta["classes"]))


def load_latents(root, split):
    """What encode wrote; it stays in its file and is read where it is indexed. Raises UserError."""
    try:
        meta = json.loads((root / "meta.json").read_text())
        both = np.load(root / split / "latents.npy", mmap_mode="r")
        labels, K = np.load(root / split / "labels.npy"), len(meta["classes"])
        fits = right_meta(meta) and both.dtype == np.float16
        fits = fits and both.shape == (2, len(labels), *meta["shape"])
        fits = fits and labels.dtype == np.int64 and labels.ndim == 1
        fits = fits and 0 <= labels.min() <= labels.max() < K
    except Exception as e:                          # a file that is damaged raises many kinds
        raise UserError(f"{root} has no whole latents for {split} ({type(e).__name__}: {e}): make them with "
                        "train.py --encode.")
    require(fits, f"{root}/{split}/latents.npy, {both.dtype} {both.shape}, does not fit its meta.json or its "
                  "labels.npy: encode again.")
    with warnings.catch_warnings():                 # torch says that it could not write there; it does not
        warnings.simplefilter("ignore")
        both = torch.from_numpy(both)
    return Data(both[0], torch.from_numpy(labels), None, meta["classes"], both, meta)


def moments_of(meta, device):
    """Mean and standard deviation of latents (2, C, 1, 1); None for images."""
    return meta and torch.tensor([meta["mean"], meta["std"]], device=device)[..., None, None]


def to_x0(images, moments):
    """Images (N, C, H, W) as stored -> what the network sees: in [-1, 1], or latents of unit variance."""
    return images.float() / 127.5 - 1 if moments is None else (images.float() - moments[0]) / moments[1]


def to_pixels(x, moments, vae):
    """The way back: x as the network sees it -> images (N, C, H, W) in [-1, 1]; without a VAE, latents."""
    if moments is None:
        return x
    z = x.float() * moments[1] + moments[0]
    if vae is None:
        return z
    batch = max(1, VAE_PIXELS // (scale_of(vae) ** 2 * z[0, 0].numel()))
    return torch.cat([vae.decode(some).sample.float() for some in z.split(batch)])


# --- a data set without a download: ten shapes, drawn by their signed distance functions ---

def box(x, y, w, h):          # w, h: half widths
    return torch.maximum(x.abs() - w, y.abs() - h)


def triangle(x, y, r):        # r: radius of the inscribed circle; a side faces down
    return torch.maximum(-y, x.abs() * 0.75 ** 0.5 + y / 2) - r


def star(x, y):               # folded into half a point, then a line from its tip (0, 1.15) to the notch
    r, a, fifth = torch.hypot(x, y), torch.atan2(x, y), 2 * math.pi / 5
    a = (torch.remainder(a + fifth / 2, fifth) - fifth / 2).abs()
    nx, ny = 1.15 - 0.5 * math.cos(fifth / 2), 0.5 * math.sin(fifth / 2)
    return (nx * r * a.sin() + ny * (r * a.cos() - 1.15)) / math.hypot(nx, ny)


SHAPES = {     # signed distance (negative inside) of points to a shape of radius about 1; x right, y up
    "circle": lambda x, y: torch.hypot(x, y) - 0.9,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.25,
    "square": lambda x, y: box(x, y, 0.8, 0.8),
    "bar": lambda x, y: box(x, y, 1.1, 0.32),
    "triangle": lambda x, y: triangle(x, y + 0.2, 0.58),
    "cross": lambda x, y: torch.minimum(box(x, y, 1.0, 0.3), box(x, y, 0.3, 1.0)),
    "star": star,
    "heart": lambda x, y: torch.minimum(torch.hypot(x.abs() - 0.48, y - 0.25) - 0.55,
                                        torch.maximum(0.75 * x.abs() - 0.66 * y - 0.7, y - 0.25)),
    "moon": lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.85 - torch.hypot(x - 0.55, y)),
    "arrow": lambda x, y: torch.minimum(torch.maximum(triangle(x, y - 0.3, 0.45), -y),
                                        box(x, y + 0.5, 0.25, 0.6)),
}
COLOURS = torch.tensor([[1, .2, .2], [.2, .9, .2], [.3, .45, 1], [1, .9, .2],
                        [1, .3, .9], [.2, .9, .9], [1, .6, .15], [.95, .95, .95]])


def draw_shapes(n, seed, size, full=False):
    """-> images (n, 3, size, size) uint8, labels (n,), masks (n, size, size) uint8, class names.

    The same for a seed. Image i is of class i mod 10; its mask is k + 1 inside a shape of class k, 0 around
    it. By default bright on dark and almost upright, easy to draw; full: free in colour, size, place, turn
    and texture.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=g)
    radius = uniform(0.3 if full else 0.55, 0.75, n, 1, 1)
    cx, cy = uniform(-1, 1, 2, n, 1, 1) * ((1 - radius) * 0.8 if full else 0.15)
    turn = uniform(-1, 1, n, 1, 1) * math.radians(180 if full else 17)
    colour = uniform(0, 1, n, 3) if full else COLOURS[torch.randint(8, (n,), generator=g)]
    ground = uniform(0, 1, n, 3) if full else torch.full((n, 3), 0.11)
    rough = uniform(-1, 1, 2, n, 3, 4, 4) * torch.tensor([.2, .2] if full else [.05, 0]).view(2, 1, 1, 1, 1)
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(n, size, size, dtype=torch.uint8)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    for k, distance in enumerate(SHAPES.values()):
        i = slice(k, None, len(SHAPES))
        x, y = (axis - cx[i]) / radius[i], (-axis[:, None] - cy[i]) / radius[i]     # (n / 10, size, size)
        x, y = x * turn[i].cos() + y * turn[i].sin(), y * turn[i].cos() - x * turn[i].sin()
        d = distance(x, y) * radius[i] * size / 2                                   # in pixels
        back, front = [base[i, :, None, None] + F.interpolate(r[i], size=(size, size), mode="bilinear")
                       for base, r in zip((ground, colour), rough)]                 # 2 x (n / 10, 3, ...)
        image = back + (front - back) * (0.5 - d).clamp(0, 1)[:, None]              # anti-aliased
        images[i], masks[i] = (image.clamp(0, 1) * 255).round().byte(), (d < 0) * (k + 1)
    return images, torch.arange(n) % len(SHAPES), masks, list(SHAPES)
