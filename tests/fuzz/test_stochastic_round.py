from __future__ import annotations

import hypothesis.strategies as st
import torch

from tests.cases.stochastic_round import Place, definition
from tests.comparison import bits
from tests.fuzz.calls import Call, Fuzz, surroundings, threads
from tests.fuzz.operands import Draw, laid, layouts, numbers, sizes

WORDS = (0, 1, 2, 1000, 2**31, 2**32 - 1)
OFFSETS = (0, 1, 100, 2**31 - 3, 2**32 - 7, 2**32, 2**40, 2**62)
GAPS = (0, 1, 50, 2**31, 2**32 - 9, 2**32, 2**40)


@st.composite
def roundings(draw: Draw, tiny: bool) -> Call:
    shape = draw(st.lists(sizes(tiny, most=33), max_size=3))
    if not tiny and draw(st.integers(0, 19)) == 19:
        shape = [draw(st.sampled_from((1300, 4099))), draw(st.sampled_from((3, 33)))]
    arguments = {
        "x": laid(draw(numbers()).fill(shape, torch.float32), draw(layouts())),
        "seed": draw(st.sampled_from((*WORDS, 2**32, 2**64 - 1))),
        "ordinal": draw(st.sampled_from(WORDS)),
        "step": draw(st.sampled_from(WORDS)),
        "offset": draw(st.sampled_from(OFFSETS)),
        "half": draw(st.sampled_from(("high", "low"))),
    }
    if draw(st.booleans()):
        run = draw(st.sampled_from((1, 2, 3, 16, 17, 100, 1025, 2**33)))
        arguments.update(run=run, pitch=run + draw(st.sampled_from(GAPS)))
    return Call("stochastic_round", arguments, around=draw(surroundings), threads=draw(threads))


def check(call: Call) -> None:
    outcome = call.run_repeatably()
    if outcome is None:
        return
    a = call.arguments
    x, found = a["x"].values, outcome.result
    place = Place(a["offset"], a.get("run"), a.get("pitch"))
    expected = definition(x, place, a["half"], **{name: a[name] for name in ("seed", "ordinal", "step")})
    assert found.dtype == torch.bfloat16
    assert found.shape == x.shape
    assert torch.equal(bits(found), bits(expected)), "bits differ"


def test_stochastic_round(implementation: str, fuzz: Fuzz) -> None:
    fuzz(roundings, check)
