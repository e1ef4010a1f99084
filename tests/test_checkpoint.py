import pickle
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.golden import golden_gen
from weclip_lib.backbone import load_backbone
from weclip_lib.decoder import Decoder
from weclip_lib.storage.archive import OPENAI_NUMBERS
from weclip_lib.storage.tensors import (
    load_official_decoder,
    load_weights,
    read_note,
    read_tensors,
    save_official_decoder,
    save_tensors,
    save_weights,
    to_official,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Validating sparse"),
]
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
    """Writes a file when it is unpickled."""

    def __init__(self, sign) -> None:
        self.sign = sign

    def __reduce__(self):
        return (exec, (f"open({str(self.sign)!r}, 'w').write('run')",))


class Restored(nn.Module):
    """Whose state in an archive is made by code of the archive, which can do anything."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("held", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.held

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.held, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        print("code of the file was run")  # noqa: T201
        self.held = state[0]
        self.training = state[1]


def small_archive(path, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """As OpenAI's, but small; returns its state."""
    held = torch.arange(24.0).view(4, 6)
    state = {
        "first": held.half(),
        "brain": held.bfloat16(),
        "view": held[1:, ::2],
        "visual.turned": held.t(),
        "visual.0.empty": torch.zeros(0, 3),
        "visual.0.flag": torch.tensor(True),
        **{number: torch.tensor(value) for value, number in enumerate(OPENAI_NUMBERS, 7)},
        **more,
    }
    torch.jit.save(torch.jit.script(Archive(state)), path)
    return state


def rewritten(path, out, changes: dict, compression: int = ZIP_STORED) -> None:
    """A copy of a zip with other files, by the end of their names, in it."""
    with ZipFile(path) as source, ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            content = source.read(name)
            for end, changed in changes.items():
                if name.endswith(end):
                    content = changed(content) if callable(changed) else changed
            target.writestr(name, content)


def test_an_archive_is_read_as_torch_reads_it(tmp_path) -> None:
    path = tmp_path / "clip.pt"
    made = small_archive(path)
    ours, theirs = read_tensors(path), torch.jit.load(path).state_dict()
    assert list(ours) == list(theirs) and set(ours) == set(made)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].stride()) == (tensor.dtype, tensor.stride()), name
        assert torch.equal(ours[name], tensor) and torch.equal(ours[name], made[name]), name
    assert ours["vocab_size"].item() == 9
    assert ours["view"].data_ptr() - ours["visual.turned"].data_ptr() == 24  # of one storage
    rewritten(path, tmp_path / "old.pt", {"byteorder": b"little"})
    (tmp_path / "clip.safetensors").write_bytes(path.read_bytes())
    for name in ("old.pt", "clip.safetensors"):
        assert torch.equal(read_tensors(tmp_path / name)["view"], made["view"])


@pytest.mark.parametrize(
    ("end", "changed", "message"),
    [
        ("/byteorder", b"big", "another order of bytes"),
        ("/data/0", lambda held: held[:-1], "size must be a multiple|multiple of element size"),
        ("/data/0", lambda held: held[:-2], "data/0 is too short for a tensor of shape"),
        ("/data.pkl", lambda held: held.replace(b"K\x04K\x06", b"K\x04K\x07"), "too short"),
        ("/data.pkl", lambda held: held.replace(b"HalfS", b"EvilS"), "names torch.EvilStorage"),
        ("/data.pkl", lambda held: held.replace(b"_rebuild_tensor_v2", b"_import_dotted_name"),
         "names torch._utils._import_dotted_name, which is no part of CLIP"),
        ("/data.pkl", lambda held: held[:-9], "cannot be read"),
        ("/data.pkl", b"\x80\x02]r\xff\xff\xff\x7f.", "cannot be read"),  # 32 GB, for C's pickle
        ("/data.pkl", b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.", "cannot be read"),
        ("/data.pkl", b"\x80\x02}X\x01\x00\x00\x00ah\x00s.", "cannot be read"),
    ],
)  # fmt: skip
def test_damaged_archives(end, changed, message, tmp_path) -> None:
    small_archive(tmp_path / "whole.pt")
    rewritten(tmp_path / "whole.pt", tmp_path / "clip.pt", {end: changed})
    with pytest.raises(ValueError, match=rf"clip\.pt .*({message})"):
        read_tensors(tmp_path / "clip.pt")


def test_more_than_a_file_can_hold_is_refused(tmp_path) -> None:
    small_archive(tmp_path / "whole.pt")
    bomb = {"/data/0": bytes(2**25)}
    rewritten(tmp_path / "whole.pt", tmp_path / "clip.pt", bomb, ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"clip\.pt .*more than its size allows"):
        read_tensors(tmp_path / "clip.pt")


def test_no_code_of_an_archive_is_run(tmp_path, capfd) -> None:
    sign, whole, trap = tmp_path / "run", tmp_path / "whole.pt", tmp_path / "trap.pt"
    state = small_archive(whole)
    code = pickle.dumps(Trap(sign), protocol=2)
    rewritten(whole, trap, {"/constants.pkl": code})
    assert torch.equal(read_tensors(trap)["first"], state["first"])
    for inside in (code, lambda held: held[:-1] + b"0" + code[2:]):
        rewritten(whole, trap, {"/data.pkl": inside})
        with pytest.raises(ValueError, match=r"trap\.pt .*exec, which is no part of CLIP"):
            read_tensors(trap)
    assert not sign.exists()
    torch.jit.save(torch.jit.script(Restored()), trap)
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"trap\.pt would have to be run to be read: where you"):
        read_tensors(trap)
    assert capfd.readouterr() == ("", "")
    torch.jit.load(trap)
    assert "code of the file was run" in capfd.readouterr().out


def test_other_archives_are_refused_and_the_remedy_works(tmp_path) -> None:
    path = tmp_path / "other.pt"
    torch.jit.save(torch.jit.script(Archive({"weight": torch.ones(2)})), path)
    with pytest.raises(ValueError, match=r"other\.pt has code, and is not OpenAI's CLIP") as error:
        read_tensors(path)
    assert "save `torch.jit.load(...).state_dict()` by `torch.save`" in str(error.value)
    torch.save(torch.jit.load(path).state_dict(), tmp_path / "plain.pt")
    assert torch.equal(read_tensors(tmp_path / "plain.pt")["weight"], torch.ones(2))


def test_no_code_of_a_torch_file_is_run(tmp_path) -> None:
    trap = Trap(tmp_path / "run")
    torch.save({"weights": trap}, tmp_path / "trap.pt")
    torch.save({"weights": trap}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(trap, protocol=2))
    for name in ("trap.pt", "old.pt", "raw.pt"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read .it holds other things"):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "run").exists()


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(30, 40), "b": torch.randn(50)}


def written(kind: str, folder) -> Path:
    """A file of some kind under a name that says nothing."""
    path = folder / "weights"
    if kind == "ours":
        save_tensors(tensors(), path, {"classes": ["cat"]})
    elif kind == "safetensors":
        save_file(tensors(), path)
    elif kind == "archive":
        small_archive(path, **tensors())
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=kind == "torch")
    return path


@pytest.mark.parametrize("kind", ["ours", "safetensors", "archive", "torch", "old torch"])
def test_files_cut_anywhere(kind, tmp_path) -> None:
    """The ending says nothing: the content is looked at."""
    path = written(kind, tmp_path)
    content = path.read_bytes()
    for name in ("a.pt", "a.safetensors", "a.bin", "a"):
        other = tmp_path / name
        other.write_bytes(content)
        assert torch.equal(read_tensors(other)["a"], tensors()["a"])
        for length in (0, 1, 5, 9, 100, len(content) // 2, len(content) - 100, len(content) - 1):
            other.write_bytes(content[:length])
            with pytest.raises(ValueError, match=rf"{name} cannot be read .* get it anew"):
                read_tensors(other)


@pytest.mark.parametrize("kind", ["ours", "archive", "torch"])
def test_zeros_in_the_middle(kind, tmp_path) -> None:
    """Told where there is a checksum; other safetensors files and old torch files have none."""
    path = written(kind, tmp_path)
    content = bytearray(path.read_bytes())
    place = content.index(tensors()["a"].numpy().tobytes()[:64])
    content[place + 512 : place + 1024] = bytes(512)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights cannot be read"):
        read_tensors(path)


def test_line_ends_changed_on_the_way(tmp_path) -> None:
    for kind in ("ours", "safetensors", "archive", "torch", "old torch"):
        path = written(kind, tmp_path)
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        with pytest.raises(ValueError, match="weights cannot be read"):
            read_tensors(path)


def test_what_is_no_weights_at_all(tmp_path) -> None:
    for name, content in (("text.pt", b"not weights at all"), ("page.safetensors", b"<html>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read .* get it anew"):
            read_tensors(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} cannot be read .* get it anew"):
            read_note(tmp_path / name)
    with ZipFile(tmp_path / "pages.zip", "w") as archive:
        archive.writestr("a.txt", "no weights")
    with pytest.raises(ValueError, match=r"pages\.zip cannot be read"):
        read_tensors(tmp_path / "pages.zip")
    with pytest.raises(ValueError, match="is no file"):
        read_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt is not there"):
        read_tensors(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "weights": torch.zeros(1)}, "holds epoch, which is no tensor"),
        ({"a": torch.zeros(1, device="meta")}, "holds a, which is no tensor"),
        ({"a": torch.eye(3).to_sparse()}, "holds a, which is no tensor"),
        (torch.zeros(2), "it holds a Tensor and no state dict"),
        ([torch.zeros(2)], "it holds a list and no state dict"),
    ],
)
def test_what_is_no_state_dict(content, message, tmp_path) -> None:
    torch.save(content, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=rf"more\.pt .*{message}"):
        read_tensors(tmp_path / "more.pt")


def test_notes(tmp_path) -> None:
    path = tmp_path / "noted"
    save_weights(nn.Linear(2, 3), path, {"classes": ["cat"]})
    assert read_note(path) == {"classes": ["cat"]}
    save_file({"a": torch.zeros(1)}, path)
    assert read_note(path) == {}
    for note in ("[1, 2]", "{", "words"):
        save_file({"a": torch.zeros(1)}, path, metadata={"note": note})
        with pytest.raises(ValueError, match="noted cannot be read"):
            read_note(path)
        assert torch.equal(read_tensors(path)["a"], torch.zeros(1))


def test_numbers_that_cannot_be_weights() -> None:
    layer = nn.Linear(2, 3)
    for value, message in (
        (torch.full((3, 2), float("nan")), "weight with values that are not finite"),
        (torch.full((3, 2), 1e300, dtype=torch.float64), "weight with values that are not finite"),
        (torch.zeros(3, 2, dtype=torch.int8), r"weight in torch\.int8: give torch\.float32"),
    ):
        with pytest.raises(ValueError, match=f"w.pt holds {message}"):
            load_weights(layer, {**layer.state_dict(), "weight": value}, "w.pt")
