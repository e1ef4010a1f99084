"""Counts kept beside tables: what comes back, what is refused, which rows are found wrong."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.test_quality import counted, random_pairs
from weclip_lib.__main__ import main as weclip
from weclip_lib.evaluation.kept import Kept, Row, read_counts, write_counts
from weclip_lib.evaluation.quality import measures, precision
from weclip_lib.evaluation.report import DECIMALS, score_tables
from weclip_lib.ops.metrics import scores
from weclip_lib.studies import results
from weclip_lib.studies.results import write_table

CLASSES = ("background", "boat", "cat", "dog")
ROWS = {
    Row("static labels", "train", "miou of static labels", -1): counted(random_pairs(3, 4, 5), 4),
    Row("decoder, RFM", "val", "miou", 0): counted(random_pairs(4, 4, 6), 4),
    Row("decoder, RFM", "val", "miou multi-scale", 0): counted(random_pairs(4, 4, 7), 4),
    Row("decoder, RFM", "val", "miou", 1): counted(random_pairs(4, 4, 8), 4),
}
DECODER = Row("decoder, RFM", "val", "miou", 0)


def table_row(row: Row, metric: str, value: float, n_images: int) -> dict:
    """A row of a notebook's table."""
    about = {"variant": row.variant, "split": row.split, "metric": metric, "seed": row.seed}
    return about | {"value": value, "unit": "percent", "n_images": n_images, "profile": "smoke"}


@pytest.fixture
def run(tmp_path):
    """A notebook's run: all measures of all counts, one value that no counts give, per class."""
    rows, per_class = [], []
    for row, counts in ROWS.items():
        for name, value in measures(counts).items():
            metric = f"{name}{row.metric.removeprefix('miou')}"
            rows.append(table_row(row, metric, value, len(counts.names)))
        if row.metric == "miou":
            about = {"variant": row.variant, "split": row.split, "seed": row.seed}
            iou = scores(counts.total()).class_iou.tolist()
            pairs = zip(CLASSES, iou, strict=True)
            per_class += [about | {"class": name, "iou": value} for name, value in pairs]
    rows.append(table_row(DECODER, "pixels relabelled", 12.3, 4))
    write_table(tmp_path, "02_x", rows)
    write_table(tmp_path, "02_x", per_class, "_per_class")
    write_counts(tmp_path / "02_x_images.npz", ROWS, CLASSES)
    return tmp_path


@pytest.fixture
def scored(tmp_path):
    """A folder of `weclip score`."""
    kinds = ("single scale", "scales and flips", "with CRF")
    kept = {kind: counted(random_pairs(4, 4, n), 4) for n, kind in enumerate(kinds)}
    for name, table in score_tables(kept, CLASSES, "val").items():
        table.round(2).to_csv(tmp_path / name, index=False)
    rows = {Row(kind, "val", "miou", -1): counts for kind, counts in kept.items()}
    write_counts(tmp_path / "scores_images.npz", rows, CLASSES)
    return tmp_path


def edit(path, pattern: str, new: str) -> None:
    """Replace what fits a pattern, which has to occur once."""
    text, count = re.subn(pattern, new, path.read_text(), flags=re.MULTILINE)
    assert count == 1
    path.write_text(text)


# --- the file ------------------------------------------------------------------------------------


def test_counts_come_back_and_have_the_same_bytes(tmp_path) -> None:
    one, other = tmp_path / "a_images.npz", tmp_path / "b_images.npz"
    write_counts(one, ROWS, CLASSES)
    write_counts(other, ROWS, CLASSES)
    assert one.read_bytes() == other.read_bytes()
    kept = read_counts(one)
    assert kept.classes == CLASSES and list(kept.rows) == list(ROWS)
    for row, counts in ROWS.items():
        assert kept.rows[row].names == counts.names
        assert (kept.rows[row].entries == counts.entries).all()
    with np.load(one) as file:
        about = json.loads(file["about"].tobytes())
    assert about["pictures"] == [["a", "b", "c"], ["a", "b", "c", "d"]]  # each list once


def test_a_file_that_could_not_be_verified_is_not_written(tmp_path) -> None:
    path = tmp_path / "x_images.npz"
    with pytest.raises(ValueError, match="counts 4 classes, not 2"):
        write_counts(path, ROWS, ("background", "cat"))
    with pytest.raises(ValueError, match="has to begin with miou"):
        write_counts(path, {Row("x", "val", "accuracy", 0): ROWS[DECODER]}, CLASSES)
    assert not path.exists()


def changed(path, **columns) -> None:
    """Write the file again with other columns; a function changes `about`."""
    with np.load(path) as file:
        arrays = {name: file[name].copy() for name in file.files}
    for name, value in columns.items():
        if name == "about":
            about = json.loads(arrays["about"].tobytes())
            value(about)
            value = np.frombuffer(json.dumps(about).encode(), np.uint8)
        arrays[name] = value(arrays[name]) if callable(value) else value
    np.savez_compressed(path, **arrays)


def put(at: int, value: int):
    def change(column):
        column[at] = value
        return column

    return change


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": put(0, 3)}, "entry 0 of a row is none of a picture"),
        ({"cell": put(1, 4 * 8)}, "entry 1 of a row"),
        ({"cell": put(1, 2)}, "entry 1 of a row"),  # background is no object
        ({"cell": put(1, 8)}, "entry 1 of a row"),  # a class is one of some size
        ({"predicted": put(2, 4)}, "entry 2 of a row"),
        ({"pixels": put(2, 0)}, "entry 2 of a row"),
        ({"pixels": lambda column: column[1:]}, "does not fit"),
        ({"pixels": lambda column: column.astype(float)}, "column pixels does not fit"),
        ({"pixels": np.array([{}], object)}, "cannot be read"),
        ({"about": lambda about: about.update(format=2)}, "its format is 2, not 1"),
        ({"about": lambda about: about.pop("rows")}, "rows"),
        ({"about": lambda about: about["rows"].pop()}, "its rows are not those of its entries"),
        ({"about": lambda about: about["rows"][0].pop()}, "cannot be read"),
        ({"about": lambda about: about["rows"].append(about["rows"][0])}, "not those of its"),
        ({"about": lambda about: about["classes"].pop()}, "of a row is none of a picture"),
        ({"about": lambda about: about["pictures"].pop()}, "cannot be read"),
    ],
)
def test_numbers_that_no_picture_has(run, columns, message) -> None:
    changed(run / "02_x_images.npz", **columns)
    with pytest.raises(SystemExit, match=message) as caught:
        weclip(["verify", str(run)])
    assert "02_x_images.npz cannot be read" in str(caught.value)
    assert "it is damaged or of another kind: make the run again" in str(caught.value)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut(run, part) -> None:
    path = run / "02_x_images.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(SystemExit, match=r"02_x_images\.npz cannot be read"):
        weclip(["verify", str(run)])


def test_no_changed_byte_gives_other_numbers(run) -> None:
    """It is refused, or it was none of the content."""
    path = run / "02_x_images.npz"
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            kept = read_counts(path)
        except ValueError as error:
            assert "02_x_images.npz cannot be read" in str(error)
            continue
        assert same(kept), at


def same(kept: Kept) -> bool:
    return list(kept.rows) == list(ROWS) and all(
        (kept.rows[row].entries == counts.entries).all() for row, counts in ROWS.items()
    )


# --- the command ---------------------------------------------------------------------------------


def test_a_run_of_a_notebook_is_right(run, capsys) -> None:
    assert results.DECIMALS[""] == results.DECIMALS["_per_class"] == DECIMALS
    weclip(["verify", str(run)])
    lines = capsys.readouterr().out.splitlines()
    measured = sum(len(measures(counts)) for counts in ROWS.values())
    assert lines == [
        f"{run}/02_x.csv: {measured} rows checked, 1 not covered",
        f"{run}/02_x_per_class.csv: 8 rows checked, 0 not covered",
    ]


def test_a_folder_of_scores_is_right(scored, capsys) -> None:
    weclip(["verify", str(scored)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"{scored}/scores.csv: 3 rows checked, 0 not covered",
        f"{scored}/per_class.csv: 4 rows checked, 0 not covered",
    ]
    assert re.fullmatch(r".*/confused.csv: 6 rows checked, 0 not covered", lines[2])


def test_the_first_wrong_row_is_named_and_all_are_listed(run, capsys) -> None:
    value = f"{measures(ROWS[DECODER])['miou']:.2f}"
    edit(run / "02_x.csv", r'^("decoder, RFM",val,miou),[\d.]+(,percent,4,0,)', r"\1,99.00\2")
    edit(run / "02_x_per_class.csv", r'^("decoder, RFM",val,cat),[\d.]+,1$', r"\1,1.00,1")
    with pytest.raises(SystemExit) as caught:
        weclip(["verify", str(run)])
    first = (
        "variant decoder, RFM, split val, metric miou, seed 0: value is 99.00, and the counts "
        f"give {value}"
    )
    assert str(caught.value) == (
        f"error: {run}/02_x.csv: {first} (and 1 more): make the run again, or restore the table"
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"  {first}" and len(lines) == 4
    assert lines[3].startswith("  variant decoder, RFM, split val, class cat, seed 1: iou is 1.00")


@pytest.mark.parametrize("change", [0.01, -0.01])
def test_a_hundredth_is_a_difference(run, change) -> None:
    value = measures(ROWS[DECODER])["boundary miou"]
    edit(
        run / "02_x.csv",
        r'^("decoder, RFM",val,boundary miou),[\d.]+(,percent,4,0,)',
        rf"\1,{value + change:.2f}\2",
    )
    with pytest.raises(SystemExit, match="metric boundary miou, seed 0: value is"):
        weclip(["verify", str(run)])


@pytest.mark.parametrize(
    ("table", "pattern", "new", "message"),
    [
        ("02_x.csv", r'^("decoder, RFM",val,miou,.*),4,1,', r"\1,5,1,", "n_images is 5, .* give 4"),
        ("02_x.csv", r'^"decoder, RFM",val,miou,.*,4,1,.*\n', "", "miou, seed 1: there is no such"),
        ("02_x.csv", r'^("decoder, RFM",val,miou),.*(,percent,4,1,)', r"\1,x\2", "value is x"),
        ("02_x.csv", r'^("decoder, RFM",val,miou),.*(,percent,4,1,)', r"\1,\2", "value is empty"),
        ("02_x.csv", r'^("decoder, RFM",val,miou,.*,4),1,', r"\1,0,", "two rows have the same"),
        ("02_x.csv", "metric", "measure", "02_x.csv cannot be read .it has no column metric"),
        ("02_x.csv", "value", "amount", "it has no column value"),
        ("02_x_per_class.csv", "iou", "iuo", "it has no column iou"),
    ],
)
def test_what_is_wrong_with_a_table(run, table, pattern, new, message) -> None:
    edit(run / table, pattern, new)
    with pytest.raises(SystemExit, match=message):
        weclip(["verify", str(run)])


@pytest.mark.parametrize(
    ("table", "pattern", "new", "message"),
    [
        (
            "scores.csv",
            r",4$(?=\nscales)",
            ",5",
            "prediction single scale: pictures is 5, .*give 4",
        ),
        ("scores.csv", r",val,4$(?=\nscales)", ",test,4", "split is test, and the counts give val"),
        ("scores.csv", r"^with CRF.*\n", "", "prediction with CRF: there is no such row"),
        ("scores.csv", "boundary miou", "boundary", "it has no column boundary miou"),
        ("per_class.csv", r"^boat,[\d.]+", "boat,1.0", "class boat: single scale is 1.0, and"),
        ("confused.csv", r"^(boat,cat),[\d.]+", r"\1,1.0", "class boat, taken for cat: single sc"),
    ],
)
def test_what_is_wrong_with_scores(scored, table, pattern, new, message) -> None:
    edit(scored / table, pattern, new)
    with pytest.raises(SystemExit, match=message):
        weclip(["verify", str(scored)])


def test_precision_and_recall_per_class_are_compared_where_they_stand(run) -> None:
    path = run / "02_x_per_class.csv"
    header, *lines = path.read_text().splitlines()
    found = [
        value
        for seed in (0, 1)
        for value in precision(ROWS[DECODER._replace(seed=seed)].total()).tolist()
    ]
    order = [line.split(",")[3:] for line in lines]  # class, iou, seed: the seeds alternate
    place = {(name, seed): 4 * int(seed) + CLASSES.index(name) for name, _, seed in order}
    cells = [f"{found[place[name, seed]]:.2f}" for name, _, seed in order]
    text = [f"{line},{cell}" for line, cell in zip(lines, cells, strict=True)]
    path.write_text("\n".join([f"{header},precision", *text]) + "\n")
    weclip(["verify", str(run)])
    path.write_text("\n".join([f"{header},precision", *text[:-1], f"{lines[-1]},0.5"]) + "\n")
    with pytest.raises(SystemExit, match=r"seed 1: precision is 0\.5, and the counts give"):
        weclip(["verify", str(run)])


def test_several_runs_and_those_that_hold_nothing(run, tmp_path_factory, capsys) -> None:
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(SystemExit, match=r"other0 holds no \*_images.npz, so nothing can be"):
        weclip(["verify", str(run), str(other)])
    assert capsys.readouterr().out.count("checked") == 2
    with pytest.raises(SystemExit, match="gone is no folder: give one of `weclip score`"):
        weclip(["verify", str(tmp_path_factory.getbasetemp() / "gone")])
    for path in run.glob("02_x*"):
        shutil.copy(path, other / path.name.replace("02", "03"))
    shutil.copy(run / "02_x_images.npz", other / "01_y_images.npz")
    with pytest.raises(SystemExit, match=r"01_y\.csv is not there"):
        weclip(["verify", str(other)])
    (other / "01_y_images.npz").unlink()
    (other / "03_x_per_class.csv").unlink()
    capsys.readouterr()
    weclip(["verify", str(run), str(other)])
    assert [
        line.split(":")[0].rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()
    ] == [
        "02_x.csv",
        "02_x_per_class.csv",
        "03_x.csv",
    ]
