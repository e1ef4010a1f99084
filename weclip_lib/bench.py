"""What a training step and an inference cost, part by part: time, memory, arithmetic. `make bench`.

Weights are random: cost does not depend on them. Times are CPU seconds (user and system, all
threads), the median of several runs. They mean something only beside others of the same run, so
`ratio` is against the forward pass of the frozen blocks over the same pixels, and `share` is how
much of the time the arithmetic would take at the rate of a large matrix product on this machine.
"""

import argparse
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import open_clip
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from weclip_lib import cam
from weclip_lib.backbone import IMAGENET_STATISTICS, Backbone
from weclip_lib.config import PROFILES, Budget, DecoderShape, Method
from weclip_lib.evaluate import predict
from weclip_lib.files import write_text
from weclip_lib.labels import VOC
from weclip_lib.model import WeCLIP
from weclip_lib.results import RESULTS, write_provenance
from weclip_lib.train import build_optimizer

BASE = "frozen blocks but the last"


@dataclass(frozen=True)
class Case:
    """What is measured; the defaults are the published step."""

    backbone: str = "ViT-B-16-quickgelu"
    batch: int = 4  # pictures
    crop: int = 320  # pixels a side
    classes: int = 2  # a picture
    device: str = "cpu"
    bf16: bool = False  # autocast; else float32


SCALING = (
    *(Case(batch=batch) for batch in (1, 2, 8, 16)),
    *(Case(crop=crop) for crop in (224, 416, 512)),
    *(Case(classes=classes) for classes in (1, 5, 10)),
    Case(backbone="ViT-L-14-quickgelu", crop=322),
)


class PeakMemory:
    """Growth of memory in use while the block runs, in MiB: the device's, or else resident."""

    def __init__(self, device: str) -> None:
        self._cuda = device != "cpu"
        self._process, self._stop = psutil.Process(), threading.Event()

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._start = self._highest = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _now(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return self._process.memory_info().rss

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, self._now())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.mib = (max(self._highest, self._now()) - self._start) / 2**20


def measured(run: Callable[[], object], repeats: int, device: str) -> dict[str, float]:
    """CPU and wall seconds (medians), growth of memory and GFLOP of a function."""

    def finish() -> None:
        run()
        if device != "cpu":
            torch.cuda.synchronize()

    with FlopCounterMode(display=False) as counter:
        finish()
    with PeakMemory(device) as memory:
        finish()
    cpu, wall = [], []
    for _ in range(repeats):
        began = time.process_time(), time.perf_counter()
        finish()
        cpu.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
    return {
        "cpu_s": statistics.median(cpu),
        "wall_s": statistics.median(wall),
        "memory_mib": memory.mib,
        "gflop": counter.get_total_flops() / 1e9,
    }


def matmul_rate(device: str, size: int = 2048) -> float:
    """GFLOP a second of a large matrix product in single precision: CPU, or wall on a device."""
    left, right = torch.randn(2, size, size, device=device)
    cost = measured(lambda: left @ right, repeats=5, device=device)
    return cost["gflop"] / cost["cpu_s" if device == "cpu" else "wall_s"]


def build_model(case: Case) -> WeCLIP:
    """The model of profile `voc` with random weights."""
    torch.manual_seed(0)
    clip = open_clip.create_model(case.backbone, load_weights=False)
    backbone = Backbone(clip, open_clip.get_tokenizer(case.backbone), IMAGENET_STATISTICS)
    return WeCLIP(backbone, VOC, Method(), DecoderShape()).to(case.device)


def measure(case: Case, repeats: int) -> list[dict]:
    """A row a part."""
    model, device = build_model(case), case.device
    optimizer = build_optimizer(model, Budget())
    images = torch.randn(case.batch, 3, case.crop, case.crop, device=device)
    wide = torch.randn(1, 3, 384, 512, device=device)
    labels = torch.zeros(case.batch, len(VOC.classes), device=device)
    labels[:, : case.classes] = 1
    spent: dict[str, float] = {}
    rows = []

    def part(name: str, run: Callable[[], object], base: str = BASE) -> None:
        cost = measured(run, repeats, device)
        spent[name] = cost["cpu_s" if device == "cpu" else "wall_s"]
        rows.append({**asdict(case), "part": name, **cost, "ratio": spent[name] / spent[base]})

    def learn(logits: torch.Tensor, affinity: torch.Tensor, label: torch.Tensor) -> None:
        segmentation, pairwise = model.losses(logits, affinity, label)
        (segmentation + model.method.affinity_weight * pairwise).backward()

    def step() -> None:
        frozen = model.freeze(images, labels)
        logits, affinity = model.decoder(frozen.tokens, grid)
        label = model.pseudo_label(model.refine_cam(frozen, affinity), images, labels)
        learn(logits, affinity, label)
        optimizer.step()
        optimizer.zero_grad()

    def inference_blocks() -> None:
        for scale in PROFILES["voc"].scales:
            resized = F.interpolate(wide, scale_factor=scale, mode="bilinear")
            model.backbone.encode_image(torch.cat([resized, resized.flip(-1)]))

    with torch.autocast(device, torch.bfloat16, enabled=case.bf16):
        features = model.backbone.encode_image(images)
        frozen, grid = model.freeze(images, labels), features.grid
        with torch.no_grad():
            _, affinity = model.decoder(frozen.tokens, grid)
        refined = model.refine_cam(frozen, affinity)
        label = model.pseudo_label(refined, images, labels)
        part(BASE, lambda: model.backbone.encode_image(images))
        texts = model.foreground, model.background
        part("Grad-CAM", lambda: cam.grad_cam(model.backbone, features, *texts, labels))
        part("boxes, RFM, refined CAMs", lambda: model.refine_cam(frozen, affinity))
        part("PAR, pseudo labels", lambda: model.pseudo_label(refined, images, labels))
        part("decoder, losses, backward", lambda: learn(*model.decoder(frozen.tokens, grid), label))
        part("AdamW", optimizer.step)
        part("whole step", step)
        base = "inference, frozen blocks"
        part(base, inference_blocks, base)
        decoders = [model.decoder.eval()]
        part("inference, whole", lambda: predict(model.backbone, decoders, wide), base)
    return rows


def machine_name() -> str:
    """The processor, as a file name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        name = found[1] if found else name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    """Measure, print the table, write results/bench/<machine>.csv."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="autocast, too")
    parser.add_argument("--scaling", action="store_true", help="other batches, crops, classes, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    first = Case(device=arguments.device)
    cases = [first]
    if arguments.bf16:
        cases.append(replace(first, bf16=True))
    if arguments.scaling:
        cases += [replace(case, device=arguments.device) for case in SCALING]
    rate = matmul_rate(arguments.device)
    rows = [row for case in tqdm(cases, unit="case") for row in measure(case, arguments.repeats)]
    table = pd.DataFrame(rows)
    clock = "cpu_s" if arguments.device == "cpu" else "wall_s"
    table["share"] = table["gflop"] / rate / table[clock]
    folder = RESULTS / "bench"
    name = machine_name() if arguments.device == "cpu" else torch.cuda.get_device_name()
    write_text(folder / f"{name}.csv", table.round(3).to_csv(index=False, lineterminator="\n"))
    write_provenance(folder, name, vars(arguments), matmul_gflops=round(rate, 1))
    shown = ["part", "cpu_s", "wall_s", "ratio", "memory_mib", "gflop", "share"]
    for about, group in table.groupby([*asdict(first)], sort=False):
        tqdm.write(f"\n{', '.join(map(str, about))}")
        tqdm.write(group[shown].to_markdown(index=False, floatfmt=".3f"))


if __name__ == "__main__":
    main()
