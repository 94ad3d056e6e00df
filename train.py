"""Train a self-conditioned diffusion model.

    python train.py --model unet --size tiny --data shapes        a CPU demo, no download
    torchrun --nproc_per_node=2 train.py --model dit              CIFAR-10 on two GPUs; the same run as on one

Lengths are in images and the batch size is global: more GPUs are faster, the experiment stays the same. All
randomness of a step follows from (seed, step): resumed or on more GPUs, a run sees the same images and noise.
Results: runs/<name>/ with config.json, checkpoint.pt, log.jsonl, samples-<images>.png.
"""
import argparse, copy, json, math, platform, re, signal, statistics, subprocess, sys, time  # noqa: E401
START = time.time()       # before torch is imported: --bench counts from here to the first step
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusion import (SCHEDULES, TARGETS, GaussianDiffusion, Student, UserError, augment, collect_stops,
                       command, contrast, encode, load_data, moments_of, pick_autocast, projector, require,
                       resume_command, right_meta, save_file, save_grid, say, seeded_noise, setup,
                       teacher_keys, to_pixels, to_x0, vae_of)
from dit_selfcond import DiT
from unet_selfcond import GroupNorm, UNet
from uvit_selfcond import UViT

MODELS = {"unet": UNet, "uvit": UViT, "dit": DiT}
LABEL_DROPOUT = 0.1       # part of the labels that become "no class", for guidance (arXiv 2207.12598)
CLIP = 1.0                # largest gradient norm
EMA_RAMP = 0.05           # the EMA's half-life is at most this part of the images seen (as in EDM)
LOG_STEPS = 20            # steps between two records of log.jsonl, and two looks at the loss
PEAK = dict(A100=312, H100=989, H200=989)     # dense bf16 TFLOP/s, by the vendor
VERSIONS = f"Python {platform.python_version()}, torch {torch.__version__}"
TEACHER_T = 100           # the teacher of --distill sees a view with less noise than at this step
GUIDANCE = 2.0            # of the sample grids, where the model is class-conditional
LAYOUT = dict(cuda=torch.channels_last, mps=torch.channels_last, cpu=torch.contiguous_format)   # of images

def mix(*numbers):
    """Whole numbers >= 0 -> one seed; torch's CPU generator takes 32 bits, and neighbours would be alike."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# --- config: flags, help, log record and checkpoint record at once ---

def flag(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices and list(choices)))

@dataclass
class Config:
    model: str = flag("dit", "network", MODELS)
    size: str = flag(None, "one of the network's SIZES [small; unet: base]")
    data: str = flag("cifar10", "cifar10, cifar100, folder:PATH, latents:PATH, shapes, shapes:full")
    image_size: int = flag(None, "side in pixels [cifar, folder: 32; shapes: 16; --encode: 256]")
    out: str = flag(None, "run folder [runs/<model>-<size>-<data>]")
    images: int = flag(None, "stop after so many training images [10,000,000 unless --minutes is given]")
    minutes: float = flag(None, "stop after so many minutes")
    batch_size: int = flag(256, "images a step, over all processes together [256]")
    micro_batch: int = flag(None, "images a forward pass and process: less memory, same result [all]")
    lr: float = flag(2e-4, "learning rate of AdamW [2e-4]")
    warmup: int = flag(50_000, "images over which the rate rises from 0 [50,000]")
    decay: int = flag(None, "images by which the rate has fallen linearly to 1 %% of --lr [never]")
    ema: int = flag(500_000, "half-life of the weight average, in images [500,000]")
    save_every: int = flag(500_000, "images between two checkpoints [500,000]")
    sample_every: int = flag(500_000, "images between two sample grids [500,000]")
    resume: bool = flag(False, "continue the run in --out; start fresh if it has no checkpoint")
    conditional: bool = flag(False, "train with the class labels")
    self_cond: bool = flag(True, "self-conditioning [on]; off is the published baseline")
    distill: float = flag(None, "weight of contrastive self-distillation of z, say 0.005 to 0.02 [off]")
    distill_images: int = flag(None, "images over which that weight falls linearly to 0 [never]")
    target: str = flag("eps", "what the network predicts [eps]", TARGETS)
    schedule: str = flag("linear", "noise schedule [linear]", SCHEDULES)
    seed: int = flag(0, "of weights, batches and noise [0]")
    device: str = flag(None, "cuda, mps or cpu [the first of these that is there]")
    precision: str = flag(None, "[bf16 or fp16 on CUDA, else fp32]", ["bf16", "fp16", "fp32"])
    compile: bool = flag(True, "torch.compile and CUDA graphs, where CUDA and Triton are [on]")
    skip_bad: bool = flag(False, "leave out unreadable images of a folder")
    resident: bool = flag(None, "hold the data on the device [where it fills less than half of what is free]")
    encode: str = flag(None, "instead of training, write the latents of --data into this new folder")
    vae: str = flag("stabilityai/sd-vae-ft-ema", "of --encode: AutoencoderKL, name on the hub or folder")
    bench: bool = flag(False, "measure the speed on random images, 80 steps; writes nothing")

# --size tiny --data shapes: what a short run on a CPU wants. Flags given by hand win.
TINY_SHAPES = dict(conditional=True, target="v", schedule="cosine", batch_size=64, lr=4e-3, warmup=6_400,
                   ema=20_000, save_every=20_000, sample_every=40_000)
TINY_IMAGES = {"unet": 60_000, "uvit": 450_000, "dit": 400_000}
MAY_CHANGE = """out images minutes micro_batch save_every sample_every resume device precision compile
                skip_bad resident encode vae"""

def parse_config(argv=None):
    """Flags -> Config with every default filled in. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    parser.error = lambda message: require(False, f"{message}; --help lists the flags.")
    for f in fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=f.metadata["choices"], metavar=f.type.__name__.upper())
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"], **kind)
    given = vars(parser.parse_args(argv))
    cfg = Config(**given)
    sizes, budget = MODELS[cfg.model].SIZES, 10_000_000
    if (cfg.size, cfg.data) == ("tiny", "shapes"):
        budget = TINY_IMAGES[cfg.model]
        cfg = Config(**{**TINY_SHAPES, "decay": budget, **given})
    cfg.size = cfg.size or list(sizes)[1]
    require(cfg.size in sizes, f"--size {cfg.size} is not one of {cfg.model}: use {', '.join(sizes)}.")
    for f in fields(Config):
        value = getattr(cfg, f.name)
        require(f.type not in (int, float) or value is None or value > -(f.name == "seed"),
                f"--{f.name.replace('_', '-')} {value} is impossible: use more than {-(f.name == 'seed')}.")
    require(cfg.distill or not cfg.distill_images, "--distill-images needs a weight: add --distill 0.02.")
    cfg.images = cfg.images or (None if cfg.minutes else budget)
    data = Path(cfg.data.removeprefix("folder:").removeprefix("latents:")).name.replace(":", "-")
    name = f"{cfg.model}-{cfg.size}-{data}"
    cfg.out = cfg.out or f"runs/{name}" + "-baseline" * (not cfg.self_cond)
    return cfg


# --- pieces of the loop ---

def build(cfg, channels, num_classes, device):
    """-> network on the device, diffusion. Raises UserError where the image size does not fit the network."""
    try:
        net_class = MODELS[cfg.model]
        net = net_class(cfg.image_size, channels, num_classes, cfg.self_cond, **net_class.SIZES[cfg.size])
    except (ValueError, RuntimeError, MemoryError, OverflowError) as e:
        raise UserError(f"--model {cfg.model} --size {cfg.size}: {e}")
    if cfg.distill:                                        # last: the rest starts as it does without
        net.projector = projector(net)
    net = net.to(device, memory_format=LAYOUT[device.type])
    for m in net.modules():
        if type(m) is nn.GroupNorm and device.type == "cuda":
            m.__class__ = GroupNorm
    return net, GaussianDiffusion(schedule=cfg.schedule, target=cfg.target)

def compile_parts(net):
    """Compile a network block by block, in place, so that parameters keep their names."""
    torch._dynamo.config.recompile_limit = 64              # all blocks of a class share it, one graph a width
    for part in net.parts:
        part.compile()

class Batches:
    """The batch of a step: a pure function of (seed, step), however many processes share it.

    Draws for the global batch of B images, keeps a process's share b: x0 (b, C, H, W) in [-1, 1] (latents: of
    unit variance), half of it flipped; t (b,); noise (b, C, H, W); y (b,), some "no class", or None. The data
    lives on the device if it fills less than half of the free memory (resident), else on the host or in its
    file, fetched one batch ahead.
    """

    def __init__(self, data, cfg, T, device, rank=0, world=1):
        images = data.both.flatten(0, 1) if data.meta else data.images       # latents: 2 N
        resident = cfg.resident
        if resident is None:
            resident = device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        self.images, self.labels = (x.to(device) if resident else x for x in (images, data.labels))
        self.resident, self.moments = resident, moments_of(data.meta, device)
        self.cfg, self.T, self.K, self.device = cfg, T, len(data.classes), device
        self.mine = slice(rank * cfg.batch_size // world, (rank + 1) * cfg.batch_size // world)
        self.pool, self.ahead = None if resident else ThreadPoolExecutor(1), {}

    def fetch(self, step):
        g = torch.Generator().manual_seed(mix(self.cfg.seed, step, 0))
        i = torch.randperm(len(self.labels), generator=g)[:self.cfg.batch_size][self.mine]
        j = i                                              # of latents, half are those of the flipped images
        if self.moments is not None:
            j = i + len(self.labels) * (torch.rand(self.cfg.batch_size, generator=g)[self.mine] < 0.5)
        if self.resident:
            i, j = self.send(i), self.send(j)
        return self.pin(self.images[j]), self.pin(self.labels[i])

    def pin(self, x):                                      # where the GPU fetches it while the host goes on
        return x.pin_memory() if self.device.type == "cuda" and x.device.type == "cpu" else x

    def send(self, x):
        return self.pin(x).to(self.device, non_blocking=True)

    def __call__(self, step):
        x, y = self.ahead.pop(step).result() if step in self.ahead else self.fetch(step)
        if self.pool:
            self.ahead = {step + 1: self.pool.submit(self.fetch, step + 1)}
        x, y = self.send(x), self.send(y)
        x0 = to_x0(x, self.moments).to(memory_format=LAYOUT[self.device.type])
        g = torch.Generator(self.device).manual_seed(mix(self.cfg.seed, step, 1))
        B, on = self.cfg.batch_size, dict(generator=g, device=self.device)
        flip = torch.rand(B, 1, 1, 1, **on)[self.mine] < 0.5
        t = torch.randint(self.T, (B,), **on)[self.mine]
        noise = torch.randn(B, *x.shape[1:], **on)[self.mine]
        drop = torch.rand(B, **on)[self.mine] < LABEL_DROPOUT
        y = torch.where(drop, self.K, y) if self.cfg.conditional else None
        return x0 if self.moments is not None else torch.where(flip, x0.flip(3), x0), t, noise, y

    def noisy_view(self, x0, step, diffusion):
        """Another view of each image, with a little noise: x_t, t. A function of (seed, step) as well."""
        g = torch.Generator(self.device).manual_seed(mix(self.cfg.seed, step, 0, 1))
        B, on = self.cfg.batch_size, dict(generator=g, device=self.device)
        u, t = torch.rand(B, 4, **on)[self.mine], torch.randint(TEACHER_T, (B,), **on)[self.mine]
        view = augment(x0, u).to(memory_format=LAYOUT[self.device.type])
        return diffusion.add_noise(view, t, torch.randn(B, *x0.shape[1:], **on)[self.mine]), t

@torch.no_grad()
def update_ema(ema, net, cfg, images):
    """ema <- beta ema + (1 - beta) net; its half-life, in images, ramps up (EDM, arXiv 2206.00364, F.2)."""
    beta = 0.5 ** (cfg.batch_size / min(cfg.ema, EMA_RAMP * images))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)

def read_checkpoint(path):
    """-> dict of tensors, plain values and a Config; nothing else is ever unpickled. Raises UserError."""
    try:
        state = {"latents": None, **torch.load(path, map_location="cpu", weights_only=True)}
        cfg, meta, classes = Config(**state["config"]), state["latents"], state["classes"]
        right = [type(state[x]) is int and state[x] >= 0 for x in ("images", "loss_count", "channels")]
        for f in fields(Config):
            value, choices = getattr(cfg, f.name), f.metadata["choices"]
            right += [type(value) in (f.type, type(f.default)), not choices or value in [*choices, None]]
        right += [cfg.size in MODELS[cfg.model].SIZES, type(classes) is list, state["ema"],
                  state["images"] % cfg.batch_size == 0, all(type(name) is str for name in classes),
                  state["num_classes"] == len(classes) * cfg.conditional, meta is None or right_meta(meta),
                  len(state["loss_sum"]) == 1 + bool(cfg.distill)]
        require(all(right), "a value that cannot be")
        return {**state, "path": path, "config": cfg, "loss_sum": [float(x) for x in state["loss_sum"]]}
    except Exception as e:
        raise UserError(f"{path} is no whole checkpoint ({type(e).__name__}): restore a copy or train anew.")

def restore(state, **parts):
    """Load state[name] into each part. Raises UserError where it does not fit."""
    try:
        for name, part in parts.items():
            if name == "optimizer":                 # its settings are those of the code
                part.load_state_dict({**part.state_dict(), "state": state[name]["state"]})
                for p, s in part.state.items():
                    shapes = [s[x].shape for x in ("step", "exp_avg", "exp_avg_sq")]
                    require(shapes == [(), p.shape, p.shape] and s["step"] >= 0, "another optimizer")
            elif state[name]:                       # a GradScaler that was off has nothing to say
                part.load_state_dict(state[name])
    except Exception as e:                          # torch raises many kinds
        raise UserError(f"{state['path']} does not fit the network ({type(e).__name__}): use its own code.")

def load_run(folder, device):
    """Run folder -> checkpoint dict, EMA network in eval mode, diffusion. Raises UserError."""
    path = Path(folder) / "checkpoint.pt"
    require(path.exists(), f"{path} does not exist: give the folder of a run of train.py.")
    state = read_checkpoint(path)
    net, diffusion = build(state["config"], state["channels"], state["num_classes"], device)
    restore(state, ema=net)
    return state, net.eval().requires_grad_(False), diffusion

def report(cfg, speed, flops, ready, world, chip, dtype):
    """What --bench says: images/s, FLOPs per image, seconds to the first step."""
    rate, memory = speed * flops / 1e12, torch.cuda.max_memory_allocated() / 1e9       # TFLOP/s, GB
    peak = [world * value for name, value in PEAK.items() if name in chip and dtype]
    say(f"{cfg.model} {cfg.size}, batch {cfg.batch_size}, {world} x {chip}, {dtype or torch.float32}, "
        f"{VERSIONS}\n{speed:,.0f} images/s, {1000 * cfg.batch_size / speed:.1f} ms a step\n"
        f"{flops / 1e9:.2f} GFLOPs an image: {rate:.2f} TFLOP/s"
        + "".join(f", {100 * rate / value:.0f} % of the {value} that the device can do" for value in peak)
        + f"\n{ready:.1f} s from the start to the end of the first step"
        + f"\n{memory:.1f} GB of the device's memory" * (memory > 0))

# --- the loop ---

def train(cfg):
    if cfg.bench:                                          # one record to warm up, three to measure
        cfg.images, cfg.minutes, cfg.data = 4 * LOG_STEPS * cfg.batch_size, None, "random"
        cfg.save_every = cfg.sample_every = sys.maxsize    # never
    out, path, log = (Path(cfg.out) / name for name in ("", "checkpoint.pt", "log.jsonl"))
    device, rank, world = setup(cfg.device)
    first, ddp, share = rank == 0, dist.is_initialized(), cfg.batch_size // world     # share: of this process
    micro = cfg.micro_batch or share

    # whatever can be wrong is found before anything is written
    require(cfg.batch_size % world == 0,
            f"--batch-size {cfg.batch_size} is not divisible by the {world} processes: use a multiple.")
    require(share % micro == 0, f"--micro-batch {micro} does not divide a process's {share}: use a divisor.")
    require(cfg.resume or cfg.bench or not out.exists() or out.is_dir() and not any(out.iterdir()),
            f"{out} exists and is not empty: go on with --resume, or choose another --out.")
    state = read_checkpoint(path) if path.exists() and not cfg.bench else None
    wrong, load = [None], lambda: load_data(cfg.data, "train", cfg.image_size, cfg.skip_bad)
    if first:
        try:
            data = load()
        except UserError as e:
            wrong = [str(e)]
    if ddp:
        dist.broadcast_object_list(wrong)                  # all stop, or go on with what the first prepared
    require(not wrong[0], wrong[0])
    data = data if first else load()
    cfg.image_size = data.images.shape[-1]
    require(cfg.batch_size <= len(data.images),
            f"--batch-size {cfg.batch_size} is more than the {len(data.images)} images: use a smaller one.")
    require(len(data.classes) > 1 or not cfg.conditional,
            f"--conditional needs classes, {cfg.data} has one: drop it, or sort them into train/<class>/.")
    require(not state or state["latents"] == data.meta,
            f"{path} was trained on other latents than {cfg.data} holds now: choose another --out.")
    for name, value in asdict(state["config"] if state else cfg).items():
        require(name in MAY_CHANGE.split() or value == getattr(cfg, name), f"{path} was trained with {name} "
                f"{value}: resume it with the same flags, or choose another --out.")

    # network, its average, optimiser
    torch.manual_seed(mix(cfg.seed))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    channels, num_classes = data.images.shape[1], len(data.classes) * cfg.conditional
    net, diffusion = build(cfg, channels, num_classes, device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(net.parameters(), cfg.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    autocast, dtype = pick_autocast(cfg.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start, images, loss_count = time.time(), 0, 0
    weights = torch.ones(1 + bool(cfg.distill), device=device)         # of the losses
    loss_sum = torch.zeros_like(weights)
    if state:
        restore(state, model=net, ema=ema, optimizer=optimizer, scaler=scaler)
        images, loss_count = state["images"], state["loss_count"]
        loss_sum += loss_sum.new_tensor(state["loss_sum"])
    batches = Batches(data, cfg, diffusion.T, device, rank, world)
    student = Student(net) if cfg.distill else net
    if cfg.compile and device.type == "cuda" and torch.utils._triton.has_triton():
        say("compiling: the first time it takes up to minutes, later it comes from a cache")
        compile_parts(net)
        if cfg.distill:
            compile_parts(ema)
        # a step has up to 2,000 kernels, more than the host launches in time: CUDA graphs launch them
        x0 = torch.zeros(micro, channels, cfg.image_size, cfg.image_size, device=device)
        t = torch.zeros(micro, dtype=torch.int64, device=device)
        some = x0.to(memory_format=LAYOUT["cuda"]), t, t.clone()
        with autocast():
            torch.cuda.make_graphed_callables(student, some if cfg.conditional else some[:2])
        for w in net.parameters():                         # else w.grad would be memory of the graph
            w.grad = torch.zeros_like(w)
    elif cfg.compile:
        say(f"torch.compile is off: it needs CUDA and Triton, and this is {device}")
    model = DistributedDataParallel(student, gradient_as_bucket_view=True) if ddp else student
    count = sum(p.numel() for p in net.parameters())

    def mean_loss():                                       # since the last log point, over all processes
        total = loss_sum.clone()
        if ddp:
            dist.all_reduce(total)
        mean = (total / world / max(loss_count, 1)).tolist()
        require(all(map(math.isfinite, mean)), f"the loss is not finite between {logged} and {images} "
                                               f"images, {path} is from before: lower --lr.")
        return mean

    def save():
        mean = mean_loss()                                 # a state that is not finite is never saved
        if first:
            save_file(path, lambda file: torch.save(dict(
                step=images // cfg.batch_size, images=images, config=asdict(cfg), model=net.state_dict(),
                ema=ema.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                loss_sum=[x * loss_count for x in mean], loss_count=loss_count, channels=channels,
                num_classes=num_classes, classes=data.classes, latents=data.meta), file))

    def draw():
        if draws:                                          # 8 rows of samples; a column a class, at most 10
            K, columns = num_classes, min(num_classes, 10) or 8
            noise = seeded_noise(range(8 * columns), data.images.shape[1:])().to(device)
            y = torch.arange(columns, device=device).repeat(8) if K else None
            with autocast(), torch.compiler.set_stance("force_eager"):
                x = diffusion.sample(ema, noise, y, null=K, guidance=GUIDANCE if K else 1, clip=not vae)
            x = to_pixels(x, moments_of(data.meta, device), vae)
            save_file(out / f"samples-{images}.png", lambda file: save_grid(x, file, columns))

    def save_log():
        save_file(log, lambda file: file.write("".join(x + "\n" for x in lines).encode()))

    def over():      # 0: no; 1: the budget is spent, by the first one's clock; else the signal that one got
        late = first and time.time() - start > 60 * (cfg.minutes or math.inf)
        stop = torch.tensor(int(max([late, *asked])))
        if ddp:
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        return 1 if images >= (cfg.images or math.inf) else stop.item()

    writes, vae = first and not cfg.bench, vae_of(data.meta, device) if first else None
    draws = first and bool(vae) == bool(data.meta)         # sample grids: of latents only with their VAE
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    if writes:
        git = subprocess.run("git rev-parse --verify HEAD", shell=True, cwd=Path(__file__).parent,
                             capture_output=True)
        head = dict(config=asdict(cfg), parameters=count, device=f"{world} x {device} {chip}",
                    versions=VERSIONS, commit=git.stdout.decode().strip())
        save_file(out / "config.json", lambda file: file.write(json.dumps(asdict(cfg), indent=2).encode()))
        old = log.read_text(errors="replace") if state and log.exists() else json.dumps(head)
        whole = re.finditer(r'^(?:{"images": (\d+), .*}|{"config": .*})$', old, re.M)
        lines = [line[0] for line in whole if int(line[1] or 0) <= images]
        for part in out.glob("*.part"):                                # of a run that was killed
            part.unlink()
        save_log()
    say(f"{cfg.model} {cfg.size}: {count:,} parameters, {len(data.images):,} images, {world} x {device}")
    logged, logged_time = images, time.time()
    bar = tqdm(total=cfg.images, initial=images, unit="img", unit_scale=True, disable=not first)
    asked, speeds = [] if cfg.bench else collect_stops(), []
    done = over()
    while not done:
        step = images // cfg.batch_size
        x0, t, noise, y = batches(step)
        torch.manual_seed(mix(cfg.seed, step, 2 + rank))               # dropout follows (seed, step) too
        fall = max(1 - images / (cfg.decay or math.inf), 0.01)
        optimizer.param_groups[0]["lr"] = lr = cfg.lr * min(1, images / cfg.warmup) * fall
        weight = (cfg.distill or 0) * max(1 - images / (cfg.distill_images or math.inf), 0)
        weights[1:] = weight
        if weight:                                         # at 0 the teacher costs nothing
            with autocast():
                keys = teacher_keys(ema, *batches.noisy_view(x0, step, diffusion), micro)
        for i in range(0, share, micro):
            with model.no_sync() if ddp and i + micro < share else nullcontext(), autocast():
                some = [x if x is None else x[i:i + micro] for x in (x0, t, noise, y)]
                losses = diffusion.loss(model, *some)                      # (micro,)
                if cfg.distill:                            # the more of an image is left, the more z can know
                    losses, p = losses
                    own = rank * share + i + torch.arange(micro, device=device)
                    apart = contrast(p, keys, own) if weight else 0 * p.sum(1)     # DDP: p is used
                    losses = torch.stack([losses, diffusion.abar[some[1]] * apart])
                loss = losses.view(len(weights), micro).sum(1) / share
                scaler.scale(loss @ weights).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        loss_sum += 0 * norm if dtype != torch.float16 else 0          # NaN as it is; in fp16 it is skipped
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)
        images, loss_count = images + cfg.batch_size, loss_count + 1
        update_ema(ema, net, cfg, images)
        done = over()
        bar.update(cfg.batch_size)
        if cfg.bench and images == cfg.batch_size:
            loss_sum.tolist()                                          # waits for the device
            ready = time.time() - START
        if loss_count == LOG_STEPS or done:
            mean = dict(zip(("loss", "distill")[:1 + (weight > 0)], mean_loss()))      # waits for the device
            speed, seconds = (images - logged) / (time.time() - logged_time), time.time() - start
            record = dict(images=images, **mean, lr=lr, images_per_second=round(speed, 1),
                          seconds=round(seconds, 1))
            if scaler.is_enabled():                                    # the steps it left out since the start
                taken = sum(int(s["step"]) for s in list(optimizer.state.values())[:1])
                record["skipped"] = images // cfg.batch_size - taken
            bar.set_postfix_str(f"loss {record['loss']:.4f}, {seconds / 60:.1f} of {cfg.minutes or '-'} min")
            if writes:
                lines.append(json.dumps(record))
                save_log()
            speeds.append(speed)
            if loss_count == LOG_STEPS:
                loss_sum, loss_count, logged, logged_time = torch.zeros_like(loss_sum), 0, images, time.time()
        for every, act in ((cfg.save_every, save), (cfg.sample_every, draw)):
            if images // every > (images - cfg.batch_size) // every and not done:
                act()
    bar.close()
    if cfg.bench:
        eager = torch.compiler.set_stance("force_eager")
        with eager, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, autocast():
            some = [x if x is None else x[:1] for x in (x0, t, noise, y)]
            diffusion.loss(ema.requires_grad_(), *some).sum().backward()
        speed, flops = statistics.median(speeds[1:]), counter.get_total_flops()
        return report(cfg, speed, flops, ready, world, chip, dtype)
    save()
    if done > 1:
        say(f"stopped by {signal.Signals(done).name} at {images:,} images; checkpoint: {path}; go on with: "
            f"{resume_command()}")
        sys.exit(128 + done)                               # as if the signal had ended it: not a success
    draw()
    say(f"{images:,} images in {(time.time() - start) / 60:.1f} minutes; checkpoint: {path}; log: {log}; "
        f"samples: {out / f'samples-{images}.png' if draws else 'not decoded'}")

@command
def main(argv=None):
    cfg = parse_config(argv)
    if cfg.encode:
        device, _, world = setup(cfg.device)
        require(world == 1, "--encode runs in one process: start it with python, without torchrun.")
        encode(cfg.data, cfg.encode, cfg.image_size or 256, cfg.vae, device, cfg.skip_bad)
        return say(f"latents: {cfg.encode}; train on them with --data latents:{cfg.encode}")
    train(cfg)

if __name__ == "__main__":
    main()
