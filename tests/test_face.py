"""What `weclip_lib` itself offers, and how long commands take to start."""

import importlib
import os
import subprocess
import sys

import pytest

import weclip_lib
from weclip_lib import moved
from weclip_lib.__main__ import COMMANDS
from weclip_lib.moved import MOVED


@pytest.mark.parametrize("name", weclip_lib.__all__)
def test_every_name_of_the_face_is_there(name) -> None:
    assert getattr(weclip_lib, name) is not None and name in dir(weclip_lib)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'grad_cams'"):
        weclip_lib.grad_cams  # noqa: B018


def test_help_needs_no_torch() -> None:
    code = "import sys, weclip_lib.__main__; print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_for_every_option(command, capsys) -> None:
    with pytest.raises(SystemExit):
        weclip_lib.__main__.main([command, "--help"])
    assert command in capsys.readouterr().out
    settings = COMMANDS[command][0]
    assert settings.__doc__ and not settings.__doc__.startswith(f"{settings.__name__}(")


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_module_is_found_by_its_old_name(old, new) -> None:
    importlib.import_module(f"weclip_lib.{new}")
    with pytest.warns(DeprecationWarning, match=f"weclip_lib.{old} is now weclip_lib.{new}"):
        found = importlib.import_module(f"weclip_lib.{old}")
    try:
        assert found is importlib.import_module(f"weclip_lib.{new}")
        assert found.__name__ == found.__spec__.name == f"weclip_lib.{new}"
    finally:
        del sys.modules[f"weclip_lib.{old}"]


@pytest.mark.parametrize("line", ["doctor", "runner run", "inference score", "sweep list x.yml"])
def test_a_command_is_found_by_its_old_module(line, tmp_path) -> None:
    module, *arguments = line.split()
    command = [sys.executable, "-m", f"weclip_lib.{module}", *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    words = [*moved.COMMANDS.get(module, [module]), *arguments[:1]]
    assert done.returncode == 0 and f"usage: weclip {words[0]}" in done.stdout
    assert "DeprecationWarning: this is now weclip" in done.stderr


@pytest.mark.parametrize(
    ("line", "option"),
    [("train --profile smoke --out", "out"), ("predict a.jpg --out x --decoder", "decoder")],
)
def test_an_empty_path_is_not_the_current_folder(line, option) -> None:
    with pytest.raises(SystemExit, match=f"error: --{option} is empty: give a path"):
        weclip_lib.__main__.main([*line.split(), ""])


def test_threads_and_memory_are_set_before_torch_loads() -> None:
    code = "import weclip_lib, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    plain = {name: v for name, v in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for given, told in ((plain, "1000 False"), (plain | {"GOMP_SPINCOUNT": "7"}, "7 False")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == told
