"""What was tried to make a step cheaper, beside what is done. Part of `make bench`.

Each row times two ways to compute the same thing, in one run, on the published step's sizes.
"""

import argparse
from collections.abc import Callable, Iterator
from unittest import mock

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from weclip_lib.backbone import run_block
from weclip_lib.ops import par
from weclip_lib.storage.files import write_text
from weclip_lib.studies.results import RESULTS, render_pages, write_provenance
from weclip_lib.tools.bench import Bench, Case, machine_name, measured_together

Pair = tuple[str, str, Callable[[], object], str, Callable[[], object]]


def _frozen_part(bench: Bench) -> Iterator[Pair]:
    backbone, images = bench.model.backbone, bench.images
    kept = bench.model.method.attention_layers - 1
    yield (
        "frozen blocks",
        "attention kept where it is read",
        lambda: backbone.encode_image(images, maps=kept),
        "kept everywhere",
        lambda: backbone.encode_image(images),
    )

    def in_inference_mode() -> None:
        with torch.inference_mode():
            backbone.encode_image(images, maps=kept)

    yield (
        "frozen blocks",
        "no_grad",
        lambda: backbone.encode_image(images, maps=kept),
        "inference_mode",
        in_inference_mode,
    )
    block = backbone.blocks[0]
    tokens = backbone.encode_image(images, maps=0).tokens[0]
    compiled = torch.compile(run_block)
    yield (
        "one block, attention kept",
        "eager",
        lambda: run_block(block, tokens),
        "torch.compile",
        lambda: compiled(block, tokens),
    )
    last = images.contiguous(memory_format=torch.channels_last)
    yield (
        "patch embedding",
        "contiguous",
        lambda: backbone.visual.conv1(images),
        "channels last",
        lambda: backbone.visual.conv1(last),
    )


def _refinement(bench: Bench) -> Iterator[Pair]:
    images = bench.images
    maps = torch.rand(len(images), 1 + bench.case.classes, *images.shape[-2:])
    kernel = par.par_kernel(images, par.DILATIONS)

    def whole() -> None:
        with mock.patch.object(par, "CPU_STRIP", images.shape[-2]):
            par.par_kernel(images, par.DILATIONS)

    yield (
        "PAR, kernel",
        "strips of rows",
        lambda: par.par_kernel(images, par.DILATIONS),
        "all rows at once",
        whole,
    )

    def fused(padded: Tensor, kernel: Tensor) -> Tensor:
        views = par.neighbours(padded, par.DILATIONS)
        return sum(view * weight for weight, view in zip(kernel.split(1, 1), views, strict=True))

    compiled = torch.compile(fused, dynamic=False)
    yield (
        "PAR, one iteration",
        "sums in place",
        lambda: par.smooth(maps, kernel, par.DILATIONS),
        "torch.compile",
        lambda: compiled(par.pad_edges(maps, par.DILATIONS), kernel),
    )


def _trained_part(bench: Bench) -> Iterator[Pair]:
    model, images = bench.model, bench.images
    frozen = model.freeze(images, bench.labels)
    grid = tuple(frozen.cam.shape[-2:])
    decoder = model.decoder
    planes = (len(images), -1, *grid)

    def one_after_the_other() -> None:
        levels = [p(t) for p, t in zip(decoder.projections, frozen.tokens, strict=True)]
        fused = decoder.fuse(torch.cat(levels, -1).transpose(1, 2).reshape(planes))
        fused.sum().backward()

    yield (
        "fusion of the blocks, backward too",
        "linear layers multiplied first",
        lambda: decoder.fused(frozen.tokens).sum().backward(),
        "one after the other",
        one_after_the_other,
    )
    label = torch.zeros_like(images[:, 0]).long()
    logits = decoder(frozen.tokens, grid)[0].detach()

    def loss(memory_format: torch.memory_format) -> None:
        small = logits.contiguous(memory_format=memory_format).requires_grad_()
        large = F.interpolate(small, label.shape[-2:], mode="bilinear", align_corners=False)
        F.cross_entropy(large, label).backward()

    yield (
        "enlarging and cross-entropy, backward too",
        "contiguous",
        lambda: loss(torch.contiguous_format),
        "channels last",
        lambda: loss(torch.channels_last),
    )
    apart = torch.optim.AdamW(decoder.parameters())
    yield "AdamW", "fused", bench.optimizer.step, "as it comes", apart.step


def main() -> None:
    """Measure, print the table, write results/bench/<machine>_tried.csv."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench, rows = Bench(Case()), []
    for makes in (_frozen_part, _refinement, _trained_part):
        for part, done, run, tried, other in tqdm(list(makes(bench)), unit="pair"):
            other()  # compiles, where it does
            costs = measured_together([run, other], arguments.repeats, "cpu")
            times = dict(
                zip(("done_cpu_s", "tried_cpu_s"), (c["cpu_s"] for c in costs), strict=True)
            )
            rows.append({"part": part, "done": done, "tried": tried, **times})
    table = pd.DataFrame(rows)
    table["tried_over_done"] = table["tried_cpu_s"] / table["done_cpu_s"]
    folder, name = RESULTS / "bench", f"{machine_name('cpu')}_tried"
    write_provenance(folder, name, vars(arguments))
    write_text(folder / f"{name}.csv", table.round(4).to_csv(index=False, lineterminator="\n"))
    render_pages()
    tqdm.write(table.to_markdown(index=False, floatfmt=".3f"))


if __name__ == "__main__":
    main()
