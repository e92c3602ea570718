"""Inspects runs: metrics, comparisons, routing, specialisation of experts, figures, reports.

In a notebook:

  run = open_run("runs/tiny_moe")
  run.metrics["loss/lm"].plot()
  trace(run.load(), "My fellow Americans")
  compare(["runs/tiny_moe", "runs/tiny_dense"])

These names import neither the model nor a plotting library until they are needed.
"""

from moejax.inspection.analysis.trace import trace as trace
from moejax.inspection.analysis.trace_view import Trace as Trace
from moejax.inspection.runs.comparison import Comparison as Comparison
from moejax.inspection.runs.comparison import compare as compare
from moejax.inspection.runs.run import Run as Run
from moejax.inspection.runs.run import open_run as open_run
