"""Metrics of the dense tasks as `torchmetrics.Metric`s (pip install "tiger_fast[train]").

All of them take `update(logits, target)`: logits (B,C,h,w) of any floating dtype are resized bilinearly to the target's size
first. Sums are int64 or float64 over the whole data set, so neither batching nor the number of ranks changes the figure.
Figures are fractions in [0, 1], but degrees for normals and metres for depth. Every figure is NaN as long as no valid pixel
has been seen. A prediction that is NaN is wrong; it never leaves the count (each class says what wrong means for it).
`name` is the figure's short name, `higher_is_better` its direction. Wrong shapes, devices or labels raise ValueError, wrong
dtypes TypeError.
"""

from tiger_fast.metrics.boundaries import BoundaryF
from tiger_fast.metrics.depth import DepthRMSE
from tiger_fast.metrics.normals import NormalsAngularError
from tiger_fast.metrics.routing import RoutingStatistics
from tiger_fast.metrics.saliency import SaliencyMaxF
from tiger_fast.metrics.segmentation import SegmentationIoU

__all__ = ["BoundaryF", "DepthRMSE", "NormalsAngularError", "RoutingStatistics", "SaliencyMaxF", "SegmentationIoU"]
