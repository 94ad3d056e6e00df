"""The runs behind claim.md: over all GPUs of a host, two at a time on each, a line of --out a run.

    python .github/results/claim_runs.py --transfer folder:tiny-imagenet --networks dit --seeds 10

Runs that --out holds already are not made again: the same command goes on where it was stopped. Others begin
anew: what their folders below --runs held goes. There a file said.txt has what a run says while it is made.
"""
import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import claim  # noqa: E402
import study  # noqa: E402

FLAGS = {
    "unet": "--schedule flow --lr 5e-4",
    "uvit": "--schedule edm --lr 2e-3 --warmup 150000",
    "dit": "--schedule edm --lr 1e-3",
}
STUDY = HERE / "study.py"               # makes a run
ORDER = ("baseline", "z + distillation"), ("z", "distillation")      # the primary comparison first


def jobs(networks, seeds, done):
    """-> [(network, variant, seed), ...] that are not done, in an order that completes pairs early."""
    every = []
    for titles in ORDER:
        for seed in seeds:
            for title in titles:
                for _, name, z, weight in claim.NETWORKS:
                    every.append((name, claim.forms(z, weight)[title], seed))
    return [job for job in every if job[0] in networks and job not in done]


def run(args, job, gpu):
    """One job on one GPU, by study.py in a process of its own -> its line, None where it failed."""
    name, variant, seed = job
    folder = Path(args.runs, f"{name}-{variant}-{seed}".replace(" ", "-"))
    shutil.rmtree(folder, ignore_errors=True)                   # else a run that was stopped is in the way
    folder.mkdir(parents=True)
    line = folder / "line.jsonl"
    command = [sys.executable, STUDY, name, "--variants", variant, "--seeds", str(seed),
               "--data", args.data, "--transfer", args.transfer, "--images", str(args.images),
               "--batch-size", "128", "--flags", f"--image-size 32 --decay {args.images} {FLAGS[name]}",
               "--size", *(["dim=128"] if name == "unet" else []), "--runs", str(folder), "--out", str(line)]
    with open(folder / "said.txt", "w") as said:
        subprocess.run(command, stdout=said, stderr=subprocess.STDOUT,
                       env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)})
    return line.read_text() if line.exists() else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="cifar10", help="as of train.py; there already, not downloaded now")
    parser.add_argument("--transfer", required=True, help="Tiny-ImageNet at 32 pixels, folder:PATH")
    parser.add_argument("--networks", nargs="+", choices=list(FLAGS), default=list(FLAGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14, 15])
    parser.add_argument("--images", type=int, default=1_400_000)
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--runs", default="runs/claim")
    parser.add_argument("--out", default="runs/claim.jsonl")
    args = parser.parse_args(argv)
    there = study.read(args.out) if Path(args.out).exists() else []
    done = {(r["network"], r["variant"], r["seed"]) for r in there}
    left, lock = jobs(args.networks, args.seeds, done), Lock()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)

    def work(gpu):
        while True:
            with lock:
                if not left:
                    return
                job = left.pop(0)
                print("begins", gpu, *job, flush=True)
            line = run(args, job, gpu)
            with lock, open(args.out, "a") as file:
                file.write(line or "")
                print("ends" if line else "FAILED", gpu, *job, flush=True)

    with ThreadPoolExecutor(2 * args.gpus) as pool:
        list(pool.map(work, [*range(args.gpus), *range(args.gpus)]))
    print("lines:", args.out)


if __name__ == "__main__":
    main()
