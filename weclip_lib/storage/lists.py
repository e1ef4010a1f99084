"""This module reads every text list that a user writes: tables, names, prompts, grids.

All are UTF-8, with or without a byte-order mark, and with the line ends of any system. Spaces
around a field mean nothing. Two words are equal here if CLIP's tokenizer takes them for one.
"""

import csv
import io
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

import ftfy
import yaml

from weclip_lib.storage.files import Unusable, in_a_line, reading

Report = Callable[[str], None]
JOINERS = "\u200c\u200d"  # between letters of some scripts, and within emoji
LIST_SIGNS = '[]{}|,;"\t\uff0c\uff1b\u3001'  # a class name with one of these was meant as several
RESERVED = ("background", "_background_", "__ignore__")  # id 0, and void


def refuse(problem: str) -> None:
    """Refuse at the first problem; the doctor collects problems instead."""
    raise Unusable(problem)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, without a byte-order mark.

    Raises:
        Unusable: If the file is not there, or is in another encoding.
    """
    with reading(path):
        content = path.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise Unusable(
                f"{path} is not in UTF-8 ({error.reason} in line {line}): save it as UTF-8"
            ) from error
        if "\0" in text:
            raise Unusable(f"{path} holds bytes of 0 and is no text in UTF-8: save it as UTF-8")
        return text


def read_lines(path: Path, meant: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their number, without the spaces around them.

    Args:
        meant: What a line is, for the message about an empty file.

    Raises:
        Unusable: If the file cannot be read, or has no such line.
    """
    lines = enumerate(io.StringIO(read_text(path)), 1)
    found = [(number, text.strip()) for number, text in lines if text.strip()]
    if not found:
        raise Unusable(f"{path} is empty: write {meant} a line, or remove it")
    return found


def read_rows(
    path: Path, needed: Sequence[str], allowed: Sequence[str] = (), report: Report = refuse
) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file, with file and line as `where`; report what is no row."""
    try:
        text = read_text(path)
    except Unusable as error:
        remedy = f": write rows of `{','.join(needed)}`" if not path.exists() else ""
        report(f"{error}{remedy}")
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if any("\n" in cell or "\r" in cell for cell in cells):
                report(f'{where}: a quote " that is not closed in this line')
            elif not header:
                header = [cell.lower() for cell in cells]
                if problem := _header_problem(header, needed, allowed):
                    report(f"{path} has the header {','.join(cells)!r}: {problem}")
                    return
            elif problem := _row_problem(cells, header, needed):
                report(f"{where}: {problem}")
            else:
                yield {**dict(zip(header, cells, strict=True)), "where": where}
    except csv.Error as error:
        report(f'{path}, line {line}: a quote " that is not closed ({in_a_line(error)})')
    if not header:
        report(f"{path} is empty: its first line has to be {','.join(needed)}")


def _header_problem(
    header: Sequence[str], needed: Sequence[str], allowed: Sequence[str]
) -> str | None:
    if len(set(header)) == len(header) and set(needed) <= set(header) <= {*needed, *allowed}:
        return None
    extra = f" (and may have {', '.join(allowed)})" if allowed else ""
    other = len(header) == 1 and (";" in header[0] or "\t" in header[0])
    commas = ", with commas between the columns" if other else ""
    return f"it must be {','.join(needed)}{extra}{commas}"


def _row_problem(cells: list[str], header: Sequence[str], needed: Sequence[str]) -> str | None:
    if len(cells) > len(header):
        return "more fields than the header: separate tags by `;`"
    missing = list(header[len(cells) :])
    if missing == [needed[-1]]:
        return f"no comma; write `{cells[0]},` where there is nothing"
    if missing:
        return f"no field {missing[0]}"
    return None


def without_repeats(
    names: Iterable[tuple[str, str]], report: Report = refuse
) -> Iterator[tuple[str, str]]:
    """Yield pairs of a place and a name; report, and leave out, a name that came before."""
    seen: set[str] = set()
    for where, name in names:
        if name in seen:
            report(f"{where}: {name!r} comes a second time")
        else:
            seen.add(name)
            yield where, name


def read_names(path: Path, known: Collection[str], report: Report = refuse) -> list[str]:
    """Return the names of pictures in a list, one a line, in order; `known` holds all pictures.

    It also reads other usual lists: their names have a folder and an ending, or a second column
    with the mask, or with a flag `1` as in VOC's ImageSets/Main.

    Raises:
        Unusable: If the list cannot be read, or is empty.
    """
    found = []
    for number, text in read_lines(path, "one name"):
        where, name = f"{path}, line {number}", known_name(text, known)
        if name is None:
            report(f"{where}: {text!r} is not among the pictures: correct or remove the line")
        else:
            found.append((where, name))
    return [name for _, name in without_repeats(found, report)]


def known_name(text: str, known: Collection[str]) -> str | None:
    """Return the picture that a line of a list names; None if there is none."""
    text = unicodedata.normalize("NFC", text)
    columns = text.rsplit(maxsplit=1)
    tries = [text]
    if len(columns) == 2 and (columns[1] == "1" or "/" in columns[1] or "." in columns[1]):
        tries.append(columns[0])
    for tried in tries:
        parts = PurePosixPath(tried.replace("\\", "/").lstrip("/")).parts
        for start in range(len(parts)):
            path = PurePosixPath(*parts[start:])
            for name in (str(path), str(path.with_suffix("")) if path.suffix else str(path)):
                if name in known:
                    return name
    return None


@lru_cache(maxsize=4096)
def key_of(word: str) -> str:
    """Return one key for all words that CLIP's tokenizer takes for one (case, form, spaces)."""
    shown = "".join(c for c in ftfy.fix_text(word) if unicodedata.category(c) != "Cf")
    return " ".join(shown.lower().split())


def class_problem(name: str) -> str | None:
    """Say why a word cannot be the name of a class; None if it can."""
    if not key_of(name):
        return "a class without name"
    if key_of(name) in RESERVED:
        return f"class {name!r} is reserved: id 0 is background without being named; remove it"
    hidden = [
        c for at, c in enumerate(name)
        if unicodedata.category(c) in ("Cf", "Cc") and not (c in JOINERS and 0 < at < len(name) - 1)
    ]  # fmt: skip
    if hidden:
        return (
            f"class {name!r} holds the invisible character U+{ord(hidden[0]):04X}: "
            f"write `{key_of(name)}`"
        )
    signs = [sign for sign in LIST_SIGNS if sign in name]
    if signs or name[0] == name[-1] == "'":
        return f"class {name!r} holds {(signs or [name[0]])[0]!r}: separate classes by `;`"
    return None


def alike_problem(name: str, others: dict[str, str]) -> str | None:
    """Say which other name is the same word to CLIP; None if none is. `others` keeps the name."""
    other = others.setdefault(key_of(name), name)
    if other != name:
        return f"{name!r} and {other!r} are one word to CLIP: write it the same everywhere"
    return None


class _OnceLoader(yaml.SafeLoader):
    """This loader refuses a key that comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"{twice[0]!r} comes a second time in what begins at line {line}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> object:
    """Return what a YAML file holds.

    Raises:
        Unusable: If it cannot be read, is no YAML, or names a key twice.
    """
    text = read_text(path)
    try:
        return yaml.load(text, _OnceLoader)
    except Exception as error:  # tags of YAML raise their conversion's errors
        raise Unusable(f"{path} is no YAML: {in_a_line(error)}") from error
