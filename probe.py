"""Linear probes of a trained run: what every layer, at every noise level, knows about an image.

    python probe.py runs/unet-tiny-shapes                    the layer x noise map: probe.json, probe.png
    python probe.py runs/unet-tiny-shapes --task segment     the same with a linear layer per pixel
    python probe.py runs/dit-small-cifar10 --data cifar100   transfer: other data, the network stays as it is
    python probe.py --compare runs/A runs/B                  layer curves of probed runs in one picture

Features of the EMA network in eval mode, without class label; one forward pass gives those of all layers.
They are averaged over space (to segment: upsampled to the pixels) and standardised, and one linear layer
learns to tell the classes from them. Layer, t and the penalty on the weights are chosen on a tenth of the
training set, which is held out; then one probe is trained on all training images used and scored, once,
on the test set.
"""
import argparse
import io
import json
import math
import re
import time
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.datasets import VOCSegmentation
from torchvision.transforms.functional import rgb_to_grayscale
from tqdm import tqdm

from diffusion import (Data, command, load_data, moments_of, pick_autocast, require, save_file, say, setup,
                       to_x0)
from train import LAYOUT, VERSIONS, build, load_run, mix

SOME_SHAPES = 5_000                                 # of the 50,000 that shapes can draw: enough here
LEVELS = [1, 10, 30, 60, 100, 200, 300, 500]        # noise levels t, from almost clean to hardly recognisable
PENALTIES = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]          # on |W|^2 / 2; in scikit-learn's terms 1 / (C N)
ITERATIONS, DAMPING = 30, 1e-4                      # of a probe, per penalty; see fit
PIXELS = 25_000                                     # dense probes learn from about so many, drawn at random
ALIKE = ["data", "levels", "train_images", "augment", "seed"]     # in runs that --compare compares
METRICS = {"accuracy": "accuracy", "miou": "mean IoU"}
NEIGHBOURS, TEMPERATURE = 20, 0.07                  # of --knn, as in DINO (arXiv 2104.14294)
VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
         person pottedplant sheep sofa train tvmonitor""".split()

# what is probed: images (N, C, S, S) uint8; targets (N,) classes, or (N, S, S) classes of pixels
Part = namedtuple("Part", "images targets")
# and with what: net(x, t, return_features=True), its diffusion, where and how it runs
Source = namedtuple("Source", "net diffusion autocast device moments", defaults=[None])


def parse(argv):
    """Flags -> namespace. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: require(False, f"{message}; --help lists the flags.")
    parser.add_argument("run", nargs="?", help="folder of a run of train.py")
    parser.add_argument("--task", choices=["classify", "segment"], default="classify", help="[classify]")
    parser.add_argument("--data", help="probe on this data, see train.py; voc to segment [the run's own]")
    parser.add_argument("--t", type=int, nargs="+", default=LEVELS, help=f"noise levels {LEVELS}")
    parser.add_argument("--images", type=int, help="use so many training images [all; of shapes 5,000]")
    parser.add_argument("--augment", type=int, default=0, metavar="VIEWS",
                        help="learn from so many randomly flipped and shifted views of each image [0]")
    parser.add_argument("--knn", action="store_true", help="also k nearest neighbours at the chosen place")
    parser.add_argument("--references", action="store_true", help="also an untrained network and the pixels")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="draw the curves of these probed runs")
    parser.add_argument("--seed", type=int, default=0, help="of held-out part, noise, views, pixels [0]")
    parser.add_argument("--batch-size", type=int, default=500, help="images of a forward pass [500]")
    parser.add_argument("--device", help="cuda, mps or cpu [the first of these that is there]")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], help="[that of the training]")
    args = parser.parse_args(argv)
    require(bool(args.run) != bool(args.compare), "give either the folder of a run, or --compare and some.")
    require(args.data != "voc" or args.task == "segment", "voc has no class per image: use --task segment.")
    require(args.task == "classify" or not args.knn, "--knn is for --task classify: leave it out.")
    for name, least in dict(images=1, augment=0, seed=0, batch_size=1).items():
        value = getattr(args, name)
        require(value is None or value >= least,
                f"--{name.replace('_', '-')} {value} is not possible: use {least} or more.")
    args.t = sorted(set(args.t))
    return args


# --- data ---

def load_voc(split, size):
    """Pascal VOC 2012 with masks, from ./data, downloaded if it is not there; "test" is its val part."""
    part, missing = "train" if split == "train" else "val", not Path("data/VOCdevkit/VOC2012").is_dir()
    try:
        found = VOCSegmentation("data", "2012", part, download=missing)
    except (OSError, RuntimeError) as e:
        require(False, f"voc is not in ./data and could not be downloaded ({e}): go online (or delete "
                       "data/VOCdevkit, if it is damaged), or use --data shapes:full (built in).")

    def read(file, mode, how):                      # centre crop, resize
        with Image.open(file) as image:
            return np.array(ImageOps.fit(image.convert(mode) if mode else image, (size, size), how))
    files = list(zip(found.images, found.masks))
    images = [read(file, "RGB", Image.Resampling.BICUBIC)
              for file, _ in tqdm(files, f"decoding {split}", unit="img", delay=1)]
    masks = [read(file, None, Image.Resampling.NEAREST) for _, file in files]
    return Data(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), None,
                torch.from_numpy(np.stack(masks)), VOC)


def load(spec, split, task, cfg, channels, latents=None):
    """-> Part as the run's network wants it, class names. Raises UserError."""
    size = cfg.image_size
    data = load_voc(split, size) if spec == "voc" else load_data(spec, split, size, cfg.skip_bad)
    images, C = data.images, data.images.shape[1]
    require(bool(latents) == bool(data.meta) and (not latents or latents["vae"] == data.meta["vae"]),
            f"{spec} is not of the kind that was trained on ({latents['vae'] if latents else 'images'}): use "
            "images for a network of images, latents of the same VAE for one of latents.")
    require(latents or images.dtype == torch.uint8,
            f"{spec} has {images.dtype} images: give uint8, 0 to 255.")
    require(C == channels or {C, channels} == {1, 3},
            f"{spec} has {C} channels, the network {channels}: probe it on data with as many.")
    if C != channels:
        images = images.expand(-1, 3, -1, -1) if C == 1 else rgb_to_grayscale(images)
    if task == "segment":
        require(data.masks is not None,
                f"--task segment needs masks, {spec} has none: use --data shapes:full or voc.")
        classes = data.classes if spec == "voc" else ["background", *data.classes]
        return Part(images, data.masks), classes
    require(data.labels is not None, f"{spec} has no class per image: use --task segment.")
    require(len(data.classes) > 1, f"{spec} has one class, {data.classes[0]}: probes need two or more, "
                                   "sort the images into train/<class>/ and test/<class>/.")
    return Part(images, data.labels), data.classes


def flip_and_shift(x, targets, g):
    """Images (n, C, S, S) and, where they are masks, targets (n, S, S): moved by up to S / 8, half flipped.

    What comes in at an edge is the image's reflection.
    """
    n, S, on = len(x), x.shape[-1], dict(generator=g, device=x.device)
    at = torch.arange(S, device=x.device) + torch.randint(-(S // 8), S // 8 + 1, (2, n, 1), **on)
    rows, columns = (S - 1) - ((S - 1) - at.abs()).abs()                      # 2 x (n, S)
    columns = torch.where(torch.rand(n, 1, **on) < 0.5, columns.flip(1), columns)
    i = torch.arange(n, device=x.device)[:, None, None], rows[:, :, None], columns[:, None]
    return x.movedim(1, 3)[i].movedim(3, 1), targets[i] if targets.ndim == 3 else targets


# --- features ---

@torch.no_grad()
def extract(source, part, levels, args, layers=None, view=0, pixels=0, learn=False):
    """Features of a part: batch by batch, level by level; all layers of a level from one forward pass.

    Yields layer, t, h (n m, D) float32 and targets (n m,) int64 for n images. m = 1 to classify: the mean
    over space. To segment, m = pixels of an image, drawn at random, or 0 for all of them in order: there the
    map is upsampled. view > 0: flipped and shifted at random. learn: what probes learn from has other noise
    than what they are scored on.
    """
    device, S, dense = source.device, part.images.shape[-1], part.targets.ndim == 3
    starts, what = range(0, len(part.images), args.batch_size), "features" if learn else "scoring"
    for start in tqdm(starts, what, unit="batch", leave=False):
        g = torch.Generator(device).manual_seed(mix(args.seed, 1, view, start, learn))
        x0, targets = (rows[start:start + args.batch_size].to(device) for rows in part)
        x0, targets = to_x0(x0, source.moments), targets.long()
        if view:
            x0, targets = flip_and_shift(x0, targets, g)
        x0 = x0.contiguous(memory_format=LAYOUT[device.type])
        noise = torch.randn(x0.shape, generator=g, device=device)
        if dense:
            p = torch.arange(S * S, device=device).expand(len(x0), -1)        # (n, m) places, row by row
            if pixels:
                p = torch.randint(S * S, (len(x0), pixels), generator=g, device=device)
            targets = targets.flatten(1).gather(1, p).flatten()
            grid = (torch.stack([p % S, p // S], -1)[:, :, None] + 0.5) / S * 2 - 1       # (n, m, 1, 2)
        for t in levels:
            ts = torch.full((len(x0),), t, device=device)
            with source.autocast():
                feats = source.net(source.diffusion.add_noise(x0, ts, noise), ts, return_features=True)[1]
            for name in layers or feats:
                h = feats[name].float()                                       # (n, D, h, w)
                if dense:                                                     # F.interpolate, but at p only
                    edge = 1 - 1 / h.shape[-1]                                # the centres of the outer cells
                    h = F.grid_sample(h, grid.clamp(-edge, edge), align_corners=False)
                    h = h[..., 0].transpose(1, 2).flatten(0, 1)               # (n, D, m, 1) -> (n m, D)
                else:
                    h = h.mean((2, 3))
                yield name, t, h, targets


def collect(source, part, levels, args, layers=None):
    """What probes learn from -> {(layer, t): features (N, D) float32}, targets (N,); on the device."""
    m = max(1, PIXELS // len(part.images)) if part.targets.ndim == 3 else 1
    found, y = defaultdict(list), []
    for view in range(1, args.augment + 1) if args.augment else [0]:
        for layer, t, h, targets in extract(source, part, levels, args, layers, view, m, learn=True):
            found[layer, t].append(h)
            if (layer, t) == next(iter(found)):
                y.append(targets)
    return {place: torch.cat(found.pop(place)) for place in list(found)}, torch.cat(y)


# --- probes ---

def spread(h):
    """Features (N, D) -> standard deviation (D,), never 0, and mean (D,): what standardises them."""
    std, mean = torch.std_mean(h, 0)
    return std + 1e-6, mean


def fit(features, y, K, penalties):
    """Trains a linear layer for every place and penalty -> for every place {penalty: (W (K, D), b (K,))}.

    features: of P places, each (N, D); y: (N,) classes; one of K or more teaches nothing. Minimises
    cross-entropy + penalty / 2 |W|^2 on standardised features by gradient descent on all of them, accelerated
    (Nesterov 1983); one batched matrix product serves all places. Features are so correlated (condition
    numbers up to 8 million were seen) that AdamW on standardised ones stopped up to 15 points below the best
    linear layer, in some layers more than in others. So the inverse of a bound on the curvature takes the
    place of a learning rate. Boehning (1992) bounds it once for all; here, for an image with probabilities p,
    the Hessian of the cross-entropy is at most (1 - |p|^2) x x^T, taken at its largest on the way so far.
    DAMPING keeps rounding out of the inverse; it slows, but does not bias. Each penalty starts from the
    probes of the one before; let them fall. Raises UserError.
    """
    moments = [spread(h) for h in features]
    require(all(mean.isfinite().all() for _, mean in moments), "the features have values that are not "
            "finite: the network's weights are damaged, or its --precision is too low.")
    x = features[0].new_ones(len(features), len(moments[0][0]) + 1, len(y))   # (P, D + 1, N): 1 for the bias
    for place, h, (std, mean) in zip(x, features, moments):
        place[:-1] = ((h - mean) / std).T
    truth = F.one_hot(y.clamp(max=K - 1), K).T.float()                        # (K, N)
    share = (y < K) / (y < K).sum()                                           # (N,), of the mean
    W, found = x.new_zeros(len(x), K, x.shape[1]), [{} for _ in features]
    ridge = torch.ones(x.shape[1], device=x.device)
    ridge[-1] = 0                                                             # no penalty on the bias
    bar = tqdm(total=len(penalties) * ITERATIONS, desc="probes", unit="step", leave=False)
    for penalty in penalties:
        ahead, bound = W, x.new_zeros(())
        for k in range(ITERATIONS):
            p = (ahead @ x).softmax(1)                                        # (P, K, N)
            bound = torch.maximum(bound, 1 - p.square().sum(1))               # (P, N)
            if k % 10 == 0:
                curvature = torch.stack([(h * w) @ h.T for h, w in zip(x, bound * share)])
                rate = torch.linalg.inv(curvature + torch.diag(penalty * ridge + DAMPING))
            error = p.sub_(truth).mul_(share)
            last, W = W, ahead - (error @ x.mT + penalty * ridge * ahead) @ rate
            ahead = W + k / (k + 3) * (W - last)
            bar.update()
        for probes, V, (std, mean) in zip(found, W, moments):                 # for features as they came
            raw = V[:, :-1] / std
            probes[penalty] = raw, V[:, -1] - raw @ mean
    bar.close()
    return found


def learn(source, part, K, levels, penalties, args, layers=None):
    """-> {(layer, t): {penalty: (W, b)}}; the probes of all layers of one width are trained at once."""
    (features, y), probes = collect(source, part, levels, args, layers), {}
    for D in {h.shape[1] for h in features.values()}:
        places = [place for place, h in features.items() if h.shape[1] == D]
        probes |= zip(places, fit([features.pop(place) for place in places], y, K, penalties))
    return probes


def score(probes, K, source, part, levels, args, layers=None):
    """-> {(layer, t, penalty): dict(accuracy=, miou=)}, of images or, by masks, of all their pixels."""
    counts = defaultdict(int)                       # confusion matrices (K, K): what it is, what was said
    for layer, t, h, targets in extract(source, part, levels, args, layers):
        known = targets < K                         # void pixels are of class 255
        for penalty, (W, b) in probes[layer, t].items():
            pairs = (targets * K + F.linear(h, W, b).argmax(1))[known]
            counts[layer, t, penalty] += torch.bincount(pairs, minlength=K * K).view(K, K)
    result = {}
    for place, count in counts.items():
        right, there = count.diag(), count.sum(1)
        ious = right / (there + count.sum(0) - right)
        result[place] = dict(accuracy=(right.sum() / count.sum()).item(),
                             miou=ious[there > 0].mean().item())              # of the classes that occur
    return result


def knn(source, train, test, place, K, args):
    """Accuracy of the k nearest training images (or views) by cosine, weights exp(cosine / temperature)."""
    (layer, t), right = place, 0
    features, y = collect(source, train, [t], args, [layer])
    x = features[place]
    std, mean = spread(x)

    def unit(h):                                    # standardised, of length 1
        return F.normalize((h - mean) / std)
    x = unit(x)
    for _, _, h, targets in extract(source, test, [t], args, [layer]):
        near, i = (unit(h) @ x.T).topk(min(NEIGHBOURS, len(x)))
        votes = torch.zeros(len(i), K, device=i.device).scatter_add_(1, y[i], (near / TEMPERATURE).exp())
        right += (votes.argmax(1) == targets).sum().item()
    return right / len(test.images)


def study(source, train, test, K, levels, args):
    """The protocol of this file's first lines, train in random order -> dict for probe.json."""
    n = len(train.images) // 10
    held, part = Part(train.images[:n], train.targets[:n]), Part(train.images[n:], train.targets[n:])
    metric = "miou" if args.task == "segment" else "accuracy"
    scores = score(learn(source, part, K, levels, PENALTIES, args), K, source, held, levels, args)
    layer, t, penalty = best = max(scores, key=lambda probe: scores[probe][metric])
    some = PENALTIES[:PENALTIES.index(penalty) + 1]                           # the way there, as before
    probes = learn(source, train, K, [t], some, args, [layer])
    final = score(probes, K, source, test, [t], args, [layer])[best]
    layers = list(dict.fromkeys(layer for layer, _, _ in scores))
    table = [[round(max(scores[name, t, penalty][metric] for penalty in PENALTIES), 5) for t in levels]
             for name in layers]
    return dict(metric=metric, layers=layers, levels=levels, held_out=table,
                best=dict(layer=layer, t=t, penalty=penalty, **scores[best]), test=final)


def references(cfg, state, source, train, test, K, args):
    """The same study of the network as it was before training, and of the pixels themselves."""
    torch.manual_seed(mix(cfg.seed))
    net, _ = build(cfg, state["channels"], state["num_classes"], source.device)

    def pixels(x, t, return_features):              # to classify: all of them in a row, at most 32 x 32
        side = min(32, x.shape[-1])
        flat = F.adaptive_avg_pool2d(x, side).flatten(1)[:, :, None, None]
        return x, {"pixels": x if args.task == "segment" else flat}
    return dict(untrained=study(source._replace(net=net.eval()), train, test, K, args.t, args),
                pixels=study(source._replace(net=pixels), train, test, K, args.t[:1], args))


# --- what one sees ---

COLOURS = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]   # dark is low
FONT = ImageFont.load_default(30)
LINES = ["#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf"]


def stem(args):
    """What the names of the result files begin with; other for other data and tasks."""
    data = "-" + re.sub(r"\W+", "-", args.data.removeprefix("folder:")).strip("-") if args.data else ""
    return "probe" + "-segment" * (args.task == "segment") + data


def summary(result):
    """One line: which run, where, how good."""
    best, metric, test = result["best"], result["metric"], result["test"]
    pixels = f" (pixel accuracy {100 * test['accuracy']:.1f} %)" if metric == "miou" else ""
    return (f"{result['run']}: {best['layer']}, t = {best['t']}; held-out {100 * best[metric]:.1f}, "
            f"test {100 * test[metric]:.1f} %{pixels}")


def table(result):
    """-> lines for the terminal: layers down, noise across; z marks the bottleneck, * the best place."""
    best, lines = (result["best"]["layer"], result["best"]["t"]), []
    lines.append(f"{'t':>10}   " + "".join(f"{t:6d} " for t in result["levels"]))
    for name, values in zip(result["layers"], result["held_out"]):
        line = "".join(f"{100 * value:6.1f}" + " *"[(name, t) == best]
                       for t, value in zip(result["levels"], values))
        lines.append(f"{name:>10} {' z'[name == result['bottleneck']]} {line}")
    return "\n".join(lines)


def canvas(width, height, heading):
    """-> picture, pen, writer of text; wide enough for the heading's lines (x, text), which are written.

    Twice the final size, so that lines come out smooth.
    """
    width = round(max(width, *(x + FONT.getlength(text) / 2 + 14 for x, text in heading)))
    picture = Image.new("RGB", (2 * width, 2 * height), "white")
    pen = ImageDraw.Draw(picture)

    def write(x, y, text, anchor="mm", fill="black"):
        pen.text((2 * x, 2 * y), text, fill, FONT, anchor)
    for i, (x, text) in enumerate(heading):
        write(x, 24 + 24 * i, text, "lm")
    return picture, pen, write


def draw_map(result, file):
    """The layer x noise map as a PNG; the best place is framed."""
    layers, levels, values = result["layers"], result["levels"], np.array(result["held_out"])
    left, top, w, h = 110, 92, 66, 26
    what = f"{METRICS[result['metric']]} of linear probes on held-out images of {result['data']} (%)"
    picture, pen, write = canvas(left + w * len(levels) + 20, top + h * len(layers) + 16,
                                 [(14, what), (14, summary(result))])
    shade = (values - values.min()) / max(np.ptp(values), 1e-9)                  # 0..1
    stops = np.linspace(0, 1, len(COLOURS))
    write(left - 12, top - 14, "t", "rm")
    for j, t in enumerate(levels):
        write(left + (j + 0.5) * w, top - 14, str(t))
    for i, name in enumerate(layers):
        write(left - 12, top + (i + 0.5) * h, name + " (z)" * (name == result["bottleneck"]), "rm")
        for j, t in enumerate(levels):
            x, y = 2 * (left + j * w), 2 * (top + i * h)
            colour = [round(np.interp(shade[i, j], stops, channel)) for channel in zip(*COLOURS)]
            pen.rectangle((x, y, x + 2 * w - 5, y + 2 * h - 5), tuple(colour))
            if (result["best"]["layer"], result["best"]["t"]) == (name, t):
                pen.rectangle((x - 2, y - 2, x + 2 * w - 3, y + 2 * h - 3), outline="red", width=6)
            write(left + (j + 0.5) * w, top + (i + 0.5) * h, f"{100 * values[i, j]:.1f}",
                  fill="black" if shade[i, j] > 0.6 else "white")
    picture.reduce(2).save(file, "PNG")


def draw_curves(results, file):
    """Layer curves of probed runs as a PNG: of each layer the best held-out score over t; a ring marks z."""
    names, same = results[0]["layers"], all(result["layers"] == results[0]["layers"] for result in results)
    names = names if same else ["first layer", "last layer"]
    gap = max(map(FONT.getlength, names)) / 2 + 12                               # between two names
    left, top, w, h = 70, 56 + 24 * len(results), max(560, round(gap * (len(names) - 1))), 320
    what = f"{METRICS[results[0]['metric']]} of linear probes on held-out images (%), best t of each layer"
    what += "; ring: z" * any(result["bottleneck"] for result in results)
    picture, pen, write = canvas(left + w + 40, top + h + 64,
                                 [(14, what), *((left + 40, summary(result)) for result in results)])
    curves = [[100 * max(row) for row in result["held_out"]] for result in results]
    low, high = min(map(min, curves)), max(map(max, curves))
    step = next(step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if (high - low) / step <= 8)
    low, high = math.floor(low / step) * step, (math.floor(high / step) + 1) * step
    for k in range(round((high - low) / step) + 1):
        y = top + h * (1 - k * step / (high - low))
        pen.line((2 * left, 2 * y, 2 * (left + w), 2 * y), "#dddddd", 2)
        write(left - 10, y, f"{low + k * step:.3g}", "rm")
    for i, name in enumerate(names):
        write(left + w * i / max(len(names) - 1, 1), top + h + 18, name)
    write(left + w / 2, top + h + 44, "layer" if same else "depth")
    for n, (result, curve) in enumerate(zip(results, curves)):
        colour = LINES[n % len(LINES)]
        points = [(2 * (left + w * i / max(len(curve) - 1, 1)), 2 * (top + h * (high - value) / (high - low)))
                  for i, value in enumerate(curve)]
        pen.line(points, colour, 5)
        for point, name in zip(points, result["layers"]):
            pen.circle(point, 6, colour)
            if name == result["bottleneck"]:
                pen.circle(point, 14, outline=colour, width=4)
        pen.line((2 * left, 2 * (48 + 24 * n), 2 * left + 60, 2 * (48 + 24 * n)), colour, 6)
    picture.reduce(2).save(file, "PNG")


def compare(args):
    """--compare: reads the results of probed runs, draws their layer curves beside those of the first."""
    results = []
    for run in args.compare:
        path = Path(run, stem(args) + ".json")
        require(path.exists(), f"{path} does not exist: make it with python probe.py {run}, and the same "
                               "--task and --data.")
        try:
            results.append(json.loads(path.read_text()))
            summary(results[-1]), draw_curves(results[-1:], io.BytesIO())      # what is odd shows here
            right = all(0 <= value <= 1 for row in results[-1]["held_out"] for value in row)
            require(right and all(name in results[-1] for name in ALIKE), "a score that cannot be")
        except Exception as e:
            require(False, f"{path} is no result of probe.py ({type(e).__name__}): probe the run again.")
    for what in ALIKE:
        known = sorted({str(result[what]) for result in results})
        require(len(known) == 1, f"these runs were probed with different {what}, {', '.join(known)}: probe "
                                 "them alike, and compare with the same --data.")
    path = Path(args.compare[0], stem(args) + "-compare.png")
    save_file(path, lambda file: draw_curves(results, file))
    say("\n".join([*map(summary, results), f"curves: {path}"]))


def probe_run(args):
    """Loads a run and its data, follows the protocol, says and writes what came out. Raises UserError."""
    device, _, world = setup(args.device)
    require(world == 1, "probe.py runs in one process: start it with python, without torchrun.")
    state, net, diffusion = load_run(args.run, device)
    cfg, spec = state["config"], args.data or state["config"].data
    require(0 <= args.t[0] and args.t[-1] < diffusion.T,
            f"--t {args.t[0] if args.t[0] < 0 else args.t[-1]} is out of range: use 0 to {diffusion.T - 1}.")
    require(not state["latents"] or not args.augment,
            "--augment flips and shifts images, and this run was trained on latents: leave it out.")
    start = time.time()
    train, classes = load(spec, "train", args.task, cfg, state["channels"], state["latents"])
    test, _ = load(spec, "test", args.task, cfg, state["channels"], state["latents"])
    K, N = len(classes), len(train.images)
    most = min(args.images or (SOME_SHAPES if spec.startswith("shapes") else N), N)
    least = max(10, K if args.task == "classify" else 0)                      # so that a tenth is an image
    require(most >= least, f"{most} training images of {K} classes are too few: use {least} or more.")
    some = torch.randperm(N, generator=torch.Generator().manual_seed(mix(args.seed, 0)))[:most]
    train = Part(*(rows[some] for rows in train))
    loaded, results = time.time(), Path(args.run, stem(args) + ".json")
    torch.backends.cudnn.benchmark = True
    source = Source(net, diffusion, pick_autocast(args.precision or cfg.precision, device)[0], device,
                    moments_of(state["latents"], device))
    result = dict(run=Path(args.run).resolve().name, data=spec, task=args.task, classes=K,
                  bottleneck=net.bottleneck if net.self_cond else None, train_images=most,
                  test_images=len(test.images), trained_on=state["images"], seed=args.seed,
                  augment=args.augment, device=str(device), versions=VERSIONS,
                  **study(source, train, test, K, args.t, args))

    def write(**found):
        result.update(found, seconds=round(time.time() - loaded, 1))
        if device.type == "cuda":
            result["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        save_file(results, lambda file: file.write(json.dumps(result, indent=1).encode()))
    save_file(results.with_suffix(".png"), lambda file: draw_map(result, file))
    write()
    say(table(result) + "\n" + summary(result))
    if args.knn:
        place = result["best"]["layer"], result["best"]["t"]
        write(knn=knn(source, train, test, place, K, args))
        say(f"{NEIGHBOURS} nearest neighbours there: test {100 * result['knn']:.1f} %")
    if args.references:
        write(references=references(cfg, state, source, train, test, K, args))
        for name, reference in result["references"].items():
            beaten = result["test"][result["metric"]] > reference["test"][result["metric"]]
            say(summary(dict(reference, run=name)) + "; NOT BEATEN by this run" * (not beaten))
    say(f"{loaded - start:.0f} s to load {most:,} + {len(test.images):,} images, "
        f"{result['seconds']:.0f} s to probe; results: {results} and .png")


@command
def main(argv=None):
    args = parse(argv)
    try:
        compare(args) if args.compare else probe_run(args)
    except torch.OutOfMemoryError:
        require(False, "the memory of the GPU is too small for this: use fewer --images or levels --t, or a "
                       "smaller --batch-size; results found before are kept.")


if __name__ == "__main__":
    main()
