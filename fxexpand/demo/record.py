"""The results as JSON, with the machine they were measured on."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from fxexpand.demo.compare import Result
from fxexpand.demo.machine import machine
from fxexpand.demo.settings import Settings
from fxexpand.version import library_version


def results_json(results: Sequence[Result], settings: Settings) -> bytes:
    """Everything that the tables and the figure show, per seed and summarised. Times are seconds, errors are shares."""
    record = {
        "fxexpand": library_version(),
        "machine": machine(),
        "settings": dataclasses.asdict(settings),
        "variants": [_variant(result) for result in results],
    }
    return (json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _variant(result: Result) -> dict[str, Any]:
    return {
        "name": result.variant.name,
        "label": result.variant.label,
        "test_error": {"mean": result.mean_error, "deviation": result.deviation},
        "difference": dataclasses.asdict(result.difference) if result.difference else None,
        "step": {"seconds": result.step_seconds, "ratio": result.step_ratio},
        "cost": dataclasses.asdict(result.cost),
        "contraction_error": {"rounding": result.rounding, "float32": result.float32},
        "runs": [
            {
                "seed": run.seed,
                "test_error": run.test_error,
                "step_seconds": run.curves.step_seconds,
                "contraction_error": dataclasses.asdict(run.contraction),
                "losses": run.curves.losses,
                "test_errors": run.curves.test_errors,
            }
            for run in result.runs
        ],
    }
