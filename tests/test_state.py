import shutil

import pytest
import torch
from torch import nn

from weclip_lib.storage.tensors import save_weights
from weclip_lib.training.checkpoints import checkpoints, load_checkpoint, newest, save_checkpoint
from weclip_lib.training.distributed import Group, joined

SETTINGS = {
    "seed": 3,
    "budget.steps": 9,
    "scales": (0.5, 2.0),
    "class prompts": ["cat", "dog"],
    "masks": 64 * "a",
}


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    decoder = nn.Linear(2, 3)
    return decoder, torch.optim.AdamW(decoder.parameters())


def step(decoder: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (decoder(torch.randn(5, 2)) ** 2).sum().backward()
    optimizer.step()


def run(folder, steps: int = 3, **settings) -> nn.Module:
    decoder, optimizer = build()
    for done in range(1, steps + 1):
        step(decoder, optimizer)
        about = {"settings": {**SETTINGS, **settings}, "history": [done], "losses": []}
        save_checkpoint(folder, done, decoder, optimizer, about, Group())
    return decoder


def resumed(folder, steps: int = 3) -> nn.Module:
    """Goes on from the newest whole checkpoint."""
    decoder, optimizer = build()
    about = load_checkpoint(newest(folder, Group()), decoder, optimizer, SETTINGS, Group())
    assert about["history"] == [about["step"]]
    for done in range(about["step"] + 1, steps + 1):
        step(decoder, optimizer)
        about = {"settings": SETTINGS, "history": [done], "losses": []}
        save_checkpoint(folder, done, decoder, optimizer, about, Group())
    return decoder


def test_the_newest_are_kept_by_their_number(tmp_path) -> None:
    assert newest(tmp_path / "none", Group()) is None
    run(tmp_path, 5)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "4", "5"]
    for other in ("checkpoint-0000009 (copy)", "checkpoint-old", ".checkpoint-0000009.partial"):
        shutil.copytree(checkpoints(tmp_path)[0], tmp_path / other)
    (tmp_path / "checkpoint-0000008").write_text("a file")
    assert newest(tmp_path, Group()).name == "checkpoint-0000005"
    checkpoints(tmp_path)[0].rename(tmp_path / "checkpoint-10000000")
    assert checkpoints(tmp_path)[-1].name == "checkpoint-10000000"


def damage(path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(8)
    path.write_bytes({"cut": content[:-1], "empty": b"", "zeros": content}[how])


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "zeros"])
@pytest.mark.parametrize("file", ["decoder.safetensors", "state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(file, how, tmp_path, capsys) -> None:
    """And the run ends as it would have: bit for bit."""
    whole = run(tmp_path)
    damage(tmp_path / "checkpoint-0000003" / file, how)
    damage(tmp_path / "checkpoint-0000002" / file, how)
    assert newest(tmp_path, Group()).name == "checkpoint-0000001"
    said = capsys.readouterr().err
    for number in (2, 3):
        folder = tmp_path / f"checkpoint-000000{number}"
        assert f"passed over: {folder / file}" in said
    assert len(said.splitlines()) == 2
    again = resumed(tmp_path)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert newest(tmp_path, Group()).name == "checkpoint-0000003"  # in the damaged one's place


def test_mixed_and_foreign_checkpoints_are_passed_over(tmp_path) -> None:
    run(tmp_path)
    first, second, third = checkpoints(tmp_path)
    shutil.copy(first / "decoder.safetensors", third / "decoder.safetensors")
    save_weights(nn.Linear(2, 3), second / "decoder.safetensors", {})
    assert newest(tmp_path, Group()) == first
    shutil.rmtree(third)
    shutil.copytree(first, third)
    assert newest(tmp_path, Group()) == first
    (third / "state.json").write_text("[1]")
    assert newest(tmp_path, Group()) == first


def test_all_damaged_and_the_remedy(tmp_path) -> None:
    out = tmp_path / "out"
    run(out)
    for path in checkpoints(out):
        damage(path / "state.json", "cut")
    with pytest.raises(ValueError, match=f"checkpoint in {out} is damaged: start anew"):
        newest(out, Group())
    shutil.rmtree(out)
    assert newest(out, Group()) is None
    run(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget.steps": 5}, "budget.steps was 5 and is 9"),
        ({"scales": (0.5, 1.0)}, "scales: 2.0 added and 1.0 removed"),
        ({"class prompts": ["fish", "dog"]}, "class prompts: 'cat' added and 'fish' removed"),
        ({"class prompts": ["dog", "cat"]}, "class prompts: in another order"),
        ({"class prompts": ["cat", "dog", "emu"]}, "class prompts: 'emu' removed"),
        ({"class prompts": ["cat", "dog", *"abcdefg"]},
         "class prompts: 'a', 'b', 'c', 'd', 'e' and 2 more removed"),
        ({"masks": 64 * "b"}, "masks: not the same as when it was started"),
        ({"masks": 61 * "x"}, "masks: not the same as when it was started"),
        ({"crop": 80}, "crop was 80 and is None"),
        ({"seed": 4, "masks": 40 * "c"},
         "masks: not the same as when it was started; seed was 4 and is 3"),
    ],
)  # fmt: skip
def test_other_settings_are_said_in_words(changes, message, tmp_path) -> None:
    run(tmp_path, 1, **changes)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(ValueError) as error:
        resumed(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'checkpoint-0000001'} is of another run: {message}: choose another --out, "
        "or restore what has changed"
    )
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_all_processes_take_the_same(tmp_path, monkeypatch) -> None:
    """Even if they do not see the same: the first one decides."""
    told = []
    monkeypatch.setattr(Group, "told", lambda _, number: told.append(number) or told[0])
    out = tmp_path / "out"
    run(out)
    damage(out / "checkpoint-0000003" / "state.safetensors", "zeros")
    assert newest(out, Group()).name == "checkpoint-0000002"
    assert newest(tmp_path / "elsewhere", Group(1, 2)).name == "checkpoint-0000002"
    told.clear()
    for path in checkpoints(out):
        damage(path / "state.json", "empty")
    for place, group in ((out, Group()), (tmp_path / "elsewhere", Group(1, 2))):
        with pytest.raises(ValueError, match=f"every checkpoint in {place} is damaged"):
            newest(place, group)


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"RANK": "x"}, "cpu", "RANK is 'x': start all processes by torchrun, or unset it"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "cpu", "RANK is 2 of 2 processes: start all"),
        ({"WORLD_SIZE": "-1"}, "cpu", "WORLD_SIZE is '-1'"),
        ({}, "gpu", "device is 'gpu'"),
    ],
)
def test_launchers_and_devices_that_make_no_sense(
    environment, device, message, monkeypatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), joined(device):
        pass


def test_gpus_go_by_the_number_of_the_process(monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for local, asked, given in (("0", "", "cuda:0"), ("1", "cuda", "cuda:1"), ("0", "cuda:1", "")):
        monkeypatch.setenv("LOCAL_RANK", local)
        with joined(asked) as group:
            assert group.device == (given or "cuda:1") == str(taken[-1])
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="'cuda:2': give auto, or what is here: cpu, cuda, cuda:0"):
        joined("cuda").__enter__()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device cuda:1 for 2 processes: choose cuda, or cpu"):
        joined("cuda:1").__enter__()
