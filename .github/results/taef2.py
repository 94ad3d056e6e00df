"""train.py, sample.py and probe.py on latents of TAEF2, FLUX.2's VAE in small, which diffusers lacks.

    python .github/results/taef2.py train --size small-1 --data folder:photos --image-size 128 --vae taef2
    python .github/results/taef2.py sample runs/dit-small-1-photos

The folder taef2 holds encoder.pt and decoder.pt, the TAEF2 of github.com/madebyollin/taesd as TorchScript:
images (N, 3, H, W) in [0, 1] to latents (N, 32, H / 8, W / 8), and back.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import probe  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

PROGRAMS = {"train": train.main, "sample": sample.main, "probe": probe.main}


class TAEF2:
    """What train.py asks of a VAE of diffusers: config, device, encode(x).latents and decode(z).sample."""

    config = SimpleNamespace(in_channels=3, get=dict(block_out_channels=[64] * 4).get)       # three halvings

    def __init__(self, folder, device):
        files = [Path(folder, "encoder.pt"), Path(folder, "decoder.pt")]
        train.require(all(file.is_file() for file in files), f"{folder} lacks encoder.pt or decoder.pt: name "
                                                             "the folder that has both.")
        self.encoder, self.decoder = [torch.jit.load(file, device).float().eval() for file in files]
        self.device = torch.device(device)

    @torch.no_grad()
    def encode(self, x):
        return SimpleNamespace(latents=self.encoder(x / 2 + 0.5))

    @torch.no_grad()
    def decode(self, z):
        return SimpleNamespace(sample=2 * self.decoder(z) - 1)


if __name__ == "__main__":
    train.load_vae = TAEF2
    PROGRAMS[sys.argv[1]](sys.argv[2:])
