"""What `weclip_lib` itself offers, and how long commands take to start."""

import subprocess
import sys

import pytest

import weclip_lib
from weclip_lib.__main__ import COMMANDS


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
    assert settings.__doc__ and not settings.__doc__.startswith(settings.__name__)
