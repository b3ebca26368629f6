"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(header: Sequence[object], rows: Iterable[Iterable[object]], right: Collection[int] = ()) -> str:
    """A table, line by line.

    Args:
        header: names of the columns.
        rows: their cells.
        right: which columns are aligned to the right.
    """
    rule = ("---:" if i in right else "---" for i in range(len(header)))
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in (header, rule, *rows))
