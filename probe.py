"""Linear probes of a trained run: what every layer, at every noise level, knows about an image.

    python probe.py runs/unet-tiny-shapes                    the layer x noise map: probe.json, probe.png
    python probe.py runs/unet-tiny-shapes --task segment     the same with a linear layer per pixel
    python probe.py runs/dit-small-cifar10 --data cifar100   transfer: other data, the network stays as it is
    python probe.py --weights cifar10_uvit_small.pth --model uvit      public weights instead of a run
    python probe.py --compare runs/A runs/B                  curves and maps of probed runs side by side

Features of the EMA network in eval mode, without class label; one forward pass gives those of all layers.
They are averaged over space (to segment: upsampled to the pixels) and standardised, and one linear layer
learns to tell the classes from them. The protocol (study) has three steps:
  1. A tenth of the training images is held out. From the rest a probe is learned for every layer, noise
     level t and penalty on the weights, and scored on the tenth.
  2. The best of them says which layer, t and penalty to take.
  3. There, one probe is learned from all training images used, and scored, once, on the test images.
"""
import hashlib
import io
import json
import math
import re
import time
from collections import defaultdict, namedtuple
from functools import partial
from itertools import chain, cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.datasets import VOCSegmentation

from train import (VERSIONS, Data, Parser, UserError, add_source, build, check_source, check_writable,
                   command, layout_of, load_data, load_source, mix, moments_of, pick_autocast, progress,
                   require, resolve, save_file, say, setup, to_x0, try_to, whole_number)

SOME_SHAPES = 5_000         # of the 50,000 that shapes can draw: enough here
LEVELS = [1, 10, 30, 60, 100, 200, 300, 500]    # of linear almost clean to hardly recognisable
PENALTIES = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]      # on |W|^2 / 2; in scikit-learn's terms 1 / (C N)
ITERATIONS = 30             # of the solver, for each penalty; the smallest end short of the optimum
DAMPING = 1e-4              # of the curvature, which can be inverted then
PIXELS = 25_000             # to segment, probes learn from about so many, drawn at random
NEIGHBOURS = 20             # of --knn, as in DINO (arXiv 2104.14294)
TEMPERATURE = 0.07          # of their votes, likewise
# what must be the same in runs that are compared
ALIKE = ["data", "test_set", "levels", "train_images", "augment", "seed", "batch_size"]
METRICS = {"accuracy": "accuracy", "miou": "mean IoU"}
VOC = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
       "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
       "train", "tvmonitor"]

# what is probed: images (N, C, S, S), uint8, or latents; targets (N,) classes, or (N, S, S) those of pixels
Part = namedtuple("Part", "images targets")
# and with what: net(x, t, return_features=True), its diffusion, where and how it runs
Source = namedtuple("Source", "net diffusion autocast device moments")


def parse(argv):
    """Flags -> namespace. Raises UserError."""
    parser = Parser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    add_source(parser)
    flag("--task", choices=["classify", "segment"], default="classify", help="[classify]")
    flag("--data", help="probe on this data, see train.py; voc to segment [the run's own]")
    flag("--skip-bad", action="store_true", help="leave out unreadable images [as in the training]")
    flag("--t", type=whole_number, nargs="+", default=LEVELS, help=f"noise levels {LEVELS}")
    flag("--images", type=whole_number, help="use so many training images [all; of shapes 5,000]")
    flag("--augment", type=whole_number, default=0, metavar="VIEWS",
         help="learn from so many randomly flipped and shifted views of each image [0]")
    flag("--knn", action="store_true", help="also k nearest neighbours at the place chosen in this run")
    flag("--references", action="store_true", help="also an untrained network and the pixels")
    flag("--compare", nargs="+", metavar="RUN", help="draw curves and maps of these probed runs")
    flag("--seed", type=whole_number, default=0, help="of held-out part, noise, views, pixels [0]")
    flag("--batch-size", type=whole_number, default=500,
         help="images of a forward pass; another size draws other noise [500]")
    args = parser.parse_args(argv)
    require(bool(args.run or args.weights) != bool(args.compare),
            "give either the folder of a run, before the flags, or --weights, or --compare and some.")
    if args.compare:
        for name, value in vars(args).items():
            fits = name in ("compare", "task", "data")
            require(fits or value == parser.get_default(name),
                    f"--{name.replace('_', '-')} is for probing: --compare reads results, leave it out.")
    else:
        check_source(args)
    require(args.data != "voc" or args.task == "segment",
            "voc has no class per image: use --task segment.")
    require(args.task == "classify" or not args.knn, "--knn is for --task classify: leave it out.")
    for name, least in dict(images=1, augment=0, seed=0, batch_size=1).items():
        value = getattr(args, name)
        require(value is None or value >= least,
                f"--{name.replace('_', '-')} {value} is not possible: use {least} or more.")
    require(len(stem(args).encode()) < 200,
            f"--data {args.data} is too long for a file's name: use a link to it.")
    args.t = sorted(set(args.t))
    return args


# --- data ---

def load_voc(split, size):
    """Pascal VOC 2012 with masks, from ./data, downloaded if it is not there; "test" is its val part."""
    part = "train" if split == "train" else "val"
    missing = not Path("data/VOCdevkit/VOC2012").is_dir()
    try:
        found = VOCSegmentation("data", "2012", part, download=missing)
    except (OSError, RuntimeError) as e:
        raise UserError(f"voc is not in ./data and could not be downloaded ({e}): go online (or delete "
                        "data/VOCdevkit, if it is damaged), or use --data shapes:full (built in).")
    images, masks = [], []
    for image, mask in progress(found, f"decoding {split}", unit="img", delay=1):
        images.append(np.array(ImageOps.fit(image, (size, size))))
        masks.append(np.array(ImageOps.fit(mask, (size, size), Image.Resampling.NEAREST)))
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return Data(images, None, torch.from_numpy(np.stack(masks)), VOC)


def load_any(spec, split, state, device):
    """Data of a spec, of the size and the kind that the network of a checkpoint sees."""
    cfg, side = state["config"], state["shape"][-1]
    if spec == "voc":
        return load_voc(split, side)
    if state["latents"] and not spec.startswith("latents:"):    # images, encoded as in the training
        require(cfg.vae, f"{spec} is not of the kind that was trained on ({state['latents']['vae']}): give "
                         "latents of the same VAE.")
        return load_data(spec, split, cfg.image_size, cfg.skip_bad, cfg.vae, device)
    return load_data(spec, split, side, cfg.skip_bad)


def load(spec, split, task, state, device):
    """-> Part as the network of a checkpoint wants it, class names. Raises UserError."""
    data = load_any(spec, split, state, device)
    images, latents = data.images, state["latents"]
    C, channels = images.shape[1], state["shape"][0]
    trained_on = latents["vae"] if latents else "images"
    found = data.meta["vae"] if data.meta else "images"
    require(trained_on == found,
            f"{spec} is not of the kind that was trained on ({trained_on}): use images for a network of "
            "images, latents of the same VAE for one of latents.")
    require(C == channels, f"{spec} has {C} channels, the network {channels}: probe it on data with as many.")
    if task == "segment":
        require(data.masks is not None,
                f"--task segment needs masks, {spec} has none: use --data shapes:full or voc.")
        return Part(images, data.masks), ["background", *data.classes]
    require(len(data.classes) > 1,
            f"{spec} has one class, {data.classes[0]}: probes need two or more, sort the images into "
            "train/<class>/ and test/<class>/.")
    return Part(images, data.labels), data.classes


def flip_and_shift(x, targets, g):
    """Images (n, C, S, S) and, where they are masks, targets (n, S, S): moved by up to S / 8, half flipped.

    What comes in at an edge is the image's reflection.
    """
    n, S = len(x), x.shape[-1]
    on = dict(generator=g, device=x.device)
    shift = torch.randint(-(S // 8), S // 8 + 1, (2, n, 1), **on)
    at = torch.arange(S, device=x.device) + shift           # 2 x (n, S), some outside
    rows, columns = (S - 1) - ((S - 1) - at.abs()).abs()    # reflected: -1 is 1, S is S - 2
    flip = torch.rand(n, 1, **on) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    image = torch.arange(n, device=x.device)
    i = image[:, None, None], rows[:, :, None], columns[:, None, :]
    if targets.ndim == 3:
        targets = targets[i]
    return x.movedim(1, 3)[i].movedim(3, 1), targets


# --- features ---

def pool(h, p, S):
    """Maps h (n, D, h, w) -> (n, D), their means over space; to segment (n m, D), their values at pixels.

    Pixels p (n, m) = row S + column are those of the map upsampled to S x S, bilinearly, as by F.interpolate.
    """
    if p is None:
        return h.mean((2, 3))
    places = torch.stack([p % S, p // S], -1)[:, :, None]   # (n, m, 1, 2): x, y
    grid = (places + 0.5) / S * 2 - 1                       # -1..1
    h = h.contiguous()                                      # MPS: pytorch/pytorch#174339
    # outside by half a pixel at most: see augment of diffusion.py
    h = F.grid_sample(h, grid, padding_mode="reflection", align_corners=False)  # (n, D, m, 1)
    return h[..., 0].transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def extract(source, part, levels, args, layers=None, view=0, pixels=None, training=False):
    """Features of a part: batch by batch, level by level; all layers of a level from one forward pass.

    Yields layer, t, h (n m, D) float32 and targets (n m,) int64 for n images; m = 1 to classify. To
    segment, m = pixels of each image, drawn at random, or all of them in order (None). View 0 is the image
    as it is; 1, 2, ... are flipped and shifted at random. training: what probes learn from has other
    noise than what they are scored on.
    """
    device, S, size = source.device, part.images.shape[-1], args.batch_size
    starts = range(0, len(part.images), size)
    for start in progress(starts, "features" if training else "scoring", unit="batch", leave=False):
        g = torch.Generator(device).manual_seed(mix(args.seed, 1, view, start, int(training)))
        x0 = to_x0(part.images[start:start + size].to(device), source.moments)
        if source.moments is not None:
            require(x0.isfinite().all(), "there are latents that are not finite: make them anew.")
        targets = part.targets[start:start + size].to(device).long()
        if view:
            x0, targets = flip_and_shift(x0, targets, g)
        x0 = x0.contiguous(memory_format=layout_of(device))
        noise = torch.randn(x0.shape, generator=g, device=device)
        p = None
        if targets.ndim == 3:                               # masks
            p = torch.arange(S * S, device=device).expand(len(x0), -1)
            if pixels:
                p = torch.randint(S * S, (len(x0), pixels), generator=g, device=device)
            targets = targets.flatten(1).gather(1, p).flatten()
        for t in levels:
            ts = torch.full((len(x0),), t, device=device)
            x_t = source.diffusion.add_noise(x0, ts, noise)
            with source.autocast():
                _, feats = source.net(x_t, ts, return_features=True)
            for name in layers or feats:
                yield name, t, pool(feats[name].float(), p, S), targets


def collect(source, part, levels, args, layers=None):
    """What probes learn from -> {(layer, t): features (N, D) float32}, targets (N,); on the device."""
    pixels = max(1, PIXELS // len(part.images))             # of each image, to segment
    views = range(1, args.augment + 1) if args.augment else [0]
    found, y = defaultdict(list), defaultdict(list)
    for view in views:
        for layer, t, h, targets in extract(source, part, levels, args, layers, view, pixels, training=True):
            found[layer, t].append(h)
            y[layer, t].append(targets)
    # pop: what has been joined is not kept twice
    features = {place: torch.cat(found.pop(place)) for place in list(found)}
    return features, torch.cat(y[layer, t])                 # those of the last place: all have the same


# --- the solver ---

# A probe minimises, on standardised features x, the mean over images of cross-entropy(W x + b, y),
# plus penalty / 2 |W|^2. Features are so correlated (condition numbers up to 8 million were seen) that
# AdamW stopped up to 15 points below the best linear layer, in some layers more than in others. So this
# is gradient descent on all images, accelerated; the inverse of a bound on the curvature takes the place
# of a learning rate. P places of one width learn at once, in batched products; they share images only.

def spread(h):
    """Features (N, D) -> standard deviation (D,), never 0, and mean (D,): what standardises them."""
    std, mean = torch.std_mean(h, 0)
    return std + 1e-6, mean


def standardise(features, spreads):
    """P features (N, D) -> (h - mean) / std as x (P, D + 1, N); its last row is 1, for the bias."""
    N, D = features[0].shape
    x = features[0].new_ones(len(features), D + 1, N)
    for place, h, (std, mean) in zip(x, features, spreads):
        place[:-1] = ((h - mean) / std).T
    return x


def curvature(x, weight, ridge):
    """H (P, D + 1, D + 1) = sum_n weight_n x_n x_n^T + ridge; x (P, D + 1, N), weight (P, N).

    DAMPING keeps rounding out of the inverse; it slows, but does not bias.
    """
    H = torch.stack([(place * w) @ place.T for place, w in zip(x, weight)])
    return H + torch.diag(ridge + DAMPING)


def minimise(W, x, truth, share, penalty):
    """Goes from the probes W (P, K, D + 1) of the last penalty to those of this one.

    x (P, D + 1, N); truth (K, N) are the right probabilities, share (N,) is an image's weight in the mean.
    """
    ridge = torch.full_like(x[0, :, 0], penalty)            # (D + 1,)
    ridge[-1] = 0                                           # none on the bias
    ahead = W
    bound = torch.zeros_like(x[:, 0])                       # (P, N)
    for k in progress(range(ITERATIONS), f"probes, {penalty:g}", unit="step", leave=False):
        # p = softmax(W x), (P, K, N): what the probes say
        p = (ahead @ x).softmax(1)
        # Hessian by W of an image's cross-entropy = (diag(p) - p p^T) (x) x x^T. No eigenvalue of the first
        # factor is negative, so none is above its trace, 1 - |p|^2. Boehning (1992) bounds it for all p, by
        # 1/2; here for those on the way so far, which is more at first, where p is flat.
        bound = torch.maximum(bound, 1 - p.square().sum(1))
        # rate = H^-1 of the bound; not in each step, which costs less
        if k % 10 == 0:
            rate = torch.linalg.inv(curvature(x, bound * share, ridge))
        # gradient = sum_n share_n (p_n - truth_n) x_n^T + ridge W
        gradient = ((p - truth) * share) @ x.mT + ridge * ahead
        # W = ahead - gradient H^-1
        last = W
        W = ahead - gradient @ rate
        # ahead = W + k / (k + 3) (W - last), Nesterov (1983)
        ahead = W + k / (k + 3) * (W - last)
    return W


def unstandardise(V, std, mean):
    """A probe V (K, D + 1) of standardised features -> W (K, D), b (K,) of features h as they came.

    V (h - mean) / std + b = W h + (b - W mean), with W = V / std.
    """
    W = V[:, :-1] / std
    return W, V[:, -1] - W @ mean


def fit(features, y, K, penalties):
    """Trains a linear layer for every place and penalty -> for every place {penalty: (W (K, D), b (K,))}.

    features: of P places, each (N, D); y: (N,) classes; one of K or more teaches nothing. Each penalty
    starts from the probes of the one before; let them fall. Raises UserError.
    """
    spreads = [spread(h) for h in features]
    require(all(mean.isfinite().all() for _, mean in spreads),
            "the features have values that are not finite: the network's weights are damaged, or its "
            "--precision is too low.")
    x = standardise(features, spreads)                      # (P, D + 1, N)
    truth = F.one_hot(y.clamp(max=K - 1), K).T.float()      # (K, N)
    share = (y < K) / (y < K).sum()                         # (N,), sums to 1
    W = x.new_zeros(len(x), K, x.shape[1])
    found = [{} for _ in features]
    for penalty in penalties:
        W = minimise(W, x, truth, share, penalty)
        for probes, V, (std, mean) in zip(found, W, spreads):
            probes[penalty] = unstandardise(V, std, mean)
    return found


def answer(probe, h):
    """Features h (N, D) as they come -> what a probe says of them: logits (N, K)."""
    W, b = probe
    return F.linear(h, W, b)


# --- the protocol ---

def learn(source, part, K, levels, penalties, args, layers=None):
    """-> {(layer, t): {penalty: probe}}; the probes of all layers of one width are trained at once."""
    features, y = collect(source, part, levels, args, layers)
    probes = {}
    for D in {h.shape[1] for h in features.values()}:
        places = [place for place, h in features.items() if h.shape[1] == D]
        probes |= zip(places, fit([features.pop(place) for place in places], y, K, penalties))
    return probes


def score(probes, K, source, part, levels, args, layers=None):
    """-> {(layer, t, penalty): dict(accuracy=, miou=)}, of images or, by masks, of all their pixels."""
    counts = defaultdict(int)               # (K, K): pixels or images by what they are, what was said
    for layer, t, h, targets in extract(source, part, levels, args, layers):
        known = targets < K                 # void pixels are of class 255
        for penalty, probe in probes[layer, t].items():
            said = answer(probe, h).argmax(1)
            pairs = (targets * K + said)[known]
            counts[layer, t, penalty] += torch.bincount(pairs, minlength=K * K).view(K, K)
    result = {}
    for place, count in counts.items():
        right, there = count.diag(), count.sum(1)
        ious = right / (there + count.sum(0) - right)
        ious = ious[there > 0]              # of the classes that occur
        accuracy = right.sum() / count.sum()
        result[place] = dict(accuracy=accuracy.item(), miou=ious.mean().item())
    return result


def held_out_scores(source, train, K, levels, args):
    """Step 1: learn everywhere from nine tenths of train, in random order, and score on the first tenth."""
    n = len(train.images) // 10
    held = Part(train.images[:n], train.targets[:n])
    rest = Part(train.images[n:], train.targets[n:])
    probes = learn(source, rest, K, levels, PENALTIES, args)
    return score(probes, K, source, held, levels, args)


def final_score(source, train, test, K, place, args):
    """Step 3: learn at the chosen place from all of train, and score once on test."""
    layer, t, penalty = place
    way = PENALTIES[:PENALTIES.index(penalty) + 1]          # each starts from the one before
    probe = learn(source, train, K, [t], way, args, [layer])[layer, t][penalty]
    return score({(layer, t): {penalty: probe}}, K, source, test, [t], args, [layer])[place]


def study(source, train, test, K, levels, args):
    """The protocol of this file's first lines -> dict for probe.json."""
    metric = "miou" if args.task == "segment" else "accuracy"
    scores = held_out_scores(source, train, K, levels, args)
    # step 2; of equals the first: least noise, earliest layer, largest penalty
    best = max(scores, key=lambda place: scores[place][metric])
    test_score = final_score(source, train, test, K, best, args)
    layers = list(dict.fromkeys(layer for layer, _, _ in scores))   # in depth order
    held_out = [[round(max(scores[layer, t, penalty][metric] for penalty in PENALTIES), 5) for t in levels]
                for layer in layers]
    layer, t, penalty = best
    return dict(metric=metric, layers=layers, levels=levels, held_out=held_out,
                best=dict(layer=layer, t=t, penalty=penalty, **scores[best]), test=test_score)


# --- other judges ---

def unit(h, std, mean):
    """Features (N, D), standardised, of length 1."""
    return F.normalize((h - mean) / std)


def knn(source, train, test, place, K, args):
    """Accuracy of the k nearest training images (or views) by cosine, weights exp(cosine / temperature)."""
    layer, t = place
    features, y = collect(source, train, [t], args, [layer])
    std, mean = spread(features[place])
    x = unit(features[place], std, mean)
    right = 0
    for _, _, h, targets in extract(source, test, [t], args, [layer]):
        cosine, i = (unit(h, std, mean) @ x.T).topk(min(NEIGHBOURS, len(x)))
        weight = (cosine / TEMPERATURE).exp()
        votes = torch.zeros(len(i), K, device=i.device).scatter_add_(1, y[i], weight)
        right += (votes.argmax(1) == targets).sum().item()
    return right / len(test.images)


def raw_pixels(x, t, return_features, dense):
    """Takes the place of a network whose one layer is x; to classify: at most 32 x 32 of it in a row."""
    if dense:
        return x, {"pixels": x}
    side = min(32, x.shape[-1])
    row = F.adaptive_avg_pool2d(x, side).flatten(1)
    return x, {"pixels": row[:, :, None, None]}


def references(state, source, train, test, K, args):
    """The same study of the network with the random weights of its seed, and of the pixels themselves."""
    torch.manual_seed(mix(state["config"].seed))
    net, _ = build(state["config"], state["shape"], state["num_classes"], source.device)
    untrained = source._replace(net=net.eval())
    pixels = source._replace(net=partial(raw_pixels, dense=args.task == "segment"))
    return dict(untrained=study(untrained, train, test, K, args.t, args),
                pixels=study(pixels, train, test, K, args.t[:1], args))


# --- what one sees ---

FONT = ImageFont.load_default(24)
LINES = ["#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf"]
NAMES, COLUMN, ROW = 194, 92, 40        # of a map, in pixels: where its columns begin, how wide, how high


def stem(args):
    """What the names of the result files begin with; other for other data and tasks."""
    name = "probe"
    if args.task == "segment":
        name += "-segment"
    if args.data:
        name += "-" + re.sub(r"\W+", "-", args.data.removeprefix("folder:")).strip("-")
    return name


def summary(result):
    """One line: which run, where, how good."""
    best, metric, test = result["best"], result["metric"], result["test"]
    score, n = test[metric], result["test_images"]
    line = (f"{result['run']}: {best['layer']}, t = {best['t']}; held-out {100 * best[metric]:.1f}, "
            f"test {100 * score:.1f}")
    if metric == "miou":
        return line + f" % (pixel accuracy {100 * test['accuracy']:.1f} %) of {n:,} images"
    error = (score * (1 - score) / n) ** 0.5                # of the mean of n answers, right or wrong
    return line + f" +- {100 * error:.1f} % (standard error) of {n:,} images"


def table(result):
    """-> lines for the terminal: layers down, noise across; z marks the bottleneck, * the best place.

    sigma is the noise in units of the image: t is another amount of noise on another path.
    """
    best = result["best"]["layer"], result["best"]["t"]
    lines = [f"{'t':>10}   " + "".join(f"{t:6d} " for t in result["levels"]),
             f"{'sigma':>10}   " + "".join(f"{sigma:6.3f} " for sigma in result["sigmas"])]
    for name, values in zip(result["layers"], result["held_out"]):
        z = "z" if name == result["bottleneck"] else " "
        line = f"{name:>10} {z} "
        for t, value in zip(result["levels"], values):
            star = "*" if (name, t) == best else " "
            line += f"{100 * value:6.1f}{star}"
        lines.append(line)
    return "\n".join(lines)


def canvas(width, height, heading):
    """White picture below lines (text, colour), as wide as they need -> picture, its pen."""
    width = max(width, *(round(FONT.getlength(text)) + 40 for text, _ in heading))
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.font = FONT
    for i, (text, colour) in enumerate(heading):
        pen.text((20, 30 + 36 * i), text, colour, anchor="lm")
    return picture, pen


def draw_maps(results, file):
    """Layer x noise maps side by side as a PNG; dark is high, by one scale for all."""
    first, several = results[0], len(results) > 1
    what = f"{METRICS[first['metric']]} of linear probes on held-out images of {first['data']} (%)"
    heading = [(what, "black"), *((summary(result), "black") for result in results)]
    values = [np.array(result["held_out"]) for result in results]
    low, high = min(map(np.min, values)), max(map(np.max, values))
    width = NAMES + COLUMN * len(first["levels"]) + 16
    top = 60 + 36 * (len(heading) - 1 + several)            # several: a line of names above the maps
    picture, pen = canvas(width * len(results), top + 94 + ROW * max(map(len, values)), heading)
    for n, (result, scores) in enumerate(zip(results, values)):
        if several:
            pen.text((n * width + NAMES, top - 8), f"{result['run']}", "black", anchor="lm")
        draw_map(pen, n * width, top, result, (scores - low) / max(high - low, 1e-9))
    picture.save(file, "PNG")


def draw_map(pen, left, top, result, shade):
    """One of them, its corner at (left, top); shade (layers, levels) is 0 to 1; the best place is framed."""
    columns = [left + NAMES + COLUMN * (j + 0.5) for j in range(len(result["levels"]))]     # their middles
    rows = [top + 74 + ROW * (i + 0.5) for i in range(len(result["layers"]))]
    end = left + NAMES - 14                                 # of the names
    for x, t in zip(columns, result["levels"]):
        pen.text((x, top + 22), f"t = {t}", "black", anchor="mm")
    pen.text((end, top + 50), "noise / signal", "black", anchor="rm")
    for x, sigma in zip(columns, result["sigmas"]):
        pen.text((x, top + 50), f"{sigma:.3f}", "black", anchor="mm")
    for i, (y, name) in enumerate(zip(rows, result["layers"])):
        z = " (z)" if name == result["bottleneck"] else ""
        pen.text((end, y), name + z, "black", anchor="rm")
        for j, (x, t) in enumerate(zip(columns, result["levels"])):
            best = name == result["best"]["layer"] and t == result["best"]["t"]
            colour = 255, int(250 - 110 * shade[i, j]), int(240 - 200 * shade[i, j])
            frame = x - COLUMN / 2 + 2, y - ROW / 2 + 2, x + COLUMN / 2 - 2, y + ROW / 2 - 2
            pen.rectangle(frame, colour, "red" if best else None, 4)
            pen.text((x, y), f"{100 * result['held_out'][i][j]:.1f}", "black", anchor="mm")


def axis(low, high):
    """-> whole numbers around two scores (%), none beyond 0 and 100, with five whole steps between them."""
    step = max(math.ceil((math.ceil(high) - math.floor(low)) / 5), 1)
    start = min(math.floor(low), 100 - 5 * step)
    return start, start + 5 * step


def height(values, ends, bottom):
    """-> y of scores in a picture whose axis, of these ends, is 460 high."""
    return np.interp(values, ends, (bottom, bottom - 460))


def draw_grid(pen, ends, right, bottom):
    """Lines behind curves, from x = 100 on, and their values; ends: those of an axis."""
    for value in np.linspace(*ends, 6):
        y = height(value, ends, bottom)
        pen.line((100, y, right, y), "#dddddd", 2)
        pen.text((90, y), f"{value:.0f}", "black", anchor="rm")


def draw_curves(results, file):
    """Layer curves of probed runs as a PNG: each layer's best held-out score over t; z is a large dot."""
    what = f"{METRICS[results[0]['metric']]} of linear probes, held out (%), best t; large dot: z"
    heading = [(summary(result), colour) for result, colour in zip(results, cycle(LINES))]
    curves = [[100 * max(row) for row in result["held_out"]] for result in results]
    ends = axis(min(map(min, curves)), max(map(max, curves)))
    right, bottom = 130 + max(900, 110 * max(map(len, curves))), 560 + 36 * len(results)
    picture, pen = canvas(right + 80, bottom + 30 + 30 * len(results), [(what, "black"), *heading])
    draw_grid(pen, ends, right, bottom)
    for n, (result, curve, (_, colour)) in enumerate(zip(results, curves, heading)):
        points = list(zip(np.linspace(130, right, len(curve)), height(curve, ends, bottom)))
        pen.line(points, colour, 4)
        for point, name in zip(points, result["layers"]):
            r = 14 if name == result["bottleneck"] else 6
            pen.ellipse((point[0] - r, point[1] - r, point[0] + r, point[1] + r), colour)
            pen.text((point[0], bottom + 30 * (n + 1)), name, colour, anchor="mm")
    picture.save(file, "PNG")


# --- the two programs ---

def read_result(path, run):
    """What probe.py wrote for a run. Raises UserError where it is missing, damaged or something else."""
    require(path.exists(),
            f"{path} does not exist: make it with python probe.py {run}, and the same --task and --data.")
    try:
        result = json.loads(path.read_text())
        for draw in (draw_curves, draw_maps):               # what a picture needs and lacks fails here
            draw([result], io.BytesIO())
        scores = [result["test"][result["metric"]], *chain(*result["held_out"])]
        lost = [name for name in ALIKE if name not in result]
        require(not lost, f"written by other code: without {', '.join(lost)}")
        right = all(0 <= value <= 1 for value in scores) and result["test_images"] > 0
        require(right, "a score that cannot be")
    except Exception as e:
        why = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        raise UserError(f"{path} is no result of probe.py ({why}): probe the run again.")
    return result


def compare(args):
    """--compare: reads results of probed runs, draws their curves and maps into the folder of the first."""
    results = [read_result(Path(run, stem(args) + ".json"), run) for run in args.compare]
    for what in ALIKE:
        known = sorted({str(result[what]) for result in results})
        require(len(known) == 1,
                f"these runs were probed with different {what}, {', '.join(known)}: probe them alike, "
                "and compare with the same --data.")
    curves, maps = (Path(args.compare[0], f"{stem(args)}-compare{what}.png") for what in ("", "-maps"))
    save_file(curves, lambda file: draw_curves(results, file))
    save_file(maps, lambda file: draw_maps(results, file))
    for result in results:
        say(summary(result))
    say(f"curves: {curves}; maps: {maps}")


def load_parts(spec, state, args, device):
    """-> training images in random order, as many as are used; test images; class names."""
    test, _ = load(spec, "test", args.task, state, device)      # the small part first: its errors cost less
    train, classes = load(spec, "train", args.task, state, device)
    K, N = len(classes), len(train.images)
    usual = SOME_SHAPES if spec.startswith("shapes") else N
    most = min(args.images or usual, N)
    least = 10                              # so that a tenth is an image
    if args.task == "classify":
        least = max(least, K)
    require(most >= least,
            f"{most} training images of {K} classes are too few: use {least} or more.")
    g = torch.Generator().manual_seed(mix(args.seed, 0))
    some = torch.randperm(N, generator=g)[:most]
    return Part(train.images[some], train.targets[some]), test, classes


def digest(images):
    """A number for at most 1,000 of these images, by which other ones are told from them."""
    some = images[::math.ceil(len(images) / 1000)]
    return hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16]


def write_result(result, path, start, stale=None):
    """Writes a result as JSON, with the seconds since start and the GPU's memory that were needed."""
    result["seconds"] = round(time.time() - start, 1)
    if result["device"].startswith("cuda"):
        result["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    save_file(path, lambda file: file.write(json.dumps(result, indent=1).encode()), stale)


def probe_run(args):
    """Loads a run and its data, follows the protocol, says and writes what came out. Raises UserError."""
    device, _, world = setup(args.device)
    require(world == 1, "probe.py runs in one process: start it with python, without torchrun.")
    state, net, diffusion = load_source(args, device)
    check_writable(Path(args.run))
    cfg, T = state["config"], diffusion.T
    cfg.skip_bad = cfg.skip_bad or args.skip_bad
    for t in args.t:
        require(0 <= t < T, f"--t {t} is out of range: use 0 to {T - 1}.")
    require(not state["latents"] or args.task == "classify",
            "--task segment needs masks, and this run was trained on latents: leave it out.")
    require(not state["latents"] or not args.augment,
            "--augment flips and shifts images, and this run was trained on latents: leave it out.")
    begun = time.time()
    spec = args.data or cfg.data
    train, test, classes = load_parts(spec, state, args, device)
    K = len(classes)
    loaded = time.time()
    path = Path(args.run, stem(args) + ".json")
    torch.backends.cudnn.benchmark = True
    autocast, _ = pick_autocast(args.precision or cfg.precision, device)
    source = Source(net, diffusion, autocast, device, moments_of(state["latents"], device))
    data = re.sub(r":.*[/\\]", ":", resolve(spec))          # results that are published name no machine
    result = dict(run=Path(args.run).resolve().name, data=data, task=args.task, classes=K,
                  bottleneck=net.bottleneck if net.self_cond else None, train_images=len(train.images),
                  test_images=len(test.images), test_set=digest(test.images), trained_on=state["images"],
                  seed=args.seed, batch_size=args.batch_size, augment=args.augment, device=str(device),
                  versions=VERSIONS)
    result["sigmas"] = [round(sigma, 5) for sigma in diffusion.path.sigma(torch.tensor(args.t)).tolist()]
    result.update(study(source, train, test, K, args.t, args))
    picture = path.with_suffix(".png")
    replaced = ", in place of others" if path.exists() else ""
    write_result(result, path, loaded, stale=picture)
    try_to("draw the map", lambda: save_file(picture, lambda file: draw_maps([result], file)))
    say(table(result))
    say(summary(result))
    if args.knn:
        place = result["best"]["layer"], result["best"]["t"]
        result["knn"] = knn(source, train, test, place, K, args)
        write_result(result, path, loaded)
        say(f"{NEIGHBOURS} nearest neighbours there: test {100 * result['knn']:.1f} %")
    if args.references:
        result["references"] = references(state, source, train, test, K, args)
        write_result(result, path, loaded)
        for name, reference in result["references"].items():
            beaten = result["test"][result["metric"]] > reference["test"][result["metric"]]
            verdict = "" if beaten else "; NOT BEATEN by this run"
            say(summary(dict(reference, run=name, test_images=len(test.images))) + verdict)
    say(f"{loaded - begun:.0f} s to load {len(train.images):,} + {len(test.images):,} images, "
        f"{result['seconds']:.0f} s to probe; results: {path} and .png{replaced}")


@command
def main(argv=None):
    args = parse(argv)
    if args.compare:
        compare(args)
    else:
        probe_run(args)


if __name__ == "__main__":
    main()
