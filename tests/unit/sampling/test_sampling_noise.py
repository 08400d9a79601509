import numpy as np
import pytest

from pagoda.sampling.noise import RequestNoise, philox4x32, uniforms
from pagoda.sampling.params import SamplingParams


# From the known-answer tests of Random123, the authors' own implementation.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox4x32(
        tuple(np.array([word], dtype=np.uint64) for word in counter),
        tuple(np.array([word], dtype=np.uint64) for word in key),
    )
    assert tuple(int(word[0]) for word in words) == expected


def test_numbers_are_uniform_and_uncorrelated_across_seeds_and_positions():
    seeds = np.arange(200, dtype=np.uint64)[:, None]
    numbers = uniforms(seeds, np.arange(500)[None, :])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    histogram, _ = np.histogram(numbers, bins=50, range=(0, 1))
    expected = numbers.size / 50
    assert ((histogram - expected) ** 2 / expected).sum() < 95  # chi-square, 49 degrees, p = 1e-4
    for shifted in (numbers[1:] * numbers[:-1], numbers[:, 1:] * numbers[:, :-1]):
        assert abs(shifted.mean() - 0.25) < 0.004


def test_attempts_at_one_position_are_different_numbers():
    seed, position = np.array([7], dtype=np.uint64), np.array([3])
    assert len({float(uniforms(seed, position, attempt)[0]) for attempt in range(100)}) == 100


def test_numbers_depend_on_seed_and_position_only():
    noise = RequestNoise(8, seed=None)
    noise.add(2, SamplingParams(seed=5))
    noise.add(6, SamplingParams(seed=-1))
    alone = [float(noise.at(np.array([2]), np.array([position]))[0]) for position in range(100)]
    other = RequestNoise(8, seed=1)
    other.add(7, SamplingParams(seed=5))
    other.add(0, SamplingParams(seed=99))
    together = [float(other.at(np.array([0, 7]), np.array([50 + position, position]))[1]) for position in range(100)]
    backwards = [float(other.at(np.array([7]), np.array([position]))[0]) for position in reversed(range(100))]
    assert alone == together == backwards[::-1]
    expected = uniforms(np.array([2**64 - 1], dtype=np.uint64), np.array([40]))
    assert noise.at(np.array([6]), np.array([40])) == expected


def test_a_request_slot_that_is_taken_again_forgets_the_numbers_of_its_last_request():
    noise = RequestNoise(1, seed=0)
    noise.add(0, SamplingParams(seed=1))
    first = noise.at(np.array([0]), np.array([10]))
    noise.add(0, SamplingParams(seed=2))
    assert noise.at(np.array([0]), np.array([10])) != first


def test_requests_without_a_seed_differ_and_follow_the_configured_seed():
    def numbers(seed):
        noise = RequestNoise(2, seed)
        noise.add(0, SamplingParams())
        noise.add(1, SamplingParams())
        return noise.at(np.array([0, 1]), np.array([0, 0])).tolist()

    assert numbers(3) == numbers(3)
    assert numbers(3) != numbers(4)
    assert numbers(None) != numbers(None)
    assert len(set(numbers(3))) == 2
