"""Overlays: frames enclose the boxes of patches in the original image, and are clipped at its border."""

import numpy as np
import pytest
from PIL import Image

from lsg_jax.report.overlay import L_SINK, V_SINK, draw_sinks

SIDE = 200
INSIDE, PARTLY, PADDING = (0.25, 0.25, 0.5, 0.75), (-0.2, 0.5, 0.3, 1.1), (0.0, 1.0, 0.5, 1.5)


def framed(image, colour):
    """(left, top, right, bottom) of the pixels of one colour; None without any."""
    rows, columns = np.nonzero((np.asarray(image) == colour).all(-1))
    return (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else None


@pytest.mark.parametrize(("size", "drawn"), [((600, 300), (200, 100)), ((50, 100), (100, 200)), ((64, 64), (200, 200))])
def test_frames_enclose_the_boxes_of_the_original_image(size, drawn):
    grey = Image.new("RGB", size, (90, 90, 90))
    in_pixels = lambda box: [edge * drawn[axis % 2] for axis, edge in enumerate(box)]
    for patch, box in enumerate((INSIDE, PARTLY)):
        sinks = {"boxes": [INSIDE, PARTLY, PADDING], "v_sinks": [patch], "l_sinks": None}
        overlay = draw_sinks(grey, sinks, side=SIDE)
        assert overlay.size == drawn
        visible = np.clip(in_pixels(box), 0, [*drawn, *drawn])
        np.testing.assert_allclose(framed(overlay, V_SINK), visible, atol=1)
    shorter = min(0.25 * drawn[0], 0.5 * drawn[1])
    inner = in_pixels(INSIDE) + 0.2 * shorter * np.array([1, 1, -1, -1])
    overlay = draw_sinks(grey, {"boxes": [INSIDE], "v_sinks": None, "l_sinks": [[], [0]]}, side=SIDE)
    np.testing.assert_allclose(framed(overlay, L_SINK), inner, atol=1)
    assert framed(overlay, V_SINK) is None


def test_a_patch_in_the_padding_has_no_frame():
    grey = Image.new("RGB", (40, 20), (90, 90, 90))
    overlay = draw_sinks(grey, {"boxes": [PADDING, (-0.5, 0.0, 0.0, 0.5)], "v_sinks": [0, 1], "l_sinks": [[0]]}, side=SIDE)
    assert np.ptp(np.asarray(overlay)) == 0
