"""How fast a training step is, with the flags of train.py: 80 steps on random images; writes nothing.

    python .github/results/bench.py --model dit --batch-size 512
    torchrun --nproc_per_node=2 .github/results/bench.py --model dit --batch-size 1024

A step is forward and backward pass, clipping, AdamW and EMA; the speed is the median over the last 60 steps.
"""
import statistics
import sys
import time
from pathlib import Path

START = time.time()                     # before torch is imported: the first step counts from here
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import train  # noqa: E402

IMAGES, CLASSES = 4_096, 10
RECORDS, STEPS = 4, 20                  # of steps that are timed together; the first warms up
PEAK = dict(A100=312, H100=989, H200=989)     # dense bf16 TFLOP/s, by the vendor


def random_data(size):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 3, size, size), dtype=torch.uint8, generator=g)
    return train.Data(images, torch.arange(IMAGES) % CLASSES, None, [str(k) for k in range(CLASSES)])


def flops(run):
    """Of a forward and a backward pass, an image."""
    x0, t, noise, y = run.batches(0)
    some = [x0[:1], t[:1], noise[:1], None if y is None else y[:1]]
    net = run.ema.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, run.autocast():
        run.diffusion.loss(net, *some).sum().backward()
    return counter.get_total_flops()


def measure(run):
    """-> images a second, seconds from the start of the process to the end of the first step."""
    speeds = []
    for record in range(RECORDS):
        begun = time.time()
        for k in range(STEPS):
            train.advance(run)
            if record == 0 and k == 0:
                run.meter.sums().tolist()                          # waits for the device
                ready = time.time() - START
        run.meter.sums().tolist()
        speeds.append(STEPS * run.cfg.batch_size / (time.time() - begun))
    return statistics.median(speeds[1:]), ready


def report(run, speed, ready, work):
    cfg, rate = run.cfg, speed * work / 1e12
    chip = train.chip(run.device)
    lines = [f"{cfg.model} {cfg.size}, batch {cfg.batch_size}, {run.world} x {chip}, {train.VERSIONS}",
             f"{speed:,.0f} images/s, {1000 * cfg.batch_size / speed:.1f} ms a step",
             f"{work / 1e9:.2f} GFLOPs an image: {rate:.2f} TFLOP/s"]
    for name, peak in PEAK.items():
        if name in chip and cfg.precision != "fp32":
            lines[-1] += f", {100 * rate / (run.world * peak):.0f} % of what the device can do in bf16"
    lines.append(f"{ready:.1f} s from the start to the end of the first step")
    if run.device.type == "cuda":
        lines.append(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB of the device's memory")
    train.say("\n".join(lines))


@train.command
def main(argv=None):
    cfg = train.parse_config(argv)
    device, _, _ = train.setup(cfg.device)
    run = train.Run(cfg, random_data(cfg.image_size), device)
    speed, ready = measure(run)
    report(run, speed, ready, flops(run))


if __name__ == "__main__":
    main()
