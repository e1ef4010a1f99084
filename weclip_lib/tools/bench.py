"""Measure time, memory and arithmetic of a training step and of inference. `make bench`.

Weights are random, since cost does not depend on them. Times are medians of several runs: CPU
seconds (user and system, all threads), or wall seconds on a GPU. Compare them only within one run.
`ratio` is the time over that of the frozen blocks' forward pass on the same pixels. `share` is an
ideal time over the measured time. Ideally, matrix products run at the rate of the fastest product
that was measured, and other operations at the rate of a large copy. Above 1, intermediate results
stayed in a cache.
"""

import math
import multiprocessing
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

import open_clip
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count
from tqdm import tqdm

from weclip_lib import cam, commands
from weclip_lib.backbone import IMAGENET_STATISTICS, Backbone
from weclip_lib.config import Budget, DecoderShape, Method
from weclip_lib.data.profiles import PROFILES
from weclip_lib.evaluation.scores import predict
from weclip_lib.labels import VOC
from weclip_lib.model import WeCLIP
from weclip_lib.storage.files import write_text
from weclip_lib.storage.provenance import write_provenance
from weclip_lib.storage.weights import untrained
from weclip_lib.studies.results import RESULTS, render_pages
from weclip_lib.training.loop import build_optimizer

BASE, STEP = "frozen blocks but the last", "whole step"
INFERENCE_BASE, INFERENCE = "inference, frozen blocks", "inference, whole"
OFFICIAL = {  # our parts, and their rows in results/published.csv
    BASE: "of which CLIP forward, 11 blocks",
    "Grad-CAM": "of which Grad-CAM, 8 passes",
    "PAR, pseudo labels": "of which PAR, 4 images",
    STEP: "official step, ViT-B/16, batch 4 at 320x320, 2 classes an image, 1 CPU thread",
    INFERENCE_BASE: "of which encoder and decoder",
    INFERENCE: "official inference, 512-long image, scales 1.0 and 0.75, flip, 1 CPU thread",
}


@dataclass(frozen=True)
class Case:
    """What is measured; the defaults give the published step."""

    backbone: str = "ViT-B-16-quickgelu"
    batch: int = 4  # pictures
    crop: int = 320  # pixels a side
    classes: str = "2"  # per picture; several numbers: of the pictures in turn
    device: str = "cpu"
    bf16: bool = False  # autocast; else float32


SCALING = (
    *(Case(batch=batch) for batch in (1, 2, 8, 16)),
    *(Case(crop=crop) for crop in (224, 416, 512)),
    *(Case(classes=classes) for classes in ("1", "5", "10", "1 1 1 5")),
    Case(backbone="MiniCLIP", crop=160, batch=8),
    Case(backbone="ViT-L-14-quickgelu", crop=322),
)


class PeakMemory:
    """Measures peak memory in bytes while the block runs: the GPU's, or else resident."""

    def __init__(self, device: str) -> None:
        self._cuda = device != "cpu"
        self._process, self._stop = psutil.Process(), threading.Event()

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self.start = self.highest = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _now(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return self._process.memory_info().rss

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.highest = max(self.highest, self._now())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.highest = max(self.highest, self._now())


class Traffic(TorchDispatchMode):
    """Counts bytes read and written by operations other than matrix products and views."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        moves = not func.is_view and not re.search("empty|unsafe_view", func.name())
        if moves and func.overloadpacket not in flop_registry:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, result))}.values()
            self.bytes += sum(t.nbytes for t in tensors if isinstance(t, Tensor))
        return result


def _attention_flops(query, _key, _value, width, heads, *_, **__) -> int:
    """Count those of fused multi-head attention: four projections, two products a head."""
    batch, tokens, _ = query
    head = (batch, heads, tokens, width // heads)
    return 8 * batch * tokens * width**2 + sdpa_flop_count(head, head, head)


FUSED = {
    torch.ops.aten._native_multi_head_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
}


def _finish(run: Callable[[], object], device: str) -> None:
    run()
    if device != "cpu":
        torch.cuda.synchronize()


def measured_together(
    runs: Sequence[Callable[[], object]], repeats: int, device: str
) -> list[dict[str, float]]:
    """Measure median CPU and wall seconds of functions, GFLOP, and GB moved between products.

    They take turns, so that a machine that is slow for a while slows all.
    """
    costs, times = [], []
    for run in runs:
        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter, Traffic() as traffic:
            _finish(run, device)
        costs.append({"gflop": counter.get_total_flops() / 1e9, "gbyte": traffic.bytes / 1e9})
    for _ in range(repeats):
        for run in runs:
            began = time.process_time(), time.perf_counter()
            _finish(run, device)
            times.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    for number, cost in enumerate(costs):
        cpu, wall = zip(*times[number :: len(runs)], strict=True)
        cost |= {"cpu_s": statistics.median(cpu), "wall_s": statistics.median(wall)}
    return costs


def measured(run: Callable[[], object], repeats: int, device: str) -> dict[str, float]:
    """Call `measured_together` for one function."""
    return measured_together([run], repeats, device)[0]


PRODUCTS = ((2048, 2048, 2048), (4096, 4096, 4096), (1604, 768, 3072), (1604, 3072, 768))  # m, k, n


def machine_rates(device: str, bf16: bool) -> tuple[float, float]:
    """Measure GFLOP/s of the fastest of several matrix products, and GB/s of a large copy.

    Two products are those of a ViT-B/16's MLP at batch 4, 320 x 320. A copy reads and writes.
    """
    clock = "cpu_s" if device == "cpu" else "wall_s"
    kind = torch.bfloat16 if bf16 else torch.float32
    products = []
    for rows, inner, columns in PRODUCTS:
        left = torch.randn(rows, inner, device=device).to(kind)
        right = torch.randn(inner, columns, device=device).to(kind)
        products.append(partial(torch.mm, left, right))
    found = measured_together(products, repeats=5, device=device)
    source, target = torch.randn(2, 2**26, device=device)
    copy = measured(lambda: target.copy_(source), repeats=5, device=device)
    fastest = max(product["gflop"] / product[clock] for product in found)
    return fastest, 2 * source.nbytes / 1e9 / copy[clock]


class Bench:
    """A model of profile `voc` with random weights, and the work to measure."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        clip = untrained(case.backbone)
        tokenizer = open_clip.get_tokenizer(case.backbone)
        backbone = Backbone(clip, tokenizer, IMAGENET_STATISTICS)
        self.case = case
        self.model = WeCLIP(backbone, VOC, Method(), DecoderShape()).to(case.device)
        self.optimizer = build_optimizer(self.model, Budget())
        self.images = torch.randn(case.batch, 3, case.crop, case.crop, device=case.device)
        self.wide = torch.randn(1, 3, 384, 512, device=case.device)
        self.labels = torch.zeros(case.batch, len(VOC.classes))
        counts = map(int, case.classes.split())
        for told, count in zip(self.labels, cycle(counts), strict=False):
            told[:count] = 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.bf16)

    def blocks(self) -> None:
        self.model.backbone.encode_image(self.images)

    def learn(self, logits: Tensor, affinity: Tensor, label: Tensor) -> None:
        segmentation, pairwise = self.model.losses(logits, affinity, label)
        (segmentation + self.model.method.affinity_weight * pairwise).backward()

    def step(self) -> None:
        model = self.model
        features = model.extract(self.images, self.labels)
        logits, affinity = model.decoder(features.tokens, tuple(features.cam.shape[-2:]))
        label = model.label(features, self.images, self.labels, affinity)
        self.learn(logits, affinity, label)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def inference_blocks(self) -> None:
        for scale in PROFILES["voc"].scales:
            resized = F.interpolate(self.wide, scale_factor=scale, mode="bilinear")
            self.model.backbone.encode_image(torch.cat([resized, resized.flip(-1)]), maps=0)

    def inference(self) -> None:
        predict(self.model.backbone, [self.model.decoder.eval()], self.wide)
        self.model.decoder.train()

    def parts(self) -> Iterator[tuple[str, Callable[[], object], str]]:
        """Yield name, work, and name of the part to compare with."""
        model, labels = self.model, self.labels
        seen = model.backbone.encode_image(self.images)
        features, grid = model.extract(self.images, labels), seen.grid
        with torch.no_grad():
            _, affinity = model.decoder(features.tokens, grid)
        refined = model.refine_cam(features, affinity)
        label = model.pseudo_label(refined, self.images, labels)
        texts = model.foreground, model.background
        yield BASE, self.blocks, BASE
        yield "Grad-CAM", lambda: cam.grad_cam(model.backbone, seen, *texts, labels), BASE
        yield "boxes, RFM, refined CAMs", lambda: model.refine_cam(features, affinity), BASE
        yield (
            "PAR, pseudo labels",
            lambda: model.pseudo_label(refined, self.images, labels),
            BASE,
        )
        yield (
            "decoder, losses, backward",
            lambda: self.learn(*model.decoder(features.tokens, grid), label),
            BASE,
        )
        yield "AdamW", self.optimizer.step, BASE
        yield STEP, self.step, BASE
        yield INFERENCE_BASE, self.inference_blocks, INFERENCE_BASE
        yield INFERENCE, self.inference, INFERENCE_BASE


def peak_memory(case: Case, part: str) -> dict[str, float]:
    """Measure MiB of weights, added by a part (STEP or INFERENCE) at its peak, and reserved.

    A new process is used, since an old one keeps its memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory, case, part, torch.get_num_threads()).result()


def _peak_memory(case: Case, part: str, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    bench = Bench(case)
    run = bench.step if part == STEP else bench.inference
    with PeakMemory(case.device) as memory, bench.autocast():
        for _ in range(2):  # the optimizer has moments from the second step on
            _finish(run, case.device)
    held = sum(t.nbytes for t in (*bench.model.parameters(), *bench.model.buffers()))
    reserved = torch.cuda.max_memory_reserved() if case.device != "cpu" else math.nan
    found = {
        "weights_mib": held,
        "memory_mib": memory.highest - memory.start,
        "reserved_mib": reserved,
    }
    return {name: value / 2**20 for name, value in found.items()}


def measure(
    case: Case, repeats: int, rates: tuple[float, float], *, inference: bool = True
) -> list[dict]:
    """Make a row per part; `rates` are of `machine_rates`."""
    clock = "cpu_s" if case.device == "cpu" else "wall_s"
    wholes = (STEP, INFERENCE) if inference else (STEP,)
    peaks = {part: peak_memory(case, part) for part in wholes}
    bench, rows = Bench(case), []
    with bench.autocast():
        chosen = [p for p in bench.parts() if inference or p[2] != INFERENCE_BASE]
        parts, runs, bases = zip(*chosen, strict=True)
        costs = dict(zip(parts, measured_together(runs, repeats, case.device), strict=True))
    for (part, cost), base in zip(costs.items(), bases, strict=True):
        limit = cost["gflop"] / rates[0] + cost["gbyte"] / rates[1]
        compared = {"ratio": cost[clock] / costs[base][clock], "share": limit / cost[clock]}
        rows.append({**asdict(case), "part": part, **cost, **compared, **peaks.get(part, {})})
    return rows


def step_profile(case: Case) -> str:
    """List the slowest operations of a step by own time."""
    bench = Bench(case)
    with bench.autocast():
        bench.step()
        with torch.profiler.profile() as profile:
            bench.step()
    key = "self_cpu_time_total" if case.device == "cpu" else "self_device_time_total"
    return profile.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=45)


def official_ratios() -> dict[str, float]:
    """Return ratios of the official code's parts in published.csv, comparable with ours."""
    figures = pd.read_csv(RESULTS / "published.csv").set_index("result")["figure"]
    cost = {part: float(figures[result]) for part, result in OFFICIAL.items()}
    inference = (INFERENCE_BASE, INFERENCE)
    bases = {part: INFERENCE_BASE if part in inference else BASE for part in cost}
    return {part: seconds / cost[bases[part]] for part, seconds in cost.items()}


def machine_name(device: str) -> str:
    """Name the processor or GPU, for a file."""
    if device != "cpu":
        name = torch.cuda.get_device_name()
    else:
        name = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        if info.exists():
            found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
            name = found[1] if found else name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(arguments: commands.Bench) -> None:
    """Run `weclip bench`.

    Raises:
        ValueError: If there is no such device.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU: leave --device out")
    torch.set_num_threads(arguments.threads)
    step = Case(device=arguments.device)
    if arguments.profile:
        tqdm.write(step_profile(step))
        return
    cases = [step, replace(step, bf16=True)]
    if arguments.scaling:
        cases += [replace(case, device=arguments.device) for case in SCALING]
    rates = {bf16: machine_rates(arguments.device, bf16) for bf16 in (False, True)}
    rows = []
    for case in tqdm(cases, unit="case"):
        repeats = arguments.repeats if case in cases[:2] else 2
        # Inference does not depend on what training is fed.
        inference = case in cases[:2] or case.backbone != step.backbone
        rows += measure(case, repeats, rates[case.bf16], inference=inference)
    table = pd.DataFrame(rows)
    official = official_ratios()
    published = table["part"].map(official).where(table["backbone"] == step.backbone)
    table.insert(table.columns.get_loc("ratio") + 1, "official_ratio", published)
    folder, name = RESULTS / "bench", machine_name(arguments.device)
    about = {"gflop_s": rates[False][0], "gflop_s_bf16": rates[True][0], "gbyte_s": rates[False][1]}
    device = torch.device(arguments.device)
    write_provenance(folder / f"{name}.json", name, asdict(arguments), device, rates=about)
    write_text(folder / f"{name}.csv", table.round(3).to_csv(index=False, lineterminator="\n"))
    render_pages()
    about_case = list(asdict(step))
    for values, group in table.groupby(about_case, sort=False):
        tqdm.write("\n" + ", ".join(f"{k} {v}" for k, v in zip(about_case, values, strict=True)))
        shown = group.drop(columns=about_case).dropna(axis=1, how="all")
        tqdm.write(shown.to_markdown(index=False, floatfmt=".3f"))
