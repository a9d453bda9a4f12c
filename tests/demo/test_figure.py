import io

import numpy as np
import pytest
from matplotlib.image import imread

from fxexpand.demo.compare import Result, result
from fxexpand.demo.experiment import ContractionError, Cost, Run
from fxexpand.demo.figure import curves_png
from fxexpand.demo.settings import Settings
from fxexpand.demo.training import Curves
from fxexpand.demo.variants import variants


def results(seeds: int, level: float) -> list[Result]:
    """Two variants whose curves fall from `level`."""
    found = []
    for variant in variants(rate=4, kernel_size=3):
        runs = []
        for seed in range(seeds):
            curves = Curves((level, level / (2 + seed)), (level / 4, level / 9), 0.1)
            runs.append(Run(variant, seed, curves, level / 9, ContractionError(0, 0), {}, None))  # type: ignore[arg-type]
        found.append(result(variant, runs, runs, Cost(1, 1, 1, 1)))
    return found


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_figure_is_a_png_that_shows_something(seeds: int) -> None:
    png = curves_png(results(seeds, 2.0), Settings(seeds=seeds, epochs=2))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(io.BytesIO(png))
    assert pixels.shape[0] >= 600
    assert pixels.shape[1] >= 1400
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 100


def test_the_figure_depends_on_the_curves_alone() -> None:
    settings = Settings(seeds=2, epochs=2)
    assert curves_png(results(2, 2.0), settings) == curves_png(results(2, 2.0), settings)
    assert curves_png(results(2, 2.0), settings) != curves_png(results(2, 1.5), settings)


def test_a_faultless_network_can_be_drawn() -> None:
    variant = variants(rate=4, kernel_size=3)[0]
    run = Run(variant, 0, Curves((0.5, 0.1), (0.1, 0.0), 0.1), 0.0, ContractionError(0, 0), {}, None)  # type: ignore[arg-type]
    png = curves_png([result(variant, [run], [run], Cost(1, 1, 1, 1))], Settings(seeds=1, epochs=2))
    assert png.startswith(b"\x89PNG")
