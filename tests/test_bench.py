"""The cost harness on a tiny case."""

import time

import pytest
import torch

from weclip_lib import bench


def test_a_row_for_every_part() -> None:
    rows = bench.measure(bench.Case("MiniCLIP", batch=1, crop=40, classes=1), repeats=1)
    parts = {row["part"]: row for row in rows}
    assert len(parts) == len(rows) == 9
    assert parts[bench.BASE]["ratio"] == 1
    assert all(row["cpu_s"] >= 0 and row["memory_mib"] >= 0 for row in rows)
    whole, base = parts["whole step"], parts[bench.BASE]
    assert whole["gflop"] > base["gflop"] + parts["Grad-CAM"]["gflop"] > base["gflop"] > 0


def test_measured_by_hand() -> None:
    left, right = torch.randn(2, 300, 300)

    def run() -> None:
        torch.zeros(32 * 2**20 // 4)  # 32 MiB
        torch.mm(left, right)
        time.sleep(0.02)

    cost = bench.measured(run, 3, "cpu")
    assert cost["gflop"] == pytest.approx(2 * 300**3 / 1e9)
    assert cost["wall_s"] >= 0.02 > cost["cpu_s"] > 0
