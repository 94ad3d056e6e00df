"""Train a self-conditioned diffusion model.

    python train.py --model unet --size tiny --data shapes        a CPU demo, no download
    torchrun --nproc_per_node=2 train.py --model dit              CIFAR-10 on two GPUs; the same run as on one

Lengths are in images and the batch size is global: more GPUs are faster, the experiment stays the same. All
randomness of a step follows from (seed, step), dropout's from the process as well: resumed or on more GPUs, a
run sees the same images and noise.
Results: runs/<name>/ with config.json, checkpoint.pt, log.jsonl, samples-<images>.png.

In this order: errors, config, data sets, latents, device and run tools, networks and checkpoints, the loop.
To see what training is, begin at the end: train, loop, advance, train_step, forward_backward, then Batches.
"""
import argparse
import copy
import functools
import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor, resize
from torchvision.utils import save_image
from tqdm import tqdm

from diffusion import (SCHEDULES, TARGETS, TEACHER_SIGMA, GaussianDiffusion, augment, contrast,
                       make_projector)
from dit_selfcond import DiT
from unet_selfcond import UNet
from uvit_selfcond import UViT

# A network of your own needs a line in MODELS, DEFAULT_SIZE and, for a size tiny, TINY_IMAGES. Asked of it,
# beside forward, encode and bottleneck as in the three:
#   Net(image_size, channels, num_classes, self_cond, **Net.SIZES[size]) builds it; it keeps the first three
#   parts  the modules that torch.compile gets
#   abar   a buffer (1001,), with self_cond
#   no BatchNorm: the EMA averages parameters, and leaves other buffers as they began
# Named in the dicts of tests/test_networks.py, it is tested like the three.
MODELS = {"unet": UNet, "uvit": UViT, "dit": DiT}
DEFAULT_SIZE = {"unet": "base", "uvit": "small", "dit": "small"}
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}       # types of autocast
LABEL_DROPOUT = 0.1       # part of the labels that become "no class", for guidance (arXiv 2207.12598)
CLIP = 1.0                # largest gradient norm
EMA_RAMP = 0.05           # the EMA's half-life is at most this part of the images seen (as in EDM)
LOG_STEPS = 20            # steps between two records of log.jsonl, and two looks at the loss
GUIDANCE = 2.0            # of the sample grids, where the model is class-conditional
VERSIONS = f"Python {platform.python_version()}, torch {torch.__version__}"


# --- errors and messages ------------------------------------------------------------------------------------

class UserError(Exception):
    """Bad input: one sentence that says what was wrong, with which value, and what to do. Exit code 2."""


class OwnError(UserError):
    """A UserError that may come up in one process alone, which says it; others come up in all of them."""


def require(ok, message):
    if not ok:
        raise UserError(message)


def is_first():
    """Is this the process that speaks?"""
    return os.environ.get("RANK", "0") == "0"


def say(message, file=None, everyone=False):
    """One line on the console, from the first process unless everyone may speak.

    Names of files and classes may hold what a terminal can't show, or would obey: that becomes a "?". A
    terminal that is gone stops nobody.
    """
    if not (is_first() or everyone):
        return
    file = file or sys.stdout
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in message)
    code = getattr(file, "encoding", None) or "utf-8"
    with suppress(OSError, ValueError):
        tqdm.write(text.encode(code, "replace").decode(code), file=file)


@functools.cache
def say_once(message):
    say(message)


def reason(error, line=0):
    """A line of what an error says; where it says nothing, its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[line].strip()


def try_to(what, work):
    """Does what a run can do without: where it fails, one line says so, and the run goes on."""
    try:
        work()
    except Exception as e:
        if not (isinstance(e, (UserError, OSError)) or is_out_of_memory(e)):
            raise
        say(f"could not {what}, going on: {e}")


def progress(*args, **options):
    """A tqdm bar of the first process; where stderr is no terminal, which it would flood, there is none."""
    return tqdm(*args, disable=None if is_first() else True, **options)


# --- config: flags, help, log record and checkpoint record at once ------------------------------------------

def flag(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class Config:
    model: str = flag("dit", "network", list(MODELS))
    size: str = flag(None, "one of the network's SIZES; tiny has defaults of its own [small; unet: base]")
    data: str = flag("cifar10", "cifar10, cifar100, folder:PATH, latents:PATH, shapes, shapes:full")
    image_size: int = flag(None, "side in pixels [32; shapes, --size tiny: 16; with --vae: 256]")
    vae: str = flag(None, "train on latents of --data: a VAE of diffusers, by name or folder [none]")
    skip_bad: bool = flag(False, "leave out unreadable images of a folder")
    out: str = flag(None, "run folder [runs/<model>-<size>-<data>]")
    images: int = flag(None, "stop after so many training images [10,000,000 unless --minutes is given]")
    minutes: float = flag(None, "stop after so many minutes")
    save_every: int = flag(500_000, "images between two checkpoints [500,000]")
    sample_every: int = flag(500_000, "images between two sample grids [500,000]")
    resume: bool = flag(False, "continue the run in --out, with its flags; start fresh where it has none")
    seed: int = flag(0, "of weights, batches and noise [0]")
    batch_size: int = flag(256, "images a step, over all processes together [256]")
    micro_batch: int = flag(None, "images per forward pass and process, for less memory [all]")
    lr: float = flag(2e-4, "learning rate of AdamW [2e-4]")
    warmup: int = flag(50_000, "images over which the rate rises from 0 [50,000]")
    decay: int = flag(None, "images by which the rate has fallen linearly to 1 %% of --lr [never]")
    ema: int = flag(500_000, "half-life of the weight average, in images [500,000]")
    conditional: bool = flag(False, "train with the class labels")
    self_cond: bool = flag(True, "self-conditioning [on]; off is the published baseline")
    distill: float = flag(None, "weight of contrastive self-distillation of z, say 0.005 to 0.02 [off]")
    distill_images: int = flag(None, "images over which that weight falls linearly to 0 [never]")
    init: str = flag(None, "file of public weights to start from, see README [random]")
    schedule: str = flag("linear", "path from images to noise [linear]", list(SCHEDULES))
    target: str = flag(None, "what the network predicts [edm, flow: v; else eps]", TARGETS)
    device: str = flag(None, "cuda, mps or cpu [the first of these that is there]")
    precision: str = flag(None, "fp32 is TF32 on CUDA [bf16 or fp16 on CUDA, else fp32]", list(PRECISIONS))
    compile: bool = flag(True, "torch.compile and CUDA graphs, where CUDA and Triton are [on]")
    resident: bool = flag(None, "hold the data on the device [where it fills less than half of what is free]")


# with which flag a group of --help begins
GROUPS = dict(model="network and data", out="the run", batch_size="the optimiser", conditional="the method",
              device="the machine")
# --size tiny: what a short run on a CPU wants, and how many images of 16 x 16 a network then needs
TINY = dict(schedule="cosine", target="v", batch_size=64, lr=4e-3, warmup=6_400, ema=20_000,
            save_every=20_000, sample_every=40_000)
TINY_IMAGES = {"unet": 60_000, "uvit": 450_000, "dit": 400_000}
# what may be another on --resume
MAY_CHANGE = ["out", "images", "minutes", "micro_batch", "save_every", "sample_every", "resume", "device",
              "precision", "compile", "skip_bad", "resident"]


def on_latents(cfg):
    """Does this run train on latents, given or made?"""
    return bool(cfg.vae) or cfg.data.startswith("latents:")


def default_image_size(cfg):
    if cfg.data.startswith("latents:"):
        return None                                 # theirs
    if cfg.vae:
        return 256
    return 16 if cfg.size == "tiny" or cfg.data.startswith("shapes") else 32


def tiny_recipe(cfg):
    """The flags of a tiny network, where they are not given by hand."""
    classes = not cfg.data.startswith("latents:")
    if cfg.data.startswith("folder:"):
        classes = len(classes_in(Path(resolve(cfg.data).removeprefix("folder:"), "train"))) > 1
    return dict(TINY, conditional=classes, decay=TINY_IMAGES[cfg.model])


def default_out(cfg):
    name = f"{cfg.model}-{cfg.size}-{Path(resolve(cfg.data)).name.replace(':', '-')}"
    return f"runs/{name}" if cfg.self_cond else f"runs/{name}-baseline"


def check_config(cfg):
    """Raises UserError where a flag has a value that cannot be."""
    sizes = MODELS[cfg.model].SIZES
    require(cfg.size in sizes, f"--size {cfg.size} is not one of {cfg.model}: use {', '.join(sizes)}.")
    for f in fields(Config):
        value = getattr(cfg, f.name)
        if f.type in (int, float) and value is not None:
            least = -1 if f.name == "seed" else 0
            name = f.name.replace("_", "-")
            require(least < value < 1e38,           # float32 ends there
                    f"--{name} {value} is impossible: use a number more than {least} and less than 1e38.")
    require(cfg.distill or not cfg.distill_images, "--distill-images needs a weight: add --distill 0.02.")
    require(not cfg.vae or not cfg.data.startswith("latents:"),
            f"{cfg.data} is encoded already: leave out --vae, or give images.")
    require(not on_latents(cfg) or cfg.schedule != "cosine" or cfg.target == "v",       # a_999 is 5e-5
            "--schedule cosine with target eps magnifies errors 600 times where no pixels can be clipped: "
            "add --target v for latents.")
    require(not cfg.init or (cfg.schedule == "linear" and cfg.target in (None, "eps")),
            f"{cfg.init} says eps on the linear path: use --schedule linear and --target eps with --init.")


class Parser(argparse.ArgumentParser):
    """Bad flags are a UserError, which names the flag that may have been meant."""

    def error(self, message):
        hint = "--help lists the flags"
        known = [option.lstrip("-") for option in self._option_string_actions]
        for word in re.findall(r"unrecognized arguments: --([\w-]+)", message):
            for near in get_close_matches(word, known, n=1):
                hint = f"did you mean --{near}"
        raise UserError(f"{message}; {hint}.")


def whole_number(text):
    """Text of a flag, 1000000 or 1e6 -> int."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        if float(text).is_integer():                # nan and inf are none
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text} is no whole number")


def parse_flags(argv):
    """Flags -> {name: value} of those that were given. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        name = "--" + f.name.replace("_", "-")
        help, choices = f.metadata["help"], f.metadata["choices"]
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        if f.type is bool:
            group.add_argument(name, help=help, action=argparse.BooleanOptionalAction)
        else:
            group.add_argument(name, help=help, type=whole_number if f.type is int else f.type,
                               choices=choices, metavar=None if choices else f.type.__name__.upper())
    return vars(parser.parse_args(argv))


def to_config(saved):
    """{name: value} that a run has written -> Config. Raises UserError."""
    unknown = sorted(saved.keys() - {f.name for f in fields(Config)})
    require(not unknown, f"written by other code: unknown {', '.join(unknown)}")
    for f in fields(Config):
        value = saved.get(f.name)
        kinds = (int, float) if f.type is float else f.type
        require(value is None or isinstance(value, kinds), f"{f.name} {value!r} is no {f.type.__name__}")
    model, size = saved.get("model"), saved.get("size")
    require(model in MODELS and size in MODELS[model].SIZES, f"there is no network {model} {size} here")
    return Config(**saved)


def flags_of_run(out):
    """What config.json of a run holds, {name: value}; nothing where there is none. Raises UserError."""
    path = Path(out, "config.json")
    try:
        return asdict(to_config(json.loads(path.read_text())))
    except FileNotFoundError:
        return {}
    except Exception as e:                          # a file that is damaged raises many kinds
        raise UserError(f"{path} is no whole config.json ({e}): remove it and give all flags by hand.")


def parse_config(argv=None):
    """Flags -> Config with every default filled in. Raises UserError."""
    given = parse_flags(argv)
    if given.get("resume") and "out" in given:      # what is not given is as it was
        saved = flags_of_run(given["out"])
        if "images" in given or "minutes" in given:             # a new end, in place of the old one
            saved |= dict(images=None, minutes=None)
        given = {**saved, **given}
    cfg = Config(**given)
    if cfg.size == "tiny":
        cfg = Config(**{**tiny_recipe(cfg), **given})
    if cfg.image_size is None:
        cfg.image_size = default_image_size(cfg)
    if cfg.size is None:
        cfg.size = DEFAULT_SIZE[cfg.model]
    check_config(cfg)
    cfg.target = make_diffusion(cfg).target
    if cfg.images is None and cfg.minutes is None:
        cfg.images = TINY_IMAGES[cfg.model] if cfg.size == "tiny" else 10_000_000
    if cfg.out is None:
        cfg.out = default_out(cfg)
    return cfg


# --- data sets ----------------------------------------------------------------------------------------------

# images (N, C, H, W) uint8; labels (N,) int64, or None; masks (N, H, W) uint8, k + 1 for class k, 0 around,
# 255 unknown; or None.
# Latents: images (N, C, h, w) float16; both: these and the flipped images' (2, N, C, h, w); meta: see encode.
Data = namedtuple("Data", "images labels masks classes both meta", defaults=[None, None])


def load_data(spec, split, image_size=None, skip_bad=False, vae=None, device="cpu", check=None):
    """Data of a spec (see --data); split is "train" or "test". Raises UserError.

    With vae its latents: they are made on the device where they are not there yet, after check(shape) let
    their shape (C, h, w) pass. All processes call this.
    """
    if spec.startswith("latents:"):
        data = in_every_process(lambda: load_latents(folder_of(spec), split))
        same_everywhere(lambda: [data.meta, len(data.labels)],
                        f"{spec} is another on another machine: copy it anew, or share a drive.")
        side = data.images.shape[-1]
        require(image_size in (None, side), f"{spec} has latents of {side} x {side}, not of {image_size} x "
                                            f"{image_size}: leave --image-size out.")
        return data
    if vae:
        folder = in_every_process(lambda: folder_of(spec) if spec.startswith("folder:") else Path())
        with alone(folder, lambda: say("another program makes latents of these images: waiting for it")):
            made = encode(spec, image_size, vae, device, skip_bad, check)
        return in_every_process(lambda: load_latents(made, split))
    if spec.startswith("folder:"):
        return load_folder(in_every_process(lambda: folder_of(spec)), split, image_size or 32, skip_bad)
    if spec in ("cifar10", "cifar100"):
        data = load_cifar(spec, split)
        size = image_size or 32
        parts = data.images.split(1000)             # in float32 all at once may not fit
        return data._replace(images=torch.cat([resize(x, [size, size], antialias=True) for x in parts]))
    if spec in ("shapes", "shapes:full"):
        n, seed = (50_000, 0) if split == "train" else (5_000, 1)
        return Data(*draw_shapes(n, seed, image_size or 16, full=spec == "shapes:full"))
    meant = f"did you mean folder:{spec}? Or " if Path(os.path.expanduser(spec)).is_dir() else ""
    raise UserError(f"unknown data {spec!r}: {meant}use cifar10, cifar100, folder:PATH, latents:PATH, shapes "
                    "or shapes:full.")


def open_cifar(name, split, download):
    """torchvision's data set. Raises UserError."""
    kind = getattr(torchvision.datasets, name.upper())
    try:
        return kind("data", split == "train", download=download)
    except (OSError, RuntimeError) as e:            # URLError is an OSError
        raise UserError(f"{name} is not in ./data and could not be downloaded ({e}): go online, or use "
                        "--data shapes (built in) or --data folder:PATH (images of yours).")


def load_cifar(name, split):
    """CIFAR-10 or -100 from ./data, downloaded by the first process if it is not there. Raises UserError."""
    first = in_every_process(lambda: open_cifar(name, split, download=True) if is_first() else None)
    found = in_every_process(lambda: first or open_cifar(name, split, download=False))
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return Data(images, torch.tensor(found.targets), None, found.classes)


# a folder of images

SUFFIXES = (*IMG_EXTENSIONS, *sorted({".jfif", ".gif", ".avif"} & Image.registered_extensions().keys()))
SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "lost+found", "Thumbs.db", "desktop.ini"}


def resolve(spec):
    """A spec with the whole path of its folder, if it names one."""
    if not spec.startswith(("folder:", "latents:")):
        return spec
    kind, path = spec.split(":", 1)
    return f"{kind}:{Path(os.path.expanduser(path)).resolve()}"


def folder_of(spec):
    """The folder that a spec names. Raises UserError where there is none."""
    root = Path(resolve(spec).partition(":")[2])
    require(root.is_dir(), f"{root} does not exist or is no folder: correct --data {spec}.")
    require(root.name or spec.startswith("latents:"),
            f"{root} is a whole drive: name a folder on it, beside which its cache can be.")
    return root


def ours(paths):
    """Those that are not hidden, and not what systems leave in folders for themselves."""
    return [path for path in paths if not path.name.startswith(".") and path.name not in SYSTEM]


def files_below(folder, above):
    """All files below a folder that are ours, also behind links, where these do not lead in a circle."""
    above = (*above, folder.resolve())
    found = []
    for path in ours(folder.iterdir()):
        if not path.is_dir():
            found.append(path)
        elif path.resolve() not in above:
            found += files_below(path, above)
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def is_image(path):
    return path.name.lower().endswith(SUFFIXES)


def images_among(files, root):
    """-> those files that are images; one line says how many others there are below root."""
    images = [path for path in files if is_image(path)]
    others = Counter(path.suffix.lower() or "without a suffix" for path in files if not is_image(path))
    if others:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5))
        say_once(f"left out files of {root} that are no images here: {kinds}")
    return images


def check_classes(labels, classes, root):
    """Raises UserError where a class has no images: it would be learned as one that is never seen."""
    empty = [name for name, n in zip(classes, labels.bincount(minlength=len(classes))) if n == 0]
    require(not empty, f"{root} has no image that can be read of class {', '.join(empty[:5])}: remove the "
                       f"folder, or put some there ({', '.join(SUFFIXES)}).")


def classes_in(folder):
    return sorted(path.name for path in ours(folder.glob("*")) if path.is_dir())


def list_folder(root, split):
    """-> image files, labels, class names, of train/<class>/* and test or val, or of a flat folder."""
    train = root / "train"
    test = root / "test" if (root / "test").is_dir() else root / "val"
    if not train.is_dir():
        return list_flat_folder(root, split)
    part = train if split == "train" else test
    require(part.is_dir(), f"{root} has no {split} images: it needs {split}/<class>/*.")
    classes = classes_in(train)
    extra = sorted(set(classes_in(test)) - set(classes))
    require(not extra, f"{test} has a class that {train} lacks, {extra[:1]}: add it there or remove it.")
    files = []
    for name in classes_in(part):
        files += files_below(part / name, above=(part.resolve(),))
    files = images_among(files, part)
    loose = [path for path in ours(part.iterdir()) if is_image(path) and not path.is_dir()]
    if loose:
        say_once(f"left out {len(loose)} images of {part} that lie in no class: put them into a folder there")
    require(files, f"{part} has no images of classes: put some into {part.name}/<class>/.")
    index = {name: k for k, name in enumerate(classes)}
    labels = torch.tensor([index[path.relative_to(part).parts[0]] for path in files])
    if split == "train":
        check_classes(labels, classes, part)
    return files, labels, classes


def list_flat_folder(root, split):
    """The same of images that lie in the folder itself: one class, for training alone."""
    require(split == "train",
            f"{root} has no {split} images: it needs {split}/<class>/*; for training, images alone do.")
    there = ours(sorted(root.iterdir()))
    files = images_among([path for path in there if not path.is_dir()], root)
    folders = [path.name for path in there if path.is_dir()]
    if files and folders:
        say_once(f"left out the folders in {root}: {', '.join(folders[:5])}")
    require(files, f"{root} has no images: put some there, or into train/<class>/ and test/<class>/.")
    return files, torch.zeros(len(files), dtype=torch.int64), ["image"]


def stamp_of(root, files):
    """What changes when files of a folder do."""
    stats = [(str(p.relative_to(root)), p.stat() if p.exists() else p.lstat()) for p in files]
    return json.dumps(["upright, on white"]
                      + [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def open_image(path):
    """Image file -> RGB, on white where it is transparent, upright by its EXIF. Raises what Pillow raises."""
    if not path.is_file():                          # a pipe would never end
        raise ValueError("it is no file, or a link to none")
    with Image.open(path) as image:
        grey16 = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
        if image.mode in ("I", "F") and not grey16:
            raise ValueError("its pixels are numbers without a white")
        image.load()
        with suppress(Exception):                   # EXIF that is broken says nothing
            image = ImageOps.exif_transpose(image)
        if grey16:
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")


def decode(path, size, skip_bad):
    """Image file -> its centre, (3, size, size) uint8; None if broken, with skip_bad. Raises UserError."""
    try:
        return pil_to_tensor(ImageOps.fit(open_image(path), (size, size)))
    except Exception as e:                          # Pillow raises many kinds for broken files
        if is_out_of_memory(e):
            raise
        require(skip_bad, f"cannot read the image {path} ({e}): repair or remove it, or pass --skip-bad.")
        return None


def decode_all(files, size, skip_bad, bar=None):
    """Image files -> images (N, 3, size, size) uint8, whether they could be read (N,) bool; in parallel."""
    images = torch.zeros(len(files), 3, size, size, dtype=torch.uint8)
    good = torch.zeros(len(files), dtype=torch.bool)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(lambda path: decode(path, size, skip_bad), files)
        for i, image in enumerate(decoded):
            if image is not None:
                images[i] = image
                good[i] = True
            if bar:
                bar.update()
    return images, good


def decode_together(files, size, skip_bad, split):
    """The same, where each process decodes a share and sends it to the others."""
    rank, world = processes()
    shares = [slice(r * len(files) // world, (r + 1) * len(files) // world) for r in range(world)]
    mine = files[shares[rank]]
    with progress(total=len(mine), desc=f"decoding {split}", unit="img", delay=1) as bar:
        found, good = in_every_process(lambda: decode_all(mine, size, skip_bad, bar))
    if world == 1:
        return found, good
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    images[shares[rank]] = found
    for r, share in enumerate(shares):
        dist.broadcast(images[share], r, group=patient_group())
    return images, torch.cat(gather(good))


def read_cache(cache, stamp):
    """-> the images that a cache holds, None where there is none, a damaged one, or one of other files."""
    with suppress(Exception), np.load(cache) as kept:            # a damaged one raises many kinds
        if str(kept["stamp"]) == stamp:
            return torch.from_numpy(kept["images"])
    return None


def load_folder(root, split, size, skip_bad):
    """Decoded in parallel; kept in <root>-<split>-<size>px.npz beside the folder until its files change."""
    files, labels, classes = in_every_process(lambda: list_folder(root, split))
    same_everywhere(lambda: [str(path.relative_to(root)) for path in files],
                    f"{root} has other files on another machine: copy it anew, or share a drive.")
    stamp = stamp_of(root, files)
    cache = root.with_name(f"{root.name}-{split}-{size}px.npz")
    images = read_cache(cache, stamp)
    if all(gather(images is not None)):             # in every process
        return Data(images, labels, None, classes)
    images, good = decode_together(files, size, skip_bad, split)
    labels = leave_out(good, labels, classes, root, split)
    if images.max() < 64:
        say(f"the images of {root} are nearly black, their brightest value is {images.max()} of 255: if they "
            "have 16 bits and use fewer, stretch them.")
    if not good.all():
        for k, i in enumerate(good.nonzero()):      # in place: twice the memory may not be there
            images[k] = images[i]
        images = images[:len(labels)]
    elif is_first():
        try_to("keep the decoded images", lambda: save_file(
            cache, lambda file: np.savez(file, images=images.numpy(), stamp=stamp)))
    return Data(images, labels, None, classes)


def leave_out(good, labels, classes, root, split):
    """-> the labels of the images that could be read; one line says how many could not. Raises UserError."""
    require(good.any(), f"none of the {len(good)} images in {root} can be read: check the files.")
    if not good.all():
        say(f"left out {len(good) - int(good.sum())} unreadable images of {root}")
    if split == "train":
        check_classes(labels[good], classes, root)
    return labels[good]


# ten shapes without a download, drawn by their signed distance functions

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


def uniform(g, low, high, *shape):
    return low + (high - low) * torch.rand(*shape, generator=g)


def draw_shapes(n, seed, size, full=False):
    """-> images (n, 3, size, size) uint8, labels (n,), masks (n, size, size) uint8, class names.

    The same for a seed. Image i is of class i mod 10; its mask is k + 1 inside a shape of class k, 0 around
    it. By default bright on dark and almost upright, easy to draw; full: free in colour, size, place, turn
    and texture.
    """
    g = torch.Generator().manual_seed(seed)
    radius = uniform(g, 0.3 if full else 0.55, 0.75, n, 1, 1)
    cx, cy = uniform(g, -1, 1, 2, n, 1, 1) * ((1 - radius) * 0.8 if full else 0.15)
    turn = uniform(g, -1, 1, n, 1, 1) * math.radians(180 if full else 17)
    colour = uniform(g, 0, 1, n, 3) if full else COLOURS[torch.randint(8, (n,), generator=g)]
    ground = uniform(g, 0, 1, n, 3) if full else torch.full((n, 3), 0.11)
    rough = torch.tensor([0.2, 0.2] if full else [0.05, 0]).view(2, 1, 1, 1, 1)
    texture = uniform(g, -1, 1, 2, n, 3, 4, 4) * rough                       # of ground and shape
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(n, size, size, dtype=torch.uint8)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    for k, distance in enumerate(SHAPES.values()):
        i = slice(k, None, len(SHAPES))                                      # m = n / 10 images
        x = (axis - cx[i]) / radius[i]
        y = (-axis[:, None] - cy[i]) / radius[i]
        cos, sin = turn[i].cos(), turn[i].sin()
        d = distance(x * cos + y * sin, y * cos - x * sin)                   # (m, size, size)
        d = d * radius[i] * size / 2                                         # in pixels
        back = ground[i, :, None, None] + F.interpolate(texture[0, i], size=(size, size), mode="bilinear")
        front = colour[i, :, None, None] + F.interpolate(texture[1, i], size=(size, size), mode="bilinear")
        inside = (0.5 - d).clamp(0, 1)[:, None]                              # anti-aliased
        image = back + (front - back) * inside                               # (m, 3, size, size)
        images[i] = (image.clamp(0, 1) * 255).round().byte()
        masks[i] = (d < 0) * (k + 1)
    return images, torch.arange(n) % len(SHAPES), masks, list(SHAPES)


# --- latents: images, encoded once by a frozen VAE ----------------------------------------------------------

VAE_PIXELS = 16 * 256 ** 2          # that a VAE works on at a time


def load_vae(name, device):
    """A frozen autoencoder of diffusers, by its name on the hub or its folder. Raises UserError."""
    try:
        from diffusers import AutoModel
        vae = AutoModel.from_pretrained(name, low_cpu_mem_usage=False)
    except ImportError:
        raise UserError("latents need diffusers, which is not installed: pip install diffusers")
    except Exception as e:                          # no network, no such folder, another kind of model ...
        raise UserError(f"{name} is no autoencoder that can be loaded ({reason(e)}): name one of the hub, "
                        f"while online, or the folder of one; of a run, put it back at {name}.")
    vae = vae.to(device).eval().requires_grad_(False)
    require(knows_images(vae), f"{name} is of class {type(vae).__name__}, which does not encode and decode "
                               "images: use an AutoencoderKL, AutoencoderTiny or AutoencoderDC.")
    return vae


@torch.no_grad()
def knows_images(vae):
    """Is an image a latent of the size that the VAE's config promises, and this an image again?"""
    try:
        side = 4 * scale_of(vae)
        image = torch.zeros(1, vae.config.in_channels, side, side, device=vae.device)
        z = to_latents(vae, image)
        return z.shape[2:] == (4, 4) and vae.decode(z).sample.shape == image.shape
    except Exception as e:                          # of video, of sound, no autoencoder at all: many kinds
        if is_out_of_memory(e):
            raise
        return False


def scale_of(vae):
    """How many pixels of an image make one of its latent, along a side: a halving between two widths."""
    widths = vae.config.get("block_out_channels") or vae.config.get("encoder_block_out_channels")
    return 2 ** (len(widths) - 1)


@torch.no_grad()
def to_latents(vae, x):
    """Images x (N, C, H, W) in [-1, 1] -> latents (N, c, h, w); the mean where they are a distribution."""
    out = vae.encode(x)
    if hasattr(out, "latent_dist"):                 # AutoencoderKL
        return out.latent_dist.mean
    return out.latents if hasattr(out, "latents") else out.latent            # AutoencoderTiny, AutoencoderDC


def vae_of(meta, device):
    """The VAE of latents, where it can be loaded; else None, and one line says so. None for images."""
    if meta is None:
        return None
    try:
        require(meta["vae"], "their meta.json names no VAE.")
        return load_vae(meta["vae"], device)
    except UserError as e:
        say(f"latents will not be decoded: {e}")
        return None


def moments_of(meta, device):
    """Mean and standard deviation of latents (2, C, 1, 1); None for images."""
    if meta is None:
        return None
    return torch.tensor([meta["mean"], meta["std"]], device=device)[..., None, None]


def to_x0(images, moments):
    """Images (N, C, H, W) as stored -> what the network sees: in [-1, 1], or latents of unit variance."""
    if moments is None:
        return images.float() / 127.5 - 1
    return (images.float() - moments[0]) / moments[1]


def to_pixels(x, moments, vae):
    """The way back: x as the network sees it -> images (N, C, H, W) in [-1, 1]; without a VAE, latents."""
    if moments is None:
        return x
    latents = x.float() * moments[1] + moments[0]
    if vae is None:
        return latents
    batch = max(1, VAE_PIXELS // (scale_of(vae) ** 2 * latents[0, 0].numel()))
    return torch.cat([vae.decode(some).sample.float() for some in latents.split(batch)])


def encode(spec, size, name, device, skip_bad=False, check=None):
    """-> the folder of a data set's latents, which is made if it is not there or not of these files.

    <split>/latents.npy (2, N, C, h, w) float16: of all images, then of the flipped images, so that flips in
    training are true ones, all as the VAE says them, not times its scaling_factor; <split>/labels.npy (N,)
    int64; meta.json: vae (null: none is known), image_size, classes, shape [C, h, w], mean and std of each
    channel over the training part, by which the network sees unit variance, and a stamp of files and VAE. It
    is renamed to its name once it is whole. Each process encodes a share. Raises UserError.
    """
    stamp = from_first(lambda: stamp_of_latents(spec, size, name))
    out, whole = from_first(lambda: find_latents(spec, size, name, stamp))
    if whole:
        return out
    vae = in_every_process(lambda: load_vae(name, device))
    C = vae.config.in_channels
    require(C == 3, f"{name} encodes images of {C} channels, not of 3: choose another --vae.")
    require(size % scale_of(vae) == 0,
            f"--image-size {size} does not fit {name}: use a multiple of {scale_of(vae)}.")
    blank = torch.zeros(1, 3, size, size, device=vae.device)
    shape = list(to_latents(vae, blank).shape[1:])
    if check:
        try:
            check(shape)
        except UserError as e:
            raise UserError(f"--image-size {size} makes latents of {shape[1]} x {shape[2]}: {e}")
    part = from_first(lambda: make_folder(out))
    try:
        try:                                        # the small part first: its errors cost less
            images, labels, _ = list_images(spec, "test", size, skip_bad)
        except UserError as e:
            say(f"without a test part, which probes need: {e}")
        else:
            encode_split(vae, images, labels, part / "test", size, shape)
        images, labels, classes = list_images(spec, "train", size, skip_bad)
        number, total, squares = encode_split(vae, images, labels, part / "train", size, shape)
        mean = total / number
        std = (squares / number - mean ** 2).sqrt()
        require((std > 0).all(), f"{name} makes latents that are constant: use another.")
        meta = dict(vae=whole_name(name), image_size=size, classes=classes, shape=shape, mean=mean.tolist(),
                    std=std.tolist(), stamp=stamp)
        from_first(lambda: put_in_place(part, out, meta))
    finally:
        if is_first():
            shutil.rmtree(part, ignore_errors=True)
    say(f"latents: {out}")
    return out


@contextmanager
def alone(folder, busy):
    """One program a machine at a time is behind this; where another is, calls busy(), then waits."""
    fd = in_every_process(lambda: lock(folder, busy) if is_first() else None)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)                            # lets go, as the end of a program does


def lock(folder, busy):
    """Opens a folder with its lock -> its file number; None where there are none: some drives, Windows."""
    with suppress(OSError, ImportError):
        import fcntl
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(fd, fcntl.LOCK_EX)
        return fd


def stamp_of_latents(spec, size, name):
    """What changes when the images or the VAE do."""
    parts = [spec, size, whole_name(name)]
    if Path(name).is_dir():
        vae = Path(name).resolve()
        parts.append(stamp_of(vae, sorted(p for p in vae.iterdir() if p.is_file())))
    if spec.startswith("folder:"):
        root = folder_of(spec)
        parts[0] = "a folder"                       # which may move
        for split in ("train", "test"):
            with suppress(UserError):               # there may be no test part; encode says it of train
                parts.append(stamp_of(root, list_folder(root, split)[0]))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def whole_name(vae):
    """The name of a VAE on the hub, or the whole path of its folder: what meta.json says."""
    return str(Path(vae).resolve()) if Path(vae).is_dir() else vae


def meta_in(folder):
    """What meta.json of a folder says, {} where it is not there or not whole."""
    with suppress(Exception):                       # a file that is damaged raises many kinds
        return dict(json.loads((folder / "meta.json").read_text()))
    return {}


def find_latents(spec, size, name, stamp):
    """-> folder for the latents, whether they are there already: beside the data, else under data/."""
    root = folder_of(spec) if spec.startswith("folder:") else Path("data", spec.replace(":", "-"))
    beside = root.with_name(f"{root.name}-{size}px-{re.sub('[^A-Za-z0-9]+', '-', Path(name).name)}")
    places = [beside, Path("data", beside.name)]                 # of data without a folder, the same
    for place in places:
        if meta_in(place).get("stamp") == stamp:
            return place, True
    for place in places:
        try:
            check_writable(place.parent)
        except UserError:
            continue
        require(not place.exists() or (place / "meta.json").exists(),
                f"{place} is in the way of the latents and holds none: move it.")
        other = meta_in(place).get("vae")
        require(other in (None, whole_name(name)),
                f"{place} holds latents of another VAE, {other}: move it, or rename the VAE's folder.")
        return place, False
    raise UserError(f"neither {beside.parent} nor data can be written: make one of them writable.")


def make_folder(out):
    """-> an empty folder <out>.part, for what is not whole yet; what a killed encoding left there goes."""
    part = Path(f"{out}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def put_in_place(part, out, meta):
    """Writes meta.json into part, and makes it out."""
    (part / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in [*part.rglob("*"), part]:           # a power cut after the rename finds all of it there
        flush(path)
    shutil.rmtree(out, ignore_errors=True)          # latents of other files
    os.replace(part, out)
    flush(out.parent)


def list_images(spec, split, size, skip_bad):
    """-> image files, or images (N, C, size, size) uint8 that are in memory; labels (N,); class names."""
    if not spec.startswith("folder:"):
        data = load_data(spec, split, size)
        return data.images, data.labels, data.classes
    root = folder_of(spec)
    files, labels, classes = in_every_process(lambda: list_folder(root, split))
    if skip_bad:
        _, good = decode_together(files, 8, skip_bad, split)                 # 8 pixels: only to see which
        labels = leave_out(good, labels, classes, root, split)
        files = [path for path, fine in zip(files, good) if fine]
    return files, labels, classes


def encode_split(vae, source, labels, folder, size, shape):
    """Writes latents.npy, of this shape each, and labels.npy -> number, sum, sum of squares (3, C)."""
    rank, world = processes()
    start, stop = rank * len(labels) // world, (rank + 1) * len(labels) // world
    from_first(lambda: make_files(folder, (2, len(labels), *shape), labels))
    sums = in_every_process(lambda: encode_share(vae, source, folder, start, stop, size))
    return torch.stack(gather(sums)).sum(0)


def make_files(folder, shape, labels):
    folder.mkdir()
    np.save(folder / "labels.npy", labels.numpy())
    np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape=shape).flush()


def encode_share(vae, source, folder, start, stop, size):
    """Encodes images start to stop into latents.npy -> their number, sum, sum of squares (3, C) float64."""
    path = folder / "latents.npy"
    latents = np.load(path, mmap_mode="r")          # written through this, a full disk would be a SIGBUS
    batch = max(1, VAE_PIXELS // size ** 2)
    sums = torch.zeros(3, latents.shape[2], dtype=torch.float64)
    bar = progress(total=stop - start, desc=f"encoding {folder.name}", unit="img")
    with bar, open(path, "r+b") as file:
        for k in range(start, stop, batch):
            images = source[k:min(k + batch, stop)]
            if not torch.is_tensor(images):
                images, _ = decode_all(images, size, skip_bad=False)
            x = to_x0(images.to(vae.device), None)
            for half, view in enumerate((x, x.flip(3))):
                z = to_latents(vae, view).half().cpu()                       # (n, C, h, w)
                require(z.isfinite().all(), "the VAE makes latents beyond float16: choose another --vae.")
                file.seek(latents.offset + (half * latents.shape[1] + k) * latents[0, 0].nbytes)
                file.write(z.numpy().tobytes())
                z = z.double()
                sums += torch.stack([z ** 0, z, z ** 2]).sum((1, 3, 4))
            bar.update(len(images))
        file.flush()
        os.fsync(file.fileno())
    return sums


def check_meta(meta):
    """Raises anything where this, of meta.json, is not what encode writes."""
    moments = np.array([meta["mean"], meta["std"]])
    C, h, w = meta["shape"]
    require(h == w, "its latents are not square")
    require(moments.shape == (2, C), "mean and std do not fit the shape")
    require(np.isfinite(moments).all() and moments[1].min() > 0, "mean or std cannot be")
    require(meta["vae"] is None or type(meta["vae"]) is str and meta["vae"] != "", "it names no VAE")
    require(type(meta["classes"]) is list, "classes are no list")
    require(all(type(name) is str for name in meta["classes"]), "a class is no name")


def load_latents(root, split):
    """What encode wrote; it stays in its file and is read where it is indexed. Raises UserError."""
    require((root / split).is_dir() or not (root / "meta.json").exists(),
            f"{root} has no {split} latents: put images into {split}/<class>/ and encode them all anew.")
    try:
        meta = json.loads((root / "meta.json").read_text())
        meta.pop("stamp", None)                     # of the files; the run is of what they hold
        check_meta(meta)
        both = np.load(root / split / "latents.npy", mmap_mode="r")
        labels = np.load(root / split / "labels.npy")
        require(both.dtype == np.float16 and both.shape == (2, len(labels), *meta["shape"]),
                f"latents.npy, {both.dtype} {both.shape}, does not fit meta.json or labels.npy")
        require(labels.dtype == np.int64 and labels.ndim == 1, "labels.npy is not (N,) int64")
        require(0 <= labels.min() and labels.max() < len(meta["classes"]), "a label has no class")
    except Exception as e:                          # a file that is damaged raises many kinds
        raise UserError(f"{root} has no whole latents for {split} ({type(e).__name__}: {e}): make them anew "
                        "with --vae, or as encode in train.py describes them.")
    with warnings.catch_warnings():                 # torch says that it could not write there; it does not
        warnings.simplefilter("ignore")
        both = torch.from_numpy(both)
    return Data(both[0], torch.from_numpy(labels), None, meta["classes"], both, meta)


# --- device and run tools -----------------------------------------------------------------------------------

# gather, same_everywhere, in_every_process and from_first: all processes must come to each such call, in the
# same order. What may fail in one of them alone is work for in_every_process, so that all end.

def setup(name):
    """Device name -> torch.device, rank, world size; joins the others under torchrun. Raises UserError."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    usable = [kind for kind in there if there[kind]]
    name = name or usable[0]
    require(name in usable, f"--device {name} is not there: use {', '.join(usable)}.")
    many = "RANK" in os.environ                     # torchrun started this process
    require(not many or name != "mps", "processes can't share the work on mps: start with python, without "
                                       "torchrun, or add --device cpu.")
    device = torch.device(name)
    if name == "cuda":
        i = int(os.environ.get("LOCAL_RANK", 0)) if many else 0
        count = torch.cuda.device_count()
        if i >= count:
            raise OwnError(f"this process wants GPU {i}, and there are {count}: start {count} a machine.")
        device = torch.device(name, i)
        torch.cuda.set_device(device)
    if many:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
        except (ValueError, RuntimeError) as e:
            place = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")]
            raise OwnError(f"RANK is {os.environ['RANK']}, and the processes could not meet at {place} "
                           f"({reason(e)}): start with torchrun, or unset RANK.")
    return device, *processes()


def processes():
    """-> rank of this process, how many there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


@functools.cache
def patient_group():
    """For what may take hours in one process while others wait: data, samples. Else minutes mean a fault."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def gather(value):
    """-> the values of all processes, in order."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=patient_group())
    return values


def in_every_process(work):
    """What work() gives; where it fails in one process, all fail alike. Raises UserError, MemoryError."""
    result, error = None, None
    try:
        result = work()
    except (UserError, OSError) as e:
        error = UserError(str(e))
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        error = MemoryError(str(e))
    for wrong in gather(error):
        if wrong is not None:
            raise wrong
    return result


def same_everywhere(value, message):
    """Raises UserError where the machines, each with a disk of its own, differ in value()."""
    if dist.is_initialized():                       # one process has nothing to compare, and a folder is long
        digest = hashlib.sha256(repr(value()).encode()).hexdigest()
        require(all(other == digest for other in gather(digest)), message)


def from_first(work):
    """What work() gives in the first process, which alone does it. Raises UserError in all."""
    result = in_every_process(work if is_first() else lambda: None)
    return gather(result)[0]


def is_out_of_memory(error):
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch, of a CPU's, the same on Windows, a GPU's; Pillow calls broken files so, by an OSError
    words = "can't allocate memory", "not enough memory", "out of memory"
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)


def layout_of(device):
    """The memory format of images with which convolutions are fast; on MPS the other one is not."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def command(body):
    """Makes a main(argv) of body(argv): bad input ends with one sentence and exit code 2."""
    def main(argv=None):
        before = {number: signal.getsignal(number) for number in STOPS}
        sys.stderr = sys.stderr or open(os.devnull, "w")                     # None where it is closed
        sys.stdout = sys.stdout or open(os.devnull, "w")
        try:
            body(argv)
        except KeyboardInterrupt:
            say("interrupted", sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except (MemoryError, RuntimeError) as e:    # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(e):
                raise
            say("error: there is too little memory: use a smaller --micro-batch, --batch-size, --image-size "
                "or --size (train.py), --batch-size (sample.py), or --batch-size, --images or fewer --t "
                "(probe.py).", sys.stderr, everyone=True)
            sys.exit(2)
        except (UserError, OSError) as e:           # OSError: a full disk, a folder that may not be written
            say(f"error: {e}", sys.stderr, everyone=type(e) is not UserError)
            sys.exit(2)
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) != handler:
                    signal.signal(number, handler)
            if dist.is_initialized():
                time.sleep(0.1)         # gloo's threads need the GIL once more: destroying holds it for good
                dist.destroy_process_group()
                patient_group.cache_clear()
    return main


def pick_autocast(name, device):
    """-> a maker of autocast contexts, its dtype. What does not work here gives way to fp32, said once."""
    if name is None and device.type == "cuda":      # below capability 8, bf16 is only emulated
        name = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    dtype = PRECISIONS.get(name)                    # None: on a CPU, unasked
    if dtype is None:
        return nullcontext, None
    try:
        with torch.autocast(device.type, dtype):
            torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item()
    except Exception as e:
        say_once(f"{name} does not work on {device} ({e}): going on in fp32")
        return nullcontext, None
    # no cache: each weight is used once, and CUDA graphs forbid it
    return lambda: torch.autocast(device.type, dtype, cache_enabled=False), dtype


STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


def collect_stops():
    """-> a list; from now on signals to stop are put there. A second Ctrl-C ends the process at once."""
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
        here = os.environ.get("LOCAL_WORLD_SIZE", "1")
        if here != os.environ["WORLD_SIZE"]:
            return "the same commands on all machines, and --resume"
        start = ["torchrun", f"--nproc_per_node={here}", *sys.argv]
    if "--resume" not in start:
        start = [*start, "--resume"]
    return shlex.join(start)


def check_writable(folder):
    """Raises UserError where files can't be written into a folder, which need not be there yet."""
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    require(there.is_dir() and os.access(there, os.W_OK),
            f"{folder} can't be written, since {there} is no folder where that is allowed: choose another.")


def save_file(path, write, stale=None):
    """Atomic: write(file) into a temporary file, flush it to the disk, rename it. Raises UserError.

    stale: a picture of what this replaces; it goes before the rename, so as never to lie beside the new.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_parts(path)
        with open(part, "xb") as file:              # x: never into what is there, nor through a link
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if stale:
            stale.unlink(missing_ok=True)
        os.replace(part, path)
        flush(path.parent)
    except (OSError, RuntimeError) as e:            # torch.save turns a full disk into a RuntimeError
        if is_out_of_memory(e):
            raise
        raise UserError(f"could not write {path} ({e}), it is as it was: make room, go on (train: --resume).")
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def clear_parts(path):
    """Removes what processes that were killed left of a file; a part of this hour may be in the making."""
    for part in path.parent.glob(glob.escape(path.name) + ".*.part"):
        with suppress(OSError):
            if time.time() - part.lstat().st_mtime > 3600:
                part.unlink()


def flush(path):
    """A file, or the names in a folder, to the disk, where it can: a power cut would else undo a rename."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def mix(*numbers):
    """Whole numbers >= 0 -> one seed of 32 bits, which is all that torch's CPU generator takes.

    Who draws from what: (seed) the first weights; (seed, step, 0) which images; (seed, step, 1) t, noise,
    flips, dropped labels; (seed, step, 0, 1) the teacher's view; (seed, step, 2 + rank) dropout. (seed, step)
    is (seed, step, 0).
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seeded_noise(seeds, shape):
    """-> a function that gives the next noise (n, *shape), each image from a CPU generator of its own seed.

    So image i is the same for any batch size and number of processes, as in EDM's code, and on any device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators])


def finite(x):
    """Raises UserError where x is not."""
    require(x.isfinite().all(), "what the network draws is not finite: its weights are damaged, or "
                                "--guidance or --precision is impossible.")
    return x


def to_uint8(x):
    """Images (N, C, H, W) in [-1, 1] -> uint8 on the CPU. Raises UserError where they are not finite."""
    return (finite(x).float() * 127.5 + 127.5).round().clamp(0, 255).byte().cpu()


def save_grid(images, file, columns):
    """Images (N, C, H, W) in [-1, 1] -> a PNG file, row by row; small ones are enlarged for the eye."""
    zoom = max(1, 64 // images.shape[-1])
    tiles = to_uint8(images).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    save_image(tiles / 255, file, format="PNG", nrow=columns, padding=4, pad_value=1)


# --- networks and checkpoints -------------------------------------------------------------------------------

def make_diffusion(cfg):
    """Raises UserError where --target does not fit --schedule."""
    sigma_data = 1.0 if on_latents(cfg) else 0.5                 # latents are of unit variance
    try:
        return GaussianDiffusion(schedule=cfg.schedule, target=cfg.target, sigma_data=sigma_data)
    except ValueError as e:
        raise UserError(str(e))


def build(cfg, shape, num_classes, device):
    """-> network for images of this shape (C, H, W) on the device, diffusion. Raises UserError."""
    channels, side, _ = shape
    net_class = MODELS[cfg.model]
    try:
        net = net_class(side, channels, num_classes, cfg.self_cond, **net_class.SIZES[cfg.size])
    except (ValueError, RuntimeError, MemoryError, OverflowError) as e:
        raise UserError(f"--model {cfg.model} --size {cfg.size}: {e}")
    diffusion = make_diffusion(cfg)
    if cfg.self_cond:
        net.abar.copy_(diffusion.abar_table())
    if cfg.distill:                                 # last: the rest starts as it does without
        net.projector = make_projector(net)
    return net.to(device, memory_format=layout_of(device)), diffusion


def check_shape(cfg, shape):
    """Raises UserError where there is no such network for images of this shape; takes no memory."""
    with torch.device("meta"):
        build(cfg, shape, 0, torch.device("meta"))


STATE = ["config", "images", "model", "ema", "optimizer", "scaler", "loss_sums", "loss_count", "shape",
         "num_classes", "classes", "counts", "latents"]         # what a checkpoint holds


def read_checkpoint(path):
    """-> dict of tensors, plain values and a Config; nothing else is ever unpickled. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:      # torch.load does not look at the checksums
            require(archive.testzip() is None, "its bytes are not those that were written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        lost = [name for name in STATE if name not in state]
        require(not lost, f"written by other code: without {', '.join(lost)}")
        cfg = to_config(state["config"])
        weights = [*state["model"].values(), *state["ema"].values()]
        require(all(w.isfinite().all() for w in weights), "a weight is not finite")
    except Exception as e:                          # torch raises many kinds
        if is_out_of_memory(e):
            raise
        why = str(e) if isinstance(e, UserError) else type(e).__name__
        raise UserError(f"{path} is no whole checkpoint of this code ({why}): use the code that wrote it, "
                        "restore a copy, or train anew.")
    return {**state, "path": path, "config": cfg}


def same_checkpoint(state, path):
    """Raises UserError where machines, each with a disk of its own, have read unlike checkpoints, or none."""
    same_everywhere(lambda: state and [state["images"], state["loss_sums"]],
                    f"{path} is not the same on every machine: copy it, or share a drive.")


def restore(state, **parts):
    """Load state[name] into each part. Raises UserError where it does not fit."""
    try:
        for name, part in parts.items():
            saved = state[name]
            if name == "optimizer":                 # its moments; its settings are those of the code
                saved = {**part.state_dict(), "state": saved["state"]}
            if saved or name != "scaler":           # a scaler that was off has nothing to say
                part.load_state_dict(saved)
    except Exception as e:                          # torch raises many kinds; its last line names a weight
        raise UserError(f"{state['path']} does not fit the network ({reason(e, -1)}): use its own code.")


def load_run(folder, device):
    """Run folder -> checkpoint dict, EMA network in eval mode, diffusion. Raises UserError."""
    path = Path(folder) / "checkpoint.pt"
    require(path.exists(), f"{path} does not exist: give the folder of a run of train.py.")
    state = read_checkpoint(path)
    net, diffusion = build(state["config"], state["shape"], state["num_classes"], device)
    restore(state, ema=net)
    return state, net.eval().requires_grad_(False), diffusion


# public weights: those of the original networks

PUBLIC_SCALE = 0.18215      # by which the public networks of latents multiply these: Stable Diffusion's


def read_public(cfg):
    """The file --init -> state dict of the network with self_cond=False, on the CPU. Raises UserError."""
    require(Path(cfg.init).is_file(), f"{cfg.init} is no file: name one of public weights.")
    try:
        state = torch.load(cfg.init, map_location="cpu", weights_only=True)
        state = {name: w.float() for name, w in MODELS[cfg.model].from_public(state).items()}
    except Exception as e:                          # torch raises many kinds
        why = str(e) if type(e) is ValueError else f"{type(e).__name__} {e}".splitlines()[0][:80]
        raise UserError(f"{cfg.init} is no file of public weights for --model {cfg.model} ({why}): correct "
                        "--model, or download it again.")
    require(all(w.isfinite().all() for w in state.values()),
            f"{cfg.init} has weights that are not finite: download it again.")
    return state


def classes_of(weights):
    """How many classes public weights know, "no class" not counted."""
    return len(weights["label_embed.weight"]) - 1 if "label_embed.weight" in weights else 0


def names_of_z(cfg, net):
    """What a network has and the plain one lacks: names of weights and buffers."""
    shape = (net.channels, net.image_size, net.image_size)
    with torch.device("meta"):                      # takes no memory
        plain, _ = build(replace(cfg, self_cond=False, distill=None), shape, net.num_classes,
                         torch.device("meta"))
    return net.state_dict().keys() - plain.state_dict().keys()


def load_public(cfg, net, weights):
    """Puts public weights into a network, whose proj stays at zero. Raises UserError."""
    known, K = classes_of(weights), net.num_classes
    fitting = f"--conditional and data of {known:,} classes" if known else "--no-conditional"
    require(known == K, f"{cfg.init} knows {known:,} classes, this network {K:,}: use {fitting}.")
    added = names_of_z(cfg, net)
    tables = {name: w for name, w in net.named_buffers() if name not in added}   # compared, not loaded
    try:
        missing, extra = net.load_state_dict(weights, strict=False)
        missing = [name for name in missing if name not in added]
        extra = [name for name in extra if name not in tables]
        require(not missing and not extra, f"missing: {missing[:3]}, left over: {extra[:3]}")
        for name, table in tables.items():
            w = weights[name]
            same = w.shape == table.shape and torch.allclose(table.cpu(), w, atol=1e-5)
            require(same, f"it has other {name}")
    except (UserError, RuntimeError, KeyError) as e:             # torch: of another shape
        raise UserError(f"{cfg.init} does not fit --model {cfg.model} --size {cfg.size} for images of "
                        f"{net.image_size} x {net.image_size} ({reason(e, -1)}): correct these flags.")


def public_meta(meta):
    """meta of latents -> with the moments by which the public networks see them; None for images."""
    if meta is None:
        return None
    C = len(meta["mean"])
    return meta | dict(mean=[0.0] * C, std=[1 / PUBLIC_SCALE] * C)


def load_weights(args, device):
    """--weights and its flags -> what load_run gives of a run of them. Raises UserError."""
    flags = ["--init", args.weights, "--no-self-cond", "--schedule", "linear", "--target", "eps"]
    for name in ("model", "size", "data", "image_size"):
        if getattr(args, name) is not None:
            flags += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    cfg = parse_config(flags)
    weights = in_every_process(lambda: read_public(cfg))
    meta = None
    shape = [3, cfg.image_size, cfg.image_size]
    if on_latents(cfg):
        meta = public_meta(load_data(cfg.data, "train", cfg.image_size).meta)
        shape = meta["shape"]
    K = classes_of(weights)
    cfg.conditional = K > 0
    net, diffusion = build(cfg, shape, K, device)
    load_public(cfg, net, weights)
    state = dict(config=cfg, images=None, shape=shape, num_classes=K, latents=meta,
                 classes=[str(k) for k in range(K)])
    return state, net.eval().requires_grad_(False), diffusion


# a run or public weights, for probe.py and sample.py

def add_source(parser):
    """The flags that say what network it is, and how it runs."""
    add = parser.add_argument
    add("run", nargs="?", help="folder of a run of train.py; give it first")
    add("--weights", metavar="FILE", help="public weights in its place; results: runs/<name of the file>")
    add("--model", choices=list(MODELS), help="of --weights [dit]")
    add("--size", help="of --weights, one of the network's SIZES [small; unet: base]")
    add("--image-size", type=whole_number, help="of --weights, side in pixels [32]")
    add("--device", help="cuda, mps or cpu [the first of these that is there]")
    add("--precision", choices=list(PRECISIONS), help="[as in training]")


def check_source(args):
    """Fills in the folder for results where there is no run. Raises UserError."""
    require(bool(args.run) != bool(args.weights),
            "give either the folder of a run, before the flags, or --weights with --model, --size "
            "and --data.")
    if args.weights:
        args.run = f"runs/{Path(args.weights).stem}"
        return
    for name in ("model", "size", "image_size"):
        require(getattr(args, name) is None,
                f"--{name.replace('_', '-')} is for --weights: leave it out, the run knows it.")


def load_source(args, device):
    """What load_run or load_weights gives. Raises UserError."""
    if args.weights:
        return load_weights(args, device)
    state, net, diffusion = in_every_process(lambda: load_run(args.run, device))
    same_checkpoint(state, state["path"])
    return state, net, diffusion


# --- the loop: its parts ------------------------------------------------------------------------------------

class Batches:
    """The batch of a step: a pure function of (seed, step), however many processes share it.

    Draws for the global batch of B images, keeps a process's share b: x0 (b, C, H, W) in [-1, 1] (latents: of
    unit variance), half of it flipped; t (b,); noise (b, C, H, W); y (b,), some "no class", or None. The data
    lives on the device if it fills less than half of the free memory (resident), else on the host or in its
    file, fetched one batch ahead.
    """

    def __init__(self, data, cfg, diffusion, device):
        rank, world = processes()
        images = data.images
        if data.meta:
            images = data.both.flatten(0, 1)        # 2 N: latents of images, then of flipped images
        resident = cfg.resident
        if resident is None:
            resident = device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        self.images = images.to(device) if resident else images
        self.labels = data.labels.to(device) if resident else data.labels
        self.resident = resident
        self.moments = moments_of(data.meta, device)
        self.cfg, self.diffusion, self.device = cfg, diffusion, device
        self.K = len(data.classes)
        self.mine = slice(rank * cfg.batch_size // world, (rank + 1) * cfg.batch_size // world)
        self.pool = None if resident else ThreadPoolExecutor(1)
        self.ahead = {}                             # step -> what the pool fetches for it

    def fetch(self, step):
        """Images and labels of this process as they are stored; each step draws anew, none twice."""
        B = self.cfg.batch_size
        g = torch.Generator().manual_seed(mix(self.cfg.seed, step, 0))
        N = len(self.labels)                        # fewer than B: some are there more than once
        label_at = torch.cat([torch.randperm(N, generator=g) for _ in range(0, B, N)])[:B][self.mine]
        image_at = label_at
        if self.moments is not None:                # half are the latents of flipped images
            image_at = label_at + N * (torch.rand(B, generator=g)[self.mine] < 0.5)
        if self.resident:
            label_at, image_at = self.send(label_at), self.send(image_at)
        return self.pin(self.images[image_at]), self.pin(self.labels[label_at])

    def pin(self, x):
        """Where the GPU fetches it while the host goes on."""
        return x.pin_memory() if self.device.type == "cuda" and x.device.type == "cpu" else x

    def send(self, x):
        pinned = self.device.type == "cuda"         # else x might be gone before it is copied
        return self.pin(x).to(self.device, non_blocking=pinned)

    def chance(self, *numbers):
        """What torch.rand and the like draw from and where, as keyword arguments; see mix."""
        g = torch.Generator(self.device).manual_seed(mix(self.cfg.seed, *numbers))
        return dict(generator=g, device=self.device)

    def __call__(self, step):
        x, y = self.ahead.pop(step).result() if step in self.ahead else self.fetch(step)
        if self.pool:
            self.ahead = {step + 1: self.pool.submit(self.fetch, step + 1)}
        x0 = to_x0(self.send(x), self.moments).to(memory_format=layout_of(self.device))
        y = self.send(y)
        B = self.cfg.batch_size
        on = self.chance(step, 1)
        flip = torch.rand(B, 1, 1, 1, **on)[self.mine] < 0.5            # of images; fetch flipped latents
        t = self.diffusion.path.draw(B, **on)[self.mine]
        noise = torch.randn(B, *x0.shape[1:], **on)[self.mine]
        drop = torch.rand(B, **on)[self.mine] < LABEL_DROPOUT
        if self.moments is None:
            x0 = torch.where(flip, x0.flip(3), x0)
        y = torch.where(drop, self.K, y) if self.cfg.conditional else None
        return x0, t, noise, y

    def noisy_view(self, x0, step):
        """Another view of each image, with a little noise: x_t, t. A function of (seed, step) as well."""
        B = self.cfg.batch_size
        on = self.chance(step, 0, 1)
        u = torch.rand(B, 4, **on)[self.mine]
        t = self.diffusion.path.draw_below(TEACHER_SIGMA, B, **on)[self.mine]
        noise = torch.randn(B, *x0.shape[1:], **on)[self.mine]
        view = augment(x0, u).to(memory_format=layout_of(self.device))
        return self.diffusion.add_noise(view, t, noise), t


class Meter:
    """Sums of the losses since the last record, on the device, and the largest gradient norm."""

    def __init__(self, device, images, sums=(0.0, 0.0), steps=0):
        self.losses = torch.tensor(sums, device=device)          # denoising, distillation
        self.norm = torch.zeros((), device=device)
        self.steps = steps
        self.images, self.time = images, time.time()             # where it starts

    def sums(self):
        """-> summed denoising and distillation loss (2,), the mean over all processes."""
        losses = self.losses.clone()
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses = losses / dist.get_world_size()
        return losses


class Run:
    """A network in training: what a step reads and changes."""

    def __init__(self, cfg, data, device, state=None, weights=None):
        """At its start, from public weights where given, or as the checkpoint dict state left it."""
        torch.manual_seed(mix(cfg.seed))
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        if device.type == "cuda":                   # the host only draws: many threads wait for one another
            torch.set_num_threads(1)
        self.cfg, self.data, self.device = cfg, data, device
        self.rank, self.world = processes()
        self.share = cfg.batch_size // self.world   # images of a step in this process
        self.micro = cfg.micro_batch or self.share  # images of a forward pass
        num_classes = len(data.classes) if cfg.conditional else 0
        self.net, self.diffusion = build(cfg, data.images.shape[1:], num_classes, device)
        if weights:
            load_public(cfg, self.net, weights)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.weights = list(self.net.parameters())  # once: to walk a network takes milliseconds
        self.averages = list(self.ema.parameters())
        self.parameters = sum(w.numel() for w in self.weights)   # how many numbers the network learns
        self.optimizer = torch.optim.AdamW(self.weights, cfg.lr, betas=(0.9, 0.99), weight_decay=0.0,
                                           fused=device.type == "cuda")
        self.autocast, dtype = pick_autocast(cfg.precision, device)          # makes contexts
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)     # else it is off
        self.batches = Batches(data, cfg, self.diffusion, device)
        self.images = 0                             # seen so far
        self.meter = Meter(device, self.images)
        if state:
            restore(state, model=self.net, ema=self.ema, optimizer=self.optimizer, scaler=self.scaler)
            self.images = state["images"]
            self.meter = Meter(device, self.images, state["loss_sums"], state["loss_count"])
        # the functions of these names below; make_fast puts CUDA graphs in their place
        self.forward_backward = functools.partial(forward_backward, self)
        self.keys_of = functools.partial(keys_of, self)
        if cfg.compile and device.type == "cuda" and torch.utils._triton.has_triton():
            make_fast(self)
        elif cfg.compile and device.type == "cuda":
            say("torch.compile is off: it needs Triton, which is not installed")

    @property
    def step(self):
        """How many steps were taken, which is the number of the next one."""
        return self.images // self.cfg.batch_size


def compile_parts(net):
    """Compile a network in place, so that parameters keep their names."""
    for part in net.parts:
        part.compile(dynamic=False)                 # else for any width, which is slower


def capture(work, *inputs):
    """Records work(*inputs) as a CUDA graph -> a function like work, which launches all its kernels at once.

    Inputs are tensors, whose shapes stay, or None. What it returns is overwritten by the next call.
    """
    inputs = [None if x is None else x.clone() for x in inputs]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):                          # compiles, and chooses the fastest kernels
            work(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    # thread_local: others may fetch data and watch NCCL meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = work(*inputs)

    def replay(*new):
        for x, value in zip(inputs, new):
            if x is not None:
                x.copy_(value)
        graph.replay()
        return result
    return replay


def make_fast(run):
    """Compiled parts; the teacher's pass, and forward with backward pass, as one CUDA graph each.

    A step has up to 2,000 kernels, more than the host launches in time; a graph launches them all.
    """
    say("compiling: the first time it takes up to minutes, later it comes from a cache")
    compile_parts(run.net)
    x0, t, noise, y = run.batches(run.step)
    if run.cfg.distill:
        run.ema.encode = torch.compile(run.ema.encode, dynamic=False)        # the teacher
        run.keys_of = capture(run.keys_of, *run.batches.noisy_view(x0, run.step))
    run.forward_backward = capture(run.forward_backward, x0, t, noise, y, *distillation_inputs(run, x0))


def learning_rate(cfg, images):
    """--lr times a rise over --warmup, times a fall from the start to 1 % at --decay, if that is given."""
    rise = min(1, images / cfg.warmup)
    fall = max(1 - images / cfg.decay, 0.01) if cfg.decay else 1
    return cfg.lr * rise * fall


def distill_weight(cfg, images):
    """--distill; it falls linearly to 0 at --distill-images, if that is given."""
    if not cfg.distill:
        return 0.0
    fall = max(1 - images / cfg.distill_images, 0) if cfg.distill_images else 1
    return cfg.distill * fall


@torch.no_grad()
def update_ema(run):
    """ema <- beta ema + (1 - beta) net; its half-life, in images, ramps up (as in EDM's code)."""
    cfg = run.cfg
    beta = 0.5 ** (cfg.batch_size / min(cfg.ema, EMA_RAMP * run.images))
    torch._foreach_lerp_(run.averages, run.weights, 1 - beta)    # one launch for all weights


@torch.no_grad()
def keys_of(run, view, t):
    """What the teacher says of the views of this process (b, C, H, W) at t (b,) -> (b, 128) float32."""
    parts = zip(view.split(run.micro), t.split(run.micro))
    with run.autocast():
        return torch.cat([run.ema.projector(run.ema.encode(x, s)).float() for x, s in parts])


def distillation_inputs(run, x0):
    """-> the teacher's keys (B, 128), of another view of each image of the whole batch; the loss's weight ().

    Both are None without --distill. Where the weight has fallen to 0, the teacher is not asked.
    """
    if not run.cfg.distill:
        return None, None
    value = distill_weight(run.cfg, run.images)
    weight = torch.full((), value, device=run.device)            # a graph would keep a number as it was
    if value == 0:
        width = run.net.projector[-1].out_features
        return torch.zeros(run.cfg.batch_size, width, device=run.device), weight
    keys = run.keys_of(*run.batches.noisy_view(x0, run.step))
    if run.world > 1:
        every = [torch.empty_like(keys) for _ in range(run.world)]
        dist.all_gather(every, keys)
        keys = torch.cat(every)
    return keys, weight


def distillation_loss(run, z, t, keys, i):
    """Of the images i, i + 1, ... of this process, with z (n, D) at t (n,): what they add to the mean, ()."""
    own = run.rank * run.share + i + torch.arange(len(z), device=run.device)    # keys are in order of ranks
    each = contrast(run.net.projector(z), keys, own)
    # the more of an image is left, the more its z can know
    return (run.diffusion.path.abar(t) * each).sum() / run.share


def forward_backward(run, x0, t, noise, y, keys, weight):
    """Puts the gradients of this process's share of a batch into w.grad -> its two mean losses, (2,).

    The second is the distillation's, with keys (B, 128), the teacher's of the whole batch, and a weight ().
    """
    run.optimizer.zero_grad()                       # to None: backward makes them anew, in a graph's memory
    losses = torch.zeros(2, device=run.device)
    for i in range(0, run.share, run.micro):
        part = slice(i, i + run.micro)
        x_t = run.diffusion.add_noise(x0[part], t[part], noise[part])
        labels = None if y is None else y[part]
        with run.autocast():
            out, z = run.net(x_t, t[part], labels, return_z=True)
            loss = run.diffusion.error(out, x0[part], t[part], noise[part]).sum() / run.share
            losses[0] += loss.detach()
            if keys is not None:
                distillation = distillation_loss(run, z, t[part], keys, i)
                losses[1] += distillation.detach()
                loss = loss + weight * distillation
        run.scaler.scale(loss).backward()
    return losses


def average_gradients(weights, world):
    """The mean over all processes, by one all_reduce instead of one per weight."""
    grads = [w.grad for w in weights if w.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= world
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))              # in place: a graph writes there again


def train_step(run):
    """The gradients of a batch, and a step of the optimiser; the losses go into run.meter."""
    x0, t, noise, y = run.batches(run.step)
    keys, weight = distillation_inputs(run, x0)
    torch.manual_seed(mix(run.cfg.seed, run.step, 2 + run.rank))     # dropout follows (seed, step) too
    run.meter.losses += run.forward_backward(x0, t, noise, y, keys, weight)
    if run.world > 1:
        average_gradients(run.weights, run.world)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.weights, CLIP)
    if not run.scaler.is_enabled():                 # fp16 leaves out a step that is not finite
        run.meter.norm = torch.maximum(run.meter.norm, norm)     # NaN stays NaN
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.meter.steps += 1


def finite_sums(run, path):
    """-> both losses, summed since the last record (2,). Raises UserError where they are not finite."""
    sums = run.meter.sums()
    for what, value in {"loss": sums, "gradient's norm": run.meter.norm}.items():
        require(value.isfinite().all(),
                f"the {what} is not finite between {run.meter.images} and {run.images} images (what {path} "
                "holds, if it is there, is from before): lower --lr, or mend data that is not finite.")
    return sums


def save(run, path):
    """Writes the checkpoint; a state that is not finite is never saved. Raises UserError."""
    sums = finite_sums(run, path).tolist()
    if run.rank > 0:
        return
    state = dict(images=run.images, config=resolved(run.cfg), model=run.net.state_dict(),
                 ema=run.ema.state_dict(), optimizer=run.optimizer.state_dict(),
                 scaler=run.scaler.state_dict(), loss_sums=sums, loss_count=run.meter.steps,
                 shape=list(run.data.images.shape[1:]), num_classes=run.net.num_classes,
                 classes=run.data.classes, counts=counts_of(run.data), latents=run.data.meta)
    save_file(path, lambda file: torch.save(state, file))


def resolved(cfg):
    """Its flags as a checkpoint keeps them, {name: value}: with the whole paths of --data and --vae."""
    return asdict(cfg) | dict(data=resolve(cfg.data), vae=cfg.vae and whole_name(cfg.vae))


def counts_of(data):
    """-> [class name, how many images it has] of each class."""
    counts = data.labels.bincount(minlength=len(data.classes)).tolist()
    return [[name, n] for name, n in zip(data.classes, counts)]


def draw(run, vae, path):
    """A grid of 8 rows of samples, a column a class, at most 10; of latents, where there is their VAE."""
    if run.rank > 0 or (run.data.meta and not vae):
        return
    K = run.net.num_classes
    columns = min(K, 10) or 8
    noise = seeded_noise(range(8 * columns), run.data.images.shape[1:])().to(run.device)
    y = torch.arange(columns, device=run.device).repeat(8)
    parts = []
    size = run.cfg.micro_batch or len(y)
    with run.autocast():
        for x, classes in zip(noise.split(size), y.split(size)):
            parts.append(run.diffusion.sample(run.ema, x, classes if K else None, null=K,
                                              guidance=GUIDANCE if K else 1.0, clip=run.data.meta is None))
    x = to_pixels(torch.cat(parts), moments_of(run.data.meta, run.device), vae)
    save_file(path, lambda file: save_grid(x, file, columns))


def start_log(run, out, resumed):
    """Writes config.json and log.jsonl: its first line, or what it has up to the checkpoint."""
    if run.rank > 0:
        return
    config = json.dumps(asdict(run.cfg), indent=2)
    save_file(out / "config.json", lambda file: file.write(config.encode()))
    path = out / "log.jsonl"
    if path.exists() and not resumed:
        n = 1
        while (out / f"log.jsonl.{n}").exists():
            n += 1
        kept = out / f"log.jsonl.{n}"
        os.replace(path, kept)
        say(f"{out} has a log but no checkpoint: starting anew, the old log is {kept}")
    lines = whole_lines(path, run.images) if path.exists() else [json.dumps(log_head(run))]
    text = "".join(line + "\n" for line in lines)
    save_file(path, lambda file: file.write(text.encode()))
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "samples-[0-9]*.png"):
        for part in out.glob(f"{name}.{8 * '[0-9a-f]'}.part"):   # save_file's, of a run that was killed
            with suppress(OSError):
                part.unlink()


def log_head(run):
    """The first line of log.jsonl."""
    device = f"{run.world} x {run.device} {chip(run.device)}"
    return dict(config=asdict(run.cfg), parameters=run.parameters, device=device, versions=VERSIONS,
                commit=git("rev-parse", "--verify", "HEAD"),
                edited=git("diff", "--name-only", "HEAD", "--", ":(glob)*.py").split())


def git(*words):
    """What git says of the folder of this file; "" where it, or a repository, is not there."""
    try:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()
    except OSError:
        return ""


def whole_lines(path, images):
    """Lines of log.jsonl that were written to their end: heads, and records up to so many images."""
    line = re.compile(r'^(?:{"images": (\d+), .*}|{"config": .*})$', re.M)
    found = line.finditer(path.read_text(errors="replace"))
    return [match[0] for match in found if int(match[1] or 0) <= images]


def chip(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def log(run, out, begun, bar):
    """Adds a record to log.jsonl and shows it beside the bar."""
    sums = finite_sums(run, out / "checkpoint.pt")
    denoising, distillation = (sums / run.meter.steps).tolist()
    now = time.time()
    minutes = (now - begun) / 60
    record = dict(images=run.images, loss=denoising)
    if distill_weight(run.cfg, run.images - run.cfg.batch_size) > 0:         # in the last step
        record["distill"] = distillation
    record["lr"] = run.optimizer.param_groups[0]["lr"]
    seconds = max(now - run.meter.time, 1e-3)       # a clock may stand still for a step
    record["images_per_second"] = round((run.images - run.meter.images) / seconds, 1)
    record["seconds"] = round(now - begun, 1)
    if run.scaler.is_enabled():                     # the steps it left out since the start
        taken = [int(s["step"]) for s in run.optimizer.state.values()]       # all parameters count alike
        record["skipped"] = run.step - max(taken, default=0)
    bar.set_postfix_str(f"loss {denoising:.4f}, {minutes:.1f} of {run.cfg.minutes or '-'} min")
    if bar.disable:                                 # no terminal: a line a record
        of = f" of {run.cfg.images:,}" if run.cfg.images else ""
        say(f"{run.images:,}{of} images, loss {denoising:.4f}, {record['images_per_second']} images/s, "
            f"{minutes:.1f} minutes", sys.stderr)
    if run.rank == 0:
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def has_passed(run, every):
    """Did the last step reach or cross a multiple of so many images?"""
    return run.images // every > (run.images - run.cfg.batch_size) // every


def stop_requested(run, begun, asked):
    """-> is the budget spent, by the first process's clock; the signal that any process got, or 0."""
    seconds = time.time() - begun
    late = run.rank == 0 and run.cfg.minutes is not None and seconds > 60 * run.cfg.minutes
    found = torch.tensor([int(late), max(asked, default=0)])
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    late, number = found.tolist()
    enough = run.cfg.images is not None and run.images >= run.cfg.images
    return bool(late or enough), number


def check_start(cfg, out, world, state=None):
    """What can be found out without the data. Raises UserError."""
    share = cfg.batch_size // world
    require(cfg.batch_size % world == 0,
            f"--batch-size {cfg.batch_size} is not divisible by the {world} processes: use a multiple.")
    require(share % (cfg.micro_batch or share) == 0,
            f"--micro-batch {cfg.micro_batch} does not divide a process's {share}: use a divisor.")
    check_writable(out)
    empty = not out.exists() or not any(out.iterdir())
    require(cfg.resume or empty,
            f"{out} exists and is not empty: go on with --resume, which starts anew where nothing was saved, "
            "or choose another --out.")
    if not state:
        return
    mine, kind = resolved(cfg), cfg.data.partition(":")[0]
    for name, value in asdict(state["config"]).items():
        # a folder may have moved: check_data looks into it
        moved = name == "data" and kind in ("folder", "latents") and value.startswith(f"{kind}:")
        require(name in MAY_CHANGE or moved or value == mine[name],
                f"{state['path']} was trained with {name} {value}: resume it with the same flags, or choose "
                "another --out.")


def check_data(cfg, data, state):
    """Do the data fit the flags, and the checkpoint that is to go on? Raises UserError."""
    require(len(data.classes) > 1 or not cfg.conditional,
            f"--conditional needs classes, {cfg.data} has one: drop it, or sort them into train/<class>/.")
    if not state:
        return
    require(state["latents"] == data.meta,
            f"{state['path']} was trained on other latents than {cfg.data} holds now: choose another --out.")
    before, now = state["counts"], counts_of(data)
    if not cfg.conditional:                         # then names of classes do not matter
        before, now = ([["all", sum(n for _, n in counts)]] for counts in (before, now))
    for was, is_now in zip_longest(before, now):
        require(was == is_now, f"{state['path']} was trained on other images than {cfg.data} holds now: a "
                               f"class and its number were {was}, are {is_now}; choose another --out.")


# --- the loop -----------------------------------------------------------------------------------------------

def advance(run):
    """One step of training: rate, gradients, weights, average."""
    rate = learning_rate(run.cfg, run.images)       # 0 in the first step, which fills AdamW's averages alone
    run.optimizer.param_groups[0]["lr"] = rate
    train_step(run)
    run.images += run.cfg.batch_size
    update_ema(run)


def loop(run, out, vae, begun, bar):
    """Trains until the budget is spent, or a signal to stop has come -> its number, or 0."""
    asked = collect_stops()
    spent, signalled = stop_requested(run, begun, asked)
    while not (spent or signalled):
        advance(run)
        bar.update(run.cfg.batch_size)
        spent, signalled = stop_requested(run, begun, asked)
        over = spent or signalled                   # then fit saves and draws
        full = run.meter.steps == LOG_STEPS
        if full or over:
            log(run, out, begun, bar)
        if full:
            run.meter = Meter(run.device, run.images)
        if has_passed(run, run.cfg.sample_every) and not over:
            try_to("draw samples", lambda: draw(run, vae, out / f"samples-{run.images}.png"))
        if has_passed(run, run.cfg.save_every) and not over:
            save(run, out / "checkpoint.pt")
    return signalled


def time_of(path):
    """When a file was written; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def train(cfg):
    """Makes a run, or one that goes on, and brings it to its end. Raises UserError."""
    out = Path(cfg.out)
    path = out / "checkpoint.pt"
    device, rank, world = setup(cfg.device)

    # whatever can be wrong is found before the run writes anything
    saved_at = from_first(lambda: time_of(path))
    state = None
    if cfg.resume:
        state = in_every_process(lambda: read_checkpoint(path) if path.exists() else None)
        same_checkpoint(state, path)
    in_every_process(lambda: check_start(cfg, out, world, state))
    weights = None
    if cfg.init and not state:                      # a checkpoint has weights of its own
        weights = in_every_process(lambda: read_public(cfg))
    if not on_latents(cfg):
        check_shape(cfg, (3, cfg.image_size, cfg.image_size))
    data = load_data(cfg.data, "train", cfg.image_size, cfg.skip_bad, cfg.vae, device,
                     check=functools.partial(check_shape, cfg))
    if cfg.init:
        data = data._replace(meta=public_meta(data.meta))
    check_data(cfg, data, state)
    run = Run(cfg, data, device, state, weights)
    vae = vae_of(data.meta, device) if rank == 0 else None
    from_first(lambda: out.mkdir(parents=True, exist_ok=True))
    busy = f"another program trains in {out}: wait for its end, or choose another --out."
    with alone(out, lambda: require(False, busy)):
        require(from_first(lambda: time_of(path)) == saved_at,
                f"{path} was written by another program meanwhile: start again with --resume, or choose "
                "another --out.")
        fit(run, out, vae, resumed=state is not None)


def fit(run, out, vae, resumed):
    """Trains from where a run stands to its end; the last line says where the results lie."""
    path = out / "checkpoint.pt"
    start_log(run, out, resumed)
    if run.cfg.size == "tiny":
        flags = {name: getattr(run.cfg, name) for name in [*TINY, "conditional", "decay"]}
        say(f"tiny networks have flags of their own: {flags}")
    say(f"{run.cfg.model} {run.cfg.size}: {run.parameters:,} parameters, {len(run.data.images):,} images, "
        f"{run.world} x {run.device}")

    begun = time.time()
    run.meter.time = begun
    start = run.images
    with progress(total=run.cfg.images, initial=start, unit="img", unit_scale=True) as bar:
        signalled = loop(run, out, vae, begun, bar)

    if run.images > start or not resumed:
        save(run, path)
    if signalled:
        say(f"stopped by {signal.Signals(signalled).name} at {run.images:,} images; checkpoint: {path}; "
            f"go on with: {resume_command()}")
        sys.exit(128 + signalled)                   # as if the signal had ended it: not a success
    samples = out / f"samples-{run.images}.png"
    try_to("draw samples", lambda: draw(run, vae, samples))
    drawn = samples if samples.exists() else "none"
    say(f"{run.images:,} images in {(time.time() - begun) / 60:.1f} minutes; checkpoint: {path}; "
        f"log: {out / 'log.jsonl'}; samples: {drawn}")


@command
def main(argv=None):
    train(parse_config(argv))


if __name__ == "__main__":
    main()
