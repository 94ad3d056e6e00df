"""Draw images from a trained run, with its EMA weights.

    python sample.py runs/unet-tiny-shapes                         64 images: samples.png
    python sample.py runs/unet-tiny-shapes --classes star heart    of these classes only
    python sample.py runs/unet-tiny-shapes --denoise               the reverse process in steps: denoise.png
    python sample.py --weights cifar10_uvit_small.pth --model uvit public weights instead of a run
    torchrun --nproc_per_node=2 sample.py runs/dit-small-cifar10 -n 50000 --npz --fid

Image i is drawn with seed --seed + i, its class is the next of --classes in turn, and it is the same for any
batch size and any number of GPUs (pixels agree within 2 of 255 levels on one kind of device). Everything is
written into the run's folder.
"""
import importlib.util
import math
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageDraw, ImageFont, ImageOps
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from diffusion import SAMPLERS
from train import (GUIDANCE, Parser, UserError, add_source, check_source, check_writable, command,
                   compile_parts, finite, from_first, in_every_process, load_data, load_source,
                   moments_of, pick_autocast, progress, reason, require, same_everywhere, save_file,
                   save_grid, say, seeded_noise, setup, to_pixels, to_uint8, to_x0, vae_of, whole_number)

COMPILE_FROM = 10_000            # images per GPU: here compiling pays, at the latest the second time


def parse(argv):
    """Flags -> namespace. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    add_source(parser)
    flag("--data", help="of --weights, see train.py [cifar10]; else what --fid compares with [the run's own]")
    flag("-n", "--count", type=whole_number, default=64, help="number of images [64]")
    flag("--sampler", choices=SAMPLERS, default="ddim", help="ddpm is for linear and cosine paths [ddim]")
    flag("--steps", type=whole_number, help="of the sampler [ddim: 50, ddpm: 1000, heun: 25]")
    flag("--guidance", type=float, help=f"1 is off [{GUIDANCE} where there are classes]")
    flag("--classes", nargs="+", metavar="CLASS", help="names or numbers, taken in turn [all]")
    flag("--seed", type=whole_number, default=0, help="of the first image [0]")
    flag("--batch-size", type=whole_number, default=250, help="images at a time [250]")
    flag("--npz", action="store_true", help="samples.npz, too: arr_0, (N, H, W, C) uint8 [with --fid]")
    flag("--fid", action="store_true", help="FID against the training set (torch-fidelity)")
    flag("--fid-weights", metavar="FILE", help="Inception weights for --fid [downloaded]")
    flag("--out", metavar="NAME", help="of the files [samples; denoise; latents]")
    flag("--skip-bad", action="store_true", help="leave out unreadable images, for --fid")
    flag("--denoise", action="store_true", help="a picture of the reverse process instead")
    flag("--compile", action=BooleanOptionalAction, help=f"[from {COMPILE_FROM:,} images a GPU on]")
    args = parser.parse_args(argv)
    check_source(args)
    require(args.weights or args.fid or not args.data,
            "--data is for --weights and --fid: leave it out, the run knows it.")
    require(not args.fid or not (args.data or "").startswith("latents:"),
            f"--data {args.data} has no images for --fid to compare with: name a data set of images.")
    require(args.fid or not (args.fid_weights or args.skip_bad),
            "--fid-weights and --skip-bad are for --fid: add it, or leave them out.")
    most = 10_000_000                               # they are kept in memory
    require(0 < args.count <= most, f"--count {args.count} is not possible: use 1 to {most:,}.")
    last = 2 ** 32 - args.count                     # torch's CPU generator takes 32 bits of a seed
    require(0 <= args.seed <= last, f"--seed {args.seed} is not possible: use 0 to {last:,}.")
    require(args.batch_size > 0, f"--batch-size {args.batch_size} is not possible: use 1 or more.")
    require(not args.out or (Path(args.out).name == args.out and len(args.out.encode()) < 200),
            f"--out {args.out} is not the name of a file: leave out folders, shorten it.")
    require(not args.denoise or not (args.npz or args.fid or args.compile),
            "--denoise draws a picture of 4 images alone: leave out --npz, --fid and --compile.")
    if args.fid:
        args.npz = True                             # an FID that fails does not take the samples along
        # found out now, not after hours of sampling
        require(importlib.util.find_spec("torch_fidelity"),
                "--fid needs torch-fidelity, which is not installed: pip install torch-fidelity==0.4.0")
        require(args.fid_weights is None or Path(args.fid_weights).is_file(),
                f"--fid-weights {args.fid_weights} is not a file: name the Inception weights, or leave it "
                "out to download them.")
    return args


def class_ids(names, classes, conditional):
    """--classes -> list of ids; None for a run without classes. Raises UserError."""
    require(conditional or not names, "--classes needs a class-conditional run: train with --conditional.")
    if not conditional:
        return None
    usable = ", ".join(classes[:10])
    if len(classes) > 10:
        usable += " ..."
    numbers = []
    if not any(map(str.isdecimal, classes)):        # where classes are called 01, 02, these are names
        numbers = [str(k) for k in range(len(classes))]
        usable += f" or 0 to {len(classes) - 1}"
    ids = []
    for name in names or classes:
        known = classes if name in classes else numbers
        require(name in known, f"--classes {name} is not a class of this run: use {usable}.")
        ids.append(known.index(name))
    return ids


class Source(NamedTuple):
    """What is drawn from: a run or public weights, as of load_source; for latents, their moments and VAE."""

    state: dict
    net: torch.nn.Module
    diffusion: object
    device: torch.device
    moments: torch.Tensor | None
    vae: object | None

    @property
    def makes_images(self):
        """Are the results images, not latents that nothing decodes?"""
        return self.vae is not None or not self.state["latents"]

    def decode(self, x):
        return to_pixels(x, self.moments, self.vae)


def draw(args, source, ids, indices, trace=None):
    """What the network draws, (n, C, H, W); index i has seed --seed + i and class ids[i mod K]."""
    state, device = source.state, source.device
    next_noise = seeded_noise([args.seed + i for i in indices], state["shape"])
    y = None
    if ids:
        y = torch.tensor([ids[i % len(ids)] for i in indices], device=device)
    autocast, _ = pick_autocast(args.precision or state["config"].precision, device)
    with autocast():
        return source.diffusion.sample(
            source.net, next_noise().to(device), y, null=state["num_classes"], steps=args.steps,
            sampler=args.sampler, guidance=args.guidance, clip=not state["latents"],
            randn=lambda like: next_noise().to(device), trace=trace)


def draw_share(args, source, ids, rank, world):
    """Of --count images those of number rank, rank + world, ... -> uint8, or latents that stay latents."""
    mine = range(rank, args.count, world)
    parts = [mine[i:i + args.batch_size] for i in range(0, len(mine), args.batch_size)]
    images = []
    for part in progress(parts, "batches", delay=1):
        whole = len(part) == len(parts[0])          # a last batch that is smaller would be compiled anew
        with torch.compiler.set_stance("default" if whole else "force_eager"):
            x = source.decode(draw(args, source, ids, part))
            images.append(to_uint8(x) if source.makes_images else finite(x).cpu())
    return torch.cat(images) if images else torch.empty(0, dtype=torch.uint8)


def collect(images, n, rank, world):
    """The shares of all processes -> all n images in their order; None but in the first process."""
    if world == 1:
        return images
    shares = [None] * world if rank == 0 else None
    dist.gather_object(images, shares)
    if rank > 0:
        return None
    images = images.new_empty(n, *images.shape[1:])
    for r, share in enumerate(shares[:n]):          # a process beyond the n-th has none
        images[r::world] = share
    return images


def evenly(trace):
    """Ten steps of a trace, or all where there are fewer; with the first and the last."""
    return [trace[round(i)] for i in np.linspace(0, len(trace) - 1, min(10, len(trace)))]


def denoise(args, source, ids):
    """Draws the first four images -> the steps (t, x_t, x0) that are shown of them."""
    trace = []
    draw(args, source, ids, range(4), trace)
    # a VAE takes its time: it decodes only what is shown
    return [(t, source.decode(x_t), source.decode(x0)) for t, x_t, x0 in evenly(trace)]


def draw_denoise(steps, file):
    """Steps (t, x_t, x0) -> PNG: for each image a row of x_t and one of the predicted x0, a column a step."""
    times, x_t, x0 = zip(*steps)
    tiles = torch.stack([torch.stack(x_t, 1), torch.stack(x0, 1)], dim=1)    # (n, 2, columns, C, H, W)
    size, gap, left, top = max(64, tiles.shape[-1]), 4, 40, 24
    tiles = F.interpolate(to_uint8(tiles.flatten(0, 2)), (size, size), mode="nearest-exact")
    grid = to_pil_image(make_grid(tiles, len(times), gap, pad_value=255))
    picture = ImageOps.expand(grid, (left - gap, top - gap, 0, 0), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for column, t in enumerate(times):
        x = left + column * (size + gap)
        pen.text((x + size / 2, top / 2), f"t = {t:.0f}", "black", font, "mm")
    for row in range(2 * len(x_t[0])):
        y = top + row * (size + gap)
        pen.text((left / 2, y + size / 2), "x0" if row % 2 else "x_t", "black", font, "mm")
    picture.save(file, "PNG")


class Images(TensorDataset):
    """uint8 images (N, C, H, W) as torch-fidelity wants them: one by one, with three channels."""

    def __getitem__(self, i):
        return self.tensors[0][i].expand(3, -1, -1)


def fid(images, real, weights, device):
    """Frechet Inception distance of two sets of uint8 images (N, C, H, W). Raises UserError."""
    from torch_fidelity import calculate_metrics
    try:
        metrics = calculate_metrics(input1=Images(images), input2=Images(real), fid=True, verbose=False,
                                    cuda=device.type == "cuda", feature_extractor_weights_path=weights)
    except Exception as e:                          # no network, a proxy, a file that is something else ...
        raise UserError(f"FID could not be computed ({reason(e)}): if the Inception weights could not be "
                        "downloaded, fetch weights-inception-2015-12-05-6726825d.pth from the releases of "
                        "github.com/toshas/torch-fidelity and name it with --fid-weights.")
    return metrics["frechet_inception_distance"]


def complete(args, state, diffusion, ids):
    """Fills in --steps and --guidance, where the flags fit the run. Raises UserError."""
    try:
        usual = diffusion.default_steps(args.sampler)
    except ValueError as e:
        raise UserError(str(e))
    if args.steps is None:
        args.steps = usual
    if args.guidance is None:
        args.guidance = GUIDANCE if ids else 1.0
    require(math.isfinite(args.guidance), f"--guidance {args.guidance} is no number: use {GUIDANCE}.")
    require(ids or args.guidance == 1, f"--guidance {args.guidance} needs a conditional run: leave it out.")
    require(0 < args.steps <= diffusion.T, f"--steps {args.steps} is out of range: use 1 to {diffusion.T}.")
    require(not state["latents"] or not args.fid,
            "--fid compares with images, and this run was trained on latents: use --npz, and an FID tool "
            "with your images.")


def to_compile(args, device, world):
    """Is the network compiled? Where the flags do not say, for many images on a GPU. Raises UserError."""
    usable = device.type != "cuda" or torch.utils._triton.has_triton()
    if args.compile is None:
        return device.type == "cuda" and usable and args.count >= COMPILE_FROM * world
    require(usable or not args.compile, "--compile needs Triton, which is not installed: leave it out.")
    return args.compile


def write(args, run, images, ids, how):
    """samples.png, or as --out says, and with --npz samples.npz in the run's folder; uint8 (N, C, H, W)."""
    shown = to_x0(images[:max(100, len(ids or []))], None)                   # 100, or one a class
    columns = min(len(ids), 20) if ids and len(ids) > 1 else math.isqrt(len(shown))
    picture, archive = (run / f"{args.out or 'samples'}.{suffix}" for suffix in ("png", "npz"))
    replaced = ", in place of another" if picture.exists() else ""
    if args.npz:
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        save_file(archive, lambda file: np.savez(file, pixels), stale=picture)
        say(f"{archive}: arr_0 {pixels.shape} uint8")
    elif archive.exists():
        say(f"{archive} is of an earlier call")
    save_file(picture, lambda file: save_grid(shown, file, columns))
    say(f"{picture}{replaced}: {len(shown)} of {args.count:,} images; {how}")


@command
def main(argv=None):
    args = parse(argv)
    device, rank, world = setup(args.device)
    state, net, diffusion = load_source(args, device)
    cfg, run = state["config"], Path(args.run)
    from_first(lambda: check_writable(run))
    ids = class_ids(args.classes, state["classes"], cfg.conditional)
    complete(args, state, diffusion, ids)
    compiled = to_compile(args, device, world)
    whose = "public weights" if args.weights else f"EMA at {state['images']:,} images"
    how = f"{args.sampler}, {args.steps} steps, guidance {args.guidance:g}, {whose}"
    latents = state["latents"]
    source = Source(state, net, diffusion, device, moments_of(latents, device), vae_of(latents, device))
    same_everywhere(lambda: source.makes_images, "the VAE loads on some machines alone: copy it to all.")
    if args.denoise:
        require(source.makes_images, "--denoise draws images, and there is no VAE of these latents: mend "
                                     "what is said above, or leave out --denoise.")
        if rank > 0:
            return
        steps = denoise(args, source, ids)
        picture = run / f"{args.out or 'denoise'}.png"
        save_file(picture, lambda file: draw_denoise(steps, file))
        say(f"{picture}: {how}")
        return
    # what is compared with is loaded before hours of sampling
    skip_bad = cfg.skip_bad or args.skip_bad
    spec = args.data or cfg.data
    real = load_data(spec, "train", cfg.image_size, skip_bad).images if args.fid else None
    if compiled:
        torch.backends.cudnn.benchmark = True
        compile_parts(net)
    # where one fails, all say so and end; and the fast wait for the slow, be it hours
    images = in_every_process(lambda: draw_share(args, source, ids, rank, world))
    images = collect(images, args.count, rank, world)
    if rank > 0:
        return
    if not source.makes_images:
        archive = run / f"{args.out or 'latents'}.npz"
        save_file(archive, lambda file: np.savez(file, images.numpy()))
        say(f"{archive}: arr_0 {tuple(images.shape)} float32, not decoded; {how}")
        return
    write(args, run, images, ids, how)
    if args.fid:
        value = fid(images, real, args.fid_weights, device)
        say(f"FID {value:.3f}: {args.count:,} samples, {len(real):,} training images of {spec}; {how}")
        if args.count < 2048 or len(real) < 2048:
            say("FID of fewer than 2,048 images says little: it is far too large, and another for each seed.")


if __name__ == "__main__":
    main()
