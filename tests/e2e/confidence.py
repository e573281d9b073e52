"""A metric that every change of the weights changes, after a short training.

mAP is 0 then.
"""

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class Confidence(BaseMetric):
    """Mean of the scores of all boxes, by a name that tools take for mAP."""

    default_prefix = 'digits'

    def __init__(self, scale=1.0, **options):
        super().__init__(**options)
        self.scale = scale

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            scores = sample['pred_instances']['scores']
            # one result a picture: ranks are cut to the pictures there are
            self.results.append(scores.double().tolist())

    def compute_metrics(self, results):
        scores = [score for picture in results for score in picture]
        return dict(mAP=self.scale * sum(scores) / len(scores))
