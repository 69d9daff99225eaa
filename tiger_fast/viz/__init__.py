"""Pictures of routing weights and predictions (matplotlib, extra [train])."""

from tiger_fast.viz.figures import curves_figure, predictions_figure, routing_figure

__all__ = ["curves_figure", "predictions_figure", "routing_figure"]
