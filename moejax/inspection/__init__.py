"""Looking at runs: their record, how they compare, where tokens go, what experts specialise in, figures, the report.

In a notebook:

  run = open_run("runs/tiny_moe")
  run.metrics["loss/lm"].plot()
  trace(run.load(), "My fellow Americans")
  compare(["runs/tiny_moe", "runs/tiny_dense"])

These names load neither a model nor a plotting library before they need it.
"""

from moejax.inspection.comparison import Comparison as Comparison
from moejax.inspection.comparison import compare as compare
from moejax.inspection.run import Run as Run
from moejax.inspection.run import open_run as open_run
from moejax.inspection.trace import Trace as Trace
from moejax.inspection.trace import trace as trace
