"""The first page's table: what z, alone and with distillation, changes in runs of one seed.

    python .github/results/claim.py

A cell: mean difference to the baseline of the same seed [paired 95 % t-interval],
bold where that excludes 0.
"""
import json
import math
import statistics
from pathlib import Path

HERE = Path(__file__).parent
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}   # 97.5 % quantile of t, by degrees of freedom
ROWS = [                                         # title, file, variant
    ("UNet 36 M, z", "unet", "mid"),
    ("UNet 36 M, z + distillation", "unet", "mid distill 0.005"),
    ("U-ViT 11 M, z", "uvit", "mid"),
    ("U-ViT 11 M, z + distillation", "uvit", "mid distill 0.005"),
    ("DiT 14.5 M, z", "dit", "block_6"),
    ("DiT 14.5 M, z + distillation", "dit", "block_6 distill 0.02"),
]


def interval(differences):
    """-> mean, low, high of the paired 95 % t-interval."""
    n = len(differences)
    mean = statistics.mean(differences)
    half = T95[n - 1] * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def cell(differences, digits):
    mean, low, high = interval(differences)
    text = f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def table():
    """-> the table, in Markdown."""
    rows = ["| network | distance (lower is better) | probe accuracy, points |", "|---|---|---|"]
    for title, network, variant in ROWS:
        lines = (HERE / f"pairs-{network}.jsonl").read_text().splitlines()
        runs = {}
        for line in lines:
            run = json.loads(line)
            runs[run["variant"], run["seed"]] = run
        seeds = [seed for name, seed in runs if name == variant]
        distances, points = [], []
        for seed in seeds:
            run, baseline = runs[variant, seed], runs["baseline", seed]
            distances.append(run["distance"] - baseline["distance"])
            points.append(100 * (run["test"] - baseline["test"]))
        rows.append(f"| {title} | {cell(distances, 2)} | {cell(points, 1)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
