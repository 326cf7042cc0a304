"""What a person reads: the figures, text, page and charts of a report or an experiment."""

from .charts import bar_chart, image_grid, line_chart
from .experiments import (
    calibration_text,
    cross_chart,
    cross_table,
    diagnosis_chart,
    diagnosis_text,
    dose_chart,
    scan_chart,
    scan_table,
)
from .figures import Question, share_chart, summary
from .page import SHOWN, report_page
from .text import report_text

__all__ = [
    "Question",
    "SHOWN",
    "bar_chart",
    "calibration_text",
    "cross_chart",
    "cross_table",
    "diagnosis_chart",
    "diagnosis_text",
    "dose_chart",
    "image_grid",
    "line_chart",
    "report_page",
    "report_text",
    "scan_chart",
    "scan_table",
    "share_chart",
    "summary",
]
