"""Where a crop of the pictures lies in flow fields of another size."""

from __future__ import annotations

Box = tuple[int, int, int, int]


def flow_box(box: Box, size: tuple[int, int], flow_size: tuple[int, int]) -> Box:
    """The box (left, top, right, bottom) of pictures of `size` (height, width), in fields of `flow_size`.

    Each axis is scaled by itself and rounded half to even, as the published code of MSCL does
    (megvii-research/MSCL); the vectors within keep their length.
    """
    down, across = flow_size[0] / size[0], flow_size[1] / size[1]
    left, top, right, bottom = box
    return round(left * across), round(top * down), round(right * across), round(bottom * down)
