"""A picture: in each row a sample, and the training images most like it to EfficientNet-Lite0.

    python .github/results/neighbours.py runs/dit/samples.npz --data folder:photos --out neighbours.png

A network that has learned its training images by heart shows here. Needs the packages of fd.py.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

import fd
import train

NEIGHBOURS = 7


def nearest(samples, images, device):
    """Images (n, 3, H, W), (N, 3, H, W) uint8 -> indices of the nearest by cosine (n, NEIGHBOURS)."""
    net = fd.load_network(device)
    found = fd.features(net, samples, device, "samples")
    known = fd.features(net, images, device, "training images")
    alike = F.normalize(found) @ F.normalize(known).T                        # (n, N)
    return alike.topk(NEIGHBOURS).indices


@train.command
def main(argv=None):
    parser = fd.make_parser(__doc__)
    parser.add_argument("samples", help="of sample.py --npz")
    parser.add_argument("-n", "--count", type=train.whole_number, default=8, help="of the first samples [8]")
    parser.add_argument("--out", type=Path, default=Path("neighbours.png"))
    args = parser.parse_args(argv)
    train.require(args.count > 0, f"--count {args.count} is not possible: use 1 or more.")
    device = fd.begin(args)
    samples = fd.read(args.samples)[:args.count]
    images = train.load_data(args.data, "train", samples.shape[-1]).images
    found = images[nearest(samples, images, device)]                         # (n, NEIGHBOURS, 3, H, W)
    tiles = torch.cat([samples[:, None], found], 1).flatten(0, 1)
    train.save_file(args.out, lambda file: train.save_grid(train.to_x0(tiles, None), file, 1 + NEIGHBOURS))
    train.say(f"{args.out}: {len(samples)} samples, left, and the {NEIGHBOURS} nearest training images")


if __name__ == "__main__":
    main()
