"""The cost model of a training step is right about what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from fxexpand.algebra.step_cost import StepCost

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "collapse_sites.json"


def test_it_says_which_form_is_faster_wherever_the_difference_is_plain() -> None:
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    plain = 0
    for row in rows:
        explicit, collapsed = row["seconds"]["explicit"], row["seconds"]["collapsed"]
        said = [StepCost(*row["work"][name]).total for name in ("explicit", "collapsed")]
        if max(explicit, collapsed) > 1.3 * min(explicit, collapsed):
            plain += 1
            assert (said[0] > said[1]) == (explicit > collapsed), row["site"]
    assert plain > 20
