"""sample.py on two small runs: what reaches the network, what is written, what is refused."""
import errno
import importlib.util
import inspect
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import diffusion
import sample
import train
import unet_selfcond
from diffusion import GaussianDiffusion, draw_shapes

ROOT = Path(__file__).resolve().parents[1]
SHAPE = 3, 16, 16
FEW = 20                                            # training images of the runs
each_run = pytest.mark.parametrize("run", ["classes", "free"])


def error(a, b):
    """Maximum absolute error of two arrays of pixels."""
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max()


def levels(x):
    """Images (N, C, H, W) in [-1, 1] -> (N, H, W, C) in 0..255, not rounded."""
    return np.clip((x.double().permute(0, 2, 3, 1).numpy() + 1) * 127.5, 0, 255)


def noises(seeds, count=1):
    """The first count noises of every seed, (count, N, C, H, W)."""
    def draw(generator):
        return torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(count)])
    return torch.stack([draw(torch.Generator().manual_seed(seed)) for seed in seeds], 1)


def few_shapes(n, *args, **kwargs):
    """draw_shapes for impatient ones."""
    return draw_shapes(FEW, *args, **kwargs)


def small_run(folder, flags, parts):
    """A run on shapes, trained for two steps -> its folder.

    Those parts of the checkpoint then get noise of their own, so that no zero gate hides the time, the class
    or z.
    """
    flags = f"--model {flags} --size tiny --data shapes --images 16 --batch-size 8 --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GaussianDiffusion, "sample", lambda self, net, noise, *args, **kwargs: noise)
        train.main([*flags.split(), "--out", str(folder)])
    state = torch.load(folder / "checkpoint.pt")
    generator = torch.Generator().manual_seed(1)
    for part in parts:
        for value in state[part].values():
            value += 0.04 * torch.randn(value.shape, generator=generator)
    torch.save(state, folder / "checkpoint.pt")
    return folder


def stamps(folder):
    """Name and time of every file of a folder."""
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs, trained for two steps: "classes", a UNet, and "free", a DiT without classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "draw_shapes", few_shapes)
        runs = dict(classes="unet", free="dit --no-conditional --schedule linear")
        return {name: small_run(tmp_path_factory.mktemp("runs") / name, flags, ["ema"])
                for name, flags in runs.items()}


@pytest.fixture
def draw(folders):
    """draw(run, flags) -> samples (N, H, W, C) uint8 of sample.py, by way of samples.npz."""
    def draw(run, flags=""):
        file = folders[run] / "samples.npz"
        file.unlink(missing_ok=True)
        sample.main([str(folders[run]), "--device", "cpu", "--npz", *flags.split()])
        with np.load(file) as archive:
            assert archive.files == ["arr_0"]
            return archive["arr_0"]
    return draw


@pytest.fixture
def calls(monkeypatch):
    """What each call of the sampler got, drew and gave, and what it gave the network in each forward."""
    log, real = [], GaussianDiffusion.sample

    def record(*args, **kwargs):
        bound = inspect.signature(real).bind(*args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments, drawn=[], forwards=[])
        log.append(call)

        def net(x, t, y=None):
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            training = any(module.training for module in call.net.modules())
            call.forwards.append(SimpleNamespace(
                size=len(x), y=y if y is None else y.tolist(), training=training, dtype=dtype))
            return call.net(x, t) if y is None else call.net(x, t, y)

        def randn(x):
            call.drawn.append(call.randn(x))
            return call.drawn[-1]
        call.result = real(**{**bound.arguments, "net": net, "randn": randn})
        return call.result
    monkeypatch.setattr(GaussianDiffusion, "sample", record)
    return log


@pytest.fixture
def no_sampling(monkeypatch):
    """Makes drawing an image a failure."""
    monkeypatch.setattr(GaussianDiffusion, "sample", lambda *args, **kwargs: pytest.fail("it samples"))


def refused(capsys, argv):
    """Runs sample.py, which must exit with code 2 and one line on stderr -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        sample.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# --- what is written ---

@pytest.mark.parametrize("run, flags, columns, rows", [
    ("classes", "--n 23", 10, 3), ("classes", "--n 7", 7, 1), ("classes", "--n 5 --classes star heart", 2, 3),
    ("classes", "--n 9 --classes star", 3, 3), ("free", "--n 10", 3, 4), ("free", "--n 103", 10, 10)])
def test_grid(draw, folders, run, flags, columns, rows):
    """samples.png holds the first samples, 100 at most, row by row; several classes have a column each."""
    pixels = draw(run, flags + " --steps 1").repeat(4, 1).repeat(4, 2)      # shown four times as large
    expected = np.full((4 + 68 * rows, 4 + 68 * columns, 3), -1)            # -1: anything
    for i, tile in enumerate(pixels[:rows * columns]):
        top, left = 4 + 68 * (i // columns), 4 + 68 * (i % columns)
        expected[top:top + 64, left:left + 64] = tile
    with Image.open(folders[run] / "samples.png") as picture:
        assert picture.format == "PNG" and picture.size == expected.shape[1::-1]
        assert error(np.array(picture)[expected >= 0], expected[expected >= 0]) == 0


@each_run
def test_npz(draw, calls, run):
    """--npz is arr_0 alone, uint8 (N, H, W, C), the sampler's images in order, rounded, not cut off."""
    pixels = draw(run, "--n 7 --steps 3 --batch-size 4")
    assert pixels.dtype == np.uint8 and pixels.shape == (7, 16, 16, 3)
    assert error(pixels, levels(torch.cat([call.result for call in calls]))) < 0.501
    assert ((pixels > 0) & (pixels < 255)).mean() > 0.2, "nearly all pixels are clipped: the test sees little"


def test_default_files(folders, monkeypatch):
    """Without flags: 64 images of all classes in turn as samples.png, and no other file."""
    seen, folder = [], folders["classes"]
    monkeypatch.setattr(GaussianDiffusion, "sample",
                        lambda self, net, noise, y, **kwargs: seen.append(y.tolist()) or noise)
    before = stamps(folder)
    sample.main([str(folder), "--device", "cpu"])
    assert seen == [[i % 10 for i in range(64)]]
    after = stamps(folder)
    assert [name for name in after if after[name] != before.get(name)] == ["samples.png"]


# --- noise and batches ---

@each_run
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_any_batch_size(draw, calls, run, sampler):
    """Image i uses the noise of generator seed + i alone, at the start and, with ddpm, afresh in every step.

    So for any --batch-size the noise is exactly the same and the pixels agree within 2 of 255 levels.
    """
    expected, pixels = noises(range(11, 18), 4), {}
    for size in (64, 3, 1):
        calls.clear()
        pixels[size] = draw(run, f"--n 7 --seed 11 --steps 4 --sampler {sampler} --batch-size {size}")
        assert [len(call.noise) for call in calls] == {64: [7], 3: [3, 3, 1], 1: [1] * 7}[size]
        assert torch.equal(torch.cat([call.noise for call in calls]), expected[0])
        drawn = [torch.cat(step) for step in zip(*(call.drawn for call in calls))]
        assert len(drawn) == (3 if sampler == "ddpm" else 0), "the last step adds none"
        assert all(torch.equal(noise, other) for noise, other in zip(drawn, expected[1:]))
        assert error(pixels[size], pixels[64]) <= 2
    assert all(error(a, b) > 50 for a, b in zip(pixels[64], pixels[64][1:])), "every seed its image"


def test_compile(draw, monkeypatch):
    """--compile compiles whole batches only, each part of the network once, and draws the same images."""
    real, stats = torch.nn.Module.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    torch._dynamo.reset()
    stats.clear()
    flags = "--n 5 --steps 2 --guidance 1 --batch-size"
    expected = draw("classes", f"{flags} 2")
    assert error(draw("classes", f"{flags} 8 --compile"), expected) <= 2 and not stats["unique_graphs"]
    assert error(draw("classes", f"{flags} 2 --compile"), expected) <= 2
    assert 1 < stats["unique_graphs"] <= len(unet_selfcond.UNet(**unet_selfcond.UNet.SIZES["tiny"]).parts)


def test_seed_counts_on(draw):
    """Without classes, image i of --seed 5 is image i + 5 of --seed 0, the default."""
    many, few = draw("free", "--n 8 --steps 4"), draw("free", "--n 3 --steps 4 --seed 5")
    assert error(few, many[5:]) <= 2 and error(few, many[:3]) > 50


def test_two_processes(draw, folders):
    """Two processes draw the same seven images as one, in order, and only the first of them speaks."""
    flags = "--n 7 --steps 4 --seed 3 --batch-size 2"
    alone, file = draw("classes", flags), folders["classes"] / "samples.npz"
    file.unlink()
    done = subprocess.run(
        [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2 -- sample.py".split(),
         str(folders["classes"]), "--device", "cpu", "--npz", *flags.split()],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert error(np.load(file)["arr_0"], alone) <= 2
    assert done.stdout.count("samples.png") == done.stdout.count("samples.npz") == 1


@pytest.mark.parametrize("script", [sample, train])
def test_torchrun_takes_the_flags(script):
    """The torchrun lines of the docstrings pass torchrun's own parser, which in Python 3.11 reads all flags.

    It takes a flag of the script, --n say, for the start of one of its own and stops if it fits several.
    """
    commands = re.findall(r"^ *torchrun (.*?)(?:  .*)?$", script.__doc__, re.M)
    parser = importlib.import_module("torch.distributed.run").get_args_parser()
    assert commands
    for command in commands:
        assert parser.parse_args(command.split()).training_script == Path(script.__file__).name


@pytest.mark.parametrize("n, world", [(1, 2), (5, 3), (6, 2)])
def test_shares(draw, folders, monkeypatch, n, world):
    """The ranks' shares together are one process's images, also where a rank has none; only rank 0 writes.

    Here one process plays every rank, the last first, and torch.distributed's gathering is imitated.
    """
    alone, shares = draw("free", f"--n {n} --steps 2"), []

    def gather(mine, into):
        shares.append(mine)
        if into is not None:
            into[:] = shares[::-1]
    monkeypatch.setattr(torch.distributed, "gather_object", gather)
    for rank in reversed(range(world)):
        (folders["free"] / "samples.png").unlink(missing_ok=True)
        monkeypatch.setattr(sample, "setup", lambda name: (torch.device(name), rank, world))
        if rank > 0:
            sample.main([str(folders["free"]), "--device", "cpu", "--npz", "--n", str(n), "--steps", "2"])
            assert not (folders["free"] / "samples.png").exists()
            assert len(shares[-1]) == len(range(rank, n, world)), "the work is divided evenly"
    assert error(draw("free", f"--n {n} --steps 2"), alone) <= 2


# --- classes, weights, guidance, samplers ---

@pytest.mark.parametrize("flags, classes", [
    ("--classes star heart", [6, 7, 6, 7, 6, 7, 6]), ("--classes 7 6", [7, 6, 7, 6, 7, 6, 7]),
    ("--classes 9 circle 9", [9, 0, 9, 9, 0, 9, 9]), ("--classes moon", [8] * 7), ("", list(range(7)))])
@pytest.mark.parametrize("size", [7, 4])
def test_classes(draw, calls, flags, classes, size):
    """--classes, by name or number, are taken in turn across batches; the network gets them in every step."""
    draw("classes", f"--n 7 --steps 3 --guidance 1 --batch-size {size} {flags}")
    parts = [classes[i:i + size] for i in range(0, 7, size)]
    assert [[forward.y for forward in call.forwards] for call in calls] == [[part] * 3 for part in parts]


def test_classes_matter(draw):
    """The same seeds drawn as another class become other images."""
    circle, bar = (draw("classes", f"--n 3 --steps 4 --guidance 1 --classes {k}") for k in ("circle", "bar"))
    assert all(error(a, b) > 20 for a, b in zip(circle, bar))


def test_names_before_numbers():
    """In a run whose classes have numbers for names, --classes means the names."""
    assert sample.class_ids(["7", "1"], ["0", "5", "7"], True) == [2, 1]


@each_run
def test_ema_weights(draw, folders, calls, run):
    """The images come from the checkpoint's EMA weights in eval mode, not from the raw ones."""
    pixels = draw(run, "--n 4 --steps 4 --guidance 1")
    assert not any(forward.training for forward in calls[0].forwards)
    state, y = torch.load(folders[run] / "checkpoint.pt"), torch.arange(4) if run == "classes" else None
    cfg, off = SimpleNamespace(**state["config"]), {}
    build = train.MODELS[cfg.model]
    assert (cfg.target, cfg.schedule) == ("v", "cosine" if run == "classes" else "linear")
    for name in ("ema", "model"):
        net = build(16, 3, state["num_classes"], **build.SIZES["tiny"]).eval()
        net.load_state_dict(state[name])
        x = GaussianDiffusion(schedule=cfg.schedule, target="v").sample(net, noises(range(4))[0], y, steps=4)
        off[name] = error(pixels, levels(x))
    assert off["ema"] <= 2 and off["model"] > 50, off


@pytest.mark.parametrize("run, flags, w", [
    ("classes", "", 2.0), ("classes", "--guidance 1", 1), ("classes", "--guidance 3.5", 3.5),
    ("classes", "--guidance 0", 0), ("free", "", 1), ("free", "--guidance 1", 1)])
def test_guidance(draw, calls, run, flags, w):
    """--guidance, 2 by default where there are classes, runs both halves in one batch of 2B; 1 is off: B."""
    pixels = draw(run, f"--n 3 --steps 4 {flags}")
    y = None if run == "free" else [0, 1, 2] + [10, 10, 10] * (w != 1)
    assert [forward.y for forward in calls[0].forwards] == [y] * 4
    assert {forward.size for forward in calls[0].forwards} == {3 if w == 1 else 6}
    assert calls[0].guidance == w
    if w != 1:
        assert error(pixels, draw(run, "--n 3 --steps 4 --guidance 1")) > 20


def test_default_guidance():
    """The default guidance is that of train.py's sample grids, as the help says."""
    assert train.GUIDANCE == sample.GUIDANCE == 2.0


@pytest.mark.parametrize("flags, steps, eta", [
    ("", 50, 0), ("--steps 7", 7, 0), ("--steps 1000", 1000, 0), ("--sampler ddpm", 1000, 1),
    ("--sampler ddpm --steps 20", 20, 1)])
def test_sampler(draw, monkeypatch, flags, steps, eta):
    """ddim takes 50 steps by default, without noise; ddpm 1000, with it; --steps changes either."""
    seen = []
    monkeypatch.setattr(GaussianDiffusion, "sample",
                        lambda self, net, noise, *args, **kwargs: seen.append(kwargs) or noise)
    draw("free", f"--n 2 {flags}")
    assert [(kwargs["steps"], kwargs["eta"]) for kwargs in seen] == [(steps, eta)]


@pytest.mark.parametrize("trained, flags, dtype", [
    (None, "", torch.float32), ("bf16", "", torch.bfloat16), ("bf16", "--precision fp32", torch.float32),
    (None, "--precision bf16", torch.bfloat16)])
def test_precision(folders, tmp_path, calls, trained, flags, dtype):
    """The network runs in the run's precision, or in that of --precision."""
    state = torch.load(folders["free"] / "checkpoint.pt")
    state["config"]["precision"] = trained
    torch.save(state, tmp_path / "checkpoint.pt")
    sample.main([str(tmp_path), "--device", "cpu", "--n", "2", "--steps", "2", *flags.split()])
    assert [forward.dtype for forward in calls[0].forwards] == [dtype] * 2


# --- the picture of the reverse process ---

@pytest.mark.parametrize("run, flags, times", [
    ("classes", "", [999, 899, 779, 679, 559, 459, 339, 239, 119, 19]),
    ("free", "--steps 3", [999, 666, 332]), ("free", "--steps 1 --seed 2", [999])])
def test_denoise(draw, folders, monkeypatch, calls, run, flags, times):
    """--denoise: four images, rows x_t and x0, ten columns at most from noise to sample, all labelled."""
    texts, write, seed = [], ImageDraw.ImageDraw.text, 2 if "seed" in flags else 0

    def text(self, xy, words, *args, **kwargs):
        texts.append(words)
        write(self, xy, words, *args, **kwargs)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    pixels = draw(run, f"--n 4 {flags}")
    before = stamps(folders[run])
    calls.clear()
    sample.main([str(folders[run]), "--device", "cpu", "--denoise", *flags.split()])
    after = stamps(folders[run])
    assert [name for name in after if after[name] != before.get(name)] == ["denoise.png"], "nothing else"
    assert len(calls) == 1 and texts == [f"t = {t}" for t in times] + ["x_t", "x0"] * 4
    with Image.open(folders[run] / "denoise.png") as picture:
        assert picture.format == "PNG" and picture.size == (40 + 68 * len(times), 24 + 68 * 8)
        canvas = np.array(picture)
    labels = [canvas[:24, 40 + 68 * k:104 + 68 * k] for k in range(len(times))]
    labels += [canvas[24 + 68 * k:88 + 68 * k, :40] for k in range(8)]
    assert all(label.min() < 128 for label in labels), "a label is not there to be seen"
    tiles = canvas[24:, 40:].reshape(8, 68, len(times), 68, 3)[:, :64, :, :64].swapaxes(1, 2)
    assert error(tiles, tiles[:, :, ::4, ::4].repeat(4, 2).repeat(4, 3)) == 0, "pixels are squares"
    tiles = tiles[:, :, ::4, ::4]
    for j in range(4):
        assert error(tiles[2 * j, 0], levels(noises([seed + j])[0])[0]) < 0.501, "the first x_t is the noise"
        assert error(tiles[2 * j + 1, -1], pixels[j]) <= 2, "the last x0 is the sample"
        for k, t in enumerate(times):
            step = next(step for step in calls[0].trace if step[0] == t)
            for row, x in (2 * j, step[1]), (2 * j + 1, step[2]):
                assert error(tiles[row, k], levels(x)[j]) < 0.501, f"t = {t}"


def test_denoise_rank(folders, monkeypatch):
    """Of several processes only the first writes denoise.png; two would tear it from each other."""
    (folders["free"] / "denoise.png").unlink(missing_ok=True)
    monkeypatch.setattr(sample, "setup", lambda name: (torch.device(name), 1, 2))
    sample.main([str(folders["free"]), "--device", "cpu", "--denoise", "--steps", "1"])
    assert not (folders["free"] / "denoise.png").exists()


# --- FID, on random Inception weights ---

@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights for torch-fidelity's Inception network."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args: None)
        torch.manual_seed(0)
        net = extractor.FeatureExtractorInceptionV3("random", ["64"])
    for weight in net.parameters():
        weight.mul_(4 if weight.ndim == 4 else 1)   # else the features hardly differ
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(net.state_dict(), file)
    return file


@pytest.fixture
def fid(inception, folders, monkeypatch, capsys):
    """fid(flags) -> the value that sample.py prints; the training set is the few images of the run."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception
    monkeypatch.setattr(Inception, "get_default_feature_layer_for_metric", lambda metric: "64")
    monkeypatch.setattr(diffusion, "draw_shapes", few_shapes)

    def fid(flags):
        capsys.readouterr()
        sample.main([str(folders["classes"]), "--device", "cpu", "--fid", "--fid-weights", str(inception),
                     *flags.split()])
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FID "))
        assert f"{FEW} training images" in line
        return float(line.split()[1].rstrip(":"))
    return fid


def frechet(a, b):
    """Frechet distance of two sets of features (N, D), by way of symmetric matrices, in float64."""
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * cross).item()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_fid(fid, draw, inception, monkeypatch):
    """--fid prints the Frechet distance between the samples and the run's training set.

    Not the real thing: the Inception weights are random and only its first 64 features are taken, for speed.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    real = draw_shapes(FEW, 0, 16)[0]
    fakes = torch.from_numpy(draw("classes", "--n 12 --steps 2")).permute(0, 3, 1, 2)
    net = FeatureExtractorInceptionV3("random", ["64"], feature_extractor_weights_path=inception)
    expected = frechet(net(fakes)[0], net(real)[0])
    assert expected > 0.1 and abs(fid("--n 12 --steps 2") - expected) < 2e-3
    monkeypatch.setattr(sample, "draw", lambda *args: real[args[-1]] / 127.5 - 1)
    assert abs(fid(f"--n {FEW}")) < 1e-3, "the training set's distance to itself"


def test_fid_workers(fid, monkeypatch):
    """The images of --fid can be sent to the loader processes of torch-fidelity where these are not forked.

    That is so on a Mac, on Windows, and on Linux from Python 3.14 on.
    """
    import torch_fidelity
    inputs = []

    def calculate(input1, input2, **kwargs):
        inputs.extend([input1, input2])
        return {"frechet_inception_distance": 0.5}
    monkeypatch.setattr(torch_fidelity, "calculate_metrics", calculate)
    assert fid("--n 3 --steps 1") == 0.5
    for images in inputs:
        assert torch.equal(pickle.loads(pickle.dumps(images))[1], images[1])


def test_fid_without_package(folders, capsys, monkeypatch, no_sampling):
    """Without torch-fidelity, --fid says what to install, before any sampling."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "torch_fidelity" else
                        real(name, *args))
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "pip install torch-fidelity" in refused(capsys, [str(folders["free"]), "--fid", "--device", "cpu"])


def test_fid_weights_missing(folders, capsys, monkeypatch, no_sampling):
    """--fid-weights that name no file are refused, with the name, before any sampling."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda *args: True)
    argv = [str(folders["free"]), "--fid", "--fid-weights", "nowhere.pth", "--device", "cpu"]
    assert "nowhere.pth" in refused(capsys, argv)


@pytest.mark.parametrize("broken", ["download", "file"])
def test_fid_weights_broken(folders, inception, capsys, monkeypatch, tmp_path, broken):
    """Weights that cannot be downloaded, or a file of another network: one sentence says what to fetch."""
    def offline(*args, **kwargs):
        raise URLError("Name or service not known")
    extractor = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(extractor, "load_state_dict_from_url", offline)
    monkeypatch.setattr(diffusion, "draw_shapes", few_shapes)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    argv = [str(folders["free"]), *"--fid --n 2 --steps 1 --device cpu".split()]
    if broken == "file":
        argv += ["--fid-weights", str(tmp_path / "other.pth")]
    line = refused(capsys, argv)
    assert "weights-inception-2015-12-05-6726825d.pth" in line and "--fid-weights" in line
    assert broken == "file" or "Name or service not known" in line


def test_fid_without_data(folders, capsys, monkeypatch, no_sampling, tmp_path):
    """A training set that is no longer there is found out before any sampling."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda *args: True)
    state = torch.load(folders["free"] / "checkpoint.pt")
    state["config"]["data"] = f"folder:{tmp_path / 'gone'}"
    torch.save(state, tmp_path / "checkpoint.pt")
    assert "gone" in refused(capsys, [str(tmp_path), "--fid", "--device", "cpu"])


# --- bad input ---

@pytest.mark.parametrize("run, flags, words", [
    ("classes", "--classes 10", "--classes 10 9"), ("classes", "--classes star 99", "--classes 99 9"),
    ("classes", "--classes -1", "-1"), ("classes", "--classes sun", "--classes sun star"),
    ("free", "--classes star", "--classes --conditional"), ("free", "--guidance 2.5", "--guidance 2.5"),
    ("free", "--steps 0", "--steps 0 1000"), ("classes", "--steps 0 --sampler ddpm", "--steps 0 1000"),
    ("free", "--steps 1001", "--steps 1001 1000"), ("free", "--steps -3 --denoise", "--steps -3"),
    ("free", "--steps ten", "--steps ten"), ("free", "--n 0", "--n 0"), ("free", "--n -5", "--n -5"),
    ("free", "--batch-size 0", "--batch-size 0"), ("free", "--sampler euler", "euler ddim"),
    ("free", "--device toaster", "toaster cpu"), ("free", "--nn 5", "--nn")])
def test_bad_flags(folders, capsys, no_sampling, run, flags, words):
    """A flag that cannot be followed gets one sentence with it and its value; nothing is drawn or written."""
    before = stamps(folders[run])
    line = refused(capsys, [str(folders[run]), "--device", "cpu", *flags.split()])
    assert not [word for word in words.split() if word not in line], line
    assert stamps(folders[run]) == before


@pytest.mark.parametrize("broken", [
    "no folder", "no file", "truncated", "text", "pickle", "other dict", "network"])
def test_bad_run(folders, capsys, no_sampling, tmp_path, broken):
    """A checkpoint that is not there, cut off, something else or another network's is named in a sentence."""
    file, whole = tmp_path / "run" / "checkpoint.pt", (folders["free"] / "checkpoint.pt").read_bytes()
    if broken != "no folder":
        file.parent.mkdir()
    if broken in ("truncated", "text"):
        file.write_bytes(whole[:len(whole) // 2] if broken == "truncated" else b"Not a checkpoint.")
    elif broken == "pickle":                        # only tensors and plain values are ever loaded
        torch.save(dict(config={}, ema=SimpleNamespace()), file)
    elif broken == "other dict":
        torch.save(dict(weight=torch.zeros(1)), file)
    elif broken == "network":
        other = torch.load(folders["classes"] / "checkpoint.pt")["ema"]
        torch.save({**torch.load(folders["free"] / "checkpoint.pt"), "ema": other}, file)
    assert str(file) in refused(capsys, [str(file.parent), "--device", "cpu"])


@pytest.mark.parametrize("name, flags", [
    ("samples.png", ""), ("samples.npz", "--npz"), ("denoise.png", "--denoise")])
def test_full_disk(folders, capsys, monkeypatch, name, flags):
    """A disk that is full while a file is written leaves its last version whole, and no remains beside it."""
    argv = [str(folders["free"]), "--device", "cpu", "--n", "3", "--steps", "2", *flags.split()]
    sample.main(argv)
    files, sync = os.listdir(folders["free"]), os.fsync
    old, room = (folders["free"] / name).read_bytes(), ["samples.png"] * (name == "samples.npz")

    def full(descriptor):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        room.pop()
        sync(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, [*argv, "--seed", "9"])
    assert name in line and "No space left" in line
    assert (folders["free"] / name).read_bytes() == old
    assert sorted(os.listdir(folders["free"])) == sorted(files)
