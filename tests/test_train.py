"""train.py: flags, data, batches, the loop, runs that go on, two processes, bad input. Runs are tiny."""
import copy
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import diffusion
import train
from conftest import (COLOURS, CPU, MOVES, argv, assert_same_run, config, end, error, folder, fork_two, load,
                      log, losses, moments, picture, refused, run, run_two, same, train_in_fork, tree)

pytestmark = pytest.mark.usefixtures("quick")
each_model = pytest.mark.parametrize("model", train.MODELS)
pins = pytest.mark.pins


def ready(flags=""):
    """A Run of the tiny shapes, at its start."""
    cfg = config(flags)
    return train.Run(cfg, train.load_data("shapes", "train", cfg.image_size), CPU)


def steps(run, n=1):
    """n steps of the loop, without what it writes -> the Run."""
    for _ in range(n):
        train.advance(run)
    return run


def means(run):
    """Mean denoising and distillation loss since the last record."""
    return (run.meter.sums() / run.meter.steps).tolist()


def state_of(run):
    """What runs that should be equal are compared by: weights, averages, gradients, losses."""
    return dict(model=run.net.state_dict(), ema=run.ema.state_dict(), means=means(run),
                moments=moments(dict(optimizer=run.optimizer.state_dict())))


# --- config ---

def test_help(capsys, monkeypatch):
    """--help says of every flag what it is for."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(train.Config):
        assert f.metadata["help"] and f.metadata["help"] % () in text, f.name
        if f.type is int and f.default is not None:
            assert f.metadata["help"].endswith(f"[{f.default:,}]"), f.name


def test_flags():
    """Every field of Config has a flag that sets it, and no other field."""
    base = "--model uvit --size small --distill 2".split()
    for f in fields(train.Config):
        flag, default = "--" + f.name.replace("_", "-"), f.default
        value = {str: "shapes", int: 7, float: 0.25, bool: not default}[f.type]
        if f.metadata["choices"] or f.name == "size":
            value = {"model": "dit", "size": "tiny"}.get(f.name) or f.metadata["choices"][-1]
        given = [flag, str(value)]
        if f.type is bool:
            given = [flag if value else flag.replace("--", "--no-")]
        cfg, plain = (asdict(train.parse_config([*base, *x])) for x in (given, []))
        changed = {name for name in cfg if cfg[name] != plain[name]}
        assert cfg[f.name] == value and type(cfg[f.name]) is f.type
        follow = {"out", "images", "image_size"} - {f.name}                  # where these follow from others
        follow |= RECIPE.keys() | {"decay"} if f.name == "size" else set()
        follow |= {"target"} if f.name == "schedule" else set()
        assert changed - follow == {f.name}, f.name


RECIPE = {**train.TINY, "conditional": True, "target": "v", "schedule": "cosine", "image_size": 16}


@pytest.mark.parametrize("flags, expected", [
    pytest.param("", dict(model="dit", size="small", data="cifar10", out="runs/dit-small-cifar10",
                          images=10_000_000, batch_size=256, lr=2e-4, self_cond=True, conditional=False,
                          target="eps", schedule="linear", decay=None, minutes=None, resume=False,
                          compile=True, seed=0, image_size=32, save_every=500_000, sample_every=500_000,
                          ema=500_000, warmup=50_000), marks=pins),
    ("--model unet", dict(size="base", out="runs/unet-base-cifar10")),
    ("--model uvit --no-self-cond", dict(size="small", out="runs/uvit-small-cifar10-baseline")),
    ("--minutes 5", dict(minutes=5.0, images=None)),
    *[(f"--model {m} --size tiny --data shapes", {**RECIPE, "decay": train.TINY_IMAGES[m],
       "images": train.TINY_IMAGES[m], "out": f"runs/{m}-tiny-shapes"}) for m in train.MODELS],
    ("--size tiny --data shapes --lr 0.5 --no-conditional --target eps --batch-size 8 --decay 5 --images 77",
     {**RECIPE, "lr": 0.5, "conditional": False, "target": "eps", "batch_size": 8, "decay": 5, "images": 77}),
    ("--size tiny --data shapes:full", {**RECIPE, "out": "runs/dit-tiny-shapes-full"}),
    ("--size tiny --data cifar10 --decay 5", {**RECIPE, "decay": 5, "images": train.TINY_IMAGES["dit"]}),
    ("--size tiny --data folder:/some/where/photos", {**RECIPE, "conditional": False}),
    ("--size small --data shapes", dict(lr=2e-4, target="eps", out="runs/dit-small-shapes", decay=None)),
    *[(f"--schedule {name} {more}", dict(schedule=name, target=target)) for name, more, target in (
        ("cosine", "", "eps"), ("linear", "--target v", "v"), ("edm", "", "v"), ("flow", "", "v"),
        ("flow", "--target v", "v"))],
    ("--size tiny --data shapes --schedule flow", {**RECIPE, "schedule": "flow"}),
    ("--data folder:/some/where/photos", dict(out="runs/dit-small-photos", image_size=32)),
    ("--data folder:/some/where/photos --vae name", dict(out="runs/dit-small-photos", image_size=256)),
    ("--data latents:/some/where/photos", dict(out="runs/dit-small-photos", image_size=None)),
])
def test_defaults(flags, expected):
    """Defaults are filled in; tiny has a recipe of its own; flags given by hand win."""
    cfg = asdict(train.parse_config(flags.split()))
    assert {name: cfg[name] for name in expected} == expected


@pytest.mark.parametrize("flags, scale", [
    ("--data shapes", 0.5), ("--data folder:/some/where/latents:", 0.5),
    ("--data latents:/some/where/photos", 1), ("--data folder:/some/where/photos --vae name", 1)])
def test_sigma_data(flags, scale):
    """edm takes the standard deviation of images for 0.5, that of latents for 1, when it is loaded, too."""
    cfg = train.parse_config(f"{flags} --size tiny --schedule edm".split())
    _, loaded = train.build(cfg, (3, 16, 16), 10, CPU)
    assert train.make_diffusion(cfg).path.scale == loaded.path.scale == scale
    assert loaded.path.sigma(torch.tensor([500.0])).item() == pytest.approx(scale)


# --- data ---

@pytest.mark.parametrize("spec", ["shapes", "shapes:full"])
@pytest.mark.parametrize("size", [None, 32])
def test_shapes(spec, size):
    """Drawn shapes: uint8, ten classes, 16 px unless asked, the same again, other ones in the test split."""
    data, again, test = (train.load_data(spec, split, size) for split in ("train", "train", "test"))
    side = size or 16
    assert data.images.shape == (400, 3, side, side) and data.masks.shape == (400, side, side)
    assert data.images.dtype == data.masks.dtype == torch.uint8 and data.labels.dtype == torch.int64
    assert data.classes == list(train.SHAPES) and data.labels.bincount().tolist() == [40] * 10
    assert all(map(torch.equal, data[:3], again[:3]))
    assert torch.equal(data.labels, test.labels)
    assert (data.images != test.images).flatten(1).any(1).all()
    other = train.load_data("shapes" if ":" in spec else "shapes:full", "train", size)
    assert (data.images != other.images).flatten(1).any(1).all()


@pins
@pytest.mark.parametrize("spec, areas, bright, bright_test", [
    ("shapes", [.2647, .2647, .2656, .1549, .1792, .2154, .1851, .2608, .1537, .1443], 56.53, 57.37),
    ("shapes:full", [.1751, .1968, .1765, .1104, .1166, .1458, .1330, .1788, .1013, .0972], 126.06, 122.82)])
def test_shapes_stay(spec, areas, bright, bright_test):
    """The shapes are those that numbers were published of: how much each one fills, how bright all are."""
    data, test = (train.load_data(spec, split) for split in ("train", "test"))
    found = [(data.masks[data.labels == k] > 0).float().mean().item() for k in range(10)]
    assert found == pytest.approx(areas, abs=2e-4)
    assert data.images.float().mean().item() == pytest.approx(bright, abs=0.02)
    assert test.images.float().mean().item() == pytest.approx(bright_test, abs=0.02)


@pytest.mark.pins
def test_how_many_shapes(monkeypatch):
    """50,000 to learn from, 5,000 others to test with."""
    asked = []

    def few(n, seed, size, full):
        asked.append((n, seed))
        return [None] * 4
    monkeypatch.setattr(train, "draw_shapes", few)
    for split in ("train", "test"):
        train.load_data("shapes", split)
    assert asked == [(50_000, 0), (5_000, 1)]


@pytest.mark.parametrize("size", [16, 32])
def test_masks(size):
    """A mask is its image's class + 1 where the image is bright, 0 where it is dark."""
    data = train.load_data("shapes", "train", size)
    inside = data.masks > 0
    assert torch.equal(data.masks.long(), inside * (data.labels + 1)[:, None, None])
    bright = data.images.amax(1) > 0.53 * 255        # half between the ground's 0.11 and the colours' 0.95
    assert (bright != inside).float().mean() < 0.01
    part = inside.float().mean((1, 2))
    assert 0.04 < part.min() and part.max() < 0.55
    edge = inside[:, 0].any(1) | inside[:, -1].any(1) | inside[:, :, 0].any(1) | inside[:, :, -1].any(1)
    assert edge.float().mean() < 0.05                # the shapes lie within their pictures


def test_shapes_differ():
    """No two of the ten classes look alike: the nearest of 400 masks tells every one of them apart."""
    (_, k, a), (_, truth, b) = (train.load_data("shapes", split, 16)[:3] for split in ("train", "test"))
    nearest = torch.cdist((b > 0).float().flatten(1), (a > 0).float().flatten(1)).argmin(1)
    right = (k[nearest] == truth).float()
    assert min(right[truth == c].mean().item() for c in range(10)) > 0.7          # by chance: 0.1


@pytest.mark.parametrize("other", ["test", "val"])
def test_folder(tmp_path, other):
    """train/<class>/* and test or val: classes in order of their names, numbered as in train in both."""
    for split, name, colour in (("train", "b", "blue"), ("train", "a", "red"), ("train", "c", "green"),
                                ("train", "a", "grey"), (other, "c", "green"), (other, "b", "blue")):
        picture(tmp_path / "photos" / split / name / f"{colour}.png", colour)
    (tmp_path / "photos/train/a/notes.txt").write_text("no image")
    data, test = (train.load_data(f"folder:{tmp_path}/photos", split, 8) for split in ("train", "test"))
    for found, colours, labels in ((data, ["grey", "red", "blue", "green"], [0, 0, 1, 2]),
                                   (test, ["blue", "green"], [1, 2])):
        assert found.classes == ["a", "b", "c"] and found.labels.tolist() == labels and found.masks is None
        assert found.images.shape == (len(labels), 3, 8, 8) and found.images.dtype == torch.uint8
        assert found.images[:, :, 0, 0].tolist() == [list(COLOURS[c]) for c in colours]


def test_flat_folder(tmp_path):
    """A folder of images alone is one class, in order of the names; 32 px unless asked; no test split."""
    for name, colour in (("2.PNG", "red"), ("1.jpeg", "grey"), ("3.webp", "grey")):
        picture(tmp_path / "photos" / name, colour)
    data = train.load_data(f"folder:{tmp_path}/photos", "train")
    assert data.classes == ["image"] and data.labels.tolist() == [0, 0, 0]
    assert data.images.shape == (3, 3, 32, 32)
    assert error(data.images[:, :, 9, 9], [COLOURS[c] for c in ("grey", "red", "grey")]) <= 2
    with pytest.raises(train.UserError, match="test"):
        train.load_data(f"folder:{tmp_path}/photos", "test")


@pytest.mark.parametrize("mode, suffix", [("RGB", "jpg"), ("L", "png"), ("LA", "png"), ("P", "png"),
                                          ("RGBA", "png"), ("CMYK", "tif"), ("CMYK", "jpg")])
@pytest.mark.parametrize("size", [(96, 32), (32, 96), (24, 8), (12, 4)])
def test_any_image(tmp_path, mode, suffix, size):
    """Any mode, any proportions: the short side becomes the image size, the middle of the long one stays."""
    colours = ("red", "grey" if mode in ("L", "LA") else "green", "blue")
    picture(tmp_path / f"image.{suffix}", *colours, size=size, mode=mode)
    assert Image.open(tmp_path / f"image.{suffix}").mode == mode
    image = train.load_data(f"folder:{tmp_path}", "train", 8).images[0].int()
    assert image.shape == (3, 8, 8)
    middle = image[:, :, 2:6] if size[0] > size[1] else image[:, 2:6]
    expected = torch.tensor(COLOURS[colours[1]])[:, None, None]
    assert error(middle, expected.expand_as(middle)) <= (40 if suffix == "jpg" else 6)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the image files that were decoded."""
    names, real = [], train.open_image
    monkeypatch.setattr(train, "open_image", lambda path: names.append(path.name) or real(path))
    return names


def test_cache(tmp_path, decoded):
    """Decoded images are kept beside the folder, by size and split, until a file changes, comes or goes."""
    root = tmp_path / "data/photos"

    def write(name, colour, time=1):
        picture(root / name, colour)                 # of equal size in bytes
        os.utime(root / name, ns=(time, time))

    def look(expected, split="train", size=8):
        decoded.clear()
        data = train.load_data(f"folder:{root}", split, size)
        assert sorted(decoded) == [f"{name}.bmp" for name in expected]
        return data

    for name, colour in (("train/a/1.bmp", "red"), ("train/b/2.bmp", "blue"), ("test/a/3.bmp", "grey")):
        write(name, colour)
    before, first = tree(root), look("12")
    for expected, split, size in (("12", "train", 16), ("3", "test", 8), ("", "train", 16), ("", "test", 8)):
        look(expected, split, size)
    second = look("")
    assert all(map(torch.equal, first[:2], second[:2])) and first[2:] == second[2:]
    assert tree(root) == before and len(list(root.parent.iterdir())) == 4        # photos and three caches

    write("train/a/1.bmp", "green", time=2)
    assert look("12").images[0, :, 0, 0].tolist() == list(COLOURS["green"])
    write("train/a/0.bmp", "grey")
    assert look("012").labels.tolist() == [0, 0, 1]
    (root / "train/a/1.bmp").unlink()
    assert look("02").labels.tolist() == [0, 1]
    (root / "train/a/0.bmp").rename(root / "train/a/3.bmp")                    # only a name is another
    assert look("23").images[:, 2, 0, 0].tolist() == [90, 255]
    next(root.parent.glob("*train-8px.npz")).write_bytes(b"PK not an archive")
    assert look("23").images[:, 2, 0, 0].tolist() == [90, 255]
    look("")


def test_skip_bad(tmp_path, capsys):
    """--skip-bad leaves out what can't be read and says how many; the rest never becomes the cache."""
    for name, colour in (("a/1.png", "blue"), ("a/2.png", "red"), ("b/3.png", "grey"), ("b/4.png", "green")):
        picture(tmp_path / "photos/train" / name, colour)
    torn = tmp_path / "photos/train/a/2.png"
    torn.write_bytes(torn.read_bytes()[:40])
    (tmp_path / "photos/train/b/3.png").write_bytes(b"")
    spec = f"folder:{tmp_path}/photos"
    data = train.load_data(spec, "train", 8, skip_bad=True)
    assert "left out 2" in capsys.readouterr().out and data.labels.tolist() == [0, 1]
    assert data.images[:, :, 0, 0].tolist() == [list(COLOURS["blue"]), list(COLOURS["green"])]
    with pytest.raises(train.UserError, match="[23].png"):
        train.load_data(spec, "train", 8)


@pytest.mark.parametrize("spec", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, spec):
    """CIFAR as torchvision reads it, here from files of a few random images: both splits, any size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5: True)
    kind, K, rng = getattr(torchvision.datasets, spec.upper()), int(spec[5:]), np.random.default_rng(0)
    folder, names = Path("data") / kind.base_folder, [f"class {k}" for k in range(K)]
    folder.mkdir(parents=True)
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    for split, files in (("train", kind.train_list), ("test", kind.test_list)):
        pixels = rng.integers(0, 256, (len(files), 16, 3072), np.uint8)
        labels = rng.integers(0, K, (len(files), 16))
        key = "labels" if K == 10 else "fine_labels"
        for (name, _), x, y in zip(files, pixels, labels):
            (folder / name).write_bytes(pickle.dumps({"data": x, key: y.tolist()}))
        images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
        data, small = train.load_data(spec, split), train.load_data(spec, split, 16).images
        assert torch.equal(data.images, images) and data.images.is_contiguous() and data.masks is None
        assert data.labels.tolist() == labels.flatten().tolist() and data.classes == names
        halved = images.float().unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
        assert small.dtype == torch.uint8 and small.shape[2:] == (16, 16)
        assert (small.float() - halved).abs().mean() < 16                    # picked, not averaged: 32


# --- batches ---

@pytest.fixture(scope="module")
def noise_data():
    """40 images of noise, no two alike, none its own mirror image."""
    images = torch.randint(256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 0, 255
    return train.Data(images, torch.arange(40) % 10, None, list(train.SHAPES))


def batches(data, flags="", T=1000):
    cfg = config(flags)
    return train.Batches(data, cfg, train.GaussianDiffusion(T, cfg.schedule, cfg.target), CPU)


# schedule -> the t at which sigma is 0.341, and t of 0..1000 as a number that is evenly drawn from 0..1
TIMES = {
    "linear": (100, lambda t: t / 1000),
    "cosine": (math.ceil(1008 * math.atan(0.341) / (math.pi / 2) - 9), lambda t: t / 1000),
    "edm": (1000 * math.atan(0.341 / 0.5) / (math.pi / 2),
            lambda t: torch.special.ndtr(((0.5 * (t * math.pi / 2000).tan()).log() + 1.2) / 1.2)),
    "flow": (1000 * 0.341 / 1.341, lambda t: torch.special.ndtr((t / 1000).logit())),
}
each_path = pytest.mark.parametrize("schedule", TIMES)


@each_path
def test_batch_is_a_function_of_seed_and_step(noise_data, schedule):
    """A batch, fetched ahead or not, is a function of (seed, step); all of it changes with both.

    The teacher's times are drawn from those with less noise than TEACHER_SIGMA.
    """
    path = f"--schedule {schedule}"
    make = batches(noise_data, path)
    first = {step: make(step) for step in range(6)}
    views = [make.noisy_view(first[0][0], step) for step in (0, 1, 0)]
    assert all(map(torch.equal, views[0], views[2])) and not any(map(torch.equal, views[0], views[1]))
    t = torch.cat([make.noisy_view(first[0][0], step)[1] for step in range(40)]) / TIMES[schedule][0]
    assert 0 <= t.min() < 0.02 and 0.98 < t.max() <= 1 and abs(t.mean() - 0.5) < 0.03
    for flags in (path, f"{path} --no-resident", f"{path} --no-conditional"):
        again = batches(noise_data, flags)
        for step in (4, 0, 5, 5, 2, 1, 3):
            found = again(step)
            assert all(map(torch.equal, found[:3], first[step])), step
            assert found[3] is None if "cond" in flags else torch.equal(found[3], first[step][3])
    assert not any(map(torch.equal, first[0], first[1]))
    for seed in (1, 2, 1000, 2**32, 2**70):
        assert not any(map(torch.equal, batches(noise_data, f"{path} --seed {seed}")(3), first[3])), seed


def test_where_the_data_lives(noise_data, monkeypatch):
    """On a GPU the data goes to the device where it fills less than half of what is free; a flag decides."""
    size, sent = noise_data.images.nbytes, []
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device: sent.append(device) or x)
    for free, resident, expected in ((2 * size, None, False), (2 * size + 2, None, True), (0, True, True),
                                     (9 * size, False, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 9 * size))
        cfg, cuda = config(), torch.device("cuda")
        cfg.resident = resident
        found = train.Batches(noise_data, cfg, train.make_diffusion(cfg), cuda)
        assert found.resident == bool(sent) == expected and set(sent) <= {cuda}
        sent.clear()


@each_path
def test_batch_contents(noise_data, schedule):
    """x0 are images in [-1, 1], half of them flipped, a tenth of the labels dropped; t and noise are fair."""
    make, n = batches(noise_data, f"--batch-size 20 --schedule {schedule}"), 200
    x0, t, noise, y = (torch.cat(parts) for parts in zip(*(make(step) for step in range(n))))
    images = noise_data.images / 127.5 - 1
    both = torch.cat([images, images.flip(3)]).flatten(1)
    nearest = torch.cdist(x0.flatten(1), both).argmin(1)
    assert error(x0.flatten(1), both[nearest]) < 1e-6
    assert x0.min() == -1 and x0.max() == 1
    flipped, picked, drop = nearest >= 40, nearest % 40, y == 10
    assert abs(flipped.float().mean() - 0.5) < 0.03
    assert picked.bincount(minlength=40).min() > 70                          # each about 100 times
    assert all(len(set(i.tolist())) == 20 for i in picked.split(20))         # none twice in a batch
    assert torch.equal(y[~drop], noise_data.labels[picked][~drop])
    assert abs(drop.float().mean() - 0.1) < 0.02
    table, share = schedule in ("linear", "cosine"), TIMES[schedule][1](t)
    assert t.dtype == (torch.int64 if table else torch.float32)
    counts = (10 * share).long().bincount(minlength=10)
    assert len(counts) == 10 and counts.min() > 320                          # each about 400 times
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert len(noise[:, 0, 0, :4].unique(dim=0)) == len(noise)               # none twice
    by_column = torch.stack([v.float().view(n, 20).mean(0) for v in (flipped, drop)])
    assert (by_column - torch.tensor([[0.5], [0.1]])).abs().max() < 0.15     # not the same images every time
    pairs = torch.stack([flipped.float(), drop.float(), share, noise[:, 0, 0, 0]])
    assert (pairs.corrcoef() - torch.eye(4)).abs().max() < 0.08              # and independent of each other


# --- the loop ---

def test_scaled_gradients():
    """In fp16 the loss is scaled, and the gradients that are clipped are those of fp32 again."""
    runs = [steps(ready(f"--precision {name}")) for name in ("fp16", "fp32")]
    assert runs[0].scaler.get_scale() > 1000 and not runs[1].scaler.is_enabled()
    found, expected = (torch.cat([w.grad.flatten() for w in run.weights]) for run in runs)
    assert 0.1 < expected.norm() < 1.01 * train.CLIP
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_dropout_of_processes(monkeypatch):
    """Each process, step and seed has dropout of its own; that of a step comes again with the step."""
    run, seeds = ready(""), []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for run.rank, run.images, run.cfg.seed in ((0, 0, 0), (1, 0, 0), (0, 16, 0), (0, 0, 1), (0, 0, 0)):
        train.train_step(run)
    assert seeds[0] == seeds[4] and len({*seeds}) == 4


@pins
def test_optimizer():
    """AdamW with betas 0.9 and 0.99 and no weight decay; gradients are clipped at norm 1."""
    optimizer = ready("").optimizer
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.AdamW and train.CLIP == 1
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 0)


@each_model
def test_seed_of_the_weights(model):
    """Another --seed begins at other weights, but for those that begin as constants or as the identity."""
    a, b = (dict(ready(f"--model {model} --seed {seed}").net.named_parameters()) for seed in (0, 1))
    assert {k for k in a if torch.equal(a[k], b[k]) and len(a[k].unique()) > 1} <= {"conv_out.weight"}


@pins
def test_projector():
    """LayerNorm, Linear, GELU, Linear lead from z's width, here 64, to 128."""
    found = ready("--distill 0.1").net.projector
    assert [type(m).__name__ for m in found] == ["LayerNorm", "Linear", "GELU", "Linear"]
    assert found[0].normalized_shape == (64,) and found[1].in_features == 64
    assert found[3].out_features == 128


def test_kept_losses(tmp_path):
    """A checkpoint keeps sums of losses as they are: a third of 0.05, three times, is not 0.05 in float32."""
    found = ready()
    found.meter.losses, found.meter.steps = torch.tensor([0.05, 0.1]), 3
    train.save(found, tmp_path / "checkpoint.pt")
    assert torch.tensor(load(tmp_path)["loss_sums"]).equal(found.meter.losses)


def test_logged_losses(tmp_path, monkeypatch):
    """A record has the mean of both losses over the steps since the last one, not the last step's."""
    records = {}
    for every in (1, 3):
        monkeypatch.setattr(train, "LOG_STEPS", every)
        run(tmp_path / f"{every}", f"{MOVES} --images 96 --distill 0.5")
        records[every] = log(tmp_path / f"{every}")[1]
    for name in ("loss", "distill"):
        single = np.array([r[name] for r in records[1]]).reshape(2, 3)
        assert [r[name] for r in records[3]] == pytest.approx(single.mean(1), rel=1e-5)
        assert (single.std(1) > 1e-3 * single.mean(1)).all()


def test_ema_in_the_loop(tmp_path, monkeypatch):
    """The checkpoint's EMA is the average of the weights after each step, begun at the first ones."""
    seen, update = [], train.update_ema

    def watch(run):
        for part in (run.net,) if seen else (run.ema, run.net):
            seen.append({k: v.double().clone() for k, v in part.state_dict().items()})
        update(run)
    monkeypatch.setattr(train, "update_ema", watch)
    state = run(tmp_path / "run", f"{MOVES} --images 272 --ema 12")
    expected = seen[0]
    for k, net in enumerate(seen[1:], 1):
        beta = 0.5 ** (16 / min(12, 16 * k / 20))          # 5 % of the images seen, at most --ema
        expected = {name: beta * expected[name] + (1 - beta) * net[name] for name in net}
    assert len(seen) == 18 and same(state["model"], {k: v.float() for k, v in seen[-1].items()})
    assert error(state["ema"], expected) < 1e-6 < 1e-4 < error(state["ema"], state["model"])


def test_learning_rate(tmp_path, monkeypatch):
    """The rate rises over --warmup images and falls linearly to 1 % by --decay; the optimizer has it."""
    cfg = config("--lr 0.01 --warmup 100 --decay 480")
    for images, rate in ((0, 0), (16, 0.01 * 0.16 * 464 / 480), (96, 0.01 * 0.96 * 0.8), (240, 0.005),
                         (480, 1e-4), (560, 1e-4)):
        assert train.learning_rate(cfg, images) == pytest.approx(rate, abs=1e-12)
    cfg.decay = None
    assert train.learning_rate(cfg, 10**9) == 0.01
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    state = run(tmp_path / "run", "--lr 0.01 --warmup 32 --decay 128")
    rates = [record["lr"] for record in log(tmp_path / "run")[1]]
    assert rates == pytest.approx([0, 0.005 * 0.875, 0.01 * 0.75, 0.01 * 0.625], abs=1e-12)     # before steps
    assert state["optimizer"]["param_groups"][0]["lr"] == rates[-1]


@pytest.mark.parametrize("flags", ["--model unet", "--model dit --distill 0.5"])
def test_micro_batch(monkeypatch, flags):
    """--micro-batch changes memory, not the result; with distillation, the keys are of the whole batch."""
    whole, parts = (ready(f"{flags} {MOVES} --micro-batch {m}") for m in (16, 4))
    monkeypatch.setattr(train, "CLIP", 1e9)          # or a gradient of the wrong size would not show
    for found in (whole, parts):
        found.optimizer.param_groups[0]["eps"] = 1e-4        # or rounding noise would become real steps
    first = {k: v.clone() for k, v in whole.net.state_dict().items()}
    a, b = state_of(steps(whole, 6)), state_of(steps(parts, 6))
    assert error(a["model"], first) > 1e-3
    assert max(error(a[name], b[name]) for name in a) < 1e-5


@pytest.mark.parametrize("flags, n", [
    ("unet", 20), ("dit", 40), ("uvit", 40), ("unet --schedule linear --target eps", 20),
    ("unet --schedule edm", 30), pytest.param("unet --schedule edm", 20, marks=pins),
    ("unet --schedule flow", 20)])
def test_learns(flags, n):
    """Each network soon knows a batch by heart: 0.2 of its loss is left, 0.5 where it does not see x.

    So on each path.
    """
    found = ready(f"--model {flags} --lr 4e-3 --warmup 160")
    batch = found.batches(0)
    found.batches = lambda step: batch
    history = []
    for _ in range(n // 10):
        history.append(means(steps(found, 10))[0])
        found.meter = train.Meter(CPU, found.images)
    assert history[-1] < 0.35 * history[0]


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_abar_table(schedule):
    """A network that is built for a path weighs z by that path's abar at each t; of pure noise z counts 0."""
    run = ready(f"--schedule {schedule}")
    t = torch.tensor([0, 1, 60, 500, 999])
    expected = run.diffusion.path.abar(t if run.diffusion.discrete else t.float())
    assert run.net.abar.shape == (1001,) and error(run.net.abar[t], expected) < 1e-6
    assert run.net.abar[0] > 0.999 and run.net.abar[1000] < 1e-4 and torch.equal(run.net.abar, run.ema.abar)


@each_model
def test_parts(model, monkeypatch):
    """A network says which of its modules are to be compiled."""
    net, compiled = ready(f"--model {model}").net, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(self))
    train.compile_parts(net)
    inside = [m for part in compiled for m in part.modules()]
    assert len(inside) == len(set(inside)) > 10 and set(inside) <= set(net.modules())


@pins
@each_model
def test_names_of_z(model):
    """z adds these to the plain network."""
    on, off = (ready(f"--model {model} --{no}self-cond") for no in ("", "no-"))
    assert on.net.state_dict().keys() - off.net.state_dict().keys() == {
        "proj.1.weight", "proj.1.bias", "abar"}


@each_model
def test_twins(model):
    """A run and its baseline see the same images, noise and initial weights: equal until proj has moved."""
    on, off = (ready(f"--model {model} {MOVES} --{no}self-cond") for no in ("", "no-"))
    assert means(steps(on))[0] == means(steps(off))[0]
    assert means(steps(on, 7))[0] != means(steps(off, 7))[0]


# --- contrastive self-distillation ---

NEUTRAL = torch.tensor([[1, .5, .5, 0]])


def test_contrast():
    """InfoNCE by its formula, image by image; in float32 also under autocast."""
    p, keys, own = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([2, 0, 3])
    likeness = torch.cosine_similarity(p[:, None], keys[None], dim=2) / 0.2
    expected = torch.stack([-(row[i].exp() / row.exp().sum()).log() for row, i in zip(likeness, own)])
    assert error(diffusion.contrast(p, keys, own), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert error(diffusion.contrast(p, keys, own), expected) < 1e-5


def test_augment():
    """A view is a part of the image, mirrored or not; neutral choices change nothing."""
    x0, u = torch.rand(2, 3, 16, 16) * 2 - 1, NEUTRAL.repeat(2, 1)
    assert error(diffusion.augment(x0, u), x0) < 1e-5
    flat = torch.ones(64, 1, 8, 8)                  # to its border
    assert error(diffusion.augment(flat, torch.rand(64, 4)), flat) < 1e-5
    u[1, 3] = 1                                                              # only the second is mirrored
    assert error(diffusion.augment(x0, u), torch.stack([x0[0], x0[1].flip(2)])) < 1e-5
    ramp = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16)                    # from left to right
    for x0, place, along in ((ramp, 1, 2), (ramp.mT, 2, 1)):                 # in x; then in y
        u = NEUTRAL.repeat(2, 1)
        u[:, 0], u[0, place], u[1, place] = 0, 0, 1                          # half the area: at either end
        first, last = diffusion.augment(x0, u)
        assert -1 <= first.min() < -0.9 and 0.3 < first.max() < 0.45
        assert error(first, -last.flip(along)) < 1e-5


def share_of(schedule, t):
    """The image's share of the variance at t (B,), if its own is 1."""
    if schedule == "cosine":
        return (1 - diffusion.cosine_betas(1000).clamp(max=0.999)).cumprod(0)[t].float()
    return 1 / (1 + (0.5 * (t * math.pi / 2000).tan() if schedule == "edm" else t / (1000 - t)) ** 2)


@pytest.mark.parametrize("schedule, flags, images, weight", [
    ("cosine", "", 0, 0), ("edm", "", 0, 0), ("flow", "", 0, 0),
    *[("cosine", "--distill 0.5 --distill-images 48", *x) for x in ((0, 0.5), (24, 0.25))],
    ("edm", "--distill 0.5", 24, 0.5), ("flow", "--distill 0.5", 24, 0.5)])
@each_model
def test_one_step(monkeypatch, model, schedule, flags, images, weight):
    """A step by hand: the mean loss, its gradient, clipped, into AdamW; with distillation both losses.

    The teacher is the EMA and sees another view; the less noise, the more an image counts.
    """
    monkeypatch.setattr(train, "CLIP", 0.05 if model == "unet" else 100)
    path = f"--model {model} --schedule {schedule}"
    flags = f"{path} {flags}"
    cfg, found, plain = config(flags), ready(flags), ready(path)
    torch.manual_seed(train.mix(0))
    net, process = train.build(cfg, (3, 8, 8), 10, CPU)
    teacher = copy.deepcopy(net)
    for p, q in zip(teacher.parameters(), found.ema.parameters(), strict=True):
        p.data += 0.1 * torch.randn_like(p)
        q.copy_(p)
    found.images = plain.images = images
    train.train_step(found)
    make = train.Batches(train.load_data("shapes", "train", 8), cfg, process, CPU)
    x0, t, noise, y = make(found.step)
    x_t, apart = process.add_noise(x0, t, noise), torch.zeros(())
    loss = process.error(net(x_t, t, y), x0, t, noise).mean()
    if weight:
        z, keys = net.encode(x_t, t, y), teacher.encode(*make.noisy_view(x0, found.step))
        apart = diffusion.contrast(net.projector(z), teacher.projector(keys).detach(), torch.arange(16))
        apart = (share_of(schedule, t) * apart).mean()
    (loss + weight * apart).backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in net.parameters()]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert (norm > train.CLIP) == (model == "unet")
    part = min(train.CLIP / norm, 1)
    expected = {i: 0.1 * part * g for i, g in enumerate(grads)}                  # 0.1 = 1 - beta1
    state = state_of(found)
    assert error(state["moments"], expected) < 1e-6
    assert error(state["means"], [loss.item(), apart.item()]) < 1e-5
    assert means(steps(plain))[0] == state["means"][0]


def test_distill_fades(tmp_path, monkeypatch):
    """Its weight falls linearly to 0; from then on the teacher is not asked and the log has no loss of it."""
    flags = "--distill 0.5 --distill-images 48 --images 96"
    cfg = config(flags)
    assert [train.distill_weight(cfg, images) for images in (0, 24, 36, 48, 99)] == [0.5, 0.25, 0.125, 0, 0]
    assert train.distill_weight(config("--distill 0.5"), 10**9) == 0.5
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    asked, keys_of = [], train.keys_of
    monkeypatch.setattr(train, "keys_of", lambda *x: asked.append(1) or keys_of(*x))
    run(tmp_path / "run", flags)
    assert ["distill" in r for r in log(tmp_path / "run")[1]] == [True] * 3 + [False] * 3 and len(asked) == 3


# --- what a run leaves behind ---

def test_speed_in_the_log(tmp_path, monkeypatch):
    """images_per_second is of the steps since the last record, seconds are since the start."""
    now, update = [0.0], train.update_ema

    def slower(run):                                                         # step k takes k seconds
        now[0] += run.images / 16
        update(run)
    monkeypatch.setattr(train, "update_ema", slower)
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: now[0], sleep=time.sleep))
    monkeypatch.setattr(train, "LOG_STEPS", 2)
    run(tmp_path / "run", "--images 64")
    found = [(r["images_per_second"], r["seconds"]) for r in log(tmp_path / "run")[1]]
    assert found == [(10.7, 3), (4.6, 10)]
    monkeypatch.setattr(train, "update_ema", update)                         # now the clock stands still
    run(tmp_path / "still", "--images 64")
    assert log(tmp_path / "still")[1][-1]["images"] == 64


@pytest.mark.parametrize("flags", ["", *[f"--schedule {path} --distill 0.5" for path in (
    "linear --target eps --model unet", "edm", "flow")]])
def test_run_folder(tmp_path, capsys, flags):
    """config.json, checkpoint.pt, log.jsonl, samples-<images>.png; the last line says where they lie.

    So on each path, and load_run knows it.
    """
    out, flags = tmp_path / "some/run", f"--images 340 {flags}"
    out.mkdir(parents=True)                                              # an empty folder is not in the way
    state = run(out, flags)
    assert {p.name for p in out.iterdir()} == {"config.json", "checkpoint.pt", "log.jsonl", "samples-352.png"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(str(out / name) in last for name in ("checkpoint.pt", "log.jsonl", "samples-352.png"))

    cfg = json.loads((out / "config.json").read_text())
    assert cfg == asdict(train.parse_config(argv(out, flags))) == state["config"]
    target, path = cfg["target"], train.load_run(out, CPU)[2].path
    assert target == ("eps" if "eps" in flags else "v") and path.sigma(torch.tensor([500])).item() == (
        pytest.approx({"linear": 3.44, "cosine": 1.01, "edm": 0.5, "flow": 1}[cfg["schedule"]], abs=0.01))
    assert state["images"] == 352 and state["classes"] == list(train.SHAPES)
    assert state["shape"] == [3, 8, 8] and state["num_classes"] == 10

    head, rest = log(out)
    learned = sum(v.numel() for name, v in state["model"].items() if name != "abar")
    assert head["config"] == cfg and head["parameters"] == learned
    assert torch.__version__ in head["versions"] and "cpu" in head["device"]
    in_git = Path(train.__file__).with_name(".git").exists() and shutil.which("git")
    assert re.fullmatch("[0-9a-f]{40}", head["commit"]) or not in_git and head["commit"] == ""
    assert head["edited"] == [] or in_git and all(name.endswith(".py") for name in head["edited"])
    assert [r["images"] for r in rest] == [320, 352]
    for record in rest:
        more = {"distill"} if cfg["distill"] else set()
        assert set(record) == {"images", "loss", "lr", "images_per_second", "seconds"} | more
        assert 0 < record["loss"] < 2 and record["images_per_second"] > 0 <= record["seconds"]

    with Image.open(out / "samples-352.png") as image:                   # tiles of 64 px, 4 px between them
        assert image.size == (10 * 68 + 4, 8 * 68 + 4) and len(image.getcolors(10**6)) > 100


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_edited(tmp_path, monkeypatch):
    """log.jsonl names the files of code that are not as in the commit that it names."""
    def git(words):
        me = "-c user.name=me -c user.email=me@home".split()
        subprocess.run(["git", *me, *words.split()], cwd=tmp_path, check=True)

    for name in ("train.py", "dit_selfcond.py", "README.md", "tests/test_dit.py"):
        Path(tmp_path, name).parent.mkdir(exist_ok=True)
        Path(tmp_path, name).write_text("as it was")
    git("init -q")
    git("add .")
    git("commit -qm all")
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    found = ready()
    assert train.log_head(found)["edited"] == []
    for name in ("dit_selfcond.py", "README.md", "tests/test_dit.py", "new.py"):
        Path(tmp_path, name).write_text("as it is")
    assert train.log_head(found)["edited"] == ["dit_selfcond.py"]


def test_changed_network(tmp_path, capsys, monkeypatch):
    """A run of a network that was changed since is refused, and a weight that does not fit is named."""
    out = tmp_path / "run"
    run(out)
    monkeypatch.setitem(train.DiT.SIZES["tiny"], "dim", 48)
    with refused(capsys, "does not fit", "size mismatch for", "48"):
        train.main(argv(out, "--resume"))


def test_how_often(tmp_path, monkeypatch):
    """--save-every and --sample-every count images; both happen once more at the end.

    A grid comes before the checkpoint of its step: what is killed between the two draws it again.
    """
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: written.append(path.name) or replace(part, path))
    run(tmp_path / "run", "--images 160 --save-every 40 --sample-every 64")
    written = [name for name in written if name != "log.jsonl"]
    assert written == ["config.json", "checkpoint.pt", "samples-64.png", "checkpoint.pt",
                       "samples-128.png", "checkpoint.pt", "checkpoint.pt", "samples-160.png"]


def test_preview(tmp_path, monkeypatch):
    """A sample grid: EMA weights in eval mode, a class a column, guidance, noise of the seeds 0, 1, 2 ..."""
    calls, sample = [], train.GaussianDiffusion.sample

    def watch(self, net, noise, y, **kw):
        calls.append((net, noise, y, kw))
        return sample(self, net, noise, y, **kw)
    monkeypatch.setattr(train.GaussianDiffusion, "sample", watch)
    runs = [ready(flags) for flags in ("", "--no-conditional")]
    for found in runs:
        train.draw(found, None, tmp_path / "samples.png")
    net, noise, y, kw = calls[0]
    assert net is runs[0].ema and not net.training and runs[0].net.training
    assert y.tolist() == list(range(10)) * 8 and kw == dict(null=10, guidance=train.GUIDANCE, clip=True)
    for i in (0, 33, 79):
        assert torch.equal(noise[i], torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)))
    assert len(calls[1][1]) == 64 and calls[1][2] is None and calls[1][3]["guidance"] == 1


# --- budgets ---

@pytest.mark.parametrize("flags, seconds, images, asked, expected", [
    ("--images 64 --minutes 1", 59, 48, [], (False, 0)),
    ("--images 64 --minutes 1", 61, 48, [], (True, 0)),
    ("--images 64", 0, 0, [15], (False, 15)),
    ("--images 64", 0, 64, [2, 15], (True, 15)),
])
def test_stop_requested(flags, seconds, images, asked, expected):
    """A run ends at --images or --minutes, whichever comes first; a signal is told apart from that."""
    found = SimpleNamespace(cfg=config(flags), rank=0, images=images)
    assert train.stop_requested(found, time.time() - seconds, asked) == expected


def test_resume_with_another_end(old_run):
    """Where --resume --out is given a new end, by images or minutes, that of the run no longer holds."""
    for flags, ends in (("", (32, None)), ("--minutes 3", (None, 3)), ("--images 64", (64, None)),
                        ("--images 64 --minutes 3", (64, 3))):
        cfg = train.parse_config(["--resume", "--out", str(old_run), *flags.split()])
        assert (cfg.images, cfg.minutes) == ends, flags


# --- stop and go on ---

@pytest.mark.parametrize("flags", ["--model unet", "--precision fp16", "--distill 0.5 --distill-images 80",
                                   "--schedule flow --distill 0.5"])
def test_resume(tmp_path, monkeypatch, flags):
    """Stopped between two log points and resumed, a run equals an uninterrupted one, bit for bit.

    Weights, EMA, optimizer, loss scale, losses; so with dropout. load_run gives its EMA, frozen.
    """
    monkeypatch.setattr(train, "LOG_STEPS", 2)
    monkeypatch.setitem(train.UNet.SIZES, "tiny", {**train.UNet.SIZES["tiny"], "dropout": 0.3})
    flags = f"{MOVES} {flags}"
    whole = run(tmp_path / "whole", f"{flags} --images 80")
    run(tmp_path / "run", f"{flags} --images 48")
    run(tmp_path / "run", f"{flags} --images 48 --resume")           # nothing left to do: nothing changes
    assert_same_run(run(tmp_path / "run", f"{flags} --images 80 --resume --save-every 32"), whole)
    for name in ("loss", "distill"):
        expected, found = losses(tmp_path / "whole", name), losses(tmp_path / "run", name)
        assert list(expected) == [32, 64, 80] and {i: found[i] for i in expected} == expected
    _, net, process = train.load_run(tmp_path / "run", CPU)
    assert same(net.state_dict(), whole["ema"]) and error(whole["ema"], whole["model"]) > 1e-5
    assert not net.training and not any(p.requires_grad for p in net.parameters()) and process.target == "v"


def test_resume_without_checkpoint(tmp_path, old_run):
    """--resume where there is no checkpoint starts afresh, whatever else lies there."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.jsonl").write_text('{"config": {}}\n{"images": 16, "loss": 9}\n{"images": 999}\n')
    (out / "checkpoint.pt.0123abcd.part").write_bytes(b"half a file")
    (out / "film.mkv.part").write_bytes(b"not ours")
    (out / "samples-16.png.mine.part").write_bytes(b"not ours")
    (out / "samples-a.npz.0123abcd.part").write_bytes(b"of sample.py, which may be at it still")
    assert_same_run(run(out, "--images 32 --resume"), load(old_run))
    assert losses(out) == losses(old_run) and log(out)[0]["config"]["model"] == "dit"
    others = {"log.jsonl.1", "film.mkv.part", "samples-16.png.mine.part", "samples-a.npz.0123abcd.part"}
    assert tree(out).keys() == tree(old_run).keys() | others


def test_resume_elsewhere(tmp_path, old_run):
    """A run folder may be moved, and resumed with another budget, micro-batch, rhythm and precision."""
    out = old_run.rename(tmp_path / "moved")
    rhythm = "--save-every 16 --sample-every 32"
    state = run(out, f"--images 64 --resume --micro-batch 8 {rhythm} --precision fp16")
    assert state["images"] == 64 and state["config"]["out"] == str(out) and state["scaler"]["scale"] > 1
    assert json.loads((out / "config.json").read_text()) == state["config"]
    assert run(out, "--images 96 --resume --precision fp32")["images"] == 96


# --- several processes ---

@pytest.mark.parametrize("flags", ["--model dit --conditional", "--model uvit --schedule edm",
                                   "--model dit --schedule flow --distill 0.5 --distill-images 80"])
def test_two_processes(tmp_path, photos, flags):
    """Two processes equal one: weights, averages, gradients, losses within 1e-5; so in parts of a batch."""
    flags = f"{flags} {MOVES} --images 160 --data folder:{photos}"
    one = run(tmp_path / "one", flags)
    two, said = run_two(tmp_path / "two", flags + " --micro-batch 4")
    assert two["images"] == 160 and max(v.abs().max() for v in moments(one).values()) > 1e-3
    assert error(one["model"], one["ema"]) > 1e-4
    for a, b in ((one["model"], two["model"]), (one["ema"], two["ema"]), (moments(one), moments(two))):
        assert error(a, b) < 1e-5
    assert error(two["loss_sums"], one["loss_sums"]) < 1e-4
    assert said.count("images in") == said.count("2 x cpu") == 1                # the first one speaks
    assert log(tmp_path / "two")[0]["device"].startswith("2 x cpu")


def decode_in_fork(folder, skip_bad, lost):
    """Leaves what one process of two found in a folder; lost: the second one cannot read the cache."""
    _, rank, _ = train.setup("cpu")
    names, real = [], train.decode
    train.decode = lambda path, *rest: names.append(path.name) or real(path, *rest)
    if lost and rank == 1:
        train.read_cache = lambda cache, stamp: None
    data = train.load_data(f"folder:{folder}/photos", "train", 8, skip_bad)
    torch.save((data.images, data.labels, names), folder / f"found{rank}.pt")


def test_two_processes_decode(tmp_path, photos):
    """Each of two processes decodes a share of a folder; both have all images, and leave the cache of one."""
    shutil.copytree(photos, tmp_path / "photos")
    for path in tmp_path.glob("photos/train/b/0[13579].png"):
        path.unlink()                                                        # 35: not to be halved
    cache, expected = tmp_path / "photos-train-8px.npz", {}

    def decode(*how):
        both = fork_two(decode_in_fork, tmp_path, *how)
        assert [end(process)[0] for process in both] == [0, 0]
        found = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
        for images, labels, _ in found:
            assert torch.equal(images, expected.images) and torch.equal(labels, expected.labels)
        return [names for *_, names in found]

    expected, kept = train.load_data(f"folder:{tmp_path}/photos", "train", 8), cache.read_bytes()
    assert decode(False, False) == [[], []]
    files = sorted(path.name for path in tmp_path.glob("photos/train/*/*"))
    for lost in (True, False):
        first, second = decode(False, lost)
        assert {len(first), len(second)} == {17, 18} and sorted(first + second) == files
        assert cache.read_bytes() == kept
        cache.unlink()
    (tmp_path / "photos/train/b/39.png").write_bytes(b"")
    expected = train.load_data(f"folder:{tmp_path}/photos", "train", 8, skip_bad=True)
    decode(True, False)
    assert len(expected.images) == 34 and not cache.exists()


def test_bad_input_of_two_processes(tmp_path, photos):
    """What only one process can see ends both: one sentence, no traceback, nothing written, none waits."""
    shutil.copytree(photos, tmp_path / "photos")
    bad = tmp_path / "photos/train/b/39.png"                                 # the last of the second's share
    bad.write_bytes(b"this is no image")
    before = tree(tmp_path)
    both = fork_two(train_in_fork, argv(tmp_path / "run", f"--data folder:{tmp_path}/photos"))
    (code, _, err), (other, _, nothing) = [end(process) for process in both]
    assert code == other == 2 and err.startswith("error: ") and err.count("\n") == 1 and str(bad) in err, err
    assert nothing == "" and tree(tmp_path) == before


def own_clocks(flags):
    """The first process's clock goes on by 0.25 s at each look, the second one's by 250 s."""
    looks, pace = [], (0.25, 250)[int(os.environ["RANK"])]
    train.time = SimpleNamespace(time=lambda: looks.append(1) or pace * len(looks), sleep=time.sleep)
    train.main(flags)


def test_minutes_of_two_processes(tmp_path, photos):
    """--minutes alone ends both at the same step, though the second one's clock runs 1000 times as fast."""
    flags = argv(tmp_path / "run", f"--minutes 0.02 --data folder:{photos}")
    i = flags.index("--images")
    both = fork_two(own_clocks, flags[:i] + flags[i + 2:])
    (code, said, err), (other, *_) = [end(process) for process in both]
    assert code == other == 0, err
    assert load(tmp_path / "run")["images"] == 64 and said.count("images in") == 1


def test_processes_and_batch(tmp_path):
    """A batch that the processes can't share evenly is refused, with both numbers."""
    for flags, words in (("", "--batch-size 16 3 processes"),
                         ("--batch-size 15 --micro-batch 2", "--micro-batch 2 5")):
        with pytest.raises(train.UserError) as e:
            train.check_start(config(flags), tmp_path / "run", world=3)
        assert all(word in str(e.value) for word in words.split())


# --- bad input ---

# of a resumed run, and what it was begun with
OTHERS = {"--model uvit": "model dit", "--size small": "size tiny", "--image-size 12": "image_size 8",
          "--data shapes:full": "shapes", "--no-self-cond": "self_cond True", "--target eps": "target v",
          "--schedule flow": "schedule cosine", "--no-conditional": "conditional True",
          "--seed 1": "seed 0", "--batch-size 32": "batch_size 16", "--distill 1": "distill None",
          "--decay 7": f"decay {train.TINY_IMAGES['dit']}",
          **{f"--{name} 7": f"{name} {train.TINY[name]}" for name in ("lr", "ema", "warmup")}}


@pytest.mark.parametrize("flags, words", [
    ("--data nonsense", "nonsense cifar10 folder: shapes"),
    ("--data shapes:half", "shapes:half shapes:full"),
    ("--data latents:nowhere --vae x", "latents:nowhere --vae"),
    ("--data latents:nowhere --target eps", "cosine eps --target v"),
    ("--vae x --target eps", "cosine eps --target v"),
    ("--model dit --image-size 10", "dit tiny 10 4"),
    ("--micro-batch 5", "--micro-batch 5 16"),
    ("--model resnet", "--model resnet unet uvit dit"),
    ("--size huge", "--size huge dit tiny small base large xlarge"),
    ("--model unet --size small", "--size small unet tiny base"),
    ("--target x0", "--target x0 eps v"),
    ("--schedule straight", "--schedule straight linear cosine edm flow"),
    ("--schedule flow --target eps", "flow eps v"), ("--target eps --schedule edm", "edm eps v"),
    ("--precision fp8", "--precision fp8 bf16 fp16 fp32"),
    ("--distill-images 9", "--distill-images --distill 0.02"),
    ("--xyz", "--xyz --help"),
    ("--device cuda", "--device cuda cpu"),
    ("--device tpu", "--device tpu cpu"),
    ("--lr nan", "--lr nan 0"), ("--lr inf", "--lr inf 0"), ("--minutes inf", "--minutes inf 0"),
    ("--lr 1e39", "--lr 1e+39 1e38"),
    ("--seed -1", "--seed -1"),
    ("--out a-file/run", "a-file/run"),
    ("--out a-file", "a-file choose another"),
    *[(f"--out {out}", f"{out} --resume --out") for out in ("run", "other")],
    *[(f"--{f.name.replace('_', '-')} 0", f"--{f.name.replace('_', '-')} {f.type(0)} 0")
      for f in fields(train.Config) if f.type in (int, float) and f.name != "seed"],
    *[(f"--out run --resume {flags}", f"run/checkpoint.pt {words}") for flags, words in OTHERS.items()],
])
def test_bad_flags(tmp_path, old_run, monkeypatch, capsys, flags, words):
    """What can't be is refused in one sentence that names the value and what can; nothing is written.

    No run or other file is overwritten; a checkpoint of another experiment is not resumed.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("do not lose me")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("do not lose me")
    before = tree(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with refused(capsys, *words.split()):
        train.main(argv("new", flags))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("spec", ["cifar10", "cifar100"])
@pytest.mark.parametrize("problem", [URLError("no route to host"), RuntimeError("File not found.")])
def test_no_network(tmp_path, monkeypatch, capsys, spec, problem):
    """Where CIFAR can't be downloaded, the sentence says why and names the ways on."""
    def download(*args, **kwargs):
        raise problem
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    with refused(capsys, spec, str(problem), "--data shapes", "folder:"):
        train.main(argv("run", "--image-size 32", "--data", spec))
    assert not (tmp_path / "run").exists()


def encoded(kind, side):
    """An image file's bytes."""
    file = io.BytesIO()
    Image.effect_noise((side, side), 50).save(file, kind)
    return file.getvalue()


GOOD = {f"train/{'ab'[i % 2]}/{i}.png": encoded("PNG", 8) for i in range(16)}
FLAT = {f"{i}.png": encoded("PNG", 8) for i in range(16)}
JPEG = encoded("JPEG", 64)
FOLDERS = {             # case -> files, flags, words
    "missing": ({}, "", "photos does not exist"),
    "no images": ({"notes.txt": b"no image"}, "", "photos has no images"),
    "empty train": ({"train/notes.txt": b""}, "", "train has no images train/<class>/"),
    "empty classes": ({"train/a/notes.txt": b"", "train/b/notes.txt": b""}, "", "train no images"),
    "one class": (FLAT, "", "--conditional one"),
    "new class in test": ({**GOOD, "test/unknown/1.png": b""}, "", "unknown test train"),
    "unreadable": ({**GOOD, "train/b/7.png": b"this is no image"}, "", "photos/train/b/7.png --skip-bad"),
    "cut off": ({**GOOD, "train/b/7.jpg": encoded("JPEG", 24)[:-99]}, "", "photos/train/b/7.jpg --skip-bad"),
    "a bomb": ({**GOOD, "train/b/7.jpg": JPEG}, "", "photos/train/b/7.jpg --skip-bad"),
    "all left out": (dict.fromkeys(GOOD, b""), "--skip-bad", "none photos"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folder(tmp_path, monkeypatch, capsys, case):
    """A folder that won't do is refused in one sentence; nothing is written."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    files, flags, words = FOLDERS[case]
    spec = folder(tmp_path / "photos", files)
    before = tree(tmp_path)
    with refused(capsys, str(tmp_path), *words.split()):
        train.main(argv(tmp_path / "run", f"--conditional {flags}", "--data", spec))
    assert {k: v for k, v in tree(tmp_path).items() if not k.endswith(".npz")} == before


# --- device and precision ---

@pytest.mark.parametrize("there, expected", [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")])
def test_device(monkeypatch, there, expected):
    """Without --device: cuda, then mps, then cpu; a flag overrides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train.setup(None)[0].type == expected and train.setup("cpu") == (CPU, 0, 1)


def test_half_precision():
    """bf16 and fp16 are really on, learn the same to their precision, and keep the weights in fp32."""
    exact, *others = (steps(ready(f"{MOVES} --precision {p}"), 6) for p in ("fp32", "bf16", "fp16"))
    for found in others:
        assert 0 < error(means(found)[0], means(exact)[0]) < 0.01
        assert all(v.dtype == torch.float32 for v in found.net.state_dict().values())
        assert 1e-6 < error(found.net.state_dict(), exact.net.state_dict()) < 0.02
    assert [found.scaler.is_enabled() for found in (exact, *others)] == [False, False, True]


@pytest.mark.parametrize("capability, dtype", [
    ((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_precision_of_a_gpu(monkeypatch, capability, dtype):
    """Unasked it is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train.pick_autocast(None, torch.device("cuda"))[1] == dtype
    assert train.pick_autocast(None, CPU)[1] is None


def test_precision_that_fails(monkeypatch, capsys):
    """Where an autocast type does not work, one line says so and the run is one in fp32."""
    def autocast(*args, **kwargs):
        raise RuntimeError("no such instruction")
    exact = steps(ready(MOVES), 4)
    train.say_once.cache_clear()
    monkeypatch.setattr(torch, "autocast", autocast)
    for name in ("bf16", "fp16"):
        capsys.readouterr()
        found = steps(ready(f"{MOVES} --precision {name}"), 4)
        said = capsys.readouterr().out
        assert said.count("\n") == said.count("no such instruction") == 1 and name in said and "fp32" in said
        assert same(state_of(found), state_of(exact)) and not found.scaler.is_enabled()


def test_compile_is_off(capsys):
    """On a CPU torch.compile is off, without a word."""
    assert steps(ready("--compile")).meter.steps == 1
    assert not capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@each_model
def test_compiled(tmp_path, monkeypatch, model):
    """Compiled blocks in CUDA graphs train like the eager network, also where gradients are accumulated."""
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    flags = f"--model {model} --device cuda --precision fp32 --image-size 16 --ema 1 {MOVES}"
    runs = dict(eager="--no-compile", compiled="--compile", parts="--compile --micro-batch 4")
    found = {name: run(tmp_path / name, f"{flags} {more}") for name, more in runs.items()}
    assert len(losses(tmp_path / "eager")) == 4
    for name in ("compiled", "parts"):
        assert error(moments(found[name]), moments(found["eager"])) < 1e-4
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "eager"), abs=1e-3)


