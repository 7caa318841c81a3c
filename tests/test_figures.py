"""The picture of all gains shows the numbers that it is given."""

import pandas as pd
import pytest

from metaadamw_lite.experiments import figures, paired


def rows(*cells):
    """Rows of the picture from (improvements, band) each; the paper's gain is 4 %."""
    table = [
        {
            "label": f"task {k}",
            "improvements": pd.Series(improvements, dtype=float),
            "gain": paired.paired_difference(pd.Series(improvements, dtype=float), "%"),
            "paper": 4.0,
            "band": band,
        }
        for k, (improvements, band) in enumerate(cells)
    ]
    return pd.DataFrame(table)


@pytest.mark.parametrize("dark", [False, True])
def test_a_row_has_its_pairs_the_papers_number_and_a_mean_where_there_is_an_interval(dark):
    (ax,) = figures.plot_gains(rows(([1.0, 2.0, 4.0], None), ([5.0], None)), dark).axes
    drawn = {(tuple(line.get_xdata()), line.get_ydata()[0]) for line in ax.get_lines() if len(line.get_xdata())}
    assert {((1.0, 2.0, 4.0), 0), ((5.0,), 1), ((4.0,), 0), ((4.0,), 1)} <= drawn
    (bar,) = ax.containers
    assert bar.lines[0].get_xdata().tolist() == pytest.approx([7 / 3])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["task 0", "task 1"]
    assert ax.yaxis_inverted(), "the first row is on top"


def test_the_band_of_random_phis_is_drawn_where_there_is_one():
    figure = figures.plot_gains(rows(([1.0], None), ([1.0], (-3.0, 2.0))))
    (band,) = figure.axes[0].patches
    assert (band.get_x(), band.get_width()) == (-3.0, 5.0)
    assert band.get_y() + band.get_height() / 2 == pytest.approx(1)
    labels = [len(f.legends[0].get_texts()) for f in (figure, figures.plot_gains(rows(([1.0], None))))]
    assert labels == [4, 3], "the legend names a band only where one is drawn"


def test_both_pages_have_the_same_numbers_in_other_colours():
    light, dark = (figures.plot_gains(rows(([1.0, 2.0, 4.0], (0.0, 1.0))), d) for d in (False, True))
    assert light.get_facecolor() != dark.get_facecolor()
    assert light.axes[0].get_xlim() == dark.axes[0].get_xlim()
