from __future__ import annotations

import numpy as np
import pytest
from mscl_case import motion_fields, outputs

from preprocess.encode.motion_scores import attention_map, colour_code, frame_scores, motion_boundaries, unit_field
from shards_spec.errors import ConfigError
from shards_spec.pictures import colour_wheel

SCORES = outputs("mds")
VARIANTS = [name.removeprefix("frame_score_") for name in SCORES if name.startswith("frame_score_")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_frame_scores_are_those_of_the_reference(variant):
    weighting, attention = variant.rsplit("_", 1)
    scores = frame_scores(motion_fields(), weighting=weighting, attention=attention)
    np.testing.assert_allclose(scores, SCORES[f"frame_score_{variant}"], rtol=1e-5)


def test_maps_are_those_of_the_reference():
    boundaries = motion_boundaries(motion_fields()[0])
    np.testing.assert_allclose(boundaries, SCORES["motion_map_0"], rtol=1e-5, atol=1e-4)
    for scale in ("max", "sum"):
        np.testing.assert_allclose(attention_map(boundaries, scale=scale), SCORES[f"attention_{scale}_0"], rtol=1e-5)


def test_colour_code_is_that_of_the_reference():
    flow, expected = outputs("fra")["normalised"], outputs("flow_colour")
    np.testing.assert_array_equal(colour_wheel(), expected["wheel"])
    image = np.moveaxis(expected["image_u8"][0], 0, -1)  # [t, h, w, 3]
    difference = np.abs(colour_code(flow).astype(int) - image)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


def test_only_changes_of_direction_count_not_speed():
    """Each field is scaled by its own maximum, so motion that only grows faster has no score."""
    field = motion_fields()[0]
    assert frame_scores([field, 2 * field, 7 * field]).max() < 0.1  # grey levels, by rounding
    assert frame_scores([field, -field])[0] > 10
    np.testing.assert_allclose(unit_field(3 * field), unit_field(field), atol=1e-5)


def test_a_video_without_motion_or_fields():
    still = np.zeros((30, 30, 2), np.float32)
    assert frame_scores([still, still]).tolist() == [0, 0]
    assert frame_scores([]).shape == (0,)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ConfigError, match="28 x 28 and more, not 20 x 40"):
        frame_scores([np.zeros((20, 40, 2), np.float32)])
    with pytest.raises(ConfigError, match='attention "max" or "sum"'):
        frame_scores([], weighting="attention_map", attention="none")
