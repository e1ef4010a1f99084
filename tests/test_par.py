import math

import torch

from weclip_lib.ops import par


def slow_par(image, maps, dilations):
    """One iteration, pixel by pixel, straight from the definition."""
    _, height, width = image.shape
    offsets = [(dy * d, dx * d) for d in dilations for dy, dx in par.DIRECTIONS]
    distance = torch.tensor([math.hypot(*offset) for offset in offsets])
    near = (-((distance / (distance.std() + 1e-8) / 0.3) ** 2)).softmax(0)
    result = torch.zeros_like(maps)
    for y in range(height):
        for x in range(width):
            places = [
                (min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1))
                for dy, dx in offsets
            ]
            colours = torch.stack([image[:, py, px] for py, px in places])
            scaled = (colours - image[:, y, x]) / (colours.std(0) + 1e-8) / 0.3
            weight = (-(scaled**2).mean(1)).softmax(0) + 0.01 * near
            values = torch.stack([maps[:, py, px] for py, px in places])
            result[:, y, x] = (weight[:, None] * values).sum(0)
    return result


def test_equals_its_definition() -> None:
    torch.manual_seed(0)
    image, maps = torch.rand(3, 11, 7), torch.rand(2, 11, 7)
    found = par.refine(image[None], maps[None], iterations=1, dilations=(1, 3))[0]
    torch.testing.assert_close(found, slow_par(image, maps, (1, 3)), atol=1e-5, rtol=0)


def test_kernel_sums_and_batch() -> None:
    images, maps = torch.rand(2, 3, 11, 7), torch.rand(2, 5, 11, 7)
    kernel = par.par_kernel(images, (1, 2))
    torch.testing.assert_close(kernel.sum(1), torch.full((2, 11, 7), 1.01))
    both = par.refine(images, maps)
    alone = torch.cat([par.refine(images[i : i + 1], maps[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(both, alone)


def test_groups_and_strips_change_nothing(monkeypatch) -> None:
    images, maps = torch.rand(5, 3, 21, 7), torch.rand(5, 2, 21, 7)
    whole = par.refine(images, maps)
    monkeypatch.setattr(par, "CPU_PIXELS", 2 * 21 * 7)
    monkeypatch.setattr(par, "CPU_STRIP", 8)
    torch.testing.assert_close(par.refine(images, maps), whole, atol=1e-6, rtol=0)


def test_scale_of_the_image_does_not_matter() -> None:
    images, maps = torch.rand(1, 3, 11, 7), torch.rand(1, 2, 11, 7)
    torch.testing.assert_close(
        par.refine(images, maps), par.refine(images * 255 - 80, maps), atol=1e-3, rtol=0
    )
