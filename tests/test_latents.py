"""Latents, from a folder of images to decoded samples, through a small VAE with random weights."""
import builtins
import errno
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
import probe
import sample
import train

CPU = torch.device("cpu")
SIZE, SIDE, N = 16, 8, 40                       # pixels, latents, training images
NET = "--model dit --size tiny --batch-size 8 --images 16 --save-every 1000000 --device cpu --no-compile"


def error(a, b):
    """Maximum absolute error."""
    return (a.double() - b.double()).abs().max().item()


@contextmanager
def refused(capsys, *words):
    """The body ends with exit code 2 and one sentence on stderr that has all words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(said) == 1
    assert [word for word in words if word not in said[0]] == [], said


def encoding(out, photos, vae):
    """The flags that encode photos."""
    return ["--encode", str(out), "--data", f"folder:{photos}", "--image-size", str(SIZE), "--vae", str(vae),
            "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """The VAE sees 16 images at a time, so that there are several batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "VAE_PIXELS", 16 * SIZE ** 2)
        yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of an AutoencoderKL that scales down by 2."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4, sample_size=SIZE)
    folder = tmp_path_factory.mktemp("vae")
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of N images to train, N / 4 to test, in two classes; each larger than it will be."""
    root, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for split, n in (("train", N), ("test", N // 4)):
        for i in range(n):
            path = root / split / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (4, 5, 3), np.uint8).repeat(6, 0).repeat(6, 1)
            pixels[:, :, 0] = pixels[:, :, 0] // 2 + 120 * (i % 2)          # class b is redder
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def latents(vae, photos, tmp_path_factory):
    """The folder that --encode writes of the photos."""
    out = tmp_path_factory.mktemp("encoded") / "latents"
    train.main(encoding(out, photos, vae))
    return out


@pytest.fixture(scope="module")
def trained(latents, tmp_path_factory):
    """A class-conditional run on the latents."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main([*NET.split(), "--conditional", "--data", f"latents:{latents}", "--out", str(out)])
    return out


@pytest.fixture
def copied(latents, tmp_path):
    """A copy of the latents, to be damaged."""
    return Path(shutil.copytree(latents, tmp_path / "copy"))


def no_vae(monkeypatch):
    """From now on no VAE can be loaded."""
    def fail(name, device):
        raise diffusion.UserError(f"{name} is out of reach.")
    monkeypatch.setattr(diffusion, "load_vae", fail)


# --- encode ---

@pytest.mark.parametrize("split, n", [("train", N), ("test", N // 4)])
def test_encode(latents, photos, vae, split, n):
    """latents.npy has the posterior means of images, then of flipped ones; labels.npy the classes."""
    net, data = diffusion.load_vae(str(vae), CPU), diffusion.load_data(f"folder:{photos}", split, SIZE)
    both, labels = np.load(latents / split / "latents.npy"), np.load(latents / split / "labels.npy")
    assert both.shape == (2, n, 4, SIDE, SIDE) and both.dtype == np.float16
    assert labels.dtype == np.int64 and labels.tolist() == data.labels.tolist()
    x = data.images.float() / 127.5 - 1
    for half, view in zip(both, (x, x.flip(3))):
        assert error(torch.from_numpy(half), net.encode(view).latent_dist.mean) < 2e-3
    assert sorted(p.name for p in (latents / split).iterdir()) == ["labels.npy", "latents.npy"]


def test_meta(latents, vae):
    """meta.json has each channel's mean and standard deviation over the training part, and the rest."""
    meta, both = json.loads((latents / "meta.json").read_text()), np.load(latents / "train/latents.npy")
    both = both.astype(np.float64)
    assert meta.pop("mean") == pytest.approx(both.mean((0, 1, 3, 4)).tolist(), abs=1e-9)
    assert meta.pop("std") == pytest.approx(both.std((0, 1, 3, 4)).tolist(), rel=1e-6)
    assert meta == dict(vae=str(vae.resolve()), image_size=SIZE, classes=["a", "b"], shape=[4, SIDE, SIDE])
    assert [p.name for p in latents.parent.iterdir()] == ["latents"]


def test_encode_shapes(vae, tmp_path, monkeypatch):
    """Data that are no folder are encoded too; without a test part there is just train."""
    monkeypatch.setattr(diffusion, "load_data", lambda spec, split, size: diffusion.Data(
        *diffusion.draw_shapes(20, int(split == "test"), size)))
    diffusion.encode("shapes", tmp_path / "a", SIZE, str(vae), CPU)
    assert np.load(tmp_path / "a/test/latents.npy").shape == (2, 20, 4, SIDE, SIDE)
    monkeypatch.undo()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "1.png")
    Image.effect_noise((20, 20), 90).convert("RGB").save(tmp_path / "2.png")
    diffusion.encode(f"folder:{tmp_path}", tmp_path / "b", SIZE, str(vae), CPU)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["meta.json", "train"]


def test_broken_images(vae, photos, latents, tmp_path, capsys):
    """A broken image is named, nothing is left; --skip-bad leaves out the first, the last, a whole batch."""
    root = Path(shutil.copytree(photos, tmp_path / "photos"))
    bad = sorted((root / "train").rglob("*.png"))
    bad = [bad[0], *bad[16:32], bad[-1]]
    for path in bad:
        path.write_bytes(path.read_bytes()[:30])
    flags = encoding(tmp_path / "out", root, vae)
    with refused(capsys, bad[0].name, "--skip-bad"):
        train.main(flags)
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
    train.main([*flags, "--skip-bad"])
    keep = [i for i in range(N) if i not in (0, *range(16, 32), N - 1)]
    for name in ("latents.npy", "labels.npy"):
        whole, part = (np.load(folder / "train" / name) for folder in (latents, tmp_path / "out"))
        whole = whole[:, keep] if whole.ndim > 1 else whole[keep]
        assert whole.shape == part.shape                                     # a last bit may follow the batch
        assert np.allclose(whole, part, rtol=2**-10, atol=1e-5), name


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_interrupted(vae, photos, tmp_path, monkeypatch, stop):
    """An encoding that is stopped leaves nothing; one that was killed is cleared away by the next."""
    out, seen = tmp_path / "out", []

    def decode(*args, once=diffusion.decode):
        seen.append(args)
        if len(seen) > 20:
            raise stop
        return once(*args)
    monkeypatch.setattr(diffusion, "decode", decode)
    with pytest.raises(stop):
        diffusion.encode(f"folder:{photos}", out, SIZE, str(vae), CPU)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "out.part/train").mkdir(parents=True)
    (tmp_path / "out.part/train/images").write_bytes(b"old")
    diffusion.encode(f"folder:{photos}", out, SIZE, str(vae), CPU)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and diffusion.load_latents(out, "train")


def test_full_disk(vae, photos, tmp_path, monkeypatch, capsys):
    """A disk that fills is one sentence; nothing is left."""
    def full(path, mode="r", *args, **kwargs):
        file = builtins.open(path, mode, *args, **kwargs)
        if "flipped" in str(path) and "w" in mode:
            class Full:
                def __enter__(self): return self
                def __exit__(self, *error): file.close()
                def write(self, bytes): raise OSError(errno.ENOSPC, "No space left on device")
            return Full()
        return file
    monkeypatch.setattr(diffusion, "open", full, raising=False)
    with refused(capsys, "No space left", "out.part"):
        train.main(encoding(tmp_path / "out", photos, vae))
    assert not list(tmp_path.iterdir())


# --- latents as data ---

def test_load(latents):
    """latents: is what was encoded; to_x0 makes it of zero mean and unit variance, to_pixels goes back."""
    data = diffusion.load_data(f"latents:{latents}", "train")
    both = np.load(latents / "train/latents.npy")
    assert np.array_equal(data.images, both[0]) and np.array_equal(data.both, both) and data.masks is None
    moments = diffusion.moments_of(data.meta, CPU)
    x = diffusion.to_x0(data.both.flatten(0, 1), moments).double()
    assert error(x.mean((0, 2, 3)), torch.zeros(4)) < 1e-5
    assert error(x.std((0, 2, 3), correction=0), torch.ones(4)) < 1e-5
    vae = diffusion.load_vae(data.meta["vae"], CPU)
    x0 = diffusion.to_x0(data.images[:20], moments)
    assert error(diffusion.to_pixels(x0, moments, None), data.images[:20]) < 1e-4
    expected = vae.decode(data.images[:20].float()).sample
    assert error(diffusion.to_pixels(x0, moments, vae), expected) < 1e-4 and expected.shape[-1] == SIZE


@pytest.mark.parametrize("resident", [True, False])
def test_batches(latents, resident):
    """A batch has half of its latents from the flipped images, whole and with their labels; steps differ."""
    data = diffusion.load_data(f"latents:{latents}", "train")
    cfg = train.Config(batch_size=N, conditional=True, resident=resident)
    batches, flipped, orders = train.Batches(data, cfg, 1000, CPU), 0, []
    halves = [diffusion.to_x0(half, batches.moments) for half in data.both]
    for step in range(5):
        x0, _, _, y = batches(step)
        found = [[(x - half).abs().amax((1, 2, 3)).argmin().item() for half in halves] for x in x0]
        half = [int((x - halves[1][b]).abs().max() < 1e-6) for x, (a, b) in zip(x0, found)]
        rows = [pair[h] for pair, h in zip(found, half)]
        assert all(error(x, halves[h][i]) < 1e-6 for x, h, i in zip(x0, half, rows))
        assert sorted(rows) == list(range(N))
        kept = y != 2                                            # 2: label dropped
        assert torch.equal(y[kept], data.labels[rows][kept]) and kept.sum() > N / 2
        flipped += sum(half)
        orders.append((rows, half))
    assert 0.35 < flipped / N / 5 < 0.65 and orders[0][0] != orders[1][0] and orders[0][1] != orders[1][1]


def test_resident(latents):
    """From the file or from the device: the same batches."""
    data, found = diffusion.load_data(f"latents:{latents}", "train"), []
    for resident in (True, False):
        batches = train.Batches(data, train.Config(batch_size=8, resident=resident), 1000, CPU)
        found.append([batches(step)[:3] for step in (3, 4, 9)])
    assert all(torch.equal(a, b) for one, two in zip(*found) for a, b in zip(one, two))


def change(**new):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        meta = {k: v for k, v in {**meta, **new}.items() if v != "gone"}
        (folder / "meta.json").write_text(json.dumps(meta))
    return damage


def cut(name, n):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n])


def open_header(folder):
    """numpy reads the header with Python's tokenizer, whose error is of a kind of its own."""
    path = folder / "train/labels.npy"
    path.write_bytes(path.read_bytes().replace(b"}", b" "))


@pytest.mark.parametrize("damage", [
    change(shape=[4, 9, 9]), change(mean=[0, 0, 0]), change(std=[1, 1, 1, 0]), change(classes=["a"]),
    change(mean="gone"), change(shape="gone"), change(shape=7), change(vae="gone"), change(std=None),
    change(std=["1"] * 4), cut("meta.json", 30), cut("meta.json", 0), cut("train/latents.npy", 5000),
    cut("train/latents.npy", 50), cut("train/labels.npy", 140),
    lambda folder: (folder / "meta.json").write_text("[]"),
    lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe\x00"),
    lambda folder: (folder / "train/labels.npy").unlink(),
    lambda folder: np.save(folder / "train/labels.npy", np.zeros(7, np.int64)),
    lambda folder: np.save(folder / "train/labels.npy", np.full(N, -1)),
    lambda folder: np.save(folder / "train/labels.npy", np.zeros(N)),
    lambda folder: np.save(folder / "train/labels.npy", np.zeros((N, 2), np.int64)),
    change(mean=[float("nan"), 0, 0, 0]), change(mean=list("abcd")),
    change(classes=[1, 2]), change(vae=["x"]), open_header,
    lambda folder: np.save(folder / "train/labels.npy", np.array([print], object)),
    lambda folder: np.save(folder / "train/latents.npy", np.zeros((2, N, 4, SIDE, SIDE))),
])
def test_damaged(copied, tmp_path, capsys, damage):
    """Latents that are damaged, cut off or disagree with meta.json are refused in a sentence."""
    damage(copied)
    with refused(capsys, str(copied), "ncode"):
        train.main([*NET.split(), "--data", f"latents:{copied}", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# --- train, sample, probe ---

def test_trained(trained, latents):
    """The run keeps what leads back to pixels; its sample grid shows decoded images."""
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert state["latents"] == json.loads((latents / "meta.json").read_text())
    assert state["channels"] == 4 and state["config"]["image_size"] == SIDE
    _, net, gaussian = train.load_run(trained, CPU)
    noise, y = diffusion.seeded_noise(range(16), (4, SIDE, SIDE))(), torch.arange(2).repeat(8)
    x = gaussian.sample(net, noise, y, null=2, guidance=train.GUIDANCE, clip=False)
    vae = diffusion.load_vae(state["latents"]["vae"], CPU)
    moments = diffusion.moments_of(state["latents"], CPU)
    with open(trained / "expected.png", "wb") as file:
        diffusion.save_grid(diffusion.to_pixels(x, moments, vae), file, 2)
    names = "samples-16.png", "expected.png"
    grid, expected = (np.asarray(Image.open(trained / name), int) for name in names)
    assert grid.shape == (8 * 68 + 4, 2 * 68 + 4, 3) and np.abs(grid - expected).max() <= 1


def test_sample(trained):
    """Samples are the decoded latents, which are not clipped; --denoise decodes each step."""
    state, net, gaussian = train.load_run(trained, CPU)
    sample.main([str(trained), *"--n 6 --steps 3 --npz --device cpu".split()])
    pixels = np.load(trained / "samples.npz")["arr_0"]
    noise = diffusion.seeded_noise(range(6), (4, SIDE, SIDE))()
    y = torch.arange(6) % 2
    x = gaussian.sample(net, noise, y, null=2, steps=3, guidance=train.GUIDANCE, clip=False)
    vae = diffusion.load_vae(state["latents"]["vae"], CPU)
    moments = diffusion.moments_of(state["latents"], CPU)
    expected = diffusion.to_uint8(diffusion.to_pixels(x, moments, vae)).permute(0, 2, 3, 1).numpy()
    assert pixels.shape == (6, SIZE, SIZE, 3) and np.abs(pixels.astype(int) - expected).max() <= 1
    sample.main([str(trained), *"--denoise --steps 3 --device cpu".split()])
    assert Image.open(trained / "denoise.png").width > 3 * 64


def test_without_vae(trained, latents, tmp_path, monkeypatch, capsys):
    """Where the VAE can't be loaded, training goes on and sample.py writes latents; both say so."""
    no_vae(monkeypatch)
    train.main([*NET.split(), "--data", f"latents:{latents}", "--out", str(tmp_path / "run")])
    assert "out of reach" in (out := capsys.readouterr().out) and "not decoded" in out
    assert not list((tmp_path / "run").glob("*.png"))
    run = Path(shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("*.png")))
    sample.main([str(run), *"--n 3 --steps 2 --device cpu".split()])
    assert "out of reach" in (out := capsys.readouterr().out) and "latents.npz" in out
    z = np.load(run / "latents.npz")["arr_0"]
    assert z.shape == (3, 4, SIDE, SIDE) and z.dtype == np.float32 and not (run / "samples.png").exists()
    with refused(capsys, "--denoise", "VAE"):
        sample.main([str(run), "--denoise", "--device", "cpu"])


def test_probe(trained, latents, capsys):
    """probe.py learns from the latents of train and is scored on those of test, normalised."""
    probe.main([str(trained), *"--t 1 --knn --device cpu".split()])
    result = json.loads((trained / "probe.json").read_text())
    assert (result["train_images"], result["test_images"]) == (N, N // 4) and "knn" in result
    args, seen = probe.parse([str(trained), "--t", "0"]), []
    data = diffusion.load_data(f"latents:{latents}", "train")

    def net(x, t, return_features):
        seen.append(x)
        return x, {"x": x}
    _, _, gaussian = train.load_run(trained, CPU)
    moments = diffusion.moments_of(data.meta, CPU)
    source = probe.Source(net, gaussian, lambda: torch.no_grad(), CPU, moments)
    list(probe.extract(source, probe.Part(data.images, data.labels), [0], args))
    assert error(torch.cat(seen), diffusion.to_x0(data.images, moments)) < 0.1      # t = 0: almost clean


def test_refused(trained, latents, vae, photos, tmp_path, capsys):
    """What does not go together is refused in a sentence."""
    out = tmp_path / "out"
    with refused(capsys, str(latents), "exists"):
        train.main(encoding(latents, photos, vae))
    with refused(capsys, "--image-size 15", "multiple of 2"):
        train.main([*encoding(out, photos, vae), "--image-size", "15"])
    for config in (None, dict(_class_name="UNet2DModel", sample_size=8), dict(_class_name="AutoencoderKL")):
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with refused(capsys, "AutoencoderKL", str(tmp_path)):
            train.main(encoding(out, photos, tmp_path))
    with refused(capsys, "encoded already"):
        train.main([*encoding(out, photos, vae), "--data", f"latents:{latents}"])
    with refused(capsys, "8 x 8", "--image-size"):
        train.main([*NET.split(), "--data", f"latents:{latents}", "--image-size", "16", "--out", str(out)])
    with refused(capsys, "--augment", "latents"):
        probe.main([str(trained), "--augment", "2"])
    with refused(capsys, f"folder:{photos}", "latents of the same VAE"):
        probe.main([str(trained), "--data", f"folder:{photos}"])
    with refused(capsys, "--task segment", "masks"):
        probe.main([str(trained), "--task", "segment"])
    assert not out.exists()


def test_no_diffusers(tmp_path, capsys, monkeypatch):
    """Without diffusers one sentence says how to install it."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with refused(capsys, "pip install diffusers"):
        train.main(["--encode", str(tmp_path / "out"), "--data", "shapes", "--device", "cpu"])
    assert not list(tmp_path.iterdir())
