"""What all tables have in common: their look, how a quantity is written, and that names are text. Pure."""

from __future__ import annotations

from typing import NamedTuple

from rich.table import Table
from rich.text import Text

ALARM, WARNING, FINE, QUIET = "bold red", "yellow", "green", "dim"


class Column(NamedTuple):
    title: str
    number: bool = False


def quantity(count: float) -> str:
    """9999, 10.0k, 1.23M: four digits at most, so that a column's magnitudes compare at a glance."""
    if count < 9999.5:
        return str(round(count))
    for unit in ("k", "M", "G", "T", "P", "E"):
        count /= 1000
        if count < 999.5 or unit == "E":
            break
    return f"{count:.{2 if count < 9.995 else 1 if count < 99.95 else 0}f}{unit}"


def new_table(*columns: Column) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=QUIET)
    for column in columns:
        table.add_column(column.title, justify="right" if column.number else "left", no_wrap=True)
    return table


def add_row(table: Table, *cells: str | Text) -> None:
    """Adds the cells as they are: to rich a plain string is markup, and [fd00::1] would be a tag."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
