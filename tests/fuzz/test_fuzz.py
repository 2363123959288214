"""What fuzzing found once stays found, and half a minute of frames is drawn anew: the same ones each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuzz import search
from fuzz.arena import Arena, Step
from fuzz.main import CASES, arenas
from fuzz.search import Finding, Tally

SEQUENCES = {"all": 400, "nat": 200, "tunnels": 200}
"""By world. scripts/fuzz has more worlds, and takes as long as one likes."""
KEPT = search.read_cases(CASES)


@pytest.fixture(scope="module")
def loaded(bpf_able: None) -> Iterator[dict[str, Arena]]:
    with arenas(list(SEQUENCES)) as found:
        yield {arena.name: arena for arena in found}


@pytest.mark.parametrize("case", [pytest.param(case, id=title) for title, case in KEPT])
def test_a_kept_case(loaded: dict[str, Arena], case: Finding) -> None:
    assert loaded[case.world].play(case.steps) == []


@pytest.mark.parametrize("world", SEQUENCES)
def test_program_and_model_agree(loaded: dict[str, Arena], world: str) -> None:
    arena, tally = loaded[world], Tally()
    for seed in range(SEQUENCES[world]):
        finding = search.one_sequence(arena, seed, tally)
        if finding:
            finding = search.shrink(arena, finding)
            pytest.fail("\n".join([*finding.complaints, finding.case(f"a sequence of {world}")]))
    assert tally.frames > 0.96 * SEQUENCES[world] * search.LENGTH
    assert tally.verdicts[0] == 0
    assert min(tally.verdicts[1:]) > 100


def test_another_model_would_be_noticed(loaded: dict[str, Arena]) -> None:
    """The comparison itself is put to the test: other bytes, another verdict, another counter."""
    arena = loaded["all"]
    front = next(f for f in arena.gateway.fronts.values() if f.config.name == "dsr4 80/tcp")
    ip = bytes.fromhex("450000280000400040060000c0000209") + front.address
    segment = bytes.fromhex("9c400050") + bytes(8) + b"\x50\x10" + bytes(6)
    steps = [Step("front", bytes.fromhex("0200000000010200000000c10800") + ip + segment)]
    assert arena.play(steps) == []
    (server,) = (s for s in front.servers.values() if arena.model.counters[f"backend.{s.id}.packets"])
    for field, value, what in (("mac", bytes(6), "other bytes"), ("mtu", 39, "other bytes"), ("id", 0, "counter")):
        before = getattr(server, field)
        setattr(server, field, value)
        assert any(what in complaint for complaint in arena.play(steps)), field
        setattr(server, field, before)
    arena.gateway.listening[front.address].remove(front)
    assert any("verdict" in complaint for complaint in arena.play(steps))
    arena.gateway.listening[front.address].append(front)
    assert arena.play(steps) == []
