"""Latents, from images to decoded samples, through small autoencoders with random weights."""
import errno
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import probe
import sample
import train
from conftest import CPU, ROOT, TORCHRUN, Fork, end, error, few_shapes, load, refused, start, tree, wait_for

SIZE, SIDE, N = 16, 8, 40                       # pixels, latents, training images
NET = "--model dit --size tiny --batch-size 8 --images 16 --save-every 1000000 --device cpu --no-compile"


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """The VAE sees 16 images at a time, so that there are several batches; sample grids take 2 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "VAE_PIXELS", 16 * SIZE ** 2)
        yield


def make_vae(kind, folder):
    """A folder with a small model of diffusers that has random weights -> the folder."""
    diffusers = pytest.importorskip("diffusers")
    configs = dict(
        AutoencoderKL=dict(
            block_out_channels=[8, 16], layers_per_block=1, latent_channels=4, norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2),
        AutoencoderTiny=dict(
            encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8], latent_channels=4,
            num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1]),
        AutoencoderDC=dict(
            encoder_block_out_channels=[8, 16], decoder_block_out_channels=[8, 16], latent_channels=4,
            encoder_layers_per_block=[1, 1], decoder_layers_per_block=[1, 1], attention_head_dim=8,
            encoder_qkv_multiscales=[[], []], decoder_qkv_multiscales=[[], []],
            encoder_block_types="ResBlock", decoder_block_types="ResBlock"),
        AutoencoderKLTemporalDecoder=dict(                  # of video, but its encoder knows images
            block_out_channels=[32, 32], layers_per_block=1, down_block_types=["DownEncoderBlock2D"] * 2),
        UNet2DModel=dict(
            block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, sample_size=8,
            down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2))
    torch.manual_seed(0)
    getattr(diffusers, kind)(**configs[kind]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of an AutoencoderKL that halves a side."""
    return make_vae("AutoencoderKL", tmp_path_factory.mktemp("vae") / "small-kl")


@pytest.fixture
def mine(photos, tmp_path):
    """A copy of the photos, to be changed."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def encode(folder, vae, **kwargs):
    return train.encode(f"folder:{folder}", SIZE, str(vae), CPU, **kwargs)


@pytest.fixture(scope="module")
def latents(photos, vae):
    """The folder of the photos' latents."""
    return encode(photos, vae)


def flags(folder, vae, out, more=""):
    return [*NET.split(), "--data", f"folder:{folder}", "--image-size", str(SIZE), "--vae", str(vae),
            "--out", str(out), *more.split()]


@pytest.fixture(scope="module")
def trained(photos, vae, latents, tmp_path_factory):
    """A class-conditional run on the photos' latents."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main(flags(photos, vae, out, "--conditional"))
    return out


def both_of(folder, split="train"):
    return np.load(folder / split / "latents.npy")


def close(a, b):
    """Equal but for the last bit of float16, which may follow how many images the VAE saw at once."""
    return a.shape == b.shape and np.allclose(a.astype(np.float64), b, rtol=2**-10, atol=1e-5)


# --- encode ---

@pytest.mark.parametrize("split, n", [("train", N), ("test", N // 4)])
def test_encode(latents, photos, vae, split, n):
    """latents.npy has the posterior means of images, then of flipped ones; labels.npy the classes."""
    net, data = train.load_vae(str(vae), CPU), train.load_data(f"folder:{photos}", split, SIZE)
    both, labels = both_of(latents, split), np.load(latents / split / "labels.npy")
    assert both.shape == (2, n, 4, SIDE, SIDE) and both.dtype == np.float16
    assert labels.dtype == np.int64 and labels.tolist() == data.labels.tolist()
    x = data.images.float() / 127.5 - 1
    for half, view in zip(both, (x, x.flip(3))):
        assert error(half, net.encode(view).latent_dist.mean) < 2e-3
    assert sorted(p.name for p in (latents / split).iterdir()) == ["labels.npy", "latents.npy"]


def test_meta(latents, photos, vae):
    """meta.json has each channel's mean and standard deviation over the training part, and the rest."""
    meta, both = json.loads((latents / "meta.json").read_text()), both_of(latents).astype(np.float64)
    assert meta.pop("mean") == pytest.approx(both.mean((0, 1, 3, 4)).tolist(), abs=1e-9)
    assert meta.pop("std") == pytest.approx(both.std((0, 1, 3, 4)).tolist(), rel=1e-6)
    assert len(meta.pop("stamp")) == 64
    assert meta == dict(vae=str(vae.resolve()), image_size=SIZE, classes=["a", "b"], shape=[4, SIDE, SIDE])
    assert latents == photos.with_name(f"photos-{SIZE}px-small-kl") and not [*latents.parent.glob("*.part")]


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batch_size(latents, mine, vae, monkeypatch, batch):
    """However many images the VAE sees at a time, the latents are the same."""
    monkeypatch.setattr(train, "VAE_PIXELS", batch * SIZE ** 2)
    assert close(both_of(encode(mine, vae)), both_of(latents))


def test_no_folder(vae, tmp_path, monkeypatch):
    """Data that are no folder are encoded into data/; a flat folder of images has no test part."""
    few_shapes(monkeypatch, 30, 20)
    monkeypatch.chdir(tmp_path)
    out = train.encode("shapes", SIZE, str(vae), CPU)
    assert out == Path(f"data/shapes-{SIZE}px-small-kl")
    assert (both_of(out).shape[1], both_of(out, "test").shape[1]) == (30, 20)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (20, 20), "red").save("flat/1.png")
    Image.effect_noise((20, 20), 90).convert("RGB").save("flat/2.png")
    out = encode("flat", vae)
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "train"] and both_of(out).shape[1] == 2


def test_place(mine, vae, tmp_path, monkeypatch):
    """Where the data's parent can't be written, latents are under data/, and found there; else a sentence."""
    monkeypatch.chdir(tmp_path)
    shut, access = [mine.parent], os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in shut and access(path, mode))
    out = encode(mine, vae)
    assert out == Path(f"data/photos-{SIZE}px-small-kl") and both_of(out).shape[1] == N
    assert sorted(p.name for p in mine.parent.iterdir()) == ["data", "photos"]
    monkeypatch.setattr(train, "encode_split", None)
    shut.append(Path("data"))
    assert encode(mine, vae) == out
    (mine / "train/a/00.png").touch()
    with pytest.raises(train.UserError, match="writable"):
        encode(mine, vae)


def test_used_again(mine, vae, tmp_path, monkeypatch):
    """While files, VAE and size are the same nothing is encoded again; else it is, anew or apart."""
    splits, encode_split = [], train.encode_split
    monkeypatch.setattr(train, "encode_split", lambda *args: [splits.append(args), encode_split(*args)][1])

    def anew(name=vae, size=SIZE):
        """-> folder, whether it was made just now."""
        del splits[:]
        out = train.encode(f"folder:{mine}", size, str(name), CPU)
        assert len(splits) in (0, 2)
        return out.name, bool(splits)
    first = f"photos-{SIZE}px-small-kl"
    assert anew() == (first, True) and anew() == (first, False)
    os.utime(mine / "test/b/01.png", (1, 1))
    assert anew() == (first, True) and anew() == (first, False)
    (mine / "train/a/00.png").unlink()
    assert anew() == (first, True) and both_of(mine.with_name(first)).shape[1] == N - 1
    other = make_vae("AutoencoderTiny", tmp_path / "other")
    assert anew(other) == (f"photos-{SIZE}px-other", True)
    assert anew(size=32) == ("photos-32px-small-kl", True) and anew() == (first, False)
    os.utime(other / "config.json", (1, 1))
    assert anew(other) == (f"photos-{SIZE}px-other", True)


def test_broken_images(latents, mine, vae, tmp_path, capsys):
    """A broken image is named, nothing is left; --skip-bad leaves out the first, the last, a whole batch."""
    bad = sorted((mine / "train").rglob("*.png"))
    bad = [bad[0], *bad[16:32], bad[-1]]
    for path in bad:
        path.write_bytes(path.read_bytes()[:30])
    with refused(capsys, bad[0].name, "--skip-bad"):
        train.main(flags(mine, vae, tmp_path / "run"))
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
    out = encode(mine, vae, skip_bad=True)
    assert "18 unreadable" in capsys.readouterr().out
    keep = [i for i in range(N) if i not in (0, *range(16, 32), N - 1)]
    assert close(both_of(out), both_of(latents)[:, keep])
    labels = [np.load(folder / "train/labels.npy") for folder in (out, latents)]
    assert np.array_equal(labels[0], labels[1][keep])


def encode_slowly(folder, vae):
    to_latents = train.to_latents
    train.to_latents = lambda *args: [time.sleep(0.3), to_latents(*args)][1]
    encode(folder, vae)


def test_stopped(mine, vae, tmp_path, monkeypatch):
    """An encoding that is stopped leaves nothing, a killed one nothing that counts; the next clears it."""
    monkeypatch.setattr(train, "encode_share", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(mine, vae)
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
    monkeypatch.undo()
    part = tmp_path / f"photos-{SIZE}px-small-kl.part"
    fork = Fork(encode_slowly, mine, vae)
    wait_for(lambda: (part / "train/latents.npy").exists(), fork, 120)
    fork.kill()
    fork.wait(20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", part.name]
    assert encode(mine, vae) == part.with_suffix("") and both_of(part.with_suffix("")).any((2, 3, 4)).all()
    assert not part.exists()


def test_full_disk(mine, vae, tmp_path, monkeypatch, capsys):
    """A disk that fills while latents are written is one sentence; nothing is left, the old ones least."""
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")
    out = encode(mine, vae)
    (mine / "train/a/00.png").unlink()
    monkeypatch.setattr(train, "open", Full, raising=False)
    with refused(capsys, "No space left"):
        train.main(flags(mine, vae, tmp_path / "run"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", out.name]
    assert train.load_latents(out, "train").images.shape[0] == N


def test_two_processes(mine, latents, vae, tmp_path):
    """torchrun: two processes make the latents of one, and train on them as one does."""
    code, out, err = end(start(*TORCHRUN, ROOT / "train.py", *flags(mine, vae, tmp_path / "two")), 240)
    assert code == 0, err
    made = mine.with_name(latents.name)
    assert close(both_of(made), both_of(latents)) and close(both_of(made, "test"), both_of(latents, "test"))
    metas = [json.loads((folder / "meta.json").read_text()) for folder in (made, latents)]
    assert all(error(*(meta[key] for meta in metas)) < 1e-5 for key in ("mean", "std"))
    assert out.count("latents: ") == 1 and not [*tmp_path.glob("*.part")]
    train.main(flags(mine, vae, tmp_path / "one"))
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert error(one["ema"], two["ema"]) < 1e-5 and (tmp_path / "two/samples-16.png").exists()


# --- latents as data ---

def test_load(latents):
    """latents: is what was encoded; to_x0 makes it of zero mean and unit variance, to_pixels goes back."""
    data, both = train.load_data(f"latents:{latents}", "train"), both_of(latents)
    assert np.array_equal(data.images, both[0]) and np.array_equal(data.both, both) and data.masks is None
    moments = train.moments_of(data.meta, CPU)
    x = train.to_x0(data.both.flatten(0, 1), moments).double()
    assert error(x.mean((0, 2, 3)), torch.zeros(4)) < 1e-5
    assert error(x.std((0, 2, 3), correction=0), torch.ones(4)) < 1e-5
    vae = train.load_vae(data.meta["vae"], CPU)
    x0 = train.to_x0(data.images[:20], moments)
    assert error(train.to_pixels(x0, moments, None), data.images[:20]) < 1e-4
    expected = vae.decode(data.images[:20].float()).sample
    assert error(train.to_pixels(x0, moments, vae), expected) < 1e-4 and expected.shape[-1] == SIZE
    with pytest.raises(train.UserError, match="8 x 8.*--image-size"):
        train.load_data(f"latents:{latents}", "train", SIZE)


def test_batches(latents):
    """A batch has half of its latents from the flipped images, whole, with their labels; resident or not."""
    data, orders = train.load_data(f"latents:{latents}", "train"), []
    cfg = dict(batch_size=N, conditional=True)
    one, two = (train.Batches(data, train.Config(**cfg, resident=on), 1000, CPU) for on in (True, False))
    whole = train.to_x0(data.both.flatten(0, 1), one.moments)
    for step in range(5):
        x0, _, _, y = batch = one(step)
        assert all(torch.equal(a, b) for a, b in zip(batch, two(step)))
        found = torch.stack([(x - whole).abs().amax((1, 2, 3)) for x in x0])                  # (N, 2 N)
        least, order = found.min(1)
        assert least.max() < 1e-6 and sorted((order % N).tolist()) == list(range(N))
        kept = y != 2                                                        # 2: label dropped
        assert torch.equal(y[kept], data.labels[order % N][kept]) and kept.sum() > N / 2
        orders.append(order)
    flipped = torch.stack(orders) >= N
    assert 0.35 < flipped.float().mean() < 0.65
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(flipped[0], flipped[1])


def change(**new):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text())
        meta = {k: v for k, v in {**meta, **new}.items() if v != "gone"}
        (folder / "meta.json").write_text(json.dumps(meta))
    return damage


def cut(name, n):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n])


def put(name, array):
    return lambda folder: np.save(folder / "train" / name, array)


def open_header(folder):
    """numpy reads the header with Python's tokenizer, whose error is of a kind of its own."""
    path = folder / "train/labels.npy"
    path.write_bytes(path.read_bytes().replace(b"}", b" "))


@pytest.mark.parametrize("damage", [
    change(shape=[4, 9, 9]), change(shape="gone"), change(shape=7), change(vae="gone"), change(vae=["x"]),
    change(mean=[0, 0, 0]), change(mean="gone"), change(mean=[np.nan, 0, 0, 0]), change(mean=list("abcd")),
    change(std=[1, 1, 1, 0]), change(std=None), change(std=["1"] * 4), change(classes=["a"]),
    change(classes=[1, 2]), cut("meta.json", 30), cut("meta.json", 0), cut("train/latents.npy", 5000),
    cut("train/latents.npy", 50), cut("train/labels.npy", 140), open_header,
    lambda folder: (folder / "meta.json").write_text("[]"),
    lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe\x00"),
    lambda folder: (folder / "train/labels.npy").unlink(),
    put("labels.npy", np.zeros(7, np.int64)), put("labels.npy", np.full(N, -1)),
    put("labels.npy", np.zeros(N)), put("labels.npy", np.zeros((N, 2), np.int64)),
    put("labels.npy", np.array([print], object)), put("latents.npy", np.zeros((2, N, 4, SIDE, SIDE))),
])
def test_damaged(latents, tmp_path, capsys, damage):
    """Latents that are damaged, cut off or disagree with meta.json are refused in a sentence."""
    copied = Path(shutil.copytree(latents, tmp_path / "copy"))
    damage(copied)
    with refused(capsys, str(copied), "--vae"):
        train.main([*NET.split(), "--data", f"latents:{copied}", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# --- train, sample, probe ---

def draw(run, noise, y=None, **kwargs):
    """What the EMA network makes of the noise, decoded by the VAE that the run's checkpoint names."""
    state, net, diffusion = train.load_run(run, CPU)
    null, guidance = state["num_classes"], train.GUIDANCE if state["num_classes"] else 1
    x = diffusion.sample(net, noise, y, null=null, guidance=guidance, clip=False, **kwargs)
    vae = train.load_vae(state["latents"]["vae"], CPU)
    return train.to_pixels(x, train.moments_of(state["latents"], CPU), vae)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"])
def test_kinds(photos, tmp_path, kind):
    """Each kind of VAE encodes; a run keeps what leads back to pixels, and its grid shows decoded images."""
    vae, run = make_vae(kind, tmp_path / kind), tmp_path / "run"
    train.main(flags(photos, vae, run, "--conditional"))
    state = load(run)
    meta = json.loads((photos.with_name(f"photos-{SIZE}px-{kind}") / "meta.json").read_text())
    assert {**state["latents"], "stamp": meta["stamp"]} == meta and state["shape"] == [4, SIDE, SIDE]
    assert state["config"]["image_size"] == SIZE and state["config"]["vae"] == str(vae)
    y = torch.arange(2).repeat(8)
    with open(run / "expected.png", "wb") as file:
        train.save_grid(draw(run, train.seeded_noise(range(16), (4, SIDE, SIDE))(), y), file, 2)
    grid, expected = (np.asarray(Image.open(run / name), int) for name in ("samples-16.png", "expected.png"))
    assert grid.shape == (8 * 68 + 4, 2 * 68 + 4, 3) and np.abs(grid - expected).max() <= 1 and grid.std() > 5


def test_sample(trained):
    """Samples are the decoded latents, which are not clipped; --denoise decodes each step."""
    sample.main([str(trained), *"--n 6 --steps 3 --npz --device cpu".split()])
    pixels = np.load(trained / "samples.npz")["arr_0"]
    noise, y = train.seeded_noise(range(6), (4, SIDE, SIDE))(), torch.arange(6) % 2
    expected = train.to_uint8(draw(trained, noise, y, steps=3)).permute(0, 2, 3, 1)
    assert error(pixels, expected) <= 1 and pixels.shape == (6, SIZE, SIZE, 3)
    sample.main([str(trained), *"--denoise --steps 3 --device cpu".split()])
    assert Image.open(trained / "denoise.png").width > 3 * 64


def test_without_vae(trained, latents, tmp_path, monkeypatch, capsys):
    """Where the VAE can't be loaded, training goes on and sample.py writes latents; both say so."""
    def fail(name, device):
        raise train.UserError(f"{name} is out of reach.")
    monkeypatch.setattr(train, "load_vae", fail)
    train.main([*NET.split(), "--data", f"latents:{latents}", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "out of reach" in said and "not decoded" in said and not [*(tmp_path / "run").glob("*.png")]
    run = Path(shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("*.png")))
    sample.main([str(run), *"--n 3 --steps 2 --device cpu".split()])
    said = capsys.readouterr().out
    assert "out of reach" in said and "latents.npz" in said and not (run / "samples.png").exists()
    z = np.load(run / "latents.npz")["arr_0"]
    assert z.shape == (3, 4, SIDE, SIDE) and z.dtype == np.float32
    with refused(capsys, "--denoise", "VAE"):
        sample.main([str(run), "--denoise", "--device", "cpu"])


def test_probe(trained, monkeypatch):
    """probe.py learns from the latents of train and is scored on those of test, which are there already."""
    monkeypatch.setattr(train, "encode_split", None)
    probe.main([str(trained), *"--t 1 --knn --device cpu".split()])
    result = json.loads((trained / "probe.json").read_text())
    assert (result["train_images"], result["test_images"]) == (N, N // 4) and "knn" in result


@pytest.mark.parametrize("script, more, words", [
    (train, "--image-size 15", "--image-size 15|multiple of 2"),
    (train, "--vae TMP/empty", "TMP/empty|can be loaded"),
    (train, "--vae TMP/video", "TMP/video|class AutoencoderKLTemporalDecoder|AutoencoderDC"),
    (train, "--vae TMP/unet", "TMP/unet|class UNet2DModel|AutoencoderDC"),
    (train, "--vae TMP/taken", "photos-16px-taken|in the way"),
    (train, "--data folder:TMP/no", "TMP/no|no folder"),
    (train, "--data latents:TMP/latents", "latents:TMP/latents|encoded already"),
    (probe, "--augment 2", "--augment|latents"),
    (probe, "--data latents:TMP/latents", "latents:TMP/latents|latents of the same VAE"),
    (probe, "--task segment", "--task segment|masks"),
])
def test_refused(trained, latents, vae, mine, tmp_path, capsys, script, more, words):
    """What does not go together is refused in a sentence, and nothing is made."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos-16px-taken").mkdir()
    (tmp_path / "taken").symlink_to(vae)
    change(vae="another")(shutil.copytree(latents, tmp_path / "latents"))
    for name, kind in (("video", "AutoencoderKLTemporalDecoder"), ("unet", "UNet2DModel")):
        if name in more:
            make_vae(kind, tmp_path / name)
    before = tree(tmp_path)
    argv = flags(mine, vae, tmp_path / "run") if script is train else [str(trained), "--device", "cpu"]
    with refused(capsys, *words.replace("TMP", str(tmp_path)).split("|")):
        script.main([*argv, *more.replace("TMP", str(tmp_path)).split()])
    assert tree(tmp_path) == before


def test_resume_on_other_latents(mine, vae, tmp_path, capsys):
    """A run whose images changed is not resumed; where files are only newer, it goes on."""
    run = tmp_path / "run"
    train.main(flags(mine, vae, run))
    (mine / "train/a/00.png").touch()
    train.main(flags(mine, vae, run, "--resume --images 24"))
    assert load(run)["images"] == 24
    Image.new("RGB", (SIZE, SIZE), "white").save(mine / "train/a/00.png")
    with refused(capsys, "other latents", "another --out"):
        train.main(flags(mine, vae, run, "--resume --images 32"))


def test_no_diffusers(mine, tmp_path, capsys, monkeypatch):
    """Without diffusers one sentence says how to install it."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with refused(capsys, "pip install diffusers"):
        train.main(flags(mine, "some/vae", tmp_path / "run"))
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]
