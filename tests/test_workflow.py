"""The Snakemake workflow, run by Snakemake's local executor in an environment of its own."""

import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from weclip_lib.storage.provenance import ROOT

SNAKEMAKE = "snakemake==9.*"


@pytest.fixture(scope="module")
def uvx() -> str:
    found = shutil.which("uvx", path=f"{ROOT / '.tools' / 'bin'}:{sys.exec_prefix}/bin") or (
        shutil.which("uvx")
    )
    if found is None:
        pytest.skip("uvx, which fetches Snakemake, is not there")
    ready = subprocess.run(
        [found, SNAKEMAKE, "--version"], capture_output=True, text=True, check=False
    )
    if ready.returncode:
        pytest.skip(f"Snakemake cannot be fetched: {ready.stderr.strip().splitlines()[-1]}")
    return found


@pytest.mark.notebook
def test_workflow_runs_what_is_missing(uvx, tmp_path) -> None:
    parameters = {"profile": "smoke", "data_dir": str(tmp_path / "data"), "pictures": [2, 3]}
    grid, out = tmp_path / "grid.yml", tmp_path / "out"
    (tmp_path / "data").mkdir()
    grid.write_text(yaml.safe_dump({"notebook": "01_cam_generation", "parameters": parameters}))
    command = [uvx, SNAKEMAKE, "--snakefile", str(ROOT / "workflow" / "Snakefile"), "--cores", "2"]
    command += ["--directory", str(ROOT), "--config", f"grid={grid}", f"out={out}"]
    command += [f"python={sys.executable}"]

    def run() -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    run()
    assert set(pd.read_csv(out / "sweep.csv")["pictures"]) == {2, 3}
    table = out / "pictures=2" / "01_cam_generation.csv"
    stamp = table.stat().st_mtime_ns
    assert "Nothing to be done" in run()
    (out / ".finished" / "pictures=2").unlink()
    run()  # asked again, the run itself knows that it is finished
    assert table.stat().st_mtime_ns == stamp
