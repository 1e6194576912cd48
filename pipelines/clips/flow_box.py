"""Where a crop of the pictures lies in flow fields of another size."""

from __future__ import annotations


def flow_box(
    box: tuple[int, int, int, int], frame: tuple[int, int], field: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The box (top, left, height, width) of a `frame` of (height, width), in flow fields of the size `field`.

    Each edge is scaled along its own axis and rounded half to even, as the published code of MSCL does
    (megvii-research/MSCL); the vectors within keep their length.
    """
    top, left, height, width = box
    down, across = field[0] / frame[0], field[1] / frame[1]
    first_row, first_column = round(top * down), round(left * across)
    end_row, end_column = round((top + height) * down), round((left + width) * across)
    return first_row, first_column, end_row - first_row, end_column - first_column
