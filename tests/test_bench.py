"""The cost harness on a tiny case."""

import json
import time
from dataclasses import asdict

import pandas as pd
import pytest
import torch

from weclip_lib.__main__ import main as weclip
from weclip_lib.tools import bench
from weclip_lib.tools.bench import BASE, INFERENCE, INFERENCE_BASE, STEP, Case

TINY = Case("MiniCLIP", batch=1, crop=40, classes="1")


def test_a_row_for_every_part() -> None:
    rows = bench.measure(TINY, repeats=1, rates=(100.0, 10.0))
    parts = {row["part"]: row for row in rows}
    assert len(parts) == len(rows) == 9
    assert parts[BASE]["ratio"] == parts[INFERENCE_BASE]["ratio"] == 1
    assert all(row["cpu_s"] > 0 and row["share"] > 0 for row in rows)
    whole, base = parts[STEP], parts[BASE]
    assert whole["gflop"] > base["gflop"] + parts["Grad-CAM"]["gflop"] > base["gflop"] > 0
    weights = whole["weights_mib"]
    assert weights == parts[INFERENCE]["weights_mib"]
    assert min(whole["memory_mib"], parts[INFERENCE]["memory_mib"]) > 1


def test_measured_by_hand() -> None:
    left, right = torch.randn(2, 300, 300)

    def run() -> None:
        torch.mm(left, right)
        (left + right).T.contiguous()  # reads two, writes one; then copies the transposed one
        time.sleep(0.02)

    cost = bench.measured(run, 3, "cpu")
    assert cost["gflop"] == pytest.approx(2 * 300**3 / 1e9)
    assert cost["gbyte"] == pytest.approx(5 * left.nbytes / 1e9)
    assert cost["wall_s"] >= 0.02 > cost["cpu_s"] > 0


def test_fused_attention_is_counted() -> None:
    """The blocks cost the same arithmetic whether their attention is kept or not."""
    model, images = bench.Bench(TINY).model, torch.randn(2, 3, 40, 40)
    found = [
        bench.measured(lambda maps=maps: model.backbone.encode_image(images, maps=maps), 1, "cpu")
        for maps in (None, 0)
    ]
    assert found[0]["gflop"] == pytest.approx(found[1]["gflop"])


def test_classes_of_pictures_in_turn() -> None:
    case = Case("MiniCLIP", batch=5, crop=40, classes="1 3")
    assert bench.Bench(case).labels.sum(dim=1).tolist() == [1, 3, 1, 3, 1]


def test_inference_is_compared_with_blocks_that_keep_no_maps(monkeypatch) -> None:
    tiny = bench.Bench(TINY)
    kept = []
    encode = tiny.model.backbone.encode_image

    def encode_image(images, *, maps=None):
        kept.append(maps)
        return encode(images, maps=maps)

    monkeypatch.setattr(tiny.model.backbone, "encode_image", encode_image)
    tiny.inference_blocks()
    tiny.inference()
    assert set(kept) == {0}


def test_official_ratios_are_those_of_the_published_figures() -> None:
    ratios = bench.official_ratios()
    assert ratios[BASE] == ratios[INFERENCE_BASE] == 1
    assert ratios[STEP] == pytest.approx(13.8 / 3.03)
    assert ratios[INFERENCE] == pytest.approx(30.3 / 5.2)


def test_profile_names_operations() -> None:
    assert "aten::mm" in bench.step_profile(TINY)


def test_the_command_writes_table_and_provenance(tmp_path, monkeypatch, capsys) -> None:
    table = [{"part": part, "cpu_s": 1.0, "ratio": 2.0} for part in (BASE, STEP)]
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "official_ratios", lambda: {STEP: 5.0})
    monkeypatch.setattr(bench, "machine_rates", lambda device, bf16: (100.0, 10.0))

    def rows(case, *_, **__) -> list[dict]:
        return [{**asdict(case), **row} for row in table]

    monkeypatch.setattr(bench, "measure", rows)
    monkeypatch.setattr(bench, "render_pages", lambda: None)
    weclip(["bench", "--scaling"])
    (path,) = (tmp_path / "bench").glob("*.csv")
    found = pd.read_csv(path, dtype={"classes": str})
    assert set(found["classes"]) == {"1", "2", "5", "10", "1 1 1 5"}
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["device"] == "cpu" and about["rates"]["gflop_s"] == 100
    assert "classes 1 1 1 5" in capsys.readouterr().out


def test_refuses_a_gpu_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        weclip(["bench", "--device", "cuda"])
