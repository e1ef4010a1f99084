"""Writes crf.npz: what pydensecrf2 1.1 makes of three drawn pictures. Run in an environment of its
own, with pydensecrf2, numpy and scipy: python tests/golden/make_crf.py
"""

from pathlib import Path

import numpy as np
import pydensecrf.densecrf as dcrf
from scipy.ndimage import gaussian_filter

rng = np.random.default_rng(0)
figures = {}
for number, (height, width, count) in enumerate(((48, 60, 3), (64, 50, 5), (72, 60, 21))):
    shape = (height, width)
    regions = np.stack([gaussian_filter(rng.normal(size=shape), 7) for _ in range(count)]).argmax(0)
    shade = gaussian_filter(rng.normal(size=shape), 3)[..., None] * 150
    image = rng.integers(30, 226, (count, 3))[regions] + rng.normal(0, 12, (*shape, 3)) + shade
    image = image.clip(0, 255).astype(np.uint8)
    blurred = [gaussian_filter((regions == c).astype(float), 4) * 6 for c in range(count)]
    noise = [gaussian_filter(rng.normal(size=shape), 3) * 3 for _ in range(count)]
    odds = np.exp(np.stack(blurred) + np.stack(noise))
    probabilities = (odds / odds.sum(0)).astype(np.float16).astype(np.float32)
    crf = dcrf.DenseCRF2D(width, height, count)
    energy = -np.log(np.maximum(probabilities, 1e-5)).reshape(count, -1)
    crf.setUnaryEnergy(np.ascontiguousarray(energy))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=64, srgb=5, rgbim=np.ascontiguousarray(image), compat=4)
    found = np.array(crf.inference(10)).reshape(count, height, width)
    figures[f"image{number}"] = image
    figures[f"probabilities{number}"] = probabilities.astype(np.float16)
    figures[f"found{number}"] = found.astype(np.float16)
    figures[f"label{number}"] = found.argmax(0).astype(np.uint8)
np.savez_compressed(Path(__file__).with_name("crf.npz"), **figures)
