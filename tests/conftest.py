"""Shared fixtures: the deterministic small CLIP and decoder of tests/golden."""

from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import Phase, settings

from tests import outcomes, parity
from tests.golden import golden_gen
from weclip_lib.backbone import IMAGENET_STATISTICS, Backbone
from weclip_lib.config import OFFICIAL, DecoderShape
from weclip_lib.data.datasets import data_folder
from weclip_lib.data.profiles import get_profile
from weclip_lib.labels import VOC
from weclip_lib.model import WeCLIP
from weclip_lib.storage.provenance import ROOT
from weclip_lib.storage.tensors import from_official
from weclip_lib.storage.weights import register_miniclip
from weclip_lib.studies.study import Study
from weclip_lib.tools import site

register_miniclip()
settings.register_profile("default", max_examples=3, derandomize=True)
settings.register_profile("campaign", max_examples=60, phases=(Phase.generate,))
settings.load_profile("default")


def pytest_sessionfinish(session) -> None:
    """A worker process tells the first one what it has counted."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["compared"] = dict(parity.COUNT)
        session.config.workeroutput["outcomes"] = dict(outcomes.OUTCOMES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    found = getattr(node, "workeroutput", {})
    parity.COUNT.update(found.get("compared", {}))
    outcomes.OUTCOMES.update(found.get("outcomes", {}))


def pytest_terminal_summary(terminalreporter) -> None:
    for what, count in parity.COUNT.items():
        terminalreporter.write_line(f"parity with the official code: {count} {what}")
    for what, count in sorted(outcomes.OUTCOMES.items()):
        terminalreporter.write_line(f"mutated inputs, {what}: {count}")


@pytest.fixture(scope="session")
def golden_backbone() -> Backbone:
    small = golden_gen.SMALL
    clip = open_clip.CLIP(
        embed_dim=small["embed"],
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=small["v_layers"],
            width=small["v_width"],
            head_width=64,
            patch_size=small["patch"],
            image_size=small["grid"] * small["patch"],
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=small["ctx"],
            vocab_size=small["vocab"],
            width=small["t_width"],
            heads=1,
            layers=small["t_layers"],
        ),
        quick_gelu=True,
    )
    clip.load_state_dict({k: torch.tensor(v) for k, v in golden_gen.clip_state().items()})
    return Backbone(clip, open_clip.get_tokenizer("ViT-B-16-quickgelu"), IMAGENET_STATISTICS)


@pytest.fixture(scope="session")
def golden_model(golden_backbone: Backbone) -> WeCLIP:
    """The official preset on the golden weights, in eval mode."""
    model = WeCLIP(golden_backbone, VOC, OFFICIAL, DecoderShape(dim=64))
    state = {k: torch.tensor(v) for k, v in golden_gen.decoder_state().items()}
    model.decoder.load_state_dict(from_official(state))
    return model.eval()


@pytest.fixture(scope="session")
def smoke_study(tmp_path_factory) -> Study:
    """Of profile smoke, with pictures and kept results in folders of their own."""
    place = tmp_path_factory.mktemp("smoke")
    setting = get_profile("smoke")
    (place / "data").mkdir()  # MiniVOC is drawn into an empty folder
    return Study(setting, data_folder(setting, str(place / "data")), place / "work")


@pytest.fixture(scope="session")
def whole_site(tmp_path_factory) -> Path:
    """All pages; lessons as published, the others as they are before they run."""
    out = tmp_path_factory.mktemp("site")
    made = site.Site(out)
    for path in sorted((ROOT / "notebooks").rglob("[0-9i]*.ipynb")):
        published = ROOT / "results" / "mini" / "notebooks" / path.name
        lesson = path.parent.name == "notebooks" and published.exists()
        made.add_notebook(path.relative_to(ROOT), published if lesson else path)
    for page in site.PAGES:
        made.add_markdown(page)
    made.write()
    return out


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums in a fixed order whatever the machine."""
    torch.set_num_threads(1)
