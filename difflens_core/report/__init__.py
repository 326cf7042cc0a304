"""What a person reads: the figures, text, page and charts of a report or an experiment."""

from .charts import bar_chart, image_grid, line_chart
from .figures import Question, share_chart, summary
from .findings import (
    CHARTED,
    calibration_text,
    cross_chart,
    cross_table,
    diagnosis_chart,
    diagnosis_text,
    dose_chart,
    effect_chart,
    effect_table,
    loss_chart,
    mix_chart,
    ranking_chart,
    ranking_table,
    scan_chart,
    scan_table,
    weighing_text,
)
from .page import SHOWN, report_page
from .sharing import example_grid, example_of, provenance, provenance_text, with_provenance
from .text import judged_text, report_text

__all__ = [
    "CHARTED",
    "Question",
    "SHOWN",
    "bar_chart",
    "calibration_text",
    "cross_chart",
    "cross_table",
    "diagnosis_chart",
    "diagnosis_text",
    "dose_chart",
    "effect_chart",
    "effect_table",
    "example_grid",
    "example_of",
    "image_grid",
    "judged_text",
    "line_chart",
    "loss_chart",
    "mix_chart",
    "provenance",
    "provenance_text",
    "ranking_chart",
    "ranking_table",
    "report_page",
    "report_text",
    "scan_chart",
    "scan_table",
    "share_chart",
    "summary",
    "weighing_text",
    "with_provenance",
]
