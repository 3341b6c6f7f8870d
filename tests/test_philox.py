"""Oracle: the known answers that the authors of Philox published with Random123 (kat_vectors)."""

import numpy as np
import pytest
from scipy import stats

from headrace.actors.philox import Stream, philox4x32, uniforms

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(np.array([word], np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


def test_a_number_does_not_depend_on_what_it_is_drawn_with():
    ordinals = np.array([5, -3, 2**40, 0])
    together = uniforms(7, Stream.SAMPLING, ordinals, np.array([0, 1, 2, 3]), 50)
    for row, (ordinal, lane) in enumerate(zip(ordinals, range(4), strict=True)):
        assert np.array_equal(uniforms(7, Stream.SAMPLING, int(ordinal), lane, 50), together[row])
        assert np.array_equal(uniforms(7, Stream.SAMPLING, int(ordinal), lane, 3), together[row, :3])


def test_every_part_of_key_and_counter_matters():
    variants = [
        (1, 1, 1, 1),
        (2, 1, 1, 1),
        (1, 2, 1, 1),
        (1, 1, 2, 1),
        (1, 1, 1, 2),
        (1, 1, -1, 1),
        (1, 1, 1 + 2**32, 1),
    ]
    drawn = {tuple(uniforms(*variant, 4)) for variant in variants}
    assert len(drawn) == len(variants)


def test_numbers_are_uniform_and_strictly_inside():
    drawn = uniforms(0, Stream.SAMPLING, np.arange(200), 0, 100).ravel()
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert 0 < drawn.min() and drawn.max() < 1
