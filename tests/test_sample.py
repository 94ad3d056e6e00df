"""sample.py on two small runs: what reaches the network, what is written, what is refused."""
import errno
import os
import pickle
import re
import runpy
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
from conftest import (CPU, ROOT, end, error, few_shapes, fork_two, load, picture, precision, refused,
                      small_run, tree)
from diffusion import GaussianDiffusion

FEW = 20                                            # training images of the runs


def levels(x):
    """Images (N, C, H, W) in [-1, 1] -> (N, H, W, C) in 0..255, not rounded."""
    return ((x.double().permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of two runs, "classes", a UNet, and "free", a DiT without classes, and of their variants."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        few_shapes(patch, FEW)
        small_run(root / "classes", "unet")
        small_run(root / "free", "dit --no-conditional --schedule linear")
    for i, colour in enumerate(["red", "green", "blue"]):
        picture(root / f"data/{i}.png", colour, size=(16, 16))
    (root / "data/bad.png").write_bytes(b"No image.")
    classes, free = load(root / "classes"), load(root / "free")
    latents = dict(vae="none", shape=[3, 16, 16], classes=["a"], mean=[0.0] * 3, std=[1.0] * 3)
    photos = dict(data=f"folder:{root / 'data'}", skip_bad=True)
    flow, edm = ({**state, "config": {**state["config"], "schedule": schedule, "target": "v"}}
                 for state, schedule in ((classes, "flow"), (free, "edm")))
    changed = {
        "flow": flow, "edm": edm,
        "photos": {**classes, "config": {**classes["config"], **photos}},
        "gone": {**free, "config": {**free["config"], "data": "folder:not-here"}},
        "latents": {**free, "latents": latents}, "network": {**free, "ema": classes["ema"]}, "text": "None."}
    for name, state in changed.items():
        (root / name).mkdir()
        torch.save(state, root / name / "checkpoint.pt")
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
    """-> the arguments of sample.draw as main makes them, without indices."""
    args = sample.parse([str(folder), *flags.split()])
    state, net, diffusion = train.load_run(folder, CPU)
    ids = sample.class_ids(args.classes, state["classes"], state["config"].conditional)
    sample.complete(args, state, diffusion, ids)
    assert not any(module.training for module in net.modules())
    return args, sample.Source(state, net, diffusion, CPU, None, None), ids


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

def reference(folder, seeds, steps, ids, sampler, guidance):
    """What the EMA weights of the checkpoint draw of those classes, in one batch; class 10 is none."""
    state = load(folder)
    config, build = state["config"], train.MODELS[state["config"]["model"]]
    net = build(16, 3, state["num_classes"], **build.SIZES["tiny"]).eval()
    net.load_state_dict(state["ema"])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    y = torch.tensor(ids) if ids else None

    def noise(*like):
        return torch.stack([torch.randn(3, 16, 16, generator=g) for g in generators])
    diffusion = GaussianDiffusion(schedule=config["schedule"], target=config["target"])
    return levels(diffusion.sample(net, noise(), y, 10, steps, sampler, guidance, randn=noise))


FIRST, MIXED = [0, 1, 2, 3, 4, 5, 6], [9, 0, 9, 9, 0, 9, 9]


@pytest.mark.parametrize("run, flags, ids, sampler, guidance", [
    ("classes", "", FIRST, "ddim", train.GUIDANCE),
    ("classes", "--classes 9 circle 9 --sampler ddpm --guidance 3.5", MIXED, "ddpm", 3.5),
    ("classes", "--sampler heun", FIRST, "heun", train.GUIDANCE),
    ("free", "", None, "ddim", 1), ("free", "--sampler ddpm", None, "ddpm", 1),
    ("flow", "", FIRST, "ddim", train.GUIDANCE),
    ("flow", "--classes 9 circle 9 --sampler heun --guidance 3.5", MIXED, "heun", 3.5),
    ("edm", "", None, "ddim", 1), ("edm", "--sampler heun", None, "heun", 1)])
def test_pixels(root, run, flags, ids, sampler, guidance):
    """--npz is arr_0 alone, (N, H, W, C) uint8: what the EMA weights draw, rounded, for any --batch-size.

    Image i is of the noise of generator seed + i alone, and of class i mod K.
    """
    expected = reference(root / run, range(11, 18), 4, ids, sampler, guidance)
    for size, tolerance in ((250, 0.501), (3, 2.501)):         # of 7: 3, 3 and 1
        pixels = draw(root / run, f"-n 7 --seed 11 --steps 4 --batch-size {size} {flags}")
        assert pixels.dtype == np.uint8 and pixels.shape == (7, 16, 16, 3)
        assert error(pixels, expected) < tolerance, size
    assert ((pixels > 0) & (pixels < 255)).mean() > 0.2, "nearly all pixels are clipped"


@pytest.mark.parametrize("n, world", [(1, 2), (5, 3), (6, 2)])
def test_shares(root, monkeypatch, n, world):
    """The processes' shares, as even as can be, are together what one draws, also where one has none."""
    arguments = opened(root / "free", f"-n {n} --steps 2 --batch-size 2")
    alone = sample.draw_share(*arguments, rank=0, world=1)
    shares = [sample.draw_share(*arguments, rank, world) for rank in range(world)]
    assert [len(share) for share in shares] == [len(range(rank, n, world)) for rank in range(world)]

    def gather(mine, into):
        into[:] = shares
    monkeypatch.setattr(torch.distributed, "gather_object", gather)
    assert error(sample.collect(shares[0], n, 0, world), alone) <= 2


def sample_in_fork(flags):
    """sample.py with an FID that tells how many images it compares."""
    def count(input1, input2, **kwargs):
        return dict(frechet_inception_distance=len(input1) + len(input2) / 10)
    sys.modules["torch_fidelity"] = SimpleNamespace(__spec__=True, calculate_metrics=count)
    sys.argv = [str(ROOT / "sample.py"), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_two_processes(root):
    """Two processes draw the images that one draws and both load what --fid compares with; one speaks."""
    flags, folder = "-n 7 --steps 4 --seed 3 --batch-size 2", root / "photos"
    alone = draw(folder, flags)
    (folder / "samples.npz").unlink()
    both = fork_two(sample_in_fork, [str(folder), *f"--device cpu --npz --fid {flags}".split()])
    codes, out, err = zip(*map(end, both))
    assert codes == (0, 0), err
    assert error(np.load(folder / "samples.npz")["arr_0"], alone) <= 2
    assert ["".join(out).count(words) for words in ("samples.png", "samples.npz", "FID 7.300")] == [1, 1, 1]


def fail_in_second(what, flags):
    """sample.py where the second of two processes cannot draw, or has another checkpoint, or a VAE alone."""
    if os.environ["RANK"] == "1":
        read = train.read_checkpoint
        module, name, stand_in = {
            "drawing": (sample, "draw", Mock(side_effect=train.UserError("this image cannot be drawn"))),
            "memory": (sample, "draw", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))),
            "checkpoint": (train, "read_checkpoint", lambda path: read(path) | dict(images=8)),
            "vae": (sample, "vae_of", lambda *args: "a VAE")}[what]
        setattr(module, name, stand_in)
    sample.main(flags)


@pytest.mark.parametrize("what, words", [
    ("drawing", "this image cannot be drawn"), ("memory", "too little memory"),
    ("checkpoint", "checkpoint.pt is not the same on every machine"),
    ("vae", "the VAE loads on some machines")])
def test_one_of_two_fails(root, tmp_path, what, words):
    """Where one process fails, all end with a sentence; so do machines whose runs or VAEs differ."""
    state = load(root / "classes")
    if what == "vae":
        state["latents"] = load(root / "latents")["latents"]
    torch.save(state, tmp_path / "checkpoint.pt")
    both = fork_two(fail_in_second, what, [str(tmp_path), *"-n 4 --steps 2 --device cpu".split()])
    codes, _, err = zip(*map(end, both))
    assert codes == (2, 2) and words in "".join(err) and "Traceback" not in "".join(err), err
    assert [*tree(tmp_path)] == ["checkpoint.pt"]


@pytest.mark.parametrize("script", [sample, train])
def test_torchrun_takes_the_flags(script):
    """torchrun's own parser, which may take --n for a flag of its own, lets the docstrings' commands pass."""
    commands = re.findall(r"^ *torchrun (.*?)(?:  .*)?$", script.__doc__, re.M)
    assert commands
    for command in commands:
        assert get_args_parser().parse_args(command.split()).training_script == Path(script.__file__).name


def test_compile(root, monkeypatch):
    """--compile compiles batches of the first one's size, each part once, and draws the same images."""
    real, stats = torch.nn.Module.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: real(self, backend="eager"))
    flags = "-n 5 --steps 2 --batch-size"
    expected, graphs = draw(root / "free", f"{flags} 2"), []
    for size in (8, 2):                             # one batch; three, of which the last is smaller
        torch._dynamo.reset()
        stats.clear()
        assert error(draw(root / "free", f"{flags} {size} --compile"), expected) <= 2
        graphs.append(stats["unique_graphs"])
    assert 1 < graphs[0] == graphs[1] <= len(train.load_run(root / "free", CPU)[1].parts)


@pytest.mark.parametrize("flags, device, world, expected", [
    ("-n 9999", "cuda", 1, False), ("-n 10000", "cuda", 1, True), ("-n 10000", "cpu", 1, False),
    ("-n 10000", "cuda", 2, False), ("-n 20000", "cuda", 2, True),
    ("-n 50000 --no-compile", "cuda", 1, False), ("-n 1 --compile", "cuda", 1, True)])
def test_compiles_many(monkeypatch, flags, device, world, expected):
    """Unasked it compiles for 10,000 images and more a GPU, where it can; the flag has the last word."""
    args = sample.parse(["run", *flags.split()])
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    assert sample.to_compile(args, torch.device(device), world) == expected
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: False)
    if args.compile:
        with pytest.raises(train.UserError, match="--compile needs Triton"):
            sample.to_compile(args, torch.device(device), world)
    else:
        assert not sample.to_compile(args, torch.device(device), world)


# --- flags ---

@pytest.mark.pins
def test_defaults():
    """Without flags: 64 images of seed 0, 250 at a time, by DDIM, with guidance 2."""
    given = {name: value for name, value in vars(sample.parse(["run"])).items() if value}
    assert given == dict(run="run", count=64, sampler="ddim", batch_size=250)
    assert train.GUIDANCE == 2.0


@pytest.mark.parametrize("run, flags, expected", [
    ("free", "", dict(steps=50, guidance=1)), ("free", "--steps 1", dict(steps=1)),
    ("free", "--steps 1000", dict(steps=1000)),
    ("free", "--sampler ddpm --guidance 1", dict(steps=1000, guidance=1)),
    ("free", "--sampler ddpm --steps 20", dict(steps=20)), ("free", "--sampler heun", dict(steps=25)),
    ("classes", "", dict(steps=50, guidance=train.GUIDANCE)), ("classes", "--guidance 0", dict(guidance=0)),
    ("flow", "", dict(steps=50, guidance=train.GUIDANCE)), ("flow", "--sampler heun", dict(steps=25)),
    ("edm", "", dict(steps=50)), ("edm", "--sampler heun", dict(steps=25)),
    ("edm", "--sampler heun --steps 1000", dict(steps=1000))])
def test_settings(root, run, flags, expected):
    """--steps may be 1 to T, without it sampler and path say how many; guidance is on with classes."""
    args = vars(opened(root / run, flags)[0])
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("names, classes, ids", [
    (["star", "heart"], None, [6, 7]), (["7", "6"], None, [7, 6]), (["9", "circle", "9"], None, [9, 0, 9]),
    (["moon"], None, [8]), (None, None, list(range(10))), (["7", "0"], ["0", "5", "7"], [2, 0])])
def test_class_ids(names, classes, ids):
    """--classes are names or numbers, names first where classes are called 7; all classes without it."""
    assert sample.class_ids(names, classes or list(train.SHAPES), True) == ids


@pytest.mark.parametrize("trained, flags, dtype", [
    (None, "", torch.float32), ("bf16", "", torch.bfloat16), ("bf16", "--precision fp32", torch.float32),
    (None, "--precision bf16", torch.bfloat16)])
def test_precision(root, trained, flags, dtype):
    """The network runs in the run's precision, or in that of --precision."""
    arguments, seen = opened(root / "free", f"--steps 2 {flags}"), []
    _, source, _ = arguments
    source.state["config"].precision = trained
    source.net.register_forward_pre_hook(lambda *_: seen.append(precision()))
    sample.draw(*arguments, range(2))
    assert seen == [dtype] * 2


# --- what is written ---

@pytest.mark.parametrize("flags, names", [
    ("", ["samples.png"]), ("--npz", ["samples.png", "samples.npz"]), ("--denoise", ["denoise.png"])])
def test_files(root, capsys, monkeypatch, flags, names):
    """Just these files are written, and named; a full disk leaves the last version whole and no remains."""
    folder = root / "free"
    for name in names:
        (folder / name).unlink(missing_ok=True)
    before = tree(folder)
    main(folder, f"-n 3 --steps 2 {flags}")
    said, old = capsys.readouterr().out, tree(folder)
    assert all(f"{folder / name}: " in said for name in names)
    assert {name for name in old if old[name] != before.get(name)} == set(names)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=[full]))
    with refused(capsys, names[-1], "No space left"):
        main(folder, f"-n 3 --steps 2 --seed 9 {flags}")
    after = tree(folder)
    assert after == old
    if flags == "--npz":
        monkeypatch.undo()
        main(folder, "-n 3 --steps 2 --seed 9")
        assert "samples.npz is of an earlier call" in capsys.readouterr().out


@pytest.mark.parametrize("n, ids, columns, rows", [
    (23, range(10), 10, 3), (7, range(10), 7, 1), (5, [6, 7], 2, 3), (9, [6], 3, 3), (10, None, 3, 4),
    (103, None, 10, 10), (400, None, 10, 10), (130, range(120), 20, 6)])
def test_grid(tmp_path, n, ids, columns, rows):
    """samples.png: the first samples, 100 or one a class, row by row; of several classes, a column each."""
    images = torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8)
    sample.write(SimpleNamespace(count=n, npz=False, out=None), tmp_path, images, ids, "so")
    canvas = torch.from_numpy(np.array(Image.open(tmp_path / "samples.png")))
    assert canvas.shape == (4 + 68 * rows, 4 + 68 * columns, 3)
    tiles = canvas[4:, 4:].reshape(rows, 68, columns, 68, 3).permute(0, 2, 4, 1, 3).flatten(0, 1)
    shown = images[:rows * columns]
    assert error(tiles[:len(shown), :, 2:64:4, 2:64:4], shown) == 0


@pytest.mark.parametrize("run, flags, times", [
    ("classes", "--steps 12", [999, 916, 832, 666, 582, 499, 416, 249, 166, 82]),
    ("free", "--steps 3 --seed 2", [999, 666, 332]), ("free", "--steps 1", [999]),
    ("flow", "--steps 12", [1000, 917, 833, 667, 583, 500, 417, 250, 167, 83]),
    ("edm", "--sampler heun --steps 3", [1000, 544, 192])])
def test_denoise(root, monkeypatch, run, flags, times):
    """--denoise: four images, rows x_t and x0, ten columns at most; of several processes one writes it."""
    texts, decoded, write, file = [], [], ImageDraw.ImageDraw.text, root / run / "denoise.png"
    monkeypatch.setattr(ImageDraw.ImageDraw, "text",
                        lambda self, xy, words, *more: texts.append(words) or write(self, xy, words, *more))
    monkeypatch.setattr(sample, "to_pixels", lambda x, moments, vae: decoded.append(x) or x)
    main(root / run, f"--denoise {flags}")
    canvas = np.array(Image.open(file))
    assert canvas.shape == (24 + 68 * 8, 40 + 68 * len(times), 3)
    assert texts == [f"t = {t}" for t in times] + ["x_t", "x0"] * 4
    assert len(decoded) == 2 * len(times), "only what is shown is decoded"
    heads = canvas[:24, 40:].reshape(24, len(times), 68, 3)
    assert (heads.min((0, 2, 3)) < 128).all(), "a column has no t that can be seen"
    assert (canvas[24:, :40].reshape(8, -1).min(1) < 128).all(), "a row has no name that can be seen"
    tiles = canvas[24:, 40:].reshape(4, 2, 68, len(times), 68, 3)[:, :, 2:64:4, :, 2:64:4]
    trace = []
    sample.draw(*opened(root / run, flags), range(4), trace)
    for column, (t, *step) in enumerate(step for step in trace if round(step[0]) in times):
        for row, x in enumerate(step):
            assert error(tiles[:, row, :, column], levels(x)) < 0.501, f"t = {t}"
    file.unlink()
    monkeypatch.setattr(sample, "setup", lambda name: (CPU, 1, 2))
    main(root / run, f"--denoise {flags}")
    assert not file.exists()


# --- FID ---

def test_fid_inputs(root, fidelity, monkeypatch, capsys):
    """--fid compares all samples with the run's training set; a loader process can be sent the images."""
    few_shapes(monkeypatch, FEW)
    weights = root / "free/checkpoint.pt"           # any file
    main(root / "classes", f"-n 3 --steps 1 --fid --fid-weights {weights}")         # keeps its samples
    assert f"FID 0.500: 3 samples, {FEW} training images of shapes" in capsys.readouterr().out
    samples = torch.from_numpy(np.load(root / "classes/samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    call = fidelity.call_args.kwargs
    assert call["fid"] and call["feature_extractor_weights_path"] == str(weights)
    for name, expected in (("input1", samples), ("input2", train.draw_shapes(50_000, 0, 16)[0])):
        images = pickle.loads(pickle.dumps(call[name]))
        assert error(torch.stack([images[i] for i in range(len(images))]), expected) == 0
    assert sample.Images(torch.zeros(2, 1, 16, 16))[1].shape == (3, 16, 16), "of grey ones, three channels"


def test_fid_of_data_elsewhere(root, fidelity, monkeypatch, capsys):
    """--data names the data set that --fid compares with, where it is not any more where the run had it."""
    few_shapes(monkeypatch, FEW)
    main(root / "gone", "-n 3 --steps 1 --fid --data shapes")
    assert f"FID 0.500: 3 samples, {FEW} training images of shapes" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_fid(tmp_path, monkeypatch):
    """The real torch-fidelity takes the images, here with random weights; another network's are refused."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    Inception = extractor.FeatureExtractorInceptionV3
    monkeypatch.setattr(Inception, "get_default_feature_layer_for_metric", lambda metric: "64")
    file = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, file)
    real, fakes = train.draw_shapes(5, 0, 16)[0], train.draw_shapes(4, 1, 16, full=True)[0]
    with pytest.raises(train.UserError, match="--fid-weights"):
        sample.fid(fakes, real, str(file), CPU)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *args: None)
    assert abs(sample.fid(real, real, str(file), CPU)) < 1e-6 < 1e-3 < sample.fid(fakes, real, str(file), CPU)


@pytest.mark.parametrize("broken, words", [
    (URLError("Name or service not known"), "not known"), (MemoryError(), "MemoryError")])
def test_fid_fails(fidelity, broken, words):
    """Whatever torch-fidelity raises, no network or no message: one sentence says what to fetch."""
    fidelity.side_effect = broken
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    words += ".* weights-inception-2015-12-05-6726825d.pth .* --fid-weights"
    with pytest.raises(train.UserError, match=words):
        sample.fid(images, images, None, CPU)


# --- bad input ---

@pytest.mark.parametrize("run, flags, words", [
    ("classes", "--classes 10", "--classes 10 9"), ("classes", "--classes star 99", "--classes 99 9"),
    ("classes", "--classes -1", "-1"), ("classes", "--classes sun", "--classes sun star"),
    ("free", "--classes star", "--classes --conditional"), ("free", "--guidance 2.5", "--guidance 2.5"),
    ("free", "--steps 0", "--steps 0 1000"), ("classes", "--steps 0 --sampler ddpm", "--steps 0 1000"),
    ("free", "--steps 1001", "--steps 1001 1000"), ("free", "--steps -3 --denoise", "--steps -3"),
    ("free", "--denoise --npz", "--denoise --npz"), ("free", "--denoise --fid", "--denoise --fid"),
    ("free", "--steps ten", "--steps ten"), ("free", "-n 0", "--count 0"),
    ("free", "--count -5", "--count -5"),
    ("free", "--batch-size 0", "--batch-size 0"), ("free", "--sampler euler", "euler ddim ddpm heun"),
    ("flow", "--sampler ddpm", "ddpm linear cosine ddim heun"), ("flow", "--steps 1001", "--steps 1001 1000"),
    ("edm", "--sampler ddpm --steps 20 --denoise", "ddpm linear cosine ddim heun"),
    ("free", "--device toaster", "toaster cpu"), ("free", "--nn 5", "--nn"),
    ("free", "--fid --fid-weights nowhere.pth", "--fid-weights nowhere.pth"), ("gone", "--fid", "not-here"),
    ("latents", "--fid", "--fid latents --npz"), ("free", "--fid --data latents:x", "--data latents:x --fid"),
    ("free", "--fid-weights a.pth", "--fid-weights --fid"), ("free", "--skip-bad", "--skip-bad --fid"),
    ("free", "--denoise --compile", "--denoise --compile"),
    *[(run, "", f"{run}{os.sep}checkpoint.pt") for run in ("nothing", "text", "network")]])
def test_refused(root, capsys, no_sampling, fidelity, run, flags, words):
    """What cannot be followed gets one sentence with the flag, or the checkpoint; nothing is written."""
    before = tree(root / run)
    with refused(capsys, *([words] if not flags else words.split())):
        main(root / run, flags)
    assert tree(root / run) == before


def test_fid_without_package(root, capsys, monkeypatch, no_sampling):
    """Without torch-fidelity, --fid says what to install, before any sampling."""
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with refused(capsys, "pip install torch-fidelity"):
        main(root / "free", "--fid")
