"""sample.py on two small runs: what reaches the network, what is written, what is refused."""
import errno
import os
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.distributed.run import get_args_parser

import sample
import train
from conftest import (CPU, ROOT, TORCHRUN, end, error, few_shapes, load, picture, refused, small_run, start,
                      tree)
from diffusion import GaussianDiffusion

FEW = 20                                            # training images of the runs
NONE = 10                                           # "no class"


def levels(x):
    """Images (N, C, H, W) in [-1, 1] -> (N, H, W, C) in 0..255, not rounded."""
    return ((x.double().permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255)


def noises(seeds, count):
    """The first count noises (N, 3, 16, 16) of every seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.stack([torch.randn(3, 16, 16, generator=g) for g in generators]) for _ in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of two runs, "classes", a UNet, and "free", a DiT without classes, and of their variants."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        few_shapes(patch, FEW)
        small_run(root / "classes", "unet", ["ema"])
        small_run(root / "free", "dit --no-conditional --schedule linear", ["ema"])
    for i, colour in enumerate(["red", "green", "blue"]):
        picture(root / f"data/{i}.png", colour, size=(16, 16))
    (root / "data/bad.png").write_bytes(b"No image.")
    classes, free = load(root / "classes"), load(root / "free")
    latents = dict(vae="none", shape=[3, 16, 16], classes=["a"], mean=[0.0] * 3, std=[1.0] * 3)
    photos = dict(data=f"folder:{root / 'data'}", skip_bad=True)
    changed = {
        "photos": {**classes, "config": {**classes["config"], **photos}},
        "gone": {**free, "config": {**free["config"], "data": "folder:not-here"}},
        "latents": {**free, "latents": latents}, "network": {**free, "ema": classes["ema"]},
        "pickle": dict(config={}, ema=SimpleNamespace()), "other dict": dict(weight=torch.zeros(1))}
    for name in (*changed, "empty", "truncated", "text"):
        (root / name).mkdir()
    for name, state in changed.items():
        torch.save(state, root / name / "checkpoint.pt")
    whole = (root / "free/checkpoint.pt").read_bytes()
    (root / "truncated/checkpoint.pt").write_bytes(whole[:len(whole) // 2])
    (root / "text/checkpoint.pt").write_bytes(b"Not a checkpoint.")
    return root


def main(folder, flags):
    sample.main([str(folder), "--device", "cpu", *flags.split()])


def draw(folder, flags):
    """-> samples (N, H, W, C) uint8, by way of samples.npz."""
    (folder / "samples.npz").unlink(missing_ok=True)
    main(folder, f"--npz {flags}")
    archive = np.load(folder / "samples.npz")
    assert archive.files == ["arr_0"]
    return archive["arr_0"]


def opened(folder, flags):
    """-> the arguments of sample.draw as main makes them, without indices; what the network will be given."""
    args = sample.parse([str(folder), *flags.split()])
    state, net, diffusion = train.load_run(folder, CPU)
    ids = sample.class_ids(args.classes, state["classes"], state["config"].conditional)
    sample.check(args, state, diffusion, ids)
    seen = []

    def spy(x, t, y=None):
        assert not any(module.training for module in net.modules())
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        seen.append(SimpleNamespace(size=len(x), y=y if y is None else y.tolist(), dtype=dtype))
        return net(x, t) if y is None else net(x, t, y)
    return [args, state, spy, diffusion, CPU, ids], seen


@pytest.fixture
def no_sampling(monkeypatch):
    """Makes drawing an image a failure."""
    monkeypatch.setattr(GaussianDiffusion, "sample", lambda *args, **kwargs: pytest.fail("it samples"))


@pytest.fixture
def fidelity(monkeypatch):
    """A stand-in for calculate_metrics of the package torch-fidelity."""
    calculate_metrics = Mock(return_value=dict(frechet_inception_distance=0.5))
    package = SimpleNamespace(__spec__=True, calculate_metrics=calculate_metrics)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    return calculate_metrics


# --- what is drawn ---

def reference(folder, part, seeds, steps, eta, guidance):
    """What those weights of the checkpoint draw, in one batch."""
    state = load(folder)
    config, build = state["config"], train.MODELS[state["config"]["model"]]
    net = build(16, 3, state["num_classes"], **build.SIZES["tiny"]).eval()
    net.load_state_dict(state[part])
    first, *later = noises(seeds, steps)
    y = torch.arange(len(first)) % 10 if state["num_classes"] else None
    diffusion = GaussianDiffusion(schedule=config["schedule"], target=config["target"])
    return levels(diffusion.sample(net, first, y, NONE, steps, eta, guidance, randn=lambda x: later.pop(0)))


@pytest.mark.parametrize("run, flags, eta, guidance", [
    ("classes", "", 0, train.GUIDANCE), ("classes", "--sampler ddpm --guidance 3.5", 1, 3.5),
    ("free", "", 0, 1), ("free", "--sampler ddpm", 1, 1)])
def test_pixels(root, run, flags, eta, guidance):
    """--npz is arr_0 alone, (N, H, W, C) uint8: what the EMA weights draw, rounded, for any --batch-size.

    Image i is of the noise of generator seed + i alone, at the start and, with ddpm, afresh in every step but
    the last, and of class i mod K.
    """
    expected = reference(root / run, "ema", range(11, 18), 4, eta, guidance)
    for size, tolerance in ((250, 0.501), (3, 2.501), (1, 2.501)):
        pixels = draw(root / run, f"--n 7 --seed 11 --steps 4 --batch-size {size} {flags}")
        assert pixels.dtype == np.uint8 and pixels.shape == (7, 16, 16, 3)
        assert error(pixels, expected) < tolerance, size
    # what the test could otherwise not tell apart
    assert ((pixels > 0) & (pixels < 255)).mean() > 0.2, "nearly all pixels are clipped"
    assert all(error(a, b) > 50 for a, b in zip(expected, expected[1:])), "every seed its image"
    assert error(reference(root / run, "model", range(11, 18), 4, eta, guidance), expected) > 50


@pytest.mark.parametrize("n, world", [(1, 2), (5, 3), (6, 2)])
def test_shares(root, monkeypatch, n, world):
    """The processes' shares, as even as can be, are together what one draws, also where one has none."""
    arguments, _ = opened(root / "free", f"--n {n} --steps 2 --batch-size 2")
    alone = sample.draw_share(*arguments, sample.to_uint8, rank=0, world=1)
    shares = [sample.draw_share(*arguments, sample.to_uint8, rank, world) for rank in range(world)]
    assert [len(share) for share in shares] == [len(range(rank, n, world)) for rank in range(world)]

    def gather(mine, into):
        if into is not None:
            into[:] = shares
    monkeypatch.setattr(torch.distributed, "gather_object", gather)
    assert error(sample.collect(shares[0], n, 0, world), alone) <= 2
    assert sample.collect(shares[1], n, 1, world) is None


def test_two_processes(root, tmp_path):
    """Two processes draw the images that one draws and both load what --fid compares with; one speaks."""
    flags, folder = "--n 7 --steps 4 --seed 3 --batch-size 2", root / "photos"
    alone = draw(folder, flags)
    (folder / "samples.npz").unlink()
    (tmp_path / "torch_fidelity.py").write_text(
        "def calculate_metrics(input1, input2, **kwargs):\n"
        "    return dict(frechet_inception_distance=len(input1) + len(input2) / 10)\n")
    command = f"{ROOT / 'sample.py'} {folder} --device cpu --npz --fid {flags}"
    code, out, err = end(start(*TORCHRUN, "--", *command.split(), PYTHONPATH=str(tmp_path)), 120)
    assert code == 0, err
    assert error(np.load(folder / "samples.npz")["arr_0"], alone) <= 2
    assert [out.count(words) for words in ("samples.png", "samples.npz", "FID 7.300")] == [1, 1, 1]


@pytest.mark.parametrize("script", [sample, train])
def test_torchrun_takes_the_flags(script):
    """The torchrun lines of the docstrings pass torchrun's own parser, which in Python 3.11 reads all flags.

    It takes a flag of the script, --n say, for the start of one of its own and stops if it fits several.
    """
    commands = re.findall(r"^ *torchrun (.*?)(?:  .*)?$", script.__doc__, re.M)
    assert commands
    for command in commands:
        assert get_args_parser().parse_args(command.split()).training_script == Path(script.__file__).name


def test_compile(root, monkeypatch):
    """--compile compiles whole batches only, each part of the network once, and draws the same images."""
    real, stats = torch.nn.Module.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    torch._dynamo.reset()
    stats.clear()
    flags = "--n 5 --steps 2 --batch-size"
    expected = draw(root / "free", f"{flags} 2")
    assert error(draw(root / "free", f"{flags} 8 --compile"), expected) <= 2
    assert not stats["unique_graphs"]
    assert error(draw(root / "free", f"{flags} 2 --compile"), expected) <= 2
    assert 1 < stats["unique_graphs"] <= len(train.load_run(root / "free", CPU)[1].parts)


# --- flags ---

@pytest.mark.pins
def test_defaults():
    """Without flags: 64 images of seed 0, 250 at a time, by DDIM in 50 steps, with guidance 2."""
    given = {name: value for name, value in vars(sample.parse(["run"])).items() if value}
    assert given == dict(run="run", n=64, steps=50, sampler="ddim", batch_size=250)
    assert train.GUIDANCE == 2.0


@pytest.mark.parametrize("flags, steps, eta", [
    ("--steps 1", 1, 0), ("--steps 1000", 1000, 0), ("--sampler ddpm", 1000, 1),
    ("--sampler ddpm --steps 20", 20, 1)])
def test_steps(root, flags, steps, eta):
    """--steps may be 1 to T for either sampler; ddpm takes all T without it, with noise."""
    (args, *_), _ = opened(root / "free", flags)
    assert (args.steps, args.eta) == (steps, eta)


@pytest.mark.parametrize("names, classes, ids", [
    (["star", "heart"], None, [6, 7]), (["7", "6"], None, [7, 6]), (["9", "circle", "9"], None, [9, 0, 9]),
    (["moon"], None, [8]), (None, None, list(range(10))), (["7", "1"], ["0", "5", "7"], [2, 1])])
def test_class_ids(names, classes, ids):
    """--classes are names or numbers, names first where classes are called 7; all classes without it."""
    assert sample.class_ids(names, classes or list(train.SHAPES), True) == ids


def test_classes_in_turn(root):
    """--classes are taken in turn across batches; the network gets them in every step."""
    flags = "--n 7 --steps 3 --guidance 1 --batch-size 4 --classes 9 circle 9"
    arguments, seen = opened(root / "classes", flags)
    sample.draw_share(*arguments, sample.to_uint8, rank=0, world=1)
    assert [forward.y for forward in seen] == [[9, 0, 9, 9]] * 3 + [[0, 9, 9]] * 3


@pytest.mark.parametrize("run, flags, guidance", [
    ("classes", "", train.GUIDANCE), ("classes", "--guidance 1", 1), ("classes", "--guidance 3.5", 3.5),
    ("classes", "--guidance 0", 0), ("free", "", 1), ("free", "--guidance 1", 1)])
def test_guidance(root, run, flags, guidance):
    """--guidance, on by default where there are classes, runs both halves in one batch of 2B; 1 is off: B."""
    arguments, seen = opened(root / run, f"--steps 2 {flags}")
    sample.draw(*arguments, range(3))
    y = None if run == "free" else [0, 1, 2] + [NONE] * 3 * (guidance != 1)
    assert [(forward.size, forward.y) for forward in seen] == [(3 if guidance == 1 else 6, y)] * 2
    assert arguments[0].guidance == guidance


@pytest.mark.parametrize("trained, flags, dtype", [
    (None, "", torch.float32), ("bf16", "", torch.bfloat16), ("bf16", "--precision fp32", torch.float32),
    (None, "--precision bf16", torch.bfloat16)])
def test_precision(root, trained, flags, dtype):
    """The network runs in the run's precision, or in that of --precision."""
    arguments, seen = opened(root / "free", f"--steps 2 {flags}")
    arguments[1]["config"].precision = trained
    sample.draw(*arguments, range(2))
    assert [forward.dtype for forward in seen] == [dtype] * 2


# --- what is written ---

@pytest.mark.parametrize("flags, names", [
    ("", ["samples.png"]), ("--npz", ["samples.png", "samples.npz"]), ("--denoise", ["denoise.png"])])
def test_files(root, capsys, monkeypatch, flags, names):
    """Just these files are written, and named; a full disk leaves the last version whole and no remains."""
    folder, room, sync = root / "free", names[:-1], os.fsync
    for name in names:
        (folder / name).unlink(missing_ok=True)
    before = tree(folder)
    main(folder, f"--n 3 --steps 2 {flags}")
    said, old = capsys.readouterr().out, tree(folder)
    assert all(f"{folder / name}: " in said for name in names)
    assert {name for name in old if old[name] != before.get(name)} == set(names)

    def full(descriptor):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        room.pop()
        sync(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    with refused(capsys, names[-1], "No space left"):
        main(folder, f"--n 3 --steps 2 --seed 9 {flags}")
    after = tree(folder)
    assert after.keys() == old.keys() and after[names[-1]] == old[names[-1]]


@pytest.mark.parametrize("n, ids, columns, rows", [
    (23, range(10), 10, 3), (7, range(10), 7, 1), (5, [6, 7], 2, 3), (9, [6], 3, 3), (10, None, 3, 4),
    (103, None, 10, 10), (130, range(120), 20, 6)])
def test_grid(tmp_path, n, ids, columns, rows):
    """samples.png: the first samples, 100 or one a class, row by row; of several classes, a column each."""
    images = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8)
    sample.write(SimpleNamespace(n=n, npz=False), tmp_path, images, ids, "so")
    expected = torch.full((4 + 68 * rows, 4 + 68 * columns, 3), -1)         # -1: anything
    for i, tile in enumerate(images[:rows * columns]):
        top, left = 4 + 68 * (i // columns), 4 + 68 * (i % columns)
        tile = tile.permute(1, 2, 0).repeat_interleave(4, 0).repeat_interleave(4, 1)
        expected[top:top + 64, left:left + 64] = tile
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "samples.png")))
    assert pixels.shape == expected.shape
    assert error(pixels[expected >= 0], expected[expected >= 0]) == 0


@pytest.mark.parametrize("run, flags, times", [
    ("classes", "--steps 12", [999, 916, 832, 666, 582, 499, 416, 249, 166, 82]),
    ("free", "--steps 3 --seed 2", [999, 666, 332]), ("free", "--steps 1", [999])])
def test_denoise(root, monkeypatch, run, flags, times):
    """--denoise: four images, rows x_t and x0, ten columns at most from noise to sample, all labelled.

    Of several processes only the first writes it; two would tear it from each other.
    """
    texts, decoded, write, file = [], [], ImageDraw.ImageDraw.text, root / run / "denoise.png"
    monkeypatch.setattr(ImageDraw.ImageDraw, "text",
                        lambda self, xy, words, *more: texts.append(words) or write(self, xy, words, *more))
    monkeypatch.setattr(sample, "to_pixels", lambda x, moments, vae: decoded.append(x) or x)
    main(root / run, f"--denoise {flags}")
    canvas = np.array(Image.open(file))
    assert canvas.shape == (24 + 68 * 8, 40 + 68 * len(times), 3)
    assert texts == [f"t = {t}" for t in times] + ["x_t", "x0"] * 4
    assert len(decoded) == 2 * len(times), "only what is shown is decoded"
    labels = [canvas[:24, 40 + 68 * k:104 + 68 * k] for k in range(len(times))]
    labels += [canvas[24 + 68 * k:88 + 68 * k, :40] for k in range(8)]
    assert all(label.min() < 128 for label in labels), "a label is not there to be seen"
    tiles = canvas[24:, 40:].reshape(4, 2, 68, len(times), 68, 3)
    arguments, _ = opened(root / run, flags)
    trace = []
    sample.draw(*arguments, range(4), trace)
    for t, *step in trace:
        for row, x in enumerate(step):
            if t in times:
                expected = levels(x).repeat_interleave(4, 1).repeat_interleave(4, 2)
                assert error(tiles[:, row, :64, times.index(t), :64], expected) < 0.501, f"t = {t}"
    file.unlink()
    monkeypatch.setattr(sample, "setup", lambda name: (CPU, 1, 2))
    main(root / run, f"--denoise {flags}")
    assert not file.exists()


# --- FID ---

def test_fid_inputs(root, fidelity, monkeypatch, capsys):
    """--fid compares all samples with the run's training set and prints the value.

    The images can be sent to loader processes that are not forked: on a Mac, on Windows, from Python 3.14 on.
    """
    few_shapes(monkeypatch, FEW)
    weights = root / "free/checkpoint.pt"           # any file
    main(root / "classes", f"--npz --n 3 --steps 1 --fid --fid-weights {weights}")
    assert f"FID 0.500: 3 samples, {FEW} training images of shapes" in capsys.readouterr().out
    samples = torch.from_numpy(np.load(root / "classes/samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    call = fidelity.call_args.kwargs
    assert call["fid"] and call["feature_extractor_weights_path"] == str(weights)
    for name, expected in (("input1", samples), ("input2", train.draw_shapes(50_000, 0, 16)[0])):
        images = pickle.loads(pickle.dumps(call[name]))
        assert error(torch.stack([images[i] for i in range(len(images))]), expected) == 0
    assert sample.Images(torch.zeros(2, 1, 16, 16))[1].shape == (3, 16, 16), "of grey ones, three channels"


def frechet(a, b):
    """Frechet distance of two sets of features (N, D), by way of symmetric matrices, in float64."""
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * cross).item()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_fid(tmp_path, monkeypatch):
    """fid is the Frechet distance of torch-fidelity's features; a file of another network is refused.

    Not the real thing: the Inception weights are random and only its first 64 features are taken, for speed.
    """
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    Inception = extractor.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args: None)
        torch.manual_seed(0)
        net = Inception("random", ["64"])
    for weight in net.parameters():
        weight.mul_(4 if weight.ndim == 4 else 1)   # else the features hardly differ
    file, other = tmp_path / "random.pth", tmp_path / "other.pth"
    torch.save(net.state_dict(), file)
    torch.save({"a": torch.zeros(1)}, other)
    monkeypatch.setattr(Inception, "get_default_feature_layer_for_metric", lambda metric: "64")
    real, fakes = train.draw_shapes(5, 0, 16)[0], train.draw_shapes(4, 1, 16, full=True)[0]
    expected = frechet(net(fakes)[0], net(real)[0])
    assert expected > 0.1 and abs(sample.fid(fakes, real, str(file), CPU) - expected) < 2e-3
    with pytest.raises(train.UserError, match="--fid-weights"):
        sample.fid(fakes, real, str(other), CPU)


@pytest.mark.parametrize("broken, words", [
    (URLError("Name or service not known"), "not known"), (MemoryError(), "MemoryError")])
def test_fid_fails(fidelity, broken, words):
    """Whatever torch-fidelity raises, no network or no message: one sentence says what to fetch."""
    fidelity.side_effect = broken
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(train.UserError, match=words) as caught:
        sample.fid(images, images, None, CPU)
    assert "weights-inception-2015-12-05-6726825d.pth" in str(caught.value)
    assert "--fid-weights" in str(caught.value)


# --- bad input ---

@pytest.mark.parametrize("run, flags, words", [
    ("classes", "--classes 10", "--classes 10 9"), ("classes", "--classes star 99", "--classes 99 9"),
    ("classes", "--classes -1", "-1"), ("classes", "--classes sun", "--classes sun star"),
    ("free", "--classes star", "--classes --conditional"), ("free", "--guidance 2.5", "--guidance 2.5"),
    ("free", "--steps 0", "--steps 0 1000"), ("classes", "--steps 0 --sampler ddpm", "--steps 0 1000"),
    ("free", "--steps 1001", "--steps 1001 1000"), ("free", "--steps -3 --denoise", "--steps -3"),
    ("free", "--steps ten", "--steps ten"), ("free", "--n 0", "--n 0"), ("free", "--n -5", "--n -5"),
    ("free", "--batch-size 0", "--batch-size 0"), ("free", "--sampler euler", "euler ddim"),
    ("free", "--device toaster", "toaster cpu"), ("free", "--nn 5", "--nn"),
    ("free", "--fid --fid-weights nowhere.pth", "--fid-weights nowhere.pth"), ("gone", "--fid", "not-here"),
    ("latents", "--fid", "--fid latents --npz"), *[(run, "", f"{run}{os.sep}checkpoint.pt") for run in (
        "nothing", "empty", "truncated", "text", "pickle", "other dict", "network")]])
def test_refused(root, capsys, no_sampling, fidelity, run, flags, words):
    """What cannot be followed gets one sentence with the flag and its value; nothing is drawn or written.

    So does a checkpoint that is not there, cut off, something else or another network's, with its name.
    """
    before = tree(root / run)
    with refused(capsys, *([words] if not flags else words.split())):
        main(root / run, flags)
    assert tree(root / run) == before


def test_fid_without_package(root, capsys, monkeypatch, no_sampling):
    """Without torch-fidelity, --fid says what to install, before any sampling."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with refused(capsys, "pip install torch-fidelity"):
        main(root / "free", "--fid")
