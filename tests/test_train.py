"""train.py: flags, data, batches, the loop, runs that stop and go on, bad input. Runs are tiny: 8 px."""
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from errno import ENOSPC
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import diffusion
import train
import unet_selfcond

ROOT = Path(train.__file__).parent
BASE = ("--model dit --size tiny --data shapes --image-size 8 --batch-size 16 --images 64 "
        "--device cpu --no-compile")
MOVES = "--lr 1e-3 --warmup 1"          # so that a few steps change the weights by far more than a tolerance
COLOURS = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), grey=(90, 90, 90))
each_model = pytest.mark.parametrize("model", train.MODELS)


def speed_up(monkeypatch):
    """400 drawn shapes instead of 50,000; previews in 2 steps instead of 50."""
    draw, sample = diffusion.draw_shapes, train.GaussianDiffusion.sample
    monkeypatch.setattr(diffusion, "draw_shapes", lambda n, *args, **kw: draw(min(n, 400), *args, **kw))
    monkeypatch.setattr(train.GaussianDiffusion, "sample", partialmethod(sample, steps=2))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    speed_up(monkeypatch)


def argv(out, flags="", *more):
    return [*BASE.split(), "--out", str(out), *flags.split(), *map(str, more)]


def load(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def run(out, flags="", *more):
    """A run in this process -> its checkpoint."""
    train.main(argv(out, flags, *more))
    return load(out)


def log(out):
    """-> first record, the others."""
    head, *rest = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return head, rest


def losses(out):
    """{images: loss}; an image count that is logged twice is an error."""
    rest = log(out)[1]
    found = {record["images"]: record["loss"] for record in rest}
    assert len(found) == len(rest), "an interval is in the log twice"
    return found


def error(a, b):
    """Maximum absolute error over two dicts of tensors."""
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def moments(state):
    """The optimizer's running mean of the gradient, of every parameter."""
    return {k: s["exp_avg"] for k, s in state["optimizer"]["state"].items()}


def same(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    """Checkpoints equal bit for bit, but for the flags that say how far to go and where to."""
    for name in a.keys() | b.keys():
        if name != "config":
            assert same(a[name], b[name]), name


def tree(folder):
    """Everything in a folder, with the files' bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@contextmanager
def refused(capsys, *words, late=False):
    """The body ends with exit code 2 and one line on stderr with all words; late: beside a progress bar."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 2
    err = capsys.readouterr().err.replace("\x1b[A", "")          # tqdm's, where a bar of another test is left
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    said = [line for line in lines if "error: " in line]
    assert len(said) == 1 and said[0].startswith("error: ") and (late or said == lines), lines
    assert [word for word in words if word not in said[0]] == [], said


def picture(path, *colours, size=(8, 8), mode="RGB"):
    """An image file; its colours stand side by side (below each other where it is upright) in equal bands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = np.array([COLOURS[c] for c in colours], np.uint8)
    width, height = size
    rows, cols = (1, len(bands)) if width >= height else (len(bands), 1)
    pixels = bands.reshape(rows, cols, 3).repeat(height // rows, 0).repeat(width // cols, 1)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 2 x 20 noise images, for the runs in processes of their own, which draw no shapes."""
    root, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for i in range(40):
        path = root / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return root


def launch(*command, timeout=120):
    """A Python command in a process of its own, started elsewhere -> exit code, stdout, stderr."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, cwd=ROOT.parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        process.terminate()                         # torchrun then ends its processes
        process.communicate(timeout=60)
        pytest.fail(f"still running after {timeout} s")


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2".split()


# --- config ---

def test_help(capsys, monkeypatch):
    """--help names every flag, and says what it is for."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not stop.value.code
    for name in """model size data image-size out images minutes batch-size micro-batch lr warmup decay ema
                   save-every sample-every resume conditional no-self-cond target schedule seed device
                   precision no-compile skip-bad resident encode vae bench""".split():
        assert re.search(rf"--{name}\b", text), name
    for f in fields(train.Config):
        assert "--" + f.name.replace("_", "-") in text
        assert f.metadata["help"] and f.metadata["help"] % () in text, f.name


FLAGS = {"model": "uvit", "size": "small", "data": "shapes", "image_size": 24, "out": "here", "images": 7,
         "minutes": 0.5, "batch_size": 3, "micro_batch": 1, "lr": 0.25, "warmup": 11, "decay": 12, "ema": 13,
         "save_every": 14, "sample_every": 15, "resume": True, "conditional": True, "self_cond": False,
         "distill": 0.25, "distill_images": 17, "target": "v", "schedule": "cosine", "seed": 2**70,
         "device": "cpu", "precision": "bf16", "compile": False, "skip_bad": True, "resident": False,
         "encode": "there", "vae": "mine", "bench": True}


def test_flags():
    """Every field of Config has a flag that sets it, and no other field."""
    assert list(FLAGS) == [f.name for f in fields(train.Config)]
    for name, value in FLAGS.items():
        flag = "--" + name.replace("_", "-")
        given = [flag, str(value)]
        if type(value) is bool:
            given = [flag if value else flag.replace("--", "--no-")]
        base = "--model uvit --distill 2".split() if name == "distill_images" else ["--model", "uvit"]
        cfg, default = (asdict(train.parse_config([*base, *x])) for x in (given, []))
        changed = {k for k in cfg if cfg[k] != default[k]}
        assert cfg[name] == value and type(cfg[name]) is type(value)
        assert changed - {"out", "images"} == {name} - {"model", "size", "out", "images"}, name


RECIPE = {**train.TINY_SHAPES, "conditional": True, "target": "v", "schedule": "cosine"}


@pytest.mark.parametrize("flags, expected", [
    ("", dict(model="dit", size="small", data="cifar10", out="runs/dit-small-cifar10", images=10_000_000,
              batch_size=256, lr=2e-4, self_cond=True, conditional=False, target="eps", schedule="linear",
              decay=None, minutes=None, resume=False, compile=True, seed=0)),
    ("--model unet", dict(size="base", out="runs/unet-base-cifar10")),
    ("--model uvit --no-self-cond", dict(size="small", out="runs/uvit-small-cifar10-baseline")),
    ("--out here --no-self-cond", dict(out="here")),
    ("--minutes 5", dict(minutes=5.0, images=None)),
    ("--minutes 5 --images 9", dict(minutes=5.0, images=9)),
    *[(f"--model {m} --size tiny --data shapes", {**RECIPE, "decay": train.TINY_IMAGES[m],
       "images": train.TINY_IMAGES[m], "out": f"runs/{m}-tiny-shapes"}) for m in train.MODELS],
    ("--size tiny --data shapes --lr 0.5 --no-conditional --target eps --batch-size 8 --decay 5 --images 77",
     {**RECIPE, "lr": 0.5, "conditional": False, "target": "eps", "batch_size": 8, "decay": 5, "images": 77}),
    ("--size tiny --data shapes:full", dict(lr=2e-4, target="eps", conditional=False, batch_size=256,
                                            out="runs/dit-tiny-shapes-full", images=10_000_000)),
    ("--size small --data shapes", dict(lr=2e-4, target="eps", out="runs/dit-small-shapes", decay=None)),
    ("--data folder:/some/where/photos", dict(out="runs/dit-small-photos")),
])
def test_defaults(flags, expected):
    """Defaults are filled in; tiny with shapes has a recipe of its own; flags given by hand win."""
    cfg = asdict(train.parse_config(flags.split()))
    assert {name: cfg[name] for name in expected} == expected


# --- data ---

SHAPES = ["circle", "ring", "square", "bar", "triangle", "cross", "star", "heart", "moon", "arrow"]


@pytest.mark.parametrize("spec", ["shapes", "shapes:full"])
@pytest.mark.parametrize("size", [None, 16, 32])
def test_shapes(spec, size):
    """Drawn shapes: uint8, ten classes, 16 px unless asked, the same again, other ones in the test split."""
    data, again, test = (diffusion.load_data(spec, split, size) for split in ("train", "train", "test"))
    side = size or 16
    assert data.images.shape == (400, 3, side, side) and data.masks.shape == (400, side, side)
    assert data.images.dtype == data.masks.dtype == torch.uint8 and data.labels.dtype == torch.int64
    assert data.classes == SHAPES and data.labels.bincount().tolist() == [40] * 10
    assert all(map(torch.equal, data[:3], again[:3]))
    assert torch.equal(data.labels, test.labels)
    assert (data.images != test.images).flatten(1).any(1).all()
    other = diffusion.load_data("shapes" if ":" in spec else "shapes:full", "train", size)
    assert (data.images != other.images).flatten(1).any(1).all()


@pytest.mark.parametrize("size", [16, 32])
def test_masks(size):
    """A mask is its image's class + 1 where the image is bright, 0 where it is dark."""
    data = diffusion.load_data("shapes", "train", size)
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
    (_, k, a), (_, truth, b) = (diffusion.load_data("shapes", split, 16)[:3] for split in ("train", "test"))
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
    data, test = (diffusion.load_data(f"folder:{tmp_path}/photos", split, 8) for split in ("train", "test"))
    for found, colours, labels in ((data, ["grey", "red", "blue", "green"], [0, 0, 1, 2]),
                                   (test, ["blue", "green"], [1, 2])):
        assert found.classes == ["a", "b", "c"] and found.labels.tolist() == labels and found.masks is None
        assert found.images.shape == (len(labels), 3, 8, 8) and found.images.dtype == torch.uint8
        assert found.images[:, :, 0, 0].tolist() == [list(COLOURS[c]) for c in colours]


def test_flat_folder(tmp_path):
    """A folder of images alone is one class, in order of the names; 32 px unless asked; no test split."""
    for name, colour in (("2.PNG", "red"), ("1.jpeg", "grey"), ("3.webp", "grey")):
        picture(tmp_path / "photos" / name, colour)
    data = diffusion.load_data(f"folder:{tmp_path}/photos", "train")
    assert data.classes == ["image"] and data.labels.tolist() == [0, 0, 0]
    assert data.images.shape == (3, 3, 32, 32)
    assert (data.images[:, :, 9, 9] - torch.tensor([[90.] * 3, [255, 0, 0], [90] * 3])).abs().max() <= 2
    with pytest.raises(diffusion.UserError, match="test"):
        diffusion.load_data(f"folder:{tmp_path}/photos", "test")


@pytest.mark.parametrize("mode, suffix", [("RGB", "jpg"), ("L", "png"), ("LA", "png"), ("P", "png"),
                                          ("RGBA", "png"), ("CMYK", "tif")])
@pytest.mark.parametrize("size", [(96, 32), (32, 96), (24, 8), (12, 4)])
def test_any_image(tmp_path, mode, suffix, size):
    """Any mode, any proportions: the short side becomes the image size, the middle of the long one stays."""
    colours = ("red", "grey" if mode in ("L", "LA") else "green", "blue")
    picture(tmp_path / f"image.{suffix}", *colours, size=size, mode=mode)
    assert Image.open(tmp_path / f"image.{suffix}").mode == mode
    image = diffusion.load_data(f"folder:{tmp_path}", "train", 8).images[0].int()
    assert image.shape == (3, 8, 8)
    middle = image[:, :, 2:6] if size[0] > size[1] else image[:, 2:6]
    expected = torch.tensor(COLOURS[colours[1]])[:, None, None]
    assert (middle - expected).abs().max() <= (40 if suffix == "jpg" else 6)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the image files that were decoded."""
    names, loader = [], diffusion.open_image
    monkeypatch.setattr(diffusion, "open_image",
                        lambda path: (names.append(Path(path).name), loader(path))[1])
    return names


def test_cache(tmp_path, decoded):
    """Decoded images are kept beside the folder, by size and split, until a file changes, comes or goes."""
    root = tmp_path / "data/photos"

    def write(name, colour, time=1):
        picture(root / name, colour)                 # of equal size in bytes
        os.utime(root / name, ns=(time, time))

    def look(expected, split="train", size=8):
        decoded.clear()
        data = diffusion.load_data(f"folder:{root}", split, size)
        assert sorted(decoded) == [f"{name}.bmp" for name in expected]
        return data

    write("train/a/1.bmp", "red"), write("train/b/2.bmp", "blue"), write("test/a/3.bmp", "grey")
    before = tree(root)
    first, second = look("12"), look("")
    assert all(map(torch.equal, first[:2], second[:2])) and first[2:] == second[2:]
    look("12", size=16), look("3", "test"), look(""), look("", size=16), look("", "test")
    assert tree(root) == before and len(list(root.parent.iterdir())) == 4        # photos and three caches

    write("train/a/1.bmp", "green", time=2)
    assert look("12").images[0, :, 0, 0].tolist() == list(COLOURS["green"])
    write("train/a/0.bmp", "grey")
    assert look("012").labels.tolist() == [0, 0, 1]
    (root / "train/a/1.bmp").unlink()
    assert look("02").labels.tolist() == [0, 1]
    (root / "train/a/0.bmp").rename(root / "train/b/3.bmp")                    # only the order is another
    assert look("23").images[:, 2, 0, 0].tolist() == [255, 90]
    look("")


def test_damaged_cache(tmp_path, decoded):
    """A cache that is not one is made again."""
    picture(tmp_path / "photos/1.png", "red")
    (tmp_path / "photos-train-8px.npz").write_bytes(b"PK not an archive")
    for _ in range(2):
        assert diffusion.load_data(f"folder:{tmp_path}/photos", "train", 8).images.shape == (1, 3, 8, 8)
    assert decoded == ["1.png"]


def test_no_cache(tmp_path, decoded, monkeypatch, capsys):
    """Where the cache can't be written, training goes on and one line says so; nothing half-written stays."""
    picture(tmp_path / "photos/1.png", "red")
    before = tree(tmp_path)

    def read_only(path, mode="r"):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(diffusion, "open", read_only, raising=False)
    for _ in range(2):
        assert diffusion.load_data(f"folder:{tmp_path}/photos", "train", 8).images.shape == (1, 3, 8, 8)
        assert "Permission denied" in (out := capsys.readouterr().out) and out.count("\n") == 1
    assert decoded == ["1.png"] * 2 and tree(tmp_path) == before


def test_skip_bad(tmp_path, capsys):
    """--skip-bad leaves out what can't be read, says how many, and trains on; it never becomes the cache."""
    for i in range(18):
        picture(tmp_path / "photos/train" / "ab"[i % 2] / f"{i:02}.png", "red" if i % 2 else "blue")
    torn, empty = tmp_path / "photos/train/a/04.png", tmp_path / "photos/train/b/05.png"
    torn.write_bytes(torn.read_bytes()[:40])
    empty.write_bytes(b"")
    spec = f"folder:{tmp_path}/photos"
    data = diffusion.load_data(spec, "train", 8, skip_bad=True)
    assert "left out 2" in capsys.readouterr().out
    assert data.labels.tolist() == [0] * 8 + [1] * 8
    assert (data.images[:, 0, 0, 0] == 255).long().equal(data.labels)
    assert run(tmp_path / "run", "--skip-bad --images 16", "--data", spec)["images"] == 16
    with pytest.raises(diffusion.UserError, match="0[45].png"):
        diffusion.load_data(spec, "train", 8)


def stand_in(monkeypatch, spec):
    """A tiny CIFAR in torchvision's layout under ./data -> {split: (images, labels, class names)}."""
    kind, K = getattr(torchvision.datasets, spec.upper()), int(spec[5:])
    rng, truth = np.random.default_rng(0), {}
    folder = Path("data") / kind.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for split in ("train", "test"):
        images, labels, files = [], [], []
        for name, _ in getattr(kind, f"{split}_list"):
            images.append(rng.integers(0, 256, (16, 3, 32, 32), np.uint8))
            labels.append(rng.integers(0, K, 16).tolist())
            pixels = {"data": images[-1].reshape(16, -1), "labels" if K == 10 else "fine_labels": labels[-1]}
            files.append([name, write(name, pixels)])
        monkeypatch.setattr(kind, f"{split}_list", files)
        truth[split] = torch.from_numpy(np.concatenate(images)), torch.tensor(labels).flatten()
    names = [f"class {k}" for k in range(K)]
    md5 = write(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})
    return {split: (*found, names) for split, found in truth.items()}


@pytest.mark.parametrize("spec", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, spec):
    """CIFAR through torchvision: both splits, labels, class names; resized where a size is asked.

    It did not run on the real thing: a few random images stand in, with torchvision's md5 lists patched.
    """
    monkeypatch.chdir(tmp_path)
    for split, (images, labels, names) in stand_in(monkeypatch, spec).items():
        data = diffusion.load_data(spec, split)
        assert torch.equal(data.images, images) and data.images.is_contiguous()
        assert torch.equal(data.labels, labels) and data.classes == names and data.masks is None
        small = diffusion.load_data(spec, split, 16).images
        halved = images.float().unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
        assert small.dtype == torch.uint8 and small.shape[2:] == (16, 16)
        assert (small.float() - halved).abs().mean() < 16          # picked, not averaged: 32
    assert run(tmp_path / "run", "--images 16 --image-size 32", "--data", spec)["images"] == 16


# --- batches ---

def config(flags=""):
    return train.parse_config([*BASE.split(), *flags.split()])


@pytest.fixture(scope="module")
def noise_data():
    """40 images of noise, no two alike, none its own mirror image."""
    images = torch.randint(256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 0, 255
    return diffusion.Data(images, torch.arange(40) % 10, None, SHAPES)


CPU = torch.device("cpu")


def batches(data, flags="", T=1000, **kw):
    return train.Batches(data, config(flags), T, CPU, **kw)


def test_batch_is_a_function_of_seed_and_step(noise_data):
    """A batch depends on (seed, step) alone: not on what was asked before. All of it changes with both."""
    a, b = batches(noise_data), batches(noise_data)
    first = {step: a(step) for step in range(6)}
    for step in (4, 0, 5, 5, 2, 1, 3):
        assert all(map(torch.equal, b(step), first[step])), step
    assert not any(map(torch.equal, first[0], first[1]))
    for seed in (1, 2, 1000, 2**32, 2**70):
        assert not any(map(torch.equal, batches(noise_data, f"--seed {seed}")(3), first[3])), seed


@pytest.mark.parametrize("world", [2, 4])
def test_shares_make_up_the_batch(noise_data, world):
    """The processes' shares, one after the other, are the batch of one process."""
    parts = [batches(noise_data, rank=rank, world=world) for rank in range(world)]
    whole = batches(noise_data)
    for step in range(3):
        for name, all_, *shares in zip("x0 t noise y".split(), whole(step), *(part(step) for part in parts)):
            assert len(shares[0]) == 16 // world and torch.equal(torch.cat(shares), all_), name


def test_fetching_ahead(noise_data):
    """Data that is not on the device gives the same batches, also after a jump."""
    here, ahead = batches(noise_data, "--resident"), batches(noise_data, "--no-resident")
    for step in (0, 1, 2, 7, 8, 3):
        assert all(map(torch.equal, here(step), ahead(step))), step


def test_batch_contents(noise_data):
    """x0 are images in [-1, 1], half of them flipped, a tenth of the labels dropped; t and noise are fair."""
    make, steps = batches(noise_data, "--batch-size 20", T=10), 200
    x0, t, noise, y = (torch.cat(parts) for parts in zip(*(make(step) for step in range(steps))))
    images = noise_data.images / 127.5 - 1
    both = torch.cat([images, images.flip(3)]).flatten(1)
    nearest = torch.cdist(x0.flatten(1), both).argmin(1)
    assert (x0.flatten(1) - both[nearest]).abs().max() < 1e-6
    assert x0.min() == -1 and x0.max() == 1
    flipped, picked, drop = nearest >= 40, nearest % 40, y == 10
    assert abs(flipped.float().mean() - 0.5) < 0.03
    assert picked.bincount(minlength=40).min() > 70                          # each about 100 times
    assert all(len(set(i.tolist())) == 20 for i in picked.split(20))         # none twice in a batch
    assert torch.equal(y[~drop], noise_data.labels[picked][~drop])
    assert abs(drop.float().mean() - 0.1) < 0.02
    counts = t.bincount(minlength=10)
    assert t.dtype == torch.int64 and len(counts) == 10 and counts.min() > 320        # each about 400 times
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert len(noise[:, 0, 0, :4].unique(dim=0)) == len(noise)               # none twice
    by_column = torch.stack([v.float().view(steps, 20).mean(0) for v in (flipped, drop)])
    assert (by_column - torch.tensor([[0.5], [0.1]])).abs().max() < 0.15     # not the same images every time
    pairs = torch.stack([flipped.float(), drop.float(), t.float(), noise[:, 0, 0, 0]])
    assert (pairs.corrcoef() - torch.eye(4)).abs().max() < 0.08              # and independent of each other


def test_no_labels(noise_data):
    """Without --conditional there is no y; the rest of the batch stays the same."""
    *a, y = batches(noise_data, "--no-conditional")(3)
    assert y is None and all(map(torch.equal, a, batches(noise_data)(3)[:3]))


# --- the loop ---

@pytest.mark.parametrize("start, half_life, rising", [(0, 10**6, True), (0, 64, True), (10**6, 160, False)])
def test_ema(start, half_life, rising):
    """The EMA's half-life is min(--ema, 5 % of the images seen): closed form in ramp-up, across, after."""
    cfg, n = config(f"--ema {half_life}"), 120
    net, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    nn.init.zeros_(ema.weight), nn.init.zeros_(ema.bias)
    values = [k if rising else 1.0 for k in range(1, n + 1)]
    for k, value in enumerate(values, 1):
        nn.init.constant_(net.weight, value), nn.init.constant_(net.bias, -value)
        train.update_ema(ema, net, cfg, start + 16 * k)
    halvings = [16 / min(half_life, (start + 16 * k) / 20) for k in range(1, n + 1)]
    expected = sum(value * (1 - 0.5 ** halvings[k]) * 0.5 ** sum(halvings[k + 1:])
                   for k, value in enumerate(values))
    if not rising:
        assert expected == pytest.approx(1 - 0.5 ** (n * 16 / half_life), abs=1e-9)
    assert (ema.weight - expected).abs().max() < 1e-5 * n and (ema.bias + expected).abs().max() < 1e-5 * n
    assert (net.weight == values[-1]).all()


def test_ema_in_the_loop(tmp_path, monkeypatch):
    """The checkpoint's EMA is the average of the weights after each step, begun at the first ones."""
    seen, update = [], train.update_ema

    def watch(ema, net, cfg, images):
        if not seen:
            seen.append({k: v.double().clone() for k, v in ema.state_dict().items()})
        seen.append({k: v.double().clone() for k, v in net.state_dict().items()})
        update(ema, net, cfg, images)
    monkeypatch.setattr(train, "update_ema", watch)
    state = run(tmp_path / "run", f"{MOVES} --images 800 --ema 30 --batch-size 32")
    expected = seen[0]
    for k, net in enumerate(seen[1:], 1):
        beta = 0.5 ** (32 / min(30, 32 * k / 20))
        expected = {name: beta * expected[name] + (1 - beta) * net[name] for name in net}
    assert len(seen) == 26 and same(state["model"], {k: v.float() for k, v in seen[-1].items()})
    assert error(state["ema"], expected) < 1e-6 < 1e-4 < error(state["ema"], state["model"])


def test_learning_rate(tmp_path, monkeypatch):
    """The rate rises over --warmup images and falls linearly to 1 % by --decay; the optimizer has it."""
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    state = run(tmp_path / "run", "--lr 0.01 --warmup 100 --decay 480 --images 560")
    rates = [record["lr"] for record in log(tmp_path / "run")[1]]
    seen = range(0, 560, 16)                        # before the step
    assert rates == pytest.approx([0.01 * min(1, i / 100) * max(1 - i / 480, 0.01) for i in seen], abs=1e-12)
    assert state["optimizer"]["param_groups"][0]["lr"] == rates[-1]
    run(tmp_path / "flat", "--lr 0.01 --warmup 16 --decay 1000000000 --images 64")
    assert [r["lr"] for r in log(tmp_path / "flat")[1]] == pytest.approx([0, 0.01, 0.01, 0.01], abs=1e-9)


def test_one_step(tmp_path, monkeypatch):
    """The first step by hand: the mean loss of its batch, the gradient of that mean, clipped, into AdamW."""
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    cfg = config("--model unet")
    state = run(tmp_path / "run", "--model unet --images 16")
    data = train.load_data("shapes", "train", 8)
    torch.manual_seed(train.mix(0))
    net, diffusion = train.build(cfg, 3, 10, CPU)
    x0, t, noise, y = train.Batches(data, cfg, 1000, CPU)(0)
    loss = diffusion.loss(net, x0, t, noise, y).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert norm > train.CLIP
    expected = {i: 0.1 * p.grad / norm for i, p in enumerate(net.parameters())}       # 0.1 = 1 - beta1
    assert error(moments(state), expected) < 1e-6
    assert losses(tmp_path / "run") == {16: pytest.approx(loss.item(), abs=1e-6)}


@each_model
def test_micro_batch(tmp_path, monkeypatch, model):
    """--micro-batch changes memory, not the result: weights, averages, gradients and loss stay within 1e-5.

    Not clipped, or a gradient of the wrong size would not show. With a larger eps in Adam: before a GroupNorm
    of one channel a group, a bias has no gradient but rounding noise, which Adam would turn into real steps.
    """
    monkeypatch.setattr(train, "CLIP", 1e9)
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-4))
    flags = f"--model {model} {MOVES} --images 96"
    whole, parts = (run(tmp_path / str(m), f"{flags} --micro-batch {m}") for m in (16, 4))
    fresh = run(tmp_path / "fresh", f"{flags} --images 16")
    assert error(whole["model"], fresh["model"]) > 1e-3
    for a, b in ((whole["model"], parts["model"]), (whole["ema"], parts["ema"]),
                 (moments(whole), moments(parts))):
        assert error(a, b) < 1e-5
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "16"), abs=1e-5)


@pytest.mark.parametrize("model, flags", [("unet", "--images 640"), ("dit", "--images 640"),
                                          ("uvit", "--images 2560 --batch-size 32")])
def test_learns(tmp_path, model, flags):
    """The loss falls within a short run, in each of the networks."""
    run(tmp_path / "run", f"--model {model} --lr 4e-3 --warmup 160 {flags}")
    first, *_, last = losses(tmp_path / "run").values()
    assert last < 0.85 * first


@each_model
def test_twins(tmp_path, monkeypatch, model):
    """A run and its baseline see the same images, noise and initial weights: equal until proj has moved."""
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    flags = f"--model {model} {MOVES} --images 128"
    on, off = (run(tmp_path / f"{f}twin", f"{flags} --{f}self-cond") for f in ("", "no-"))
    assert on["model"].keys() - off["model"].keys() == {"proj.1.weight", "proj.1.bias"}
    on, off = (list(losses(tmp_path / f"{f}twin").values()) for f in ("", "no-"))
    assert on[0] == off[0] and on[-1] != off[-1]


# --- contrastive self-distillation ---

DISTILL = f"{MOVES} --distill 0.5 --images 96"
NEUTRAL = torch.tensor([[1, .5, .5, 0]])


def test_contrast():
    """InfoNCE by its formula, image by image; in float32 also under autocast."""
    p, keys, own = torch.randn(3, 5), torch.randn(4, 5), torch.tensor([2, 0, 3])
    likeness = nn.functional.cosine_similarity(p[:, None], keys[None], dim=2) / 0.2
    expected = torch.stack([-(row[i].exp() / row.exp().sum()).log() for row, i in zip(likeness, own)])
    assert (diffusion.contrast(p, keys, own) - expected).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert (diffusion.contrast(p, keys, own) - expected).abs().max() < 1e-5


def test_augment():
    """A view is a part of the image, mirrored or not; neutral choices change nothing."""
    x0, u = torch.rand(2, 3, 16, 16) * 2 - 1, NEUTRAL.repeat(2, 1)
    assert (diffusion.augment(x0, u) - x0).abs().max() < 1e-5
    u[1, 3] = 1                                                              # only the second is mirrored
    view = diffusion.augment(x0, u)
    assert (view[0] - x0[0]).abs().max() < 1e-5 and (view[1] - x0[1].flip(2)).abs().max() < 1e-5
    ramp = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16)                    # from left to right
    u = NEUTRAL.repeat(2, 1)
    u[:, 0], u[0, 1], u[1, 1] = 0, 0, 1                                      # half the area: left, right
    left, right = diffusion.augment(ramp, u)
    assert -1 <= left.min() < -0.9 and 0.3 < left.max() < 0.45 and (left + right.flip(2)).abs().max() < 1e-5


def test_noisy_view(noise_data):
    """The other view follows from (seed, step), in shares too; it is of the same image, its t is small."""
    parts = [batches(noise_data, rank=rank, world=2) for rank in range(2)]
    whole, process = batches(noise_data), train.GaussianDiffusion()
    for step in (0, 3):
        x_t, t = whole.noisy_view(whole(step)[0], step, process)
        shares = zip(*(part.noisy_view(part(step)[0], step, process) for part in parts))
        assert all(torch.equal(torch.cat(a), b) for a, b in zip(shares, (x_t, t)))
        assert 0 <= t.min() and t.max() < train.TEACHER_T and len(t.unique()) > 8
    assert not torch.equal(t, whole.noisy_view(whole(0)[0], 0, process)[1])


@each_model
def test_student(model):
    """One forward pass of the student gives the network's answer and the projection of its z."""
    net, _ = train.build(config(f"--model {model} --distill 1 --image-size 16"), 3, 0, CPU)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    x, t = torch.randn(4, 3, 16, 16), torch.tensor([1, 5, 300, 900])
    eps, p = diffusion.Student(net.eval())(x, t)
    assert torch.equal(eps, net(x, t)) and torch.equal(p, net.projector(net.encode(x, t)))
    assert p.shape == (4, 128) and p.std() > 1e-3


@each_model
def test_distill(tmp_path, monkeypatch, model):
    """The first step by hand: both losses, the gradient of their sum, weighted; the rest starts as without.

    The teacher, at first a copy of the student, sees another view; the less noise, the more an image counts.
    """
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    flags, cfg = f"--model {model} --images 16", config(f"--model {model} --distill 0.5")
    state, plain = run(tmp_path / "run", f"{flags} --distill 0.5"), run(tmp_path / "plain", flags)
    torch.manual_seed(train.mix(0))
    net, process = train.build(cfg, 3, 10, CPU)
    make = train.Batches(train.load_data("shapes", "train", 8), cfg, 1000, CPU)
    x0, t, noise, y = make(0)
    eps, feats = net(x_t := process.add_noise(x0, t, noise), t, y, return_features=True)
    loss = (eps - process.to_target(x0, t, noise)).square().mean()
    z, keys = net.encode(x_t, t, y), net.encode(*make.noisy_view(x0, 0, process)).detach()
    apart = diffusion.contrast(net.projector(z), net.projector(keys).detach(), torch.arange(16))
    apart = (process.abar[t] * apart).mean()
    (loss + 0.5 * apart).backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in net.parameters()]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    expected = {i: 0.1 * g / norm.clamp(min=train.CLIP) for i, g in enumerate(grads)}
    assert error(moments(state), expected) < 1e-6
    record = log(tmp_path / "run")[1][0]
    assert (record["loss"], record["distill"]) == pytest.approx((loss.item(), apart.item()), abs=1e-5)
    assert "distill" not in log(tmp_path / "plain")[1][0]
    assert losses(tmp_path / "plain")[16] == record["loss"]
    assert {k for k in state["model"].keys() - plain["model"].keys() if "projector" not in k} == set()


def test_distill_fades(tmp_path, monkeypatch):
    """Its weight falls linearly to 0; from then on the teacher is not asked and the log has no loss of it."""
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    kind, steps, asked = torch.amp.GradScaler, [], []
    scale = kind.scale
    monkeypatch.setattr(kind, "scale", lambda self, x: steps.append(x.item()) or scale(self, x))
    monkeypatch.setattr(train, "teacher_keys", lambda *x: asked.append(1) or diffusion.teacher_keys(*x))
    run(tmp_path / "run", f"{DISTILL} --distill-images 48")
    records = log(tmp_path / "run")[1]
    assert ["distill" in r for r in records] == [True] * 3 + [False] * 3 and len(asked) == 3
    expected = [r["loss"] + w * r.get("distill", 0) for r, w in zip(records, (1/2, 1/3, 1/6, 0, 0, 0))]
    assert steps == pytest.approx(expected, abs=1e-5)


def test_distill_in_parts(tmp_path, monkeypatch, photos):
    """Parts of a batch and two processes equal one: keys come from the whole batch."""
    monkeypatch.setattr(train, "CLIP", 1e9)
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-4))
    whole, parts = (run(tmp_path / str(m), f"{DISTILL} --micro-batch {m}") for m in (16, 4))
    for a, b in ((whole["model"], parts["model"]), (moments(whole), moments(parts))):
        assert error(a, b) < 1e-5
    assert [r["distill"] for r in log(tmp_path / "4")[1]] == pytest.approx(
        [r["distill"] for r in log(tmp_path / "16")[1]], abs=1e-5)
    monkeypatch.undo()
    flags = f"{DISTILL} --distill-images 48 --data folder:{photos}"
    code, _, err = launch(*TORCHRUN, ROOT / "train.py", *argv(tmp_path / "two", flags))
    assert code == 0, err
    one, two = run(tmp_path / "one", flags), load(tmp_path / "two")
    assert error(moments(one), moments(two)) < 1e-5


def test_distill_resume(tmp_path, monkeypatch, capsys):
    """A distilled run resumes bit for bit, both losses too; sample.py and probe.py read it; so a baseline."""
    monkeypatch.setattr(train, "LOG_STEPS", 4)
    flags = f"{DISTILL} --distill-images 80"
    whole = run(tmp_path / "whole", flags)
    run(tmp_path / "run", f"{flags} --images 32")
    assert_same_run(run(tmp_path / "run", f"{flags} --resume"), whole)
    expected, found = ({r["images"]: r.get("distill") for r in log(tmp_path / name)[1]}
                       for name in ("whole", "run"))
    assert found.items() >= expected.items()
    with refused(capsys, "distill"):
        run(tmp_path / "run", f"{MOVES} --images 128 --resume")
    state, net, _ = train.load_run(tmp_path / "run", CPU)
    assert error(net.state_dict(), whole["ema"]) == 0 and hasattr(net, "projector")
    run(tmp_path / "baseline", f"{DISTILL} --no-self-cond")
    assert not hasattr(train.load_run(tmp_path / "baseline", CPU)[1], "proj")


def test_teacher_is_the_ema(tmp_path, monkeypatch):
    """The keys come from the EMA: other EMA weights change the distillation loss, the denoising loss not."""
    monkeypatch.setattr(train, "LOG_STEPS", 1)
    records = []
    for noise in (0, 0.1):
        state = run(tmp_path / str(noise), f"{DISTILL} --images 16")
        state["ema"] = {k: v + noise * torch.randn_like(v) for k, v in state["ema"].items()}
        torch.save(state, tmp_path / str(noise) / "checkpoint.pt")
        run(tmp_path / str(noise), f"{DISTILL} --images 32 --resume")
        records.append(log(tmp_path / str(noise))[1][-1])
    a, b = records
    assert a["images"] == 32 and a["loss"] == b["loss"] and abs(a["distill"] - b["distill"]) > 1e-3


# --- what a run leaves behind ---

@pytest.mark.parametrize("conditional, size", [(True, 8), (False, 16)])
def test_run_folder(tmp_path, capsys, conditional, size):
    """config.json, checkpoint.pt, log.jsonl, samples-<images>.png; the last line says where they lie."""
    out, flag = tmp_path / "some/run", "" if conditional else "--no-conditional"
    state = run(out, f"--images 340 --image-size {size} {flag}")
    assert {p.name for p in out.iterdir()} == {"config.json", "checkpoint.pt", "log.jsonl", "samples-352.png"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(str(out / name) in last for name in ("checkpoint.pt", "log.jsonl", "samples-352.png"))

    cfg = json.loads((out / "config.json").read_text())
    asked = asdict(train.parse_config(argv(out, f"--images 340 --image-size {size} {flag}")))
    assert cfg == asked == state["config"]
    assert set(state) >= {"step", "images", "config", "model", "ema", "optimizer", "scaler", "classes"}
    assert state["step"] == 22 and state["images"] == 352 and state["classes"] == SHAPES
    assert state["channels"] == 3 and state["num_classes"] == 10 * conditional

    head, rest = log(out)
    assert head["config"] == cfg and head["parameters"] == sum(v.numel() for v in state["model"].values())
    assert torch.__version__ in head["versions"] and "cpu" in head["device"]
    assert re.fullmatch("([0-9a-f]{40})?", head["commit"])
    assert [r["images"] for r in rest] == [320, 352]
    for record in rest:
        assert set(record) == {"images", "loss", "lr", "images_per_second", "seconds"}
        assert 0 < record["loss"] < 2 and record["images_per_second"] > 0 <= record["seconds"]

    with Image.open(out / "samples-352.png") as image:                   # tiles of 64 px, 4 px between them
        assert image.size == ((10 if conditional else 8) * 68 + 4, 8 * 68 + 4)
        assert image.mode == "RGB" and len(image.getcolors(10**6)) > 100


def test_image_size_is_kept(tmp_path):
    """The size that the data chose by itself stands in the checkpoint and in config.json."""
    flags = "--size tiny --data shapes --images 16 --batch-size 16 --device cpu --out"
    train.main([*flags.split(), str(tmp_path / "run")])
    assert load(tmp_path / "run")["config"]["image_size"] == 16
    assert json.loads((tmp_path / "run/config.json").read_text())["image_size"] == 16


def test_how_often(tmp_path, monkeypatch):
    """--save-every and --sample-every count images; both happen once more at the end."""
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda part, path: (written.append(path.name), replace(part, path)))
    run(tmp_path / "run", "--images 160 --save-every 40 --sample-every 64")
    written = [name for name in written if name != "log.jsonl"]
    assert written == ["config.json", "checkpoint.pt", "samples-64.png", "checkpoint.pt",
                       "checkpoint.pt", "samples-128.png", "checkpoint.pt", "samples-160.png"]


def test_preview(tmp_path, monkeypatch):
    """A sample grid: EMA weights in eval mode, a class a column, guidance, noise of the seeds 0, 1, 2 ..."""
    calls, sample = [], train.GaussianDiffusion.sample

    def watch(self, net, noise, y, **kw):
        calls.append((net.state_dict(), net.training, noise, y, kw))
        return sample(self, net, noise, y, **kw)
    monkeypatch.setattr(train.GaussianDiffusion, "sample", watch)
    state = run(tmp_path / "a", "--images 64")
    run(tmp_path / "b", "--images 16 --no-conditional")
    weights, training, noise, y, kw = calls[0]
    assert same(weights, state["ema"]) and not training
    assert y.tolist() == list(range(10)) * 8 and kw == dict(null=10, guidance=train.GUIDANCE, clip=True)
    for i in (0, 33, 79):
        assert torch.equal(noise[i], torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)))
    assert len(calls[1][2]) == 64 and calls[1][3] is None and calls[1][4]["guidance"] == 1


def test_load_run(tmp_path):
    """load_run gives the EMA network, in eval mode, and the run's diffusion."""
    state = run(tmp_path / "run", f"{MOVES} --model uvit")
    found, net, diffusion = train.load_run(tmp_path / "run", CPU)
    assert same(net.state_dict(), state["ema"]) and error(state["ema"], state["model"]) > 1e-5
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert diffusion.target == "v" and found["config"] == train.Config(**state["config"])


# --- budgets ---

def test_minutes(tmp_path, monkeypatch):
    """--minutes ends a run by the clock; with --images, whichever comes first does."""
    ticks = iter(range(10_000))                      # a look at the clock takes 1 s
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(ticks)))
    flags = argv(tmp_path / "a", "--minutes 0.5")
    i = flags.index("--images")
    train.main(flags[:i] + flags[i + 2:])
    assert 16 <= load(tmp_path / "a")["images"] <= 30 * 16
    assert run(tmp_path / "b", "--minutes 100 --images 32")["images"] == 32
    assert run(tmp_path / "c", "--minutes 0.5 --images 100000")["images"] <= 30 * 16


# --- stop and go on ---

NETS = {"dit": "--model dit", "dropout": "--model unet", "half": "--model dit --precision fp16"}


@pytest.mark.parametrize("kind", NETS)
def test_resume(tmp_path, monkeypatch, kind):
    """Stopped between two log points and resumed, a run equals an uninterrupted one, bit for bit.

    Weights, EMA, optimizer, loss scale and logged losses; a UNet with dropout, a DiT, and one in fp16.
    """
    monkeypatch.setattr(train, "LOG_STEPS", 4)
    monkeypatch.setitem(train.UNet.SIZES, "tiny", {**train.UNet.SIZES["tiny"], "dropout": 0.3})
    flags = f"{MOVES} {NETS[kind]}"
    whole = run(tmp_path / "whole", f"{flags} --images 160")
    run(tmp_path / "run", f"{flags} --images 80")
    run(tmp_path / "run", f"{flags} --images 80 --resume")           # nothing left to do: nothing changes
    assert_same_run(run(tmp_path / "run", f"{flags} --images 160 --resume --save-every 48"), whole)
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert list(expected) == [64, 128, 160] and {i: found[i] for i in expected} == expected


def test_resume_without_checkpoint(tmp_path):
    """--resume where there is no checkpoint starts afresh, whatever else lies there."""
    whole = run(tmp_path / "whole")
    assert_same_run(run(tmp_path / "new", "--resume"), whole)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/log.jsonl").write_text('{"config": {}}\n{"images": 16, "loss": 9}\n{"images": 999}\n')
    (tmp_path / "old/checkpoint.pt.part").write_bytes(b"half a file")
    assert_same_run(run(tmp_path / "old", "--resume"), whole)
    assert losses(tmp_path / "old") == losses(tmp_path / "whole")
    assert log(tmp_path / "old")[0]["config"]["model"] == "dit"
    assert {p.name for p in (tmp_path / "old").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_resume_elsewhere(tmp_path):
    """A run folder may be moved, and resumed with another budget, micro-batch and rhythm of saving."""
    run(tmp_path / "a", "--images 32")
    (tmp_path / "a").rename(tmp_path / "b")
    state = run(tmp_path / "b", "--images 64 --resume --micro-batch 8 --save-every 16 --sample-every 16")
    assert state["images"] == 64 and state["config"]["out"] == str(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text()) == state["config"]


def test_resume_in_another_precision(tmp_path):
    """--precision may change on the way: from fp32 to fp16, with its loss scale, and back."""
    run(tmp_path / "run", "--images 32")
    assert run(tmp_path / "run", "--images 64 --resume --precision fp16")["scaler"]["scale"] > 1
    assert run(tmp_path / "run", "--images 96 --resume --precision fp32")["images"] == 96


DIE = """
import io, os, signal, sys, torch, train
train.LOG_STEPS, saves = 4, []
update, save, replace = train.update_ema, torch.save, os.replace
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def between(ema, net, cfg, images):             # two log points after the save at 160 images
    update(ema, net, cfg, images)
    images == 304 and die()
def during(state, file):                        # half of the second checkpoint is on the disk
    saves.append(0)
    save(state, whole := io.BytesIO())
    file.write(whole.getvalue()[:len(whole.getvalue()) // len(saves)]), file.flush(), os.fsync(file.fileno())
    len(saves) == 2 and die()
def before(part, path):                         # the second checkpoint is written but not in its place
    path.name == "checkpoint.pt" and saves.append(0)
    len(saves) == 2 and die()
    replace(part, path)
owner, name = dict(between=(train, "update_ema"), during=(torch, "save"), before=(os, "replace"))[sys.argv[1]]
setattr(owner, name, globals()[sys.argv[1]])
train.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def long_run(photos, tmp_path_factory):
    """A run of 400 images, logged every 64, saved every 160 -> its flags, checkpoint, losses."""
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("run")
    speed_up(patch)
    patch.setattr(train, "LOG_STEPS", 4)
    flags = f"{MOVES} --save-every 160 --images 400 --data folder:{photos}"
    state = run(out / "whole", flags)
    patch.undo()
    return flags, state, losses(out / "whole")


@pytest.mark.parametrize("moment", ["between", "during", "before"])
def test_kill(tmp_path, monkeypatch, long_run, moment):
    """Killed between two saves or during one, a run goes on bit for bit; nothing is logged twice."""
    flags, whole, expected = long_run
    out = tmp_path / "run"
    code, *_ = launch("-c", DIE, moment, *argv(out, flags))
    assert code == -signal.SIGKILL and load(out)["images"] == 160
    assert (out / "checkpoint.pt.part").exists() == (moment != "between")
    with open(out / "log.jsonl", "a") as file:
        file.write('{"images": 352, "lo')                # a line that was being written
    assert max(json.loads(x)["images"] for x in (out / "log.jsonl").read_text().splitlines()[1:-1]) > 160
    monkeypatch.setattr(train, "LOG_STEPS", 4)
    assert_same_run(run(out, flags + " --resume"), whole)
    assert losses(out) == expected and not list(out.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3, 4, 5])
def test_kill_any_time(tmp_path, photos, seconds):
    """Killed at any time, a run resumes, and ends where an uninterrupted one ends."""
    flags = f"{MOVES} --images 2000 --save-every 16 --data folder:{photos}"
    out, command = tmp_path / "run", [sys.executable, ROOT / "train.py", *argv(tmp_path / "run", flags)]
    with pytest.raises(subprocess.TimeoutExpired):       # subprocess.run then kills it
        subprocess.run(command, timeout=seconds, capture_output=True)
    assert_same_run(run(out, flags + " --resume"), run(tmp_path / "whole", flags))
    assert losses(out) == losses(tmp_path / "whole")


# --- several processes ---

@pytest.mark.parametrize("model", ["dit", pytest.param("uvit", marks=pytest.mark.slow)])
def test_two_processes(tmp_path, photos, model):
    """Two processes equal one: weights, averages, gradients and loss within 1e-5; so in parts of a batch."""
    flags = f"--model {model} {MOVES} --images 160 --data folder:{photos} --conditional"
    one = run(tmp_path / "one", flags)
    code, out, err = launch(*TORCHRUN, ROOT / "train.py", *argv(tmp_path / "two", flags + " --micro-batch 4"))
    assert code == 0, err
    two = load(tmp_path / "two")
    assert two["images"] == 160 and max(v.abs().max() for v in moments(one).values()) > 1e-3
    assert error(one["model"], one["ema"]) > 1e-4
    for a, b in ((one["model"], two["model"]), (one["ema"], two["ema"]), (moments(one), moments(two))):
        assert error(a, b) < 1e-5
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert out.count("images in") == out.count("2 x cpu") == 1                  # the first one speaks
    assert log(tmp_path / "two")[0]["device"].startswith("2 x cpu")


OWN_CLOCKS = """
import os, sys, time, types, train
pace = (1, 1000)[int(os.environ["RANK"])]
train.time = types.SimpleNamespace(time=lambda: time.time() * pace)
train.main(sys.argv[1:])
"""


def test_minutes_of_two_processes(tmp_path, photos):
    """With --minutes both stop at the same step, though the second one's clock runs 1000 times as fast."""
    (tmp_path / "main.py").write_text(OWN_CLOCKS)
    flags = argv(tmp_path / "run", f"--minutes 0.15 --images 100000 --data folder:{photos}")
    code, out, err = launch(*TORCHRUN, tmp_path / "main.py", *flags, timeout=90)
    assert code == 0, err
    assert 16 < load(tmp_path / "run")["images"] < 100_000
    assert out.count("images in") == 1


def test_bad_input_of_two_processes(tmp_path):
    """What only the first process can see ends both: one sentence, no traceback of ours, nothing written."""
    flags = argv(tmp_path / "run", f"--data folder:{tmp_path}/missing")
    code, _, err = launch(*TORCHRUN, ROOT / "train.py", *flags, timeout=60)
    assert code != 0 and err.count("error: ") == 1 and f"{tmp_path}/missing has no train images" in err, err
    assert tree(tmp_path) == {} and 'train.py", line' not in err, err


def test_processes_and_batch(tmp_path, monkeypatch, capsys):
    """A batch that the processes can't share evenly is refused, with both numbers; only the first speaks."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with refused(capsys, "--batch-size 16", "3 processes"):
        train.main(argv(tmp_path / "run"))
    with refused(capsys, "--micro-batch 2", "5"):
        train.main(argv(tmp_path / "run", "--batch-size 15 --micro-batch 2"))
    assert tree(tmp_path) == {}
    monkeypatch.setenv("RANK", "1")
    diffusion.say("not said"), diffusion.say("not said", file=sys.stderr)
    assert capsys.readouterr() == ("", "")


# --- bad input ---

@pytest.mark.parametrize("flags, words", [
    ("--data nonsense", "nonsense cifar10 folder: shapes"),
    ("--data shapes:half", "shapes:half shapes:full"),
    ("--model dit --image-size 10", "dit tiny 10 4"),
    ("--model uvit --image-size 10", "uvit tiny 10 4"),
    ("--model unet --image-size 10", "unet tiny 10 4"),
    ("--model unet --size base --image-size 12", "unet base 12 8"),
    ("--model dit --image-size 2", "2 4"),
    ("--batch-size 401", "--batch-size 401 400"),
    ("--micro-batch 5", "--micro-batch 5 16"),
    ("--micro-batch 32", "--micro-batch 32 16"),
    ("--model resnet", "--model resnet unet uvit dit"),
    ("--size huge", "--size huge dit tiny small base large xlarge"),
    ("--model unet --size small", "--size small unet tiny base"),
    ("--target x0", "--target x0 eps v"),
    ("--schedule sigmoid", "--schedule sigmoid linear cosine"),
    ("--precision fp8", "--precision fp8 bf16 fp16 fp32"),
    ("--images many", "--images many"),
    ("--images 1.5", "--images 1.5"),
    ("--distill-images 9", "--distill-images --distill 0.02"),
    ("--bogus", "--bogus --help"),
    ("--device cuda", "--device cuda cpu"),
    ("--device mps", "--device mps cpu"),
    ("--device tpu", "--device tpu cpu"),
    ("--lr nan", "--lr nan 0"),
    ("--seed 1e3", "--seed 1e3"),
    ("--seed -1", "--seed -1"),
    *[(f"--{name} {value}", f"--{name} {value} 0") for name, values in {
        "images": (0, -5), "batch-size": (0, -16), "micro-batch": (0, -1), "lr": (0.0, -0.1), "warmup": (0,),
        "decay": (0, -1), "ema": (0, -1), "minutes": (0.0, -1.0), "save-every": (0,), "sample-every": (-1,),
        "image-size": (0, -8), "distill": (0.0,), "distill-images": (0,)}.items() for value in values],
])
def test_bad_flags(tmp_path, monkeypatch, capsys, flags, words):
    """What can't be is refused in one sentence that names the value and what can; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with refused(capsys, *words.split()):
        train.main(argv("run", flags))
    assert tree(tmp_path) == {}


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


def folder_case(root, case):
    """Makes one of the folders that won't do -> what the sentence should name."""
    if case == "no images":
        (root / "notes.txt").write_text("no image")
        return ["photos", "no images"]
    if case == "empty train":
        (root / "train").mkdir()
        return ["train", "no images", "train/<class>/"]
    if case == "no classes":
        picture(root / "train/1.png", "red")
        return ["train", "train/<class>/"]
    if case == "empty classes":
        (root / "train/a").mkdir(parents=True), (root / "train/b").mkdir()
        return ["train", "no images"]
    for i in range(16):
        picture(root / "train" / "ab"[i % 2] / f"{i}.png", "red")
    if case == "new class in test":
        picture(root / "test/unknown/1.png", "red")
        return ["unknown", "test", "train"]
    if case == "unreadable":
        (root / "train/b/7.png").write_bytes(b"this is no image")
        return [str(root / "train/b/7.png"), "--skip-bad"]
    if case == "all unreadable":
        for path in root.rglob("*.png"):
            path.write_bytes(path.read_bytes()[:50])
        return ["--skip-bad"]
    (root.parent / "flat").mkdir()
    for path in sorted(root.rglob("*.png")):
        path.rename(root / path.name)
    for name in ("train/a", "train/b", "train"):
        (root / name).rmdir()
    return ["--conditional", "one"]


@pytest.mark.parametrize("case", ["no images", "empty train", "no classes", "empty classes", "one class",
                                  "new class in test", "unreadable", "all unreadable"])
def test_bad_folder(tmp_path, capsys, case):
    """A folder that won't do is refused in one sentence; nothing is written."""
    (tmp_path / "photos").mkdir()
    words = folder_case(tmp_path / "photos", case)
    before = tree(tmp_path)
    with refused(capsys, *words):
        train.main(argv(tmp_path / "run", "--conditional", "--data", f"folder:{tmp_path}/photos"))
    assert {k: v for k, v in tree(tmp_path).items() if not k.endswith(".npz")} == before


def test_all_bad(tmp_path, capsys):
    """A folder of nothing but unreadable images is refused with --skip-bad as well; so is a missing one."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.png").write_bytes(b"this is no image")
    for name, word in (("photos", "none"), ("missing", "no train images")):
        with refused(capsys, str(tmp_path / name), word):
            train.main(argv(tmp_path / "run", "--skip-bad", "--data", f"folder:{tmp_path}/{name}"))
    assert set(tree(tmp_path)) == {"photos", "photos/1.png"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The files of a finished run of 32 images."""
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("finished") / "run"
    speed_up(patch)
    run(out, "--images 32")
    patch.undo()
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.fixture
def old_run(tmp_path, finished):
    """A copy of it -> its folder."""
    (tmp_path / "run").mkdir()
    for name, content in finished.items():
        (tmp_path / "run" / name).write_bytes(content)
    return tmp_path / "run"


def test_never_overwritten(tmp_path, old_run, capsys):
    """An existing run, or any folder that isn't empty, is refused without --resume and stays as it is."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("do not lose me")
    (tmp_path / "file").write_text("do not lose me")
    before = tree(tmp_path)
    for out in ("run", "other", "file"):
        with refused(capsys, str(tmp_path / out), "--resume", "--out"):
            train.main(argv(tmp_path / out))
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "--images 16")["images"] == 16


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("case", ["torn", "empty", "text", "tensor", "other", "pickle", "evil", "headless"])
def test_bad_checkpoint(old_run, capsys, case):
    """What is no whole checkpoint is refused by name; nothing in it is run, and the folder stays as it is."""
    path, state = old_run / "checkpoint.pt", load(old_run)
    whole, evil = path.read_bytes(), {**state, "more": Evil(old_run / "pwned")}
    content = {"torn": whole[:len(whole) // 2], "empty": b"", "text": b"a text\n" * 99,
               "pickle": pickle.dumps(Evil(old_run / "pwned"), protocol=2), "tensor": torch.zeros(3),
               "other": {"weights": {}}, "evil": evil, "headless": {**state}}
    del content["headless"]["model"]
    if isinstance(content[case], bytes):
        path.write_bytes(content[case])
    else:
        torch.save(content[case], path)
    before = tree(old_run)
    with refused(capsys, str(path)):
        train.main(argv(old_run, "--resume --images 64"))
    assert tree(old_run) == before


@pytest.mark.parametrize("flags, words", [
    ("--model uvit", "model dit"), ("--size small", "size tiny"), ("--image-size 12", "image_size 8"),
    ("--data shapes:full", "shapes"), ("--no-self-cond", "self_cond True"), ("--target eps", "target v"),
    ("--schedule linear", "schedule cosine"), ("--no-conditional", "conditional True"),
    ("--seed 1", "seed 0"), ("--batch-size 32", "batch_size 16"),
    ("--decay 7", f"decay {train.TINY_IMAGES['dit']}"),
    *[(f"--{name} 7", f"{name} {train.TINY_SHAPES[name]}") for name in ("lr", "ema", "warmup")]])
def test_another_run(old_run, capsys, flags, words):
    """A checkpoint of another experiment is refused, with the flag that differs; the folder stays."""
    before = tree(old_run)
    with refused(capsys, str(old_run / "checkpoint.pt"), *words.split()):
        train.main(argv(old_run, f"--resume --images 64 {flags}"))
    assert tree(old_run) == before


def test_another_network(old_run, capsys, monkeypatch):
    """So is one whose weights don't fit, as after a change of SIZES."""
    monkeypatch.setitem(train.DiT.SIZES, "tiny", {**train.DiT.SIZES["tiny"], "depth": 2})
    before = tree(old_run)
    with refused(capsys, str(old_run / "checkpoint.pt")):
        train.main(argv(old_run, "--resume --images 64"))
    assert tree(old_run) == before


def full_disk(monkeypatch, how):
    """From now on checkpoints can't be written: the disk is full, seen by Python, by torch or at the end."""
    full, save, fsync = OSError(ENOSPC, "No space left on device"), torch.save, os.fsync
    if how == "fsync":
        def sync(file):
            if armed:
                raise full
            fsync(file)
        armed = []
        monkeypatch.setattr(torch, "save", lambda *args: (save(*args), armed.append(1)))
        monkeypatch.setattr(os, "fsync", sync)
    else:
        def half(state, file):
            file.write(b"half a checkpoint")
            raise full if how == "write" else RuntimeError("PytorchStreamWriter failed writing file")
        monkeypatch.setattr(torch, "save", half)


@pytest.mark.parametrize("how", ["write", "torch", "fsync", "limit"])
def test_full_disk(old_run, capsys, monkeypatch, how):
    """A full disk while saving: one sentence; the last good checkpoint stays, byte for byte; no litter.

    Also with a real limit on the size of a file in the place of the disk ("limit").
    """
    before = (old_run / "checkpoint.pt").read_bytes()
    with refused(capsys, str(old_run / "checkpoint.pt"), "--resume", late=True):
        if how == "limit":
            resource = pytest.importorskip("resource")
            old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, old[1]))
        else:
            full_disk(monkeypatch, how)
        try:
            train.main(argv(old_run, "--resume --images 64"))
        finally:
            if how == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (old_run / "checkpoint.pt").read_bytes() == before and not list(old_run.glob("*.part"))
    assert load(old_run)["images"] == 32
    monkeypatch.undo()
    speed_up(monkeypatch)
    assert_same_run(run(old_run, "--resume --images 64"), run(old_run.parent / "whole", "--images 64"))


def test_log_not_writable(old_run, capsys, monkeypatch):
    """A log that can't be written ends the run with one sentence that names it; the checkpoint stays."""
    def full(path, mode):
        if "log.jsonl" in path.name:
            raise OSError(ENOSPC, "No space left on device")
        return open(path, mode)
    monkeypatch.setattr(diffusion, "open", full, raising=False)
    with refused(capsys, "No space left", str(old_run / "log.jsonl"), late=True):
        train.main(argv(old_run, "--resume --images 64"))
    assert load(old_run)["images"] == 32


def test_folder_not_writable(tmp_path, capsys):
    """An --out where nothing can be written is refused with its name."""
    (tmp_path / "file").write_text("")
    with refused(capsys, str(tmp_path / "file/run")):
        train.main(argv(tmp_path / "file/run"))


@pytest.mark.parametrize("log_steps, step, value, interval, kept", [
    (4, 9, "nan", ("128", "192"), 128),         # seen at a log point
    (20, 9, "inf", ("0", "192"), 128),          # seen before a save: it does not become the checkpoint
    (20, 1, "nan", ("0", "64"), None),          # before the first save
])
def test_not_finite(tmp_path, capsys, monkeypatch, log_steps, step, value, interval, kept):
    """A loss that is not finite stops the run, names the interval, and leaves the last good checkpoint."""
    calls, loss = [], train.GaussianDiffusion.loss

    def spoilt(self, *args):
        calls.append(1)
        return loss(self, *args) * (float(value) if len(calls) == step else 1)
    monkeypatch.setattr(train, "LOG_STEPS", log_steps)
    monkeypatch.setattr(train.GaussianDiffusion, "loss", spoilt)
    out = tmp_path / "run"
    with refused(capsys, "not finite", *interval, str(out / "checkpoint.pt"), "--lr", late=True):
        train.main(argv(out, "--save-every 64 --images 800"))
    assert (out / "checkpoint.pt").exists() == (kept is not None) and not list(out.glob("*.png"))
    if kept:
        state = load(out)
        assert state["images"] == kept
        assert all(v.isfinite().all() for name in ("model", "ema") for v in state[name].values())
    assert all(np.isfinite(x) for x in losses(out).values())


def test_rate_too_high(tmp_path, capsys):
    """--lr 1e30 ends so, between the log points as well as at one; nothing is drawn."""
    for more, interval in (("", "between 0 and 320 images"), ("--save-every 64", "between 0 and 64 images")):
        out = tmp_path / f"run{more}"
        with refused(capsys, "not finite", interval, "--lr", late=True):
            train.main(argv(out, f"--lr 1e30 --warmup 1 --images 800 {more}"))
        assert set(tree(out)) == {"config.json", "log.jsonl"} and losses(out) == {}


def test_gradient_not_finite(tmp_path, capsys, monkeypatch):
    """A gradient that is not finite, under a loss that is, does not reach the checkpoint either."""
    calls, loss = [], train.GaussianDiffusion.loss

    def spoilt(self, *args):
        calls.append(1)
        result = loss(self, *args)
        result.register_hook(lambda grad: grad * (float("nan") if len(calls) == 8 else 1))
        return result
    monkeypatch.setattr(train.GaussianDiffusion, "loss", spoilt)
    with refused(capsys, "not finite", late=True):
        train.main(argv(tmp_path / "run", "--save-every 64 --images 800"))
    assert load(tmp_path / "run")["images"] == 64


# --- device and precision ---

@pytest.mark.parametrize("there, expected", [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")])
def test_device(monkeypatch, there, expected):
    """Without --device: cuda, then mps, then cpu; a flag overrides."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert train.setup(None)[0].type == expected and train.setup("cpu") == (CPU, 0, 1)


def test_half_precision(tmp_path):
    """bf16 and fp16 are really on, learn the same to their precision, and keep the weights in fp32."""
    states = {p: run(tmp_path / p, f"--precision {p} {MOVES} --images 160") for p in ("fp32", "bf16", "fp16")}
    exact = losses(tmp_path / "fp32")[160]
    for name in ("bf16", "fp16"):
        assert 0 < abs(losses(tmp_path / name)[160] - exact) < 0.01
        assert all(v.dtype == torch.float32 for v in states[name]["model"].values())
        assert 1e-6 < error(states[name]["model"], states["fp32"]["model"]) < 0.02
    assert states["fp16"]["scaler"] and not states["bf16"]["scaler"]


def test_precision_that_fails(tmp_path, monkeypatch, capsys):
    """Where an autocast type does not work, one line says so and the run is one in fp32."""
    def autocast(*args, **kwargs):
        raise RuntimeError("no such instruction")
    exact = run(tmp_path / "fp32", MOVES)
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch, "autocast", autocast)
        capsys.readouterr()
        state = run(tmp_path / name, f"{MOVES} --precision {name}")
        said = [line for line in capsys.readouterr().out.splitlines() if "no such instruction" in line]
        assert len(said) == 1 and name in said[0] and "fp32" in said[0]
        assert same(state["model"], exact["model"]) and not state["scaler"]


def test_compile_is_off(tmp_path, capsys):
    """On a CPU torch.compile is off, and one line says so, unless --no-compile asked for it."""
    assert run(tmp_path / "a", "--images 16 --compile")["images"] == 16
    assert capsys.readouterr().out.count("torch.compile is off") == 1
    run(tmp_path / "b", "--images 16 --no-compile")
    assert "torch.compile" not in capsys.readouterr().out


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
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


def test_group_norm():
    """The UNet's GroupNorm has the values and gradients of nn.GroupNorm, whose place it takes on CUDA."""
    torch.manual_seed(0)
    norm, x = torch.nn.GroupNorm(4, 12), 3 * torch.randn(2, 12, 5, 5) + 2
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-13)):
        found = []
        for cls in (torch.nn.GroupNorm, unet_selfcond.GroupNorm):
            norm.__class__, h = cls, x.to(dtype).requires_grad_()
            out = norm.to(dtype)(h)
            found.append([out, *torch.autograd.grad(out.square().sum(), [h, norm.weight, norm.bias])])
        for a, b in zip(*found):
            assert a.dtype == b.dtype == dtype and (a - b).abs().max() < tolerance * max(1, b.abs().max())
    flat = torch.full((2, 12, 32, 32), 7.3)                                # of variance 0, but for rounding
    assert (norm.float()(flat * torch.tensor([1, 41])[:, None, None, None])).isfinite().all()
    norm, x = norm.float(), (x + 100).bfloat16()                           # no mean is taken in bf16
    expected = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double())
    assert norm(x).dtype == torch.bfloat16 and (norm(x) - expected).abs().max() < 0.02
    kinds = {type(m) for m in train.build(config("--model unet"), 3, 0, CPU)[0].modules()}
    assert torch.nn.GroupNorm in kinds and unet_selfcond.GroupNorm not in kinds


# --- --bench ---

@each_model
def test_bench(tmp_path, capsys, model):
    """--bench says images/s, ms, FLOPs and seconds, and leaves the run's folder as it is."""
    run(tmp_path / "run", f"--model {model} --images 16")
    before = tree(tmp_path)
    capsys.readouterr()
    start = time.time()
    train.main(argv(tmp_path / "run", f"--model {model} --bench"))
    said, took = capsys.readouterr().out, time.time() - start
    assert tree(tmp_path) == before and f"{model} tiny, batch 16" in said and torch.__version__ in said
    speed, ms, flops, rate, ready = (float(found.replace(",", "")) for found in re.search(
        r"([\d,]+) images/s, ([\d.]+) ms a step\n([\d.]+) GFLOPs an image: ([\d.]+) TFLOP/s\n"
        r"([\d.]+) s from the start to the end of the first step$", said.strip()).groups())
    assert speed == pytest.approx(16 / ms * 1000, rel=0.02) and speed > 30 * 16 / took
    assert rate == pytest.approx(speed * flops / 1000, abs=0.01) and 0 < ready <= time.time() - train.START


def test_bench_flops(tmp_path, monkeypatch):
    """The FLOPs of --bench are those of a forward and a backward pass of one image, counted here by hand."""
    found = []
    monkeypatch.setattr(train, "report", lambda cfg, speed, flops, *rest: found.append(flops))
    train.main(argv(tmp_path / "run", "--bench --no-conditional --image-size 32"))
    D, N, depth, patch = 128, 64, 6, 3 * 4 * 4               # --size tiny, 32 x 32 pixels, patches of 4
    tokens = N * D * (2 * patch + depth * 12 * D)            # multiply-adds: patches, and 12 D a block
    once = 256 * D + D * D + D * D + depth * 6 * D * D + 2 * D * D       # time_mlp, proj, modulations
    forward = 2 * (tokens + once + depth * 2 * N * N * D)
    known = 2 * (N * D * patch + 256 * D)                    # the gradients of what came in are not needed
    assert found[0] == pytest.approx(3 * forward - known, rel=0.01)


def test_as_a_script(tmp_path, photos):
    """python train.py works from another folder; bad input ends it with 2 and one line."""
    flags = argv(tmp_path / "run", f"--data folder:{photos} --batch-size 64")
    code, _, err = launch(ROOT / "train.py", *flags)
    assert code == 2 and err == "error: --batch-size 64 is more than the 40 images: use a smaller one.\n"
