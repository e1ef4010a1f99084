import pickle

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.golden import golden_gen
from weclip_lib.backbone import load_backbone
from weclip_lib.checkpoint import (
    load_official_decoder,
    read_tensors,
    save_official_decoder,
    to_official,
)
from weclip_lib.decoder import Decoder

SMALL = {"width": 128, "class_count": 21, "block_count": 11, "dim": 64}


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    """A checkpoint as the official code writes it: decoder, encoder and a stray."""
    state = {name: torch.tensor(value) for name, value in golden_gen.decoder_state().items()}
    state |= {f"encoder.{n}": torch.tensor(v) for n, v in golden_gen.clip_state().items()}
    return state | {"encoder.visual.positional_embedding_new": torch.zeros(401, 128)}


def test_official_checkpoint_in_and_out(official, tmp_path) -> None:
    torch.save(official, tmp_path / "official.pth")
    decoder = Decoder(**SMALL)
    load_official_decoder(decoder, tmp_path / "official.pth")
    save_official_decoder(decoder, tmp_path / "ours.pth")
    written = torch.load(tmp_path / "ours.pth", weights_only=True)
    expected = {n: t for n, t in official.items() if n.startswith("decoder")}
    assert len(expected) == 84
    assert list(written) == list(to_official(decoder.state_dict()))
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_a_mismatch_names_the_first_tensor(official, tmp_path) -> None:
    path = tmp_path / "official.pth"
    torch.save(official, path)
    with pytest.raises(ValueError, match=r"projections.0.0.weight of shape \(64, 128\); expected"):
        load_official_decoder(Decoder(**{**SMALL, "width": 32}), path)
    with pytest.raises(ValueError, match=r"lacks projections.11.0.weight, of shape \(64, 128\)"):
        load_official_decoder(Decoder(**{**SMALL, "block_count": 12}), path)
    with pytest.raises(
        ValueError, match=r"fuse.weight of shape \(64, 704, 1, 1\); expected \(64, 640"
    ):
        load_official_decoder(Decoder(**{**SMALL, "block_count": 10}), path)
    torch.save({"encoder.proj": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"no tensor named decoder_fts_fuse"):
        load_official_decoder(Decoder(**SMALL), path)


class Archive(nn.Module):
    """Weights in a tree of modules, to be scripted, as OpenAI ships them."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        branches: dict[str, dict] = {}
        for name, tensor in state.items():
            first, dot, rest = name.partition(".")
            if dot:
                branches.setdefault(first, {})[rest] = tensor
            else:
                self.register_buffer(name, tensor)
        for name, branch in branches.items():
            self.add_module(name, Archive(branch))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save_as(kind: str, clip: nn.Module, path) -> None:
    state = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    if kind == "openai":
        numbers = {"input_resolution": 112, "context_length": 32, "vocab_size": 49408}
        whole = Archive(state | {n: torch.tensor(v) for n, v in numbers.items()})
        torch.jit.save(torch.jit.script(whole), path)
    elif kind == "safetensors":
        save_file(state, path)
    else:
        wrapped = {"state_dict": {f"module.{n}": t for n, t in state.items()}}
        torch.save(wrapped, path)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", ["openai", "safetensors", "open_clip"])
def test_clip_weights_of_every_kind(kind, tmp_path) -> None:
    clip = open_clip.create_model("MiniCLIP", load_weights=False)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    save_as(kind, clip, path)
    loaded = load_backbone("MiniCLIP", path).clip.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
    assert all(torch.equal(loaded[n], t.half().float()) for n, t in clip.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path) -> None:
    clip = open_clip.create_model("MiniCLIP", load_weights=False)
    state = clip.state_dict()
    state["visual.conv1.weight"] = torch.zeros(128, 3, 16, 16)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(
        ValueError,
        match=r"visual.conv1.weight of shape \(128, 3, 16, 16\); expected \(128, 3, 8, 8",
    ):
        load_backbone("MiniCLIP", tmp_path / "weights.safetensors")


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


def test_no_code_of_a_file_is_run(tmp_path) -> None:
    torch.save({"weights": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    for name in ("trap.pt", "raw.pt"):
        with pytest.raises(ValueError, match="damaged or holds more than tensors"):
            read_tensors(tmp_path / name)


def test_damaged_files(tmp_path) -> None:
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_tensors(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt is not there"):
        read_tensors(tmp_path / "nowhere.pt")
    torch.save({"epoch": 3, "weights": torch.zeros(1)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match="holds epoch, which is no tensor"):
        read_tensors(tmp_path / "more.pt")
