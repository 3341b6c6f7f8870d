"""The nouns of the stream."""

import numpy as np

from headrace.actors.types import Group, Prompt, Segment, Trajectory, Verdict
from headrace.runtime.codec import dumps


def segment(version: int, *tokens: int) -> Segment:
    return Segment(version=version, tokens=np.array(tokens, np.int32), logprobs=np.full(len(tokens), -0.5, np.float32))


def test_judges_read_the_same_answers_in_fewer_bytes() -> None:
    pieces = [[segment(3, *range(32)), segment(4, *range(9))], [segment(4, 7)]]
    verdict = Verdict(correct=True)
    group = Group(
        prompt=Prompt(ordinal=1, tokens=np.arange(5, dtype=np.int32), answer="07", size=2),
        trajectories=[
            Trajectory(member=m, segments=s, finish="stop", verdict=verdict, reward=0.5) for m, s in enumerate(pieces)
        ],
    )
    before = dumps(group)
    read = group.as_read()
    assert dumps(group) == before
    assert len(dumps(read)) < len(before)
    assert read.oldest_version == 3 and read.prompt is group.prompt
    for whole, part in zip(read.trajectories, group.trajectories, strict=True):
        assert whole.tokens().tolist() == part.tokens().tolist()
        assert (whole.member, whole.finish, whole.verdict, whole.reward) == (part.member, "stop", verdict, 0.5)
